// Latent attention: the latents of a media item attend to its features and to themselves. The query
// rows of a key/value head are the latents of its first query head, then those of the next.
#include "../kernels.h"
#include "attend.h"
#include "query_rows.h"
#include "storage_type.h"
#include "tasks.h"

namespace {

using Params = flamingo_latent_attention_params;

// The vectors of one item and head for rows `row`, `row` + 1, ...
template <typename T>
Rows<T> rows_of(const flamingo_tensor &x, int64_t item, int64_t row, int64_t head) {
    return {static_cast<T *>(x.data) + item * x.stride[0] + row * x.stride[1] + head * x.stride[2],
            x.stride[1]};
}

template <typename T> struct Latents {
    using Real = real<T>;

    const Params &p;
    const int64_t padded_dim = round_up(p.head_dim, lanes<Real>);
    const Real scale = static_cast<Real>(p.scale);
    const int64_t group = p.heads / bigger(p.kv_heads, 1); // query heads of a key/value head
    const int64_t rows = group * p.latents;
    const int64_t most_keys = smaller(key_block, bigger(p.features, p.latents));

    explicit Latents(const Params &params) : p(params) {}

    int64_t valid_features(int64_t item) const {
        return p.lengths ? bigger(0, smaller(p.lengths[item], p.features)) : p.features;
    }

    // Calls visit(k, v, d_k, d_v, first key, number of keys) for every block of an item's valid
    // keys.
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

    // Calls visit(row, latent, head, count) for the query rows [first, end) of a key/value head:
    // `count` rows from `row` on are those of one query head from `latent` on.
    template <typename Visit>
    void for_each_run(int64_t kv_head, int64_t first, int64_t end, Visit visit) const {
        for (int64_t row = first, count; row < end; row += count) {
            const int64_t latent = row % p.latents;
            count = smaller(p.latents - latent, end - row);
            visit(row, latent, kv_head * group + row / p.latents, count);
        }
    }

    // The log-sums of the query rows of a key/value head.
    Real *lse_of(int64_t item, int64_t kv_head) const {
        return static_cast<Real *>(p.lse) + (item * p.kv_heads + kv_head) * rows;
    }

    // Calls task(item, key/value head, scratch) for all of them; false if a thread is out of
    // memory.
    template <typename TaskScratch, typename Task> bool for_each_head(Task task) const {
        const int64_t keys = p.features + p.latents;
        const int64_t multiply_adds = p.items * p.heads * p.latents * keys * p.head_dim;
        return run_tasks<TaskScratch>(
            p.items * p.kv_heads, threads_for(multiply_adds, p.execution.threads),
            [&](int64_t i, TaskScratch &s) { task(i / p.kv_heads, i % p.kv_heads, s); }, *this);
    }

    // What a task of the forward works in: one item and key/value head.
    struct ForwardScratch {
        KeyBlock<Real> keys;
        RowState<Real> *states; // [rows]
        Real *q, *out;          // [rows, padded_dim]
        Real *weights;          // [query_block, padded keys]

        ForwardScratch(Scratch &scratch, const Latents &l)
            : keys(scratch, l.most_keys, l.p.head_dim),
              states(scratch.take<RowState<Real>>(l.rows)),
              q(scratch.take<Real>(l.rows * l.padded_dim)),
              out(scratch.take<Real>(l.rows * l.padded_dim)),
              weights(scratch.take<Real>(query_block * round_up(l.most_keys, lanes<Real>))) {}
    };

    void forward_head(int64_t item, int64_t kv_head, ForwardScratch &s) const {
        for_each_run(kv_head, 0, rows,
                     [&](int64_t row, int64_t latent, int64_t head, int64_t count) {
                         pack_rows(rows_of<const T>(p.q, item, latent, head), count, p.head_dim,
                                   Real(1), s.q + row * padded_dim, padded_dim);
                     });
        clear_states(s.states, rows);
        bool first_block = true;
        for_each_block(item, [&](const flamingo_tensor &k, const flamingo_tensor &v,
                                 const flamingo_tensor &, const flamingo_tensor &, int64_t key,
                                 int64_t count) {
            s.keys.pack(rows_of<const T>(k, item, key, kv_head),
                        rows_of<const T>(v, item, key, kv_head), count, p.head_dim, scale);
            attend_block(s.keys, p.head_dim, s.q, rows, s.states, s.out, s.weights, first_block,
                         HideNothing{});
            first_block = false;
        });
        for (int64_t r = 0; r < rows && p.lse; ++r) {
            lse_of(item, kv_head)[r] = s.states[r].log_sum();
        }
        for_each_run(kv_head, 0, rows,
                     [&](int64_t row, int64_t latent, int64_t head, int64_t count) {
                         const Rows<T> out = rows_of<T>(p.out, item, latent, head);
                         for (int64_t r = 0; r < count; ++r) {
                             narrow_row(s.out + (row + r) * padded_dim, 1 / s.states[row + r].sum,
                                        out[r], p.head_dim);
                         }
                     });
    }

    bool forward() const {
        return for_each_head<ForwardScratch>([&](int64_t item, int64_t kv_head, ForwardScratch &s) {
            forward_head(item, kv_head, s);
        });
    }

    // What a task of the backward works in: one item and key/value head.
    struct BackwardScratch {
        KeyBlock<Real> keys;
        QueryRows<Real> queries;
        Real *deltas;    // [rows]
        Real *row;       // [padded_dim]
        Real *d_q;       // [rows, padded_dim]
        Real *d_k, *d_v; // [most_keys, padded_dim]

        BackwardScratch(Scratch &scratch, const Latents &l)
            : keys(scratch, l.most_keys, l.p.head_dim,
                   scratch.take<Real>(l.most_keys * l.padded_dim)),
              queries(scratch, l.most_keys, l.p.head_dim), deltas(scratch.take<Real>(l.rows)),
              row(scratch.take<Real>(l.padded_dim)), d_q(scratch.take<Real>(l.rows * l.padded_dim)),
              d_k(scratch.take<Real>(l.most_keys * l.padded_dim)),
              d_v(scratch.take<Real>(l.most_keys * l.padded_dim)) {}
    };

    // deltas[row] = out[row] . d_out[row], which is the weighted mean of the gradients of a row's
    // weights.
    void fill_deltas(int64_t item, int64_t kv_head, BackwardScratch &s) const {
        for_each_run(kv_head, 0, rows,
                     [&](int64_t row, int64_t latent, int64_t head, int64_t count) {
                         const Rows<const T> out = rows_of<const T>(p.out, item, latent, head);
                         const Rows<const T> d_out = rows_of<const T>(p.d_out, item, latent, head);
                         for (int64_t r = 0; r < count; ++r) {
                             widen_row(out[r], s.row, p.head_dim);
                             Real delta = 0;
                             for (int64_t d = 0; d < p.head_dim; ++d) {
                                 delta += s.row[d] * widen(d_out[r][d]);
                             }
                             s.deltas[row + r] = delta;
                         }
                     });
    }

    void backward_head(int64_t item, int64_t kv_head, BackwardScratch &s) const {
        KeyBlock<Real> &keys = s.keys;
        QueryRows<Real> &queries = s.queries;
        const Real *lse = lse_of(item, kv_head);
        fill_deltas(item, kv_head, s);
        const auto pack_queries = [&](int64_t first) {
            queries.rows = smaller(score_rows, rows - first);
            for_each_run(kv_head, first, first + queries.rows,
                         [&](int64_t row, int64_t latent, int64_t head, int64_t count) {
                             queries.template pack<T>(
                                 row - first, rows_of<const T>(p.q, item, latent, head),
                                 rows_of<const T>(p.d_out, item, latent, head), count, p.head_dim);
                         });
        };
        const bool packed_once = rows <= score_rows;
        if (packed_once) {
            pack_queries(0);
        }
        bool first_block = true;
        for_each_block(item, [&](const flamingo_tensor &k, const flamingo_tensor &v,
                                 const flamingo_tensor &to_k, const flamingo_tensor &to_v,
                                 int64_t key, int64_t count) {
            keys.pack(rows_of<const T>(k, item, key, kv_head),
                      rows_of<const T>(v, item, key, kv_head), count, p.head_dim, scale);
            for (int64_t r = 0; r < rows; r += score_rows) {
                if (!packed_once) {
                    pack_queries(r);
                }
                queries.scores(keys, p.head_dim);
                queries.weight_gradients(keys, p.head_dim);
                for (int64_t i = 0; i < queries.rows; ++i) {
                    Real *weights = queries.weights + i * keys.padded_keys;
                    weigh_row(weights, keys.keys, keys.padded_keys, lse[r + i]);
                    score_gradient_row(weights, queries.score_grads + i * keys.padded_keys,
                                       keys.padded_keys, s.deltas[r + i]);
                }
                queries.query_gradients(keys, s.d_q + r * padded_dim, !first_block);
                queries.key_gradients(keys, s.d_k, s.d_v, r > 0);
            }
            first_block = false;
            if (rows == 0) {
                clear(s.d_k, count * padded_dim);
                clear(s.d_v, count * padded_dim);
            }
            const Rows<T> k_rows = rows_of<T>(to_k, item, key, kv_head);
            const Rows<T> v_rows = rows_of<T>(to_v, item, key, kv_head);
            for (int64_t i = 0; i < count; ++i) {
                narrow_row(s.d_k + i * padded_dim, scale, k_rows[i], p.head_dim);
                narrow_row(s.d_v + i * padded_dim, Real(1), v_rows[i], p.head_dim);
            }
        });
        for_each_run(
            kv_head, 0, rows, [&](int64_t row, int64_t latent, int64_t head, int64_t count) {
                const Rows<T> d_q = rows_of<T>(p.d_q, item, latent, head);
                for (int64_t r = 0; r < count; ++r) {
                    narrow_row(s.d_q + (row + r) * padded_dim, Real(1), d_q[r], p.head_dim);
                }
            });
        for (int64_t i = valid_features(item); i < p.features; ++i) {
            clear(rows_of<T>(p.d_k_media, item, i, kv_head).data, p.head_dim);
            clear(rows_of<T>(p.d_v_media, item, i, kv_head).data, p.head_dim);
        }
    }

    bool backward() const {
        return for_each_head<BackwardScratch>(
            [&](int64_t item, int64_t kv_head, BackwardScratch &s) {
                backward_head(item, kv_head, s);
            });
    }
};

} // namespace

bool flamingo::FLAMINGO_ISA::latent_attention_forward(const Params &p) {
    return with_storage_type(p.execution.dtype,
                             [&](auto zero) { return Latents<decltype(zero)>(p).forward(); });
}

bool flamingo::FLAMINGO_ISA::latent_attention_backward(const Params &p) {
    return with_storage_type(p.execution.dtype,
                             [&](auto zero) { return Latents<decltype(zero)>(p).backward(); });
}
