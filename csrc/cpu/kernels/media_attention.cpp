// Media attention: tokens against the latents of the media items of their range.
#include <algorithm>

#include "../kernels.h"
#include "attention.h"

namespace {

using Params = flamingo_media_attention_params;
using flamingo::Chunk;
using flamingo::MediaPlan;

// q, out and their gradients: the head's vectors of consecutive tokens.
template <typename T>
Rows<T> text_rows(const flamingo_tensor &x, int64_t b, int64_t t, int64_t h) {
    return {static_cast<T *>(x.data) + b * x.stride[0] + t * x.stride[1] + h * x.stride[2],
            x.stride[1]};
}
// k, v and their gradients: the head's vectors of an item's consecutive latents.
template <typename T>
Rows<T> media_rows(const flamingo_tensor &x, int64_t b, int64_t i, int64_t r, int64_t h) {
    return {static_cast<T *>(x.data) + b * x.stride[0] + i * x.stride[1] + r * x.stride[2] +
                h * x.stride[3],
            x.stride[2]};
}

template <typename T, typename Real> struct Media {
    const Params &p;
    const int64_t group = p.heads / p.kv_heads;
    const int64_t padded_dim = round_up(p.head_dim, lanes<Real>);
    const int64_t most_keys = smaller(p.latents, key_block);
    const int64_t blocks = (p.latents + key_block - 1) / key_block; // of one item
    const Real scale = static_cast<Real>(p.scale);
    const Real gate = p.gate ? hyperbolic_tangent(*static_cast<const Real *>(p.gate)) : Real(1);

    explicit Media(const Params &params) : p(params) {}

    int threads(int64_t text_rows_in_all) const {
        return threads_for(text_rows_in_all * p.latents * p.head_dim, p.execution.threads);
    }
    int64_t block_keys(int64_t block) const {
        return smaller(key_block, p.latents - block * key_block);
    }
    void pack(KeyBlock<Real> &keys, int64_t b, int64_t item, int64_t block, int64_t kv_head) const {
        keys.template pack<T>(media_rows<const T>(p.k, b, item, block * key_block, kv_head),
                              media_rows<const T>(p.v, b, item, block * key_block, kv_head),
                              block_keys(block), p.head_dim, scale);
    }
    void write_zeros(const flamingo_tensor &to, const Chunk &c, int64_t kv_head) const {
        for (int64_t t = c.begin; t < c.end; ++t) {
            for (int64_t g = 0; g < group; ++g) {
                memset(text_rows<T>(to, c.row, t, kv_head * group + g).data, 0,
                       size_t(p.head_dim) * sizeof(T));
            }
        }
    }

    // Softmax state and weighted values of a chunk, one stretch of `length` rows per head of the group.
    struct Attended {
        RowState<Real> *states;
        Real *q, *out;     // [group * longest, padded_dim]
        Real *weights;     // [stretch, padded keys]
        Real *row;         // [padded_dim]

        static int64_t bytes(const Media &m, int64_t longest) {
            const int64_t rows = bigger(m.group * longest, stretch);
            return Scratch::bytes_of<RowState<Real>>(rows) +
                   2 * Scratch::bytes_of<Real>(rows * m.padded_dim) +
                   Scratch::bytes_of<Real>(stretch * round_up(m.most_keys, lanes<Real>)) +
                   Scratch::bytes_of<Real>(m.padded_dim);
        }
        Attended(Scratch &scratch, const Media &m, int64_t longest) {
            const int64_t rows = bigger(m.group * longest, stretch);
            states = scratch.take<RowState<Real>>(rows);
            q = scratch.take<Real>(rows * m.padded_dim);
            out = scratch.take<Real>(rows * m.padded_dim);
            weights = scratch.take<Real>(stretch * round_up(m.most_keys, lanes<Real>));
            row = scratch.take<Real>(m.padded_dim);
        }
    };

    void attend(const Chunk &c, int64_t kv_head, KeyBlock<Real> &keys, Attended &a) const {
        const int64_t length = c.end - c.begin;
        for (int64_t g = 0; g < group; ++g) {
            const Rows<const T> q = text_rows<const T>(p.q, c.row, c.begin, kv_head * group + g);
            pack_rows(q, length, p.head_dim, Real(1), a.q + g * length * padded_dim, padded_dim);
        }
        std::fill_n(a.states, group * length, RowState<Real>::empty());
        const bool packed = group * c.run > few_rows;
        bool first_block = true;
        for (int64_t item = c.first; item <= c.last; ++item) {
            for (int64_t block = 0; block < blocks; ++block, first_block = false) {
                if (packed) {
                    pack(keys, c.row, item, block, kv_head);
                    attend_block(keys, p.head_dim, a.q, group * length, a.states, a.out, a.weights,
                                 first_block);
                    continue;
                }
                for (int64_t r = 0; r < group * length; ++r) {
                    attend_unpacked<T, Real>(
                        media_rows<const T>(p.k, c.row, item, block * key_block, kv_head),
                        media_rows<const T>(p.v, c.row, item, block * key_block, kv_head),
                        block_keys(block), p.head_dim, scale, a.q + r * padded_dim, &a.states[r],
                        a.out + r * padded_dim, a.weights, a.row, first_block);
                }
            }
        }
    }

    // The two products of forward_one_block, in the type of accumulation.
    template <typename Storage, typename = void> struct TileProducts {
        const Media &m;
        KeyBlock<Real> &keys;
        Attended &a;

        TileProducts(const Media &media, const Chunk &c, int64_t kv_head, KeyBlock<Real> &block,
                     Attended &attended)
            : m(media), keys(block), a(attended) {
            m.pack(keys, c.row, c.first, 0, kv_head);
        }
        void scores(Rows<const T> q, int64_t count) {
            product<Real>(count, keys.padded_keys, m.p.head_dim, m.as_left(q, count, a.q),
                          keys.k_transposed, keys.padded_keys, a.weights, keys.padded_keys, false);
        }
        void values(int64_t count) {
            product<Real>(count, m.padded_dim, keys.keys, {a.weights, keys.padded_keys, 1}, keys.v,
                          m.padded_dim, a.out, m.padded_dim, false);
        }
    };
#if defined(FLAMINGO_BFLOAT16_DOT)
    // By dot products of bfloat16 pairs: exact products, and weights rounded to bfloat16 as in every
    // flash attention.
    template <typename Unused> struct TileProducts<bfloat16, Unused> {
        const Media &m;
        KeyBlock<float> &keys;
        Attended &a;
        const int64_t dim_pairs = (m.p.head_dim + 1) / 2;

        TileProducts(const Media &media, const Chunk &c, int64_t kv_head, KeyBlock<float> &block,
                     Attended &attended)
            : m(media), keys(block), a(attended) {
            keys.pack_pairs(media_rows<const bfloat16>(m.p.k, c.row, c.first, 0, kv_head),
                            media_rows<const bfloat16>(m.p.v, c.row, c.first, 0, kv_head),
                            m.p.latents, m.p.head_dim);
        }
        void scores(Rows<const bfloat16> q, int64_t count) {
            pair *rows = reinterpret_cast<pair *>(a.q);
            for (int64_t r = 0; r < count; ++r) {
                pair_row(q[r], m.p.head_dim, rows + r * dim_pairs);
            }
            pair_product(count, keys.padded_keys, dim_pairs, rows, dim_pairs,
                         reinterpret_cast<const pair *>(keys.k_transposed), keys.padded_keys,
                         a.weights, keys.padded_keys);
            for (int64_t r = 0; r < count; ++r) {
                scale_row(a.weights + r * keys.padded_keys, keys.padded_keys, m.scale);
            }
        }
        void values(int64_t count) {
            for (int64_t r = 0; r < count; ++r) {
                narrow_to_pairs(a.weights + r * keys.padded_keys, keys.keys);
            }
            pair_product(count, m.padded_dim, (keys.keys + 1) / 2,
                         reinterpret_cast<const pair *>(a.weights), keys.padded_keys,
                         reinterpret_cast<const pair *>(keys.v), m.padded_dim, a.out, m.padded_dim);
        }
    };
#endif
    // One block holds all that the chunk sees: a tile of rows goes from q to out within the cache.
    void forward_one_block(const Chunk &c, int64_t kv_head, KeyBlock<Real> &keys,
                           Attended &a) const {
        TileProducts<T> products(*this, c, kv_head, keys, a);
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
            for (int64_t t = c.begin; t < c.end; t += stretch) {
                const int64_t count = smaller(stretch, c.end - t);
                const int64_t next = smaller(stretch, c.end - t - count);
                prefetch_rows(text_rows<const T>(p.q, c.row, t + count, h), next);
                prefetch_rows(text_rows<const T>(p.out, c.row, t, h), count);
                products.scores(text_rows<const T>(p.q, c.row, t, h), count);
                std::fill_n(a.states, count, RowState<Real>::empty());
                soften_rows<Real>(a.weights, count, keys.keys, keys.padded_keys, a.states, nullptr);
                products.values(count);
                const Rows<T> out = text_rows<T>(p.out, c.row, t, h);
                for (int64_t r = 0; r < count; ++r) {
                    narrow_row(a.out + r * padded_dim, gate / a.states[r].total, out[r],
                               p.head_dim);
                }
            }
        }
    }
    // A head's rows lie apart by all heads, where the processor does not look ahead by itself.
    void prefetch_rows(Rows<const T> rows, int64_t count) const {
        for (int64_t r = 0; r < count; ++r) {
            const char *row = reinterpret_cast<const char *>(rows[r]);
            for (int64_t byte = 0; byte < p.head_dim * int64_t(sizeof(T)); byte += 64) {
                __builtin_prefetch(row + byte);
            }
        }
    }
    // Rows as the left side of a product: where they lie if they need no widening, else copied.
    static Left<Real> as_left(Rows<const Real> rows, int64_t, Real *) {
        return {rows.data, rows.stride, 1};
    }
    template <typename Narrow>
    Left<Real> as_left(Rows<const Narrow> rows, int64_t count, Real *copy) const {
        pack_rows(rows, count, p.head_dim, Real(1), copy, padded_dim);
        return {copy, padded_dim, 1};
    }

