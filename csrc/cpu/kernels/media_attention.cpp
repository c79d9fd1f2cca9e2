// Media attention: tokens against the latents of the media items of their range.
#include <algorithm>

#include "../kernels.h"
#include "attention.h"

namespace {

using Params = flamingo_media_attention_params;
using flamingo::Chunk;
using flamingo::MediaPlan;
using flamingo::Part;

// q, out and their gradients: the head's vectors of consecutive tokens.
template <typename T> Rows<T> text_rows(const flamingo_tensor &x, int64_t b, int64_t t, int64_t h) {
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

    // Softmax state and weighted values of a chunk, one stretch of `length` rows per head of the
    // group.
    struct Attended {
        RowState<Real> *states;
        Real *q, *out; // [group * longest, padded_dim]
        Real *weights; // [stretch, padded keys]
        Real *row;     // [padded_dim]

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
    // By dot products of bfloat16 pairs: exact products, and weights rounded to bfloat16 as in
    // every flash attention.
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
#pragma omp parallel num_threads(threads(p.rows *p.tokens *p.heads)) reduction(&& : ok)
        {
            Scratch scratch(KeyBlock<Real>::bytes(most_keys, p.head_dim, false) +
                            Attended::bytes(*this, plan.longest));
            ok = scratch.ok();
            KeyBlock<Real> keys(scratch, most_keys, p.head_dim, false);
            Attended attended(scratch, *this, plan.longest);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tasks; ++task) {
                if (ok) {
                    forward_chunk(plan.chunks[task / p.kv_heads], task % p.kv_heads, keys,
                                  attended);
                }
            }
        }
        return ok;
    }

    // What one task of the backward works in: for each key that a part sees, six vectors of
    // padded_dim (packed four times, of which one is not touched, and summed gradients) and two
    // scores of score_rows rows.
    struct PartScratch {
        KeyBlock<Real> *keys;    // [widest * blocks]
        QueryRows<Real> queries; // scores of as many blocks
        Real *d_q;               // [score_rows, padded_dim]
        Real *sums;              // [widest, share_size]

        static int64_t bytes(const Media &m, int64_t widest) {
            const int64_t count = widest * m.blocks;
            return Scratch::bytes_of<KeyBlock<Real>>(count) +
                   count * KeyBlock<Real>::bytes(m.most_keys, m.p.head_dim, true) +
                   QueryRows<Real>::bytes(m.most_keys, m.p.head_dim, count) +
                   Scratch::bytes_of<Real>(score_rows * m.padded_dim) +
                   Scratch::bytes_of<Real>(widest * m.share_size());
        }
        PartScratch(Scratch &scratch, const Media &m, int64_t widest)
            : keys(scratch.take<KeyBlock<Real>>(widest * m.blocks)),
              queries(scratch, m.most_keys, m.p.head_dim, widest * m.blocks) {
            d_q = scratch.take<Real>(score_rows * m.padded_dim);
            sums = scratch.take<Real>(widest * m.share_size());
            for (int64_t block = 0; block < widest * m.blocks; ++block) {
                keys[block] = KeyBlock<Real>(scratch, m.most_keys, m.p.head_dim, true);
                keys[block].v = keys[0].v; // used while packing alone
            }
        }
    };

    // Of one item and kv head: d_k, then d_v, both [R, padded_dim], without gate and scale.
    int64_t share_size() const { return 2 * p.latents * padded_dim; }

    // Where a part that shares its items keeps the sums of one of them.
    int64_t share_at(const Part &part, int64_t item, int64_t kv_head) const {
        const int64_t items = part.last + 1 - part.first;
        return (part.slot * p.kv_heads + items * kv_head + item - part.first) * share_size();
    }

    void write_key_gradients(int64_t b, int64_t item, int64_t kv_head, const Real *sums) const {
        const Rows<T> d_k = media_rows<T>(p.d_k, b, item, 0, kv_head);
        const Rows<T> d_v = media_rows<T>(p.d_v, b, item, 0, kv_head);
        for (int64_t r = 0; r < p.latents; ++r) {
            narrow_row(sums + r * padded_dim, scale, d_k[r], p.head_dim);
            narrow_row(sums + (p.latents + r) * padded_dim, gate, d_v[r], p.head_dim);
        }
    }

