// Forward of media attention: a task attends for one chunk of tokens and one kv head.
#include "../kernels.h"
#include "attend.h"
#include "bfloat16_tile.h"
#include "media_attention.h"
#include "storage_type.h"

namespace {

using flamingo::Chunk;
using flamingo::TaskPlan;

// What a task works in. Its rows are the tokens of a chunk, one head of the group after the other.
template <typename T> struct ForwardScratch {
    using Real = real<T>;

    KeyBlock<Real> keys;
    RowState<Real> *states; // [rows]
    Real *q, *out;          // [rows, padded_dim]
    Real *weights;          // [query_block, padded keys]
    Real *row;              // [padded_dim]

    ForwardScratch(Scratch &scratch, const Media<T> &m, int64_t longest_chunk)
        : keys(scratch, m.most_keys, m.p.head_dim) {
        const int64_t rows = bigger(m.group * longest_chunk, query_block);
        states = scratch.take<RowState<Real>>(rows);
        q = scratch.take<Real>(rows * m.padded_dim);
        out = scratch.take<Real>(rows * m.padded_dim);
        weights = scratch.take<Real>(query_block * round_up(m.most_keys, lanes<Real>));
        row = scratch.take<Real>(m.padded_dim);
    }
};

// The two products of a chunk that sees one block of keys, in the type of accumulation.
template <typename T> struct TileProducts {
    using Real = real<T>;

    const Media<T> &m;
    ForwardScratch<T> &s;

    TileProducts(const Media<T> &media, const Chunk &c, int64_t kv_head, ForwardScratch<T> &scratch)
        : m(media), s(scratch) {
        m.pack(s.keys, c.row, c.first, 0, kv_head);
    }
    // weights = q k^T, times the scale.
    void scores(Rows<const T> q, int64_t count) {
        product<Real>(count, s.keys.padded_keys, m.p.head_dim, as_left(q, count),
                      s.keys.k_transposed, s.keys.padded_keys, s.weights, s.keys.padded_keys,
                      false);
    }
    // out = weights v.
    void values(int64_t count) {
        product<Real>(count, m.padded_dim, s.keys.keys, {s.weights, s.keys.padded_keys, 1},
                      s.keys.v, m.padded_dim, s.out, m.padded_dim, false);
    }

  private:
    // Rows as the left operand of a product: in place if they are of its type, else a copy.
    Left<Real> as_left(Rows<const Real> rows, int64_t) const { return {rows.data, rows.stride, 1}; }
    template <typename Narrow> Left<Real> as_left(Rows<const Narrow> rows, int64_t count) const {
        pack_rows(rows, count, m.p.head_dim, Real(1), s.q, m.padded_dim);
        return {s.q, m.padded_dim, 1};
    }
};

#if defined(FLAMINGO_BFLOAT16_DOT)
// The same by dot products of bfloat16 pairs: products are exact, and weights are rounded to
// bfloat16 as in every flash attention.
template <> struct TileProducts<bfloat16> {
    const Media<bfloat16> &m;
    ForwardScratch<bfloat16> &s;
    const int64_t dim_pairs = (m.p.head_dim + 1) / 2;

    TileProducts(const Media<bfloat16> &media, const Chunk &c, int64_t kv_head,
                 ForwardScratch<bfloat16> &scratch)
        : m(media), s(scratch) {
        s.keys.pack_pairs(media_rows<const bfloat16>(m.p.k, c.row, c.first, 0, kv_head),
                          media_rows<const bfloat16>(m.p.v, c.row, c.first, 0, kv_head),
                          m.p.latents, m.p.head_dim);
    }
    void scores(Rows<const bfloat16> q, int64_t count) {
        pair *rows = reinterpret_cast<pair *>(s.q);
        for (int64_t r = 0; r < count; ++r) {
            pair_row(q[r], m.p.head_dim, rows + r * dim_pairs);
        }
        pair_product(count, s.keys.padded_keys, dim_pairs, rows, dim_pairs,
                     reinterpret_cast<const pair *>(s.keys.k_transposed), s.keys.padded_keys,
                     s.weights, s.keys.padded_keys);
        for (int64_t r = 0; r < count; ++r) {
            scale_row(s.weights + r * s.keys.padded_keys, s.keys.padded_keys, m.scale);
        }
    }
    void values(int64_t count) {
        for (int64_t r = 0; r < count; ++r) {
            narrow_to_pairs(s.weights + r * s.keys.padded_keys, s.keys.padded_keys);
        }
        pair_product(count, m.padded_dim, (s.keys.keys + 1) / 2,
                     reinterpret_cast<const pair *>(s.weights), s.keys.padded_keys,
                     reinterpret_cast<const pair *>(s.keys.v), m.padded_dim, s.out, m.padded_dim);
    }
};
#endif

template <typename T> struct MediaForward : Media<T> {
    using typename Media<T>::Real;
    using Media<T>::Media;
    using Media<T>::p;
    using Media<T>::group;
    using Media<T>::padded_dim;
    using Media<T>::blocks;
    using Media<T>::scale;
    using Media<T>::gate;

    // Fills states and out of a chunk, for any number of blocks of keys.
    void attend(const Chunk &c, int64_t kv_head, ForwardScratch<T> &s) const {
        const int64_t length = c.end - c.begin;
        for (int64_t g = 0; g < group; ++g) {
            const Rows<const T> q = text_rows<const T>(p.q, c.row, c.begin, kv_head * group + g);
            pack_rows(q, length, p.head_dim, Real(1), s.q + g * length * padded_dim, padded_dim);
        }
        clear_states(s.states, group * length);
        const bool packed = group * c.run > few_rows;
        bool first_block = true;
        for (int64_t item = c.first; item <= c.last; ++item) {
            for (int64_t block = 0; block < blocks; ++block, first_block = false) {
                if (packed) {
                    this->pack(s.keys, c.row, item, block, kv_head);
                    attend_block(s.keys, p.head_dim, s.q, group * length, s.states, s.out,
                                 s.weights, first_block);
                    continue;
                }
                for (int64_t r = 0; r < group * length; ++r) {
                    attend_unpacked<T, Real>(
                        media_rows<const T>(p.k, c.row, item, block * key_block, kv_head),
                        media_rows<const T>(p.v, c.row, item, block * key_block, kv_head),
                        this->block_keys(block), p.head_dim, scale, s.q + r * padded_dim,
                        &s.states[r], s.out + r * padded_dim, s.weights, s.row, first_block);
                }
            }
        }
    }

    // Writes out of a chunk that sees one block of keys: each tile of rows goes from q to out while
    // it is in the cache.
    void forward_one_block(const Chunk &c, int64_t kv_head, ForwardScratch<T> &s) const {
        TileProducts<T> products(*this, c, kv_head, s);
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
            for (int64_t t = c.begin; t < c.end; t += query_block) {
                const int64_t count = smaller(query_block, c.end - t);
                const int64_t next = smaller(query_block, c.end - t - count);
                prefetch_rows(text_rows<const T>(p.q, c.row, t + count, h), next);
                prefetch_rows(text_rows<const T>(p.out, c.row, t, h), count);
                products.scores(text_rows<const T>(p.q, c.row, t, h), count);
                clear_states(s.states, count);
                online_softmax<Real>(s.weights, count, s.keys.keys, s.keys.padded_keys, s.states,
                                     nullptr);
                products.values(count);
                write_rows(s.out, s.states, count, text_rows<T>(p.out, c.row, t, h));
            }
        }
    }
    // Consecutive rows of a head are heads * head_dim apart, a stride that the processor does not
    // prefetch itself.
    void prefetch_rows(Rows<const T> rows, int64_t count) const {
        for (int64_t r = 0; r < count; ++r) {
            const char *row = reinterpret_cast<const char *>(rows[r]);
            for (int64_t byte = 0; byte < p.head_dim * int64_t(sizeof(T)); byte += 64) {
                __builtin_prefetch(row + byte);
            }
        }
    }
    // Writes rows out[count, padded_dim], normalised and gated.
    void write_rows(const Real *out, const RowState<Real> *states, int64_t count,
                    Rows<T> to) const {
        for (int64_t r = 0; r < count; ++r) {
            narrow_row(out + r * padded_dim, gate / states[r].sum, to[r], p.head_dim);
        }
    }