    void forward_chunk(const Chunk &c, int64_t kv_head, KeyBlock<Real> &keys, Attended &a) const {
        if (c.first > c.last) {
            write_zeros(p.out, c, kv_head);
            return;
        }
        if (c.first == c.last && blocks == 1 && group * c.run > few_rows) {
            forward_one_block(c, kv_head, keys, a);
            return;
        }
        attend(c, kv_head, keys, a);
        const int64_t length = c.end - c.begin;
        for (int64_t g = 0; g < group; ++g) {
            const Rows<T> out = text_rows<T>(p.out, c.row, c.begin, kv_head * group + g);
            for (int64_t t = 0; t < length; ++t) {
                const int64_t r = g * length + t;
                narrow_row(a.out + r * padded_dim, gate / a.states[r].total, out[t], p.head_dim);
            }
        }
    }

    bool forward(const MediaPlan &plan) const {
        const int64_t tasks = plan.chunk_count * p.kv_heads;
        bool ok = true;
#pragma omp parallel num_threads(threads(p.rows * p.tokens * p.heads)) reduction(&& : ok)
        {
            Scratch scratch(KeyBlock<Real>::bytes(most_keys, p.head_dim, false) +
                            Attended::bytes(*this, plan.longest));
            ok = scratch.ok();
            KeyBlock<Real> keys(scratch, most_keys, p.head_dim, false);
            Attended attended(scratch, *this, plan.longest);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tasks; ++task) {
                if (ok) {
                    forward_chunk(plan.chunks[task / p.kv_heads], task % p.kv_heads, keys, attended);
                }
            }
        }
        return ok;
    }

    // Every range one item of one block: its keys stay packed, the softmax is complete in a score row,
    // and one pass gives all gradients.
    struct SingleBlock {
        KeyBlock<Real> keys;
        QueryRows<Real> queries;
        Real *d_q;       // [score_rows, padded_dim]
        Real *d_k, *d_v; // [R, padded_dim]

        static int64_t bytes(const Media &m) {
            return KeyBlock<Real>::bytes(m.most_keys, m.p.head_dim, true) +
                   QueryRows<Real>::bytes(m.most_keys, m.p.head_dim) +
                   Scratch::bytes_of<Real>(score_rows * m.padded_dim) +
                   2 * Scratch::bytes_of<Real>(m.most_keys * m.padded_dim);
        }
        SingleBlock(Scratch &scratch, const Media &m)
            : keys(scratch, m.most_keys, m.p.head_dim, true),
              queries(scratch, m.most_keys, m.p.head_dim) {
            d_q = scratch.take<Real>(score_rows * m.padded_dim);
            d_k = scratch.take<Real>(m.most_keys * m.padded_dim);
            d_v = scratch.take<Real>(m.most_keys * m.padded_dim);
        }
    };

    int64_t share_size() const { return 2 * p.latents * padded_dim; }

    // Keys' gradients as they are summed (without gate and scale) -> d_k, d_v of one block.
    void write_key_gradients(int64_t b, int64_t item, int64_t block, int64_t kv_head,
                             const Real *d_k, const Real *d_v) const {
        const Rows<T> k_rows = media_rows<T>(p.d_k, b, item, block * key_block, kv_head);
        const Rows<T> v_rows = media_rows<T>(p.d_v, b, item, block * key_block, kv_head);
        for (int64_t r = 0; r < block_keys(block); ++r) {
            narrow_row(d_k + r * padded_dim, scale, k_rows[r], p.head_dim);
            narrow_row(d_v + r * padded_dim, gate, v_rows[r], p.head_dim);
        }
    }

    // Returns the chunk's share of the gradient of tanh(gate).
    Real backward_chunk(const Chunk &c, int64_t kv_head, SingleBlock &s, Real *share) const {
        pack(s.keys, c.row, c.first, 0, kv_head);
        const int64_t padded_keys = s.keys.padded_keys;
        bool first_rows = true;
        Real d_gate = 0;
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
            for (int64_t t = c.begin; t < c.end; t += score_rows) {
                QueryRows<Real> &queries = s.queries;
                queries.template pack<T>(text_rows<const T>(p.q, c.row, t, h),
                                         text_rows<const T>(p.d_out, c.row, t, h),
                                         smaller(score_rows, c.end - t), p.head_dim);
                queries.products(s.keys, p.head_dim);
                RowState<Real> states[score_rows];
                std::fill_n(states, queries.rows, RowState<Real>::empty());
                soften_rows<Real>(queries.weights, queries.rows, s.keys.keys, padded_keys, states, nullptr);
                for (int64_t r = 0; r < queries.rows; ++r) {
                    d_gate += finish_row(queries.weights + r * padded_keys,
                                         queries.score_grads + r * padded_keys, padded_keys,
                                         states[r].total, gate);
                }
                queries.query_gradients(s.keys, s.d_q, false);
                const Rows<T> d_q = text_rows<T>(p.d_q, c.row, t, h);
                for (int64_t r = 0; r < queries.rows; ++r) {
                    narrow_row(s.d_q + r * padded_dim, Real(1), d_q[r], p.head_dim);
                }
                queries.key_gradients(s.keys, s.d_k, s.d_v, !first_rows);
                first_rows = false;
            }
        }
        if (first_rows) { // no heads
            clear(s.d_k, p.latents * padded_dim);
            clear(s.d_v, p.latents * padded_dim);
        }
        if (share) {
            memcpy(share, s.d_k, size_t(p.latents * padded_dim) * sizeof(Real));
            memcpy(share + p.latents * padded_dim, s.d_v,
                   size_t(p.latents * padded_dim) * sizeof(Real));
        } else {
            write_key_gradients(c.row, c.first, 0, kv_head, s.d_k, s.d_v);
        }
        return d_gate;
    }

    bool backward_single(const MediaPlan &plan, Real *d_gates) const {
        Scratch shares(Scratch::bytes_of<Real>(plan.slots * p.kv_heads * share_size()));
        bool ok = shares.ok();
        Real *share_of = shares.template take<Real>(0);
        const int64_t tasks = plan.seeing_count * p.kv_heads;
        const int64_t items = p.rows * p.media * p.kv_heads;
        const bool all_ok = ok;
#pragma omp parallel num_threads(threads(p.rows * p.tokens * p.heads)) reduction(&& : ok)
        {
            Scratch scratch(SingleBlock::bytes(*this));
            ok = all_ok && scratch.ok();
            SingleBlock single(scratch, *this);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tasks; ++task) {
                const Chunk &c = plan.chunks[task / p.kv_heads];
                Real *share = c.slot < 0 ? nullptr
                                         : share_of + (c.slot * p.kv_heads + task % p.kv_heads) *
                                                          share_size();
                if (ok) {
                    d_gates[task] = backward_chunk(c, task % p.kv_heads, single, share);
                }
            }
            // Items seen by several chunks: their shares in the order of tokens. By none: zeros.
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < items; ++task) {
                const int64_t item = task / p.kv_heads, kv_head = task % p.kv_heads;
                const int64_t begin = plan.item_chunks[item], end = plan.item_chunks[item + 1];
                if (end - begin == 1 || !ok) {
                    continue;
                }
                clear(single.d_k, p.latents * padded_dim);
                clear(single.d_v, p.latents * padded_dim);
                for (int64_t chunk = begin; chunk < end; ++chunk) {
                    const Real *share =
                        share_of + (plan.chunks[chunk].slot * p.kv_heads + kv_head) * share_size();
                    add_row(single.d_k, share, p.latents * padded_dim);
                    add_row(single.d_v, share + p.latents * padded_dim, p.latents * padded_dim);
                }
                write_key_gradients(item / p.media, item % p.media, 0, kv_head, single.d_k,
                                    single.d_v);
            }
        }
        return ok;
    }

    static void add_row(Real *to, const Real *from, int64_t count) {
        for (int64_t i = 0; i < count; i += lanes<Real>) {
            store(to + i, load(to + i) + load(from + i));
        }
    }

    // Ranges of several items or items of several blocks: first each row's log-sum, delta and d_q,
    // then each block's d_k and d_v over all rows that see it.
    struct ManyBlocks {
        KeyBlock<Real> keys;
        QueryRows<Real> queries;
        Attended attended;
        Real *d_k, *d_v;

        static int64_t bytes(const Media &m, int64_t longest) {
            return KeyBlock<Real>::bytes(m.most_keys, m.p.head_dim, true) +
                   QueryRows<Real>::bytes(m.most_keys, m.p.head_dim) +
                   Attended::bytes(m, longest) +
                   2 * Scratch::bytes_of<Real>(m.most_keys * m.padded_dim);
        }
        ManyBlocks(Scratch &scratch, const Media &m, int64_t longest)
            : keys(scratch, m.most_keys, m.p.head_dim, true),
              queries(scratch, m.most_keys, m.p.head_dim), attended(scratch, m, longest) {
            d_k = scratch.take<Real>(m.most_keys * m.padded_dim);
            d_v = scratch.take<Real>(m.most_keys * m.padded_dim);
        }
    };

    // The packed block's final weights and score gradients of `count` tokens from t on.
    void score_gradients(ManyBlocks &m, int64_t b, int64_t t, int64_t count, int64_t h,
                         const Real *log_sums, const Real *deltas) const {
        QueryRows<Real> &queries = m.queries;
        queries.template pack<T>(text_rows<const T>(p.q, b, t, h),
                                 text_rows<const T>(p.d_out, b, t, h), count, p.head_dim);
        queries.products(m.keys, p.head_dim);
        const int64_t padded_keys = m.keys.padded_keys;
        const int64_t at = (b * p.heads + h) * p.tokens + t;
        for (int64_t r = 0; r < count; ++r) {
            Real *weights = queries.weights + r * padded_keys;
            weigh_row(weights, m.keys.keys, padded_keys, log_sums[at + r]);
            score_gradient_row(weights, queries.score_grads + r * padded_keys, padded_keys,
                               deltas[at + r], gate);
        }
    }

    Real backward_rows(const Chunk &c, int64_t kv_head, ManyBlocks &m, Real *log_sums,
                       Real *deltas) const {
        Attended &a = m.attended;
        attend(c, kv_head, m.keys, a);
        const int64_t length = c.end - c.begin;
        Real d_gate = 0;
        for (int64_t g = 0; g < group; ++g) {
            const int64_t h = kv_head * group + g;
            const Rows<const T> d_out = text_rows<const T>(p.d_out, c.row, c.begin, h);
            Real *log_sum = log_sums + (c.row * p.heads + h) * p.tokens + c.begin;
            Real *delta = deltas + (c.row * p.heads + h) * p.tokens + c.begin;
            for (int64_t t = 0; t < length; ++t) {
                const int64_t r = g * length + t;
                pack_rows(Rows<const T>{d_out[t], 0}, 1, p.head_dim, Real(1), a.row, padded_dim);
                log_sum[t] = a.states[r].log_sum();
                delta[t] = weighted_sum(a.row, a.out + r * padded_dim, padded_dim) /
                           a.states[r].total;
                d_gate += delta[t];
            }
        }
        Real *d_q = a.out; // the weighted values are used up
        bool first_block = true;
        for (int64_t item = c.first; item <= c.last; ++item) {
            for (int64_t block = 0; block < blocks; ++block, first_block = false) {
                pack(m.keys, c.row, item, block, kv_head);
                for (int64_t g = 0; g < group; ++g) {
                    for (int64_t t = 0; t < length; t += score_rows) {
                        score_gradients(m, c.row, c.begin + t, smaller(score_rows, length - t),
                                        kv_head * group + g, log_sums, deltas);
                        m.queries.query_gradients(m.keys, d_q + (g * length + t) * padded_dim,
                                                  !first_block);
                    }
                }
            }
        }
        for (int64_t g = 0; g < group; ++g) {
            const Rows<T> to = text_rows<T>(p.d_q, c.row, c.begin, kv_head * group + g);
            for (int64_t t = 0; t < length; ++t) {
                narrow_row(d_q + (g * length + t) * padded_dim, Real(1), to[t], p.head_dim);
            }
        }
        return d_gate;
    }

    void backward_keys(const MediaPlan &plan, int64_t b, int64_t item, int64_t block,
                       int64_t kv_head, ManyBlocks &m, const Real *log_sums,
                       const Real *deltas) const {
        clear(m.d_k, most_keys * padded_dim);
        clear(m.d_v, most_keys * padded_dim);
        bool packed = false;
        for (int64_t chunk = plan.row_chunks[b]; chunk < plan.row_chunks[b + 1]; ++chunk) {
            const Chunk &c = plan.chunks[chunk];
            if (item < c.first || item > c.last) {
                continue;
            }
            if (!packed) { // an item that nothing sees is never read
                pack(m.keys, b, item, block, kv_head);
                packed = true;
            }
            for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
                for (int64_t t = c.begin; t < c.end; t += score_rows) {
                    score_gradients(m, b, t, smaller(score_rows, c.end - t), h, log_sums, deltas);
                    m.queries.key_gradients(m.keys, m.d_k, m.d_v, true);
                }
            }
        }
        write_key_gradients(b, item, block, kv_head, m.d_k, m.d_v);
    }

    bool backward_many(const MediaPlan &plan, Real *d_gates) const {
        const int64_t text = p.rows * p.heads * p.tokens;
        Scratch saved(2 * Scratch::bytes_of<Real>(text));
        const bool all_ok = saved.ok();
        bool ok = all_ok;
        Real *log_sums = saved.template take<Real>(text), *deltas = saved.template take<Real>(text);
        const int64_t row_tasks = plan.seeing_count * p.kv_heads;
        const int64_t key_tasks = p.rows * p.media * blocks * p.kv_heads;
#pragma omp parallel num_threads(threads(text)) reduction(&& : ok)
        {
            Scratch scratch(ManyBlocks::bytes(*this, plan.longest));
            ok = all_ok && scratch.ok();
            ManyBlocks many(scratch, *this, plan.longest);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < row_tasks; ++task) {
                if (ok) {
                    d_gates[task] = backward_rows(plan.chunks[task / p.kv_heads],
                                                  task % p.kv_heads, many, log_sums, deltas);
                }
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < key_tasks; ++task) {
                const int64_t block = task / p.kv_heads % blocks;
                const int64_t item = task / p.kv_heads / blocks;
                if (ok) {
                    backward_keys(plan, item / p.media, item % p.media, block, task % p.kv_heads,
                                  many, log_sums, deltas);
                }
            }
        }
        return ok;
    }

    bool backward(const MediaPlan &plan) const {
        for (int64_t chunk = plan.seeing_count; chunk < plan.chunk_count; ++chunk) {
            for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
                write_zeros(p.d_q, plan.chunks[chunk], kv_head);
            }
        }
        const int64_t shares = plan.seeing_count * p.kv_heads;
        Scratch scratch(Scratch::bytes_of<Real>(shares));
        if (!scratch.ok()) {
            return false;
        }
        Real *d_gates = scratch.template take<Real>(shares);
        const bool ok = plan.single_item && blocks == 1 ? backward_single(plan, d_gates)
                                                        : backward_many(plan, d_gates);
        if (ok && p.d_gate) {
            Real d_tanh = 0;
            for (int64_t i = 0; i < shares; ++i) {
                d_tanh += d_gates[i];
            }
            *static_cast<Real *>(p.d_gate) = d_tanh * (1 - gate * gate);
        }
        return ok;
    }
};

template <typename T> using MediaOf = Media<T, typename accumulation<T>::type>;

} // namespace

namespace flamingo::FLAMINGO_ISA {

bool media_attention_forward(const Params &p, const MediaPlan &plan) {
    switch (p.execution.dtype) {
    case FLAMINGO_FLOAT64:
        return MediaOf<double>(p).forward(plan);
    case FLAMINGO_BFLOAT16:
        return MediaOf<bfloat16>(p).forward(plan);
    case FLAMINGO_FLOAT16:
        return MediaOf<float16>(p).forward(plan);
    default:
        return MediaOf<float>(p).forward(plan);
    }
}

bool media_attention_backward(const Params &p, const MediaPlan &plan) {
    switch (p.execution.dtype) {
    case FLAMINGO_FLOAT64:
        return MediaOf<double>(p).backward(plan);
    case FLAMINGO_BFLOAT16:
        return MediaOf<bfloat16>(p).backward(plan);
    case FLAMINGO_FLOAT16:
        return MediaOf<float16>(p).backward(plan);
    default:
        return MediaOf<float>(p).backward(plan);
    }
}

} // namespace flamingo::FLAMINGO_ISA