    // Calls visit(h, t, r, n) for every head that is among `count` rows of a chunk from `begin` on:
    // its n tokens from t on are rows r, r + 1, ... of them. A chunk has all tokens of a head, then
    // of the next.
    template <typename Visit>
    void for_each_head(const Chunk &c, int64_t kv_head, int64_t begin, int64_t count,
                       Visit visit) const {
        const int64_t length = c.end - c.begin;
        for (int64_t r = 0, n; r < count; r += n) {
            const int64_t g = (begin + r) / length, t = (begin + r) % length;
            n = smaller(count - r, length - t);
            visit(kv_head * group + g, c.begin + t, r, n);
        }
    }

    // Up to score_rows rows of a chunk, from `begin` on, with the scores of all keys of its range
    // at once. Blocks of the part from `fresh` on are neither packed nor have sums yet. Returns the
    // rows' share of the gradient of tanh(gate).
    Real backward_rows(const Part &part, const Chunk &c, int64_t kv_head, int64_t begin,
                       int64_t fresh, PartScratch &s, Real *sums) const {
        QueryRows<Real> &queries = s.queries;
        queries.rows = smaller(score_rows, group * (c.end - c.begin) - begin);
        for_each_head(c, kv_head, begin, queries.rows,
                      [&](int64_t h, int64_t t, int64_t r, int64_t n) {
                          pack_rows(text_rows<const T>(p.q, c.row, t, h), n, p.head_dim, Real(1),
                                    queries.q + r * padded_dim, padded_dim);
                          pack_rows(text_rows<const T>(p.d_out, c.row, t, h), n, p.head_dim,
                                    Real(1), queries.d_out + r * padded_dim, padded_dim);
                      });
        RowState<Real> states[score_rows];
        std::fill_n(states, queries.rows, RowState<Real>::empty());
        const int64_t first = (c.first - part.first) * blocks;
        const int64_t end = (c.last + 1 - part.first) * blocks;
        for (int64_t block = first; block < end; ++block) {
            KeyBlock<Real> &keys = s.keys[block];
            if (block >= fresh) {
                pack(keys, c.row, part.first + block / blocks, block % blocks, kv_head);
            }
            const QueryRows<Real> scored = queries.of_block(block);
            scored.scores(keys, p.head_dim);
            raise_tops(scored.weights, scored.rows, keys.keys, keys.padded_keys, states);
        }
        Real deltas[score_rows] = {};
        for (int64_t block = first; block < end; ++block) {
            const KeyBlock<Real> &keys = s.keys[block];
            const QueryRows<Real> scored = queries.of_block(block);
            weigh_rows(scored.weights, scored.rows, keys.padded_keys, states);
            scored.weight_gradients(keys, p.head_dim);
            for (int64_t r = 0; r < scored.rows; ++r) {
                deltas[r] +=
                    weighted_sum(scored.weights + r * keys.padded_keys,
                                 scored.score_grads + r * keys.padded_keys, keys.padded_keys);
            }
        }
        Real d_gate = 0;
        for (int64_t r = 0; r < queries.rows; ++r) {
            deltas[r] /= states[r].total;
            d_gate += deltas[r];
        }
        for (int64_t block = first; block < end; ++block) {
            const KeyBlock<Real> &keys = s.keys[block];
            const QueryRows<Real> scored = queries.of_block(block);
            for (int64_t r = 0; r < scored.rows; ++r) {
                finish_row(scored.weights + r * keys.padded_keys,
                           scored.score_grads + r * keys.padded_keys, keys.padded_keys,
                           1 / states[r].total, deltas[r], gate);
            }
            Real *d_k =
                sums + block / blocks * share_size() + block % blocks * key_block * padded_dim;
            scored.query_gradients(keys, s.d_q, block > first);
            scored.key_gradients(keys, d_k, d_k + p.latents * padded_dim, block < fresh);
        }
        for_each_head(c, kv_head, begin, queries.rows,
                      [&](int64_t h, int64_t t, int64_t r, int64_t n) {
                          const Rows<T> d_q = text_rows<T>(p.d_q, c.row, t, h);
                          for (int64_t i = 0; i < n; ++i) {
                              narrow_row(s.d_q + (r + i) * padded_dim, Real(1), d_q[i], p.head_dim);
                          }
                      });
        return d_gate;
    }

