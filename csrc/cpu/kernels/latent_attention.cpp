// Latent attention: the latents of a media item against its features and themselves.
#include <algorithm>

#include "../kernels.h"
#include "attention.h"

namespace {

using Params = flamingo_latent_attention_params;

// Vectors of one item and head from the given row on.
template <typename T>
Rows<T> rows_of(const flamingo_tensor &x, int64_t item, int64_t row, int64_t head) {
    return {static_cast<T *>(x.data) + item * x.stride[0] + row * x.stride[1] + head * x.stride[2],
            x.stride[1]};
}

template <typename T, typename Real> struct Latents {
    const Params &p;
    const int64_t padded_dim = round_up(p.head_dim, lanes<Real>);
    const Real scale = static_cast<Real>(p.scale);
    const int64_t most_keys = smaller(key_block, bigger(p.features, p.latents));

    explicit Latents(const Params &params) : p(params) {}

    int64_t valid_features(int64_t item) const {
        return p.lengths ? bigger(0, smaller(p.lengths[item], p.features)) : p.features;
    }

    // Calls visit(k, v, d_k, d_v, first key, number of keys) for every block of the item's keys.
    template <typename Visit> void for_each_block(int64_t item, Visit visit) const {
        const int64_t features = valid_features(item);
        for (int64_t key = 0; key < features; key += key_block) {
            visit(p.k_media, p.v_media, p.d_k_media, p.d_v_media, key,
                  smaller(key_block, features - key));
        }
        for (int64_t key = 0; key < p.latents; key += key_block) {
            visit(p.k_latents, p.v_latents, p.d_k_latents, p.d_v_latents, key,
                  smaller(key_block, p.latents - key));
        }
    }

    int threads() const {
        const int64_t keys = p.features + p.latents;
        return threads_for(p.items * p.heads * p.latents * keys * p.head_dim, p.execution.threads);
    }

    bool forward() const {
        const int64_t tasks = p.items * p.heads;
        bool ok = true;
#pragma omp parallel num_threads(threads()) reduction(&& : ok)
        {
            Scratch scratch(KeyBlock<Real>::bytes(most_keys, p.head_dim, false) +
                            Scratch::bytes_of<RowState<Real>>(p.latents) +
                            2 * Scratch::bytes_of<Real>(p.latents * padded_dim) +
                            Scratch::bytes_of<Real>(stretch * round_up(most_keys, lanes<Real>)));
            ok = scratch.ok();
            KeyBlock<Real> keys(scratch, most_keys, p.head_dim, false);
            RowState<Real> *states = scratch.template take<RowState<Real>>(p.latents);
            Real *q = scratch.template take<Real>(p.latents * padded_dim);
            Real *out = scratch.template take<Real>(p.latents * padded_dim);
            Real *weights = scratch.template take<Real>(stretch * round_up(most_keys, lanes<Real>));
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tasks; ++task) {
                if (!ok) {
                    continue;
                }
                const int64_t item = task / p.heads, head = task % p.heads;
                pack_rows(rows_of<const T>(p.q, item, 0, head), p.latents, p.head_dim, Real(1), q,
                          padded_dim);
                std::fill_n(states, p.latents, RowState<Real>::empty());
                bool first_block = true;
                for_each_block(item, [&](const flamingo_tensor &k, const flamingo_tensor &v,
                                         const flamingo_tensor &, const flamingo_tensor &,
                                         int64_t key, int64_t count) {
                    keys.template pack<T>(rows_of<const T>(k, item, key, head),
                                          rows_of<const T>(v, item, key, head), count, p.head_dim,
                                          scale);
                    attend_block(keys, p.head_dim, q, p.latents, states, out, weights, first_block);
                    first_block = false;
                });
                Real *lse = p.lse ? static_cast<Real *>(p.lse) + task * p.latents : nullptr;
                const Rows<T> to = rows_of<T>(p.out, item, 0, head);
                for (int64_t r = 0; r < p.latents; ++r) {
                    if (lse) {
                        lse[r] = states[r].log_sum();
                    }
                    narrow_row(out + r * padded_dim, 1 / states[r].total, to[r], p.head_dim);
                }
            }
        }
        return ok;
    }

