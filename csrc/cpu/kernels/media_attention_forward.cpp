#include "../kernels.h"

#include <math.h>

namespace {

using Params = flamingo_media_attention_forward_params;

// Keys whose scores are held at once: the latents of one item in every published model.
constexpr int64_t key_block = 64;
// Tokens handed to a thread at a time: few enough to even out tokens that see nothing.
constexpr int token_chunk = 16;

float exponential(float x) { return ::expf(x); }
double exponential(double x) { return ::exp(x); }
float hyperbolic_tangent(float x) { return ::tanhf(x); }
double hyperbolic_tangent(double x) { return ::tanh(x); }

template <typename Scalar>
Scalar dot(const Scalar *__restrict a, const Scalar *__restrict b, int64_t size) {
    Scalar sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < size; ++d) {
        sum += a[d] * b[d];
    }
    return sum;
}

template <typename Scalar> void multiply(Scalar *a, Scalar factor, int64_t size) {
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) {
        a[d] *= factor;
    }
}

template <typename Scalar>
void add_multiple(Scalar *__restrict a, const Scalar *__restrict b, Scalar factor, int64_t size) {
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) {
        a[d] += factor * b[d];
    }
}

// One query row over the keys of its range, with the running-maximum softmax: `out` holds the weighted
// sum of values relative to exp(largest) and is rescaled when a later key raises the maximum.
template <typename Scalar>
void attend(const Params &p, int64_t b, int64_t t, int64_t h, Scalar gate) {
    Scalar *out = static_cast<Scalar *>(p.out) + b * p.out_stride_b + t * p.out_stride_t +
                  h * p.out_stride_h; // [D]
    for (int64_t d = 0; d < p.head_dim; ++d) {
        out[d] = 0;
    }
    const int64_t given_first = p.first[b * p.first_stride_b + t * p.first_stride_t];
    const int64_t given_last = p.last[b * p.last_stride_b + t * p.last_stride_t];
    const int64_t first = given_first > 0 ? given_first : 0;
    const int64_t last = given_last < p.media ? given_last : p.media - 1;
    if (first > last || p.latents == 0) {
        return;
    }

    const int64_t kv_head = h / (p.heads / p.kv_heads);
    const Scalar *q = static_cast<const Scalar *>(p.q) + b * p.q_stride_b + t * p.q_stride_t +
                      h * p.q_stride_h; // [D]
    const Scalar *k =
        static_cast<const Scalar *>(p.k) + b * p.k_stride_b + kv_head * p.k_stride_h; // [I, R, D]
    const Scalar *v =
        static_cast<const Scalar *>(p.v) + b * p.v_stride_b + kv_head * p.v_stride_h; // [I, R, D]
    const Scalar scale = static_cast<Scalar>(p.scale);
    Scalar largest = -static_cast<Scalar>(INFINITY);
    Scalar total = 0;

    for (int64_t item = first; item <= last; ++item) {
        for (int64_t start = 0; start < p.latents; start += key_block) {
            const int64_t keys = p.latents - start < key_block ? p.latents - start : key_block;
            const Scalar *k_block = k + item * p.k_stride_i + start * p.k_stride_r; // [keys, D]
            const Scalar *v_block = v + item * p.v_stride_i + start * p.v_stride_r; // [keys, D]

            Scalar scores[key_block];
            Scalar block_largest = largest;
            for (int64_t r = 0; r < keys; ++r) {
                scores[r] = dot(q, k_block + r * p.k_stride_r, p.head_dim) * scale;
                block_largest = scores[r] > block_largest ? scores[r] : block_largest;
            }
            if (block_largest > largest) {
                if (total > 0) {
                    const Scalar shrink = exponential(largest - block_largest);
                    multiply(out, shrink, p.head_dim);
                    total *= shrink;
                }
                largest = block_largest;
            }
            for (int64_t r = 0; r < keys; ++r) {
                const Scalar weight = exponential(scores[r] - largest);
                total += weight;
                add_multiple(out, v_block + r * p.v_stride_r, weight, p.head_dim);
            }
        }
    }
    multiply(out, gate / total, p.head_dim);
}

template <typename Scalar> void run(const Params &p) {
    const Scalar gate =
        p.gate ? hyperbolic_tangent(*static_cast<const Scalar *>(p.gate)) : Scalar{1};
    // Tokens innermost: neighbours mostly see the same media, whose keys of one head then stay in cache.
    const int64_t tasks = p.rows * p.heads * p.tokens;
#pragma omp parallel for if (tasks > token_chunk) num_threads(p.threads)                             \
    schedule(dynamic, token_chunk)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t t = task % p.tokens;
        const int64_t h = task / p.tokens % p.heads;
        const int64_t b = task / p.tokens / p.heads;
        attend<Scalar>(p, b, t, h, gate);
    }
}

} // namespace

void flamingo::FLAMINGO_ISA::media_attention_forward(const Params &params) {
    if (params.dtype == FLAMINGO_FLOAT32) {
        run<float>(params);
    } else {
        run<double>(params);
    }
}