    // Returns the part's share of the gradient of tanh(gate).
    Real backward_part(const MediaPlan &plan, const Part &part, int64_t kv_head, PartScratch &s,
                       Real *shares) const {
        const bool shared = part.slot >= 0;
        Real *sums = shared ? shares + share_at(part, part.first, kv_head) : s.sums;
        Real d_gate = 0;
        int64_t fresh = 0;
        for (int64_t chunk = part.begin; chunk < part.end; ++chunk) {
            const Chunk &c = plan.chunks[chunk];
            for (int64_t r = 0; r < group * (c.end - c.begin); r += score_rows) {
                d_gate += backward_rows(part, c, kv_head, r, fresh, s, sums);
                fresh = bigger(fresh, (c.last + 1 - part.first) * blocks);
            }
        }
        for (int64_t item = part.first; item <= part.last && !shared; ++item) {
            write_key_gradients(part.row, item, kv_head, sums + (item - part.first) * share_size());
        }
        return d_gate;
    }

    bool backward(const MediaPlan &plan) const {
        for (int64_t chunk = plan.seeing_count; chunk < plan.chunk_count; ++chunk) {
            for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
                write_zeros(p.d_q, plan.chunks[chunk], kv_head);
            }
        }
        const int64_t tasks = plan.part_count * p.kv_heads;
        const int64_t items = p.rows * p.media * p.kv_heads;
        Scratch shared(Scratch::bytes_of<Real>(plan.slots * p.kv_heads * share_size()) +
                       Scratch::bytes_of<Real>(tasks));
        Real *shares = shared.template take<Real>(plan.slots * p.kv_heads * share_size());
        Real *d_gates = shared.template take<Real>(tasks);
        bool ok = true;
#pragma omp parallel num_threads(threads(p.rows *p.tokens *p.heads)) reduction(&& : ok)
        {
            Scratch scratch(PartScratch::bytes(*this, plan.widest));
            ok = shared.ok() && scratch.ok();
            PartScratch own(scratch, *this, ok ? plan.widest : 0);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tasks; ++task) {
                if (ok) {
                    d_gates[task] = backward_part(plan, plan.parts[task / p.kv_heads],
                                                  task % p.kv_heads, own, shares);
                }
            }
            // Items of several parts: the sum of their shares in the order of parts. Of none:
            // zeros.
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < items; ++task) {
                if (ok) {
                    join_shares(plan, task / p.kv_heads, task % p.kv_heads, shares);
                }
            }
        }
        if (ok && p.d_gate) {
            Real d_tanh = 0;
            for (int64_t task = 0; task < tasks; ++task) {
                d_tanh += d_gates[task];
            }
            *static_cast<Real *>(p.d_gate) = d_tanh * (1 - gate * gate);
        }
        return ok;
    }

    // Writes d_k and d_v of an item, counted over all batch rows, unless its only part did.
    void join_shares(const MediaPlan &plan, int64_t index, int64_t kv_head, Real *shares) const {
        const int64_t b = index / p.media, item = index % p.media;
        const flamingo::PartRange range = plan.item_parts[index];
        Real *sums = nullptr;
        for (int64_t i = range.begin; i < range.end; ++i) {
            const Part &part = plan.parts[i];
            if (item < part.first || item > part.last) {
                continue;
            }
            if (part.slot < 0) {
                return;
            }
            Real *share = shares + share_at(part, item, kv_head);
            if (sums) {
                for (int64_t d = 0; d < share_size(); d += lanes<Real>) {
                    store(sums + d, load(sums + d) + load(share + d));
                }
            } else {
                sums = share;
            }
        }
        if (sums) {
            write_key_gradients(b, item, kv_head, sums);
            return;
        }
        for (int64_t r = 0; r < p.latents; ++r) {
            memset(media_rows<T>(p.d_k, b, item, r, kv_head).data, 0,
                   size_t(p.head_dim) * sizeof(T));
            memset(media_rows<T>(p.d_v, b, item, r, kv_head).data, 0,
                   size_t(p.head_dim) * sizeof(T));
        }
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
