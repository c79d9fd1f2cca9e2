// What forward and backward of media attention share: sizes, and where the vectors of a head are.
#pragma once

#include "../task_plan.h"
#include "flamingo_cpu.h"
#include "key_block.h"
#include "tasks.h"

namespace {

// The vectors of one head of q, out or their gradients for tokens t, t + 1, ...
template <typename T> Rows<T> text_rows(const flamingo_tensor &x, int64_t b, int64_t t, int64_t h) {
    return {static_cast<T *>(x.data) + b * x.stride[0] + t * x.stride[1] + h * x.stride[2],
            x.stride[1]};
}
// The vectors of one head of k, v or their gradients for latents r, r + 1, ... of a media item.
template <typename T>
Rows<T> media_rows(const flamingo_tensor &x, int64_t b, int64_t item, int64_t r, int64_t h) {
    return {static_cast<T *>(x.data) + b * x.stride[0] + item * x.stride[1] + r * x.stride[2] +
                h * x.stride[3],
            x.stride[2]};
}

template <typename T> struct Media {
    using Real = real<T>;

    const flamingo_media_attention_params &p;
    const int64_t group = p.heads / p.kv_heads; // query heads of a kv head
    const int64_t padded_dim = round_up(p.head_dim, lanes<Real>);
    const int64_t most_keys = smaller(p.latents, key_block);        // of a block
    const int64_t blocks = (p.latents + key_block - 1) / key_block; // of an item
    const Real scale = static_cast<Real>(p.scale);
    const Real gate = p.gate ? hyperbolic_tangent(*static_cast<const Real *>(p.gate)) : Real(1);

    explicit Media(const flamingo_media_attention_params &params) : p(params) {}

    int threads() const {
        const int64_t queries = p.rows * p.tokens * p.heads;
        return threads_for(queries * p.latents * p.head_dim, p.execution.threads);
    }
    int64_t block_keys(int64_t block) const {
        return smaller(key_block, p.latents - block * key_block);
    }
    void pack(KeyBlock<Real> &keys, int64_t b, int64_t item, int64_t block, int64_t kv_head) const {
        keys.template pack<T>(media_rows<const T>(p.k, b, item, block * key_block, kv_head),
                              media_rows<const T>(p.v, b, item, block * key_block, kv_head),
                              block_keys(block), p.head_dim, scale);
    }
    // Clears a chunk of out or d_q, for all query heads of a kv head.
    void write_zeros(const flamingo_tensor &to, const flamingo::Chunk &c, int64_t kv_head) const {
        for (int64_t t = c.begin; t < c.end; ++t) {
            for (int64_t g = 0; g < group; ++g) {
                clear(text_rows<T>(to, c.row, t, kv_head * group + g).data, p.head_dim);
            }
        }
    }
};

} // namespace