    void forward_chunk(const Chunk &c, int64_t kv_head, ForwardScratch<T> &s) const {
        if (c.first > c.last) {
            this->write_zeros(p.out, c, kv_head);
            return;
        }
        if (c.first == c.last && blocks == 1 && group * c.run > few_rows) {
            forward_one_block(c, kv_head, s);
            return;
        }
        attend(c, kv_head, s);
        const int64_t length = c.end - c.begin;
        for (int64_t g = 0; g < group; ++g) {
            write_rows(s.out + g * length * padded_dim, s.states + g * length, length,
                       text_rows<T>(p.out, c.row, c.begin, kv_head * group + g));
        }
    }

    bool run(const TaskPlan &plan) const {
        return run_tasks<ForwardScratch<T>>(
            plan.chunk_count * p.kv_heads, this->threads(),
            [&](int64_t task, ForwardScratch<T> &s) {
                forward_chunk(plan.chunks[task / p.kv_heads], task % p.kv_heads, s);
            },
            *this, plan.longest_chunk);
    }
};

} // namespace

bool flamingo::FLAMINGO_ISA::media_attention_forward(const flamingo_media_attention_params &p,
                                                     const TaskPlan &plan) {
    return with_storage_type(p.execution.dtype,
                             [&](auto zero) { return MediaForward<decltype(zero)>(p).run(plan); });
}