    bool backward() const {
        const int64_t tasks = p.items * p.heads;
        bool ok = true;
#pragma omp parallel num_threads(threads()) reduction(&& : ok)
        {
            Scratch scratch(KeyBlock<Real>::bytes(most_keys, p.head_dim, true) +
                            QueryRows<Real>::bytes(most_keys, p.head_dim) +
                            Scratch::bytes_of<Real>(p.latents) +
                            Scratch::bytes_of<Real>(padded_dim) +
                            Scratch::bytes_of<Real>(p.latents * padded_dim) +
                            2 * Scratch::bytes_of<Real>(most_keys * padded_dim));
            ok = scratch.ok();
            KeyBlock<Real> keys(scratch, most_keys, p.head_dim, true);
            QueryRows<Real> queries(scratch, most_keys, p.head_dim);
            Real *deltas = scratch.template take<Real>(p.latents);
            Real *row = scratch.template take<Real>(padded_dim);
            Real *d_q = scratch.template take<Real>(p.latents * padded_dim);
            Real *d_k = scratch.template take<Real>(most_keys * padded_dim);
            Real *d_v = scratch.template take<Real>(most_keys * padded_dim);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tasks; ++task) {
                if (ok) {
                    backward_head(task / p.heads, task % p.heads, keys, queries, deltas, row, d_q,
                                  d_k, d_v);
                }
            }
        }
        return ok;
    }

    void backward_head(int64_t item, int64_t head, KeyBlock<Real> &keys, QueryRows<Real> &queries,
                       Real *deltas, Real *row, Real *d_q, Real *d_k, Real *d_v) const {
        const Rows<const T> q_rows = rows_of<const T>(p.q, item, 0, head);
        const Rows<const T> out = rows_of<const T>(p.out, item, 0, head);
        const Rows<const T> d_out = rows_of<const T>(p.d_out, item, 0, head);
        const Real *lse = static_cast<const Real *>(p.lse) + (item * p.heads + head) * p.latents;
        for (int64_t r = 0; r < p.latents; ++r) {
            widen_row(out[r], row, p.head_dim);
            Real delta = 0;
            for (int64_t d = 0; d < p.head_dim; ++d) {
                delta += row[d] * widen(d_out[r][d]);
            }
            deltas[r] = delta;
        }
        const auto pack_queries = [&](int64_t r) {
            queries.template pack<T>({q_rows[r], q_rows.stride}, {d_out[r], d_out.stride},
                                     smaller(score_rows, p.latents - r), p.head_dim);
        };
        const bool packed_once = p.latents <= score_rows;
        if (packed_once) {
            pack_queries(0);
        }
        bool first_block = true;
        for_each_block(item, [&](const flamingo_tensor &k, const flamingo_tensor &v,
                                 const flamingo_tensor &to_k, const flamingo_tensor &to_v,
                                 int64_t key, int64_t count) {
            keys.template pack<T>(rows_of<const T>(k, item, key, head),
                                  rows_of<const T>(v, item, key, head), count, p.head_dim, scale);
            for (int64_t r = 0; r < p.latents; r += score_rows) {
                if (!packed_once) {
                    pack_queries(r);
                }
                queries.scores(keys, p.head_dim);
                queries.weight_gradients(keys, p.head_dim);
                for (int64_t i = 0; i < queries.rows; ++i) {
                    Real *weights = queries.weights + i * keys.padded_keys;
                    weigh_row(weights, keys.keys, keys.padded_keys, lse[r + i]);
                    score_gradient_row(weights, queries.score_grads + i * keys.padded_keys,
                                       keys.padded_keys, deltas[r + i], Real(1));
                }
                queries.query_gradients(keys, d_q + r * padded_dim, !first_block);
                queries.key_gradients(keys, d_k, d_v, r > 0);
            }
            first_block = false;
            if (p.latents == 0) {
                clear(d_k, count * padded_dim);
                clear(d_v, count * padded_dim);
            }
            const Rows<T> k_rows = rows_of<T>(to_k, item, key, head);
            const Rows<T> v_rows = rows_of<T>(to_v, item, key, head);
            for (int64_t i = 0; i < count; ++i) {
                narrow_row(d_k + i * padded_dim, scale, k_rows[i], p.head_dim);
                narrow_row(d_v + i * padded_dim, Real(1), v_rows[i], p.head_dim);
            }
        });
        const Rows<T> to_q = rows_of<T>(p.d_q, item, 0, head);
        for (int64_t r = 0; r < p.latents; ++r) {
            narrow_row(d_q + r * padded_dim, Real(1), to_q[r], p.head_dim);
        }
        for (int64_t i = valid_features(item); i < p.features; ++i) {
            memset(rows_of<T>(p.d_k_media, item, i, head).data, 0, size_t(p.head_dim) * sizeof(T));
            memset(rows_of<T>(p.d_v_media, item, i, head).data, 0, size_t(p.head_dim) * sizeof(T));
        }
    }
};

template <typename T> using LatentsOf = Latents<T, typename accumulation<T>::type>;

} // namespace

namespace flamingo::FLAMINGO_ISA {

bool latent_attention_forward(const Params &p) {
    switch (p.execution.dtype) {
    case FLAMINGO_FLOAT64:
        return LatentsOf<double>(p).forward();
    case FLAMINGO_BFLOAT16:
        return LatentsOf<bfloat16>(p).forward();
    case FLAMINGO_FLOAT16:
        return LatentsOf<float16>(p).forward();
    default:
        return LatentsOf<float>(p).forward();
    }
}

bool latent_attention_backward(const Params &p) {
    switch (p.execution.dtype) {
    case FLAMINGO_FLOAT64:
        return LatentsOf<double>(p).backward();
    case FLAMINGO_BFLOAT16:
        return LatentsOf<bfloat16>(p).backward();
    case FLAMINGO_FLOAT16:
        return LatentsOf<float16>(p).backward();
    default:
        return LatentsOf<float>(p).backward();
    }
}

} // namespace flamingo::FLAMINGO_ISA
