// Forward of media attention: a task attends for one chunk of tokens, or for a part of the keys of
// one, and for one kv head. Parts are combined in their order.
#include "../kernels.h"
#include "attend.h"
#include "bfloat16_tile.h"
#include "media_attention.h"
#include "storage_type.h"

namespace {

using flamingo::Chunk;
using flamingo::ForwardTask;
using flamingo::TaskPlan;

// Heads whose keys a task with few rows reads together: about a page of them lies side by side.
constexpr int64_t most_heads = 8;
// Tasks from which on there are enough for all threads without one for each head.
constexpr int64_t many_tasks = 16;

// What a task works in. Its rows are the tokens of a chunk, one head of the group after the other,
// for each of its heads.
template <typename T> struct ForwardScratch {
    using Real = real<T>;

    KeyBlock<Real> keys;
    RowState<Real> *states; // [rows]
    Real *q, *out;          // [rows, padded_dim]
    Real *weights;          // [score_rows, padded keys]

    ForwardScratch(Scratch &scratch, const Media<T> &m)
        : keys(scratch, smaller(m.plan.widest_chunk, key_block), m.p.head_dim) {
        constexpr int64_t score_rows = bigger(query_block, most_heads * few_rows);
        const int64_t rows = bigger(m.group * m.plan.longest_chunk, score_rows);
        states = scratch.take<RowState<Real>>(rows);
        q = scratch.take<Real>(rows * m.padded_dim);
        out = scratch.take<Real>(rows * m.padded_dim);
        weights = scratch.take<Real>(
            score_rows * round_up(smaller(m.plan.widest_chunk, key_block), lanes<Real>));
    }
};

// The two products of a chunk that sees one block of keys, in the type of accumulation.
template <typename T> struct TileProducts {
    using Real = real<T>;

    const Media<T> &m;
    ForwardScratch<T> &s;

    TileProducts(const Media<T> &media, const Chunk &c, int64_t kv_head, ForwardScratch<T> &scratch)
        : m(media), s(scratch) {
        m.pack(s.keys, c.row, c.start, c.stop - c.start, kv_head);
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
        m.with_keys(c.row, c.start, kv_head, [&](auto k, auto v) {
            s.keys.pack_pairs(k, v, c.stop - c.start, m.p.head_dim);
        });
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

// What parts of chunks leave to be combined.
template <typename T> struct Partials {
    using Real = real<T>;

    RowState<Real> *states; // for each task [kv_heads, tokens of its chunk, group]
    Real *out;              // the same, [.., padded_dim]

    Partials(Scratch &scratch, const Media<T> &m)
        : states(scratch.take<RowState<Real>>(m.plan.partial_tokens * m.p.heads)),
          out(scratch.take<Real>(m.plan.partial_tokens * m.p.heads * m.padded_dim)) {}
};

template <typename T> struct MediaForward : Media<T> {
    using typename Media<T>::Real;
    using Media<T>::Media;
    using Media<T>::p;
    using Media<T>::plan;
    using Media<T>::group;
    using Media<T>::padded_dim;
    using Media<T>::scale;
    using Media<T>::gate;

    bool is_packed(const Chunk &c) const { return group * c.group > few_rows; }
    // Key/value heads of a task: the same for all tasks.
    int64_t heads_at_once() const {
        const bool few = group * p.tokens <= few_rows && plan.forward_count >= many_tasks;
        return few ? smaller(p.kv_heads, most_heads) : 1;
    }

    // Fills states[heads, rows] and out[heads, rows, padded_dim] of the chunk of a task, for heads
    // kv_head, kv_head + 1, ...; there is one head if the chunk is packed.
    void attend(const ForwardTask &task, int64_t kv_head, int64_t heads, ForwardScratch<T> &s,
                RowState<Real> *states, Real *out) const {
        const Chunk &c = plan.chunks[task.chunk];
        const int64_t length = c.end - c.begin, rows = group * length;
        for (int64_t g = 0; g < heads * group; ++g) {
            const Rows<const T> q = text_rows<const T>(p.q, c.row, c.begin, kv_head * group + g);
            pack_rows(q, length, p.head_dim, Real(1), s.q + g * length * padded_dim, padded_dim);
        }
        clear_states(states, heads * rows);
        // Blocks begin where those of the whole group do, so that no bit depends on its pieces.
        const int64_t begin = c.base + (task.start - c.base) / key_block * key_block;
        for (int64_t key = begin; key < task.stop; key += key_block) {
            const int64_t from = bigger(key, task.start);
            const int64_t count = smaller(key + key_block, task.stop) - from;
            const bool first_block = key == begin;
            const auto hide = [&](Real *scores, int64_t first_row, int64_t hidden_rows) {
                this->hide(scores, hidden_rows, round_up(count, lanes<Real>), c, first_row, from,
                           count);
            };
            if (is_packed(c)) {
                this->pack(s.keys, c.row, from, count, kv_head);
                attend_block(s.keys, p.head_dim, s.q, rows, states, out, s.weights, first_block,
                             hide);
            } else {
                this->with_keys(c.row, from, kv_head, [&](auto k, auto v) {
                    attend_unpacked(heads_from(k, p.k), heads_from(v, p.v), heads, count,
                                    p.head_dim, scale, s.q, rows, states, out, s.weights,
                                    first_block, hide);
                });
            }
        }
    }

    // Returns the rows of head h from those of head 0.
    template <typename Keys> static auto heads_from(Keys first, const flamingo_tensor &x) {
        return [first, stride = x.stride[3]](int64_t h) {
            Keys rows = first;
            rows.data += h * stride;
            return rows;
        };
    }

    // Writes out of a chunk that sees one block of keys: each tile of rows goes from q to out while
    // it is in the cache.
    void forward_one_block(const Chunk &c, int64_t kv_head, ForwardScratch<T> &s) const {
        TileProducts<T> products(*this, c, kv_head, s);
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
            for (int64_t t = c.begin; t < c.end; t += query_block) {
                const int64_t count = smaller(query_block, c.end - t);
                const int64_t next = smaller(query_block, c.end - t - count);
                prefetch_rows(text_rows<const T>(p.q, c.row, t + count, h), 0, next, p.head_dim);
                prefetch_rows(text_rows<const T>(p.out, c.row, t, h), 0, count, p.head_dim);
                products.scores(text_rows<const T>(p.q, c.row, t, h), count);
                clear_states(s.states, count);
                online_softmax<Real>(s.weights, count, s.keys.keys, s.keys.padded_keys, s.states,
                                     nullptr);
                products.values(count);
                write_rows(s.out, s.states, count, text_rows<T>(p.out, c.row, t, h));
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

    void write_chunk(const Chunk &c, int64_t kv_head, int64_t heads, const Real *out,
                     const RowState<Real> *states) const {
        const int64_t length = c.end - c.begin;
        for (int64_t g = 0; g < heads * group; ++g) {
            write_rows(out + g * length * padded_dim, states + g * length, length,
                       text_rows<T>(p.out, c.row, c.begin, kv_head * group + g));
        }
    }

    void forward_task(const ForwardTask &task, int64_t kv_head, int64_t heads, ForwardScratch<T> &s,
                      const Partials<T> &partials) const {
        const Chunk &c = plan.chunks[task.chunk];
        if (c.start == c.stop) {
            for (int64_t h = kv_head; h < kv_head + heads; ++h) {
                this->write_zeros(p.out, c, h);
            }
        } else if (task.partial >= 0) {
            const int64_t row = first_row(task, kv_head);
            attend(task, kv_head, heads, s, partials.states + row, partials.out + row * padded_dim);
        } else if (c.uniform && c.stop - c.start <= key_block && is_packed(c)) {
            forward_one_block(c, kv_head, s);
        } else {
            attend(task, kv_head, heads, s, s.states, s.out);
            write_chunk(c, kv_head, heads, s.out, s.states);
        }
    }
    // Of the partial results of a task.
    int64_t first_row(const ForwardTask &task, int64_t kv_head) const {
        const Chunk &c = plan.chunks[task.chunk];
        return (task.partial * p.kv_heads + kv_head * (c.end - c.begin)) * group;
    }

    // Adds parts to the first one of their chunk, in order, and writes the chunk.
    void combine(const ForwardTask *parts, int64_t count, int64_t kv_head,
                 const Partials<T> &partials) const {
        const Chunk &c = plan.chunks[parts->chunk];
        const int64_t rows = group * (c.end - c.begin), first = first_row(*parts, kv_head);
        RowState<Real> *states = partials.states + first;
        Real *out = partials.out + first * padded_dim;
        for (int64_t part = 1; part < count; ++part) {
            const int64_t at = first_row(parts[part], kv_head);
            for (int64_t r = 0; r < rows; ++r) {
                const RowState<Real> next = partials.states[at + r];
                const Real max = states[r].max < next.max ? next.max : states[r].max;
                // A part whose every score is -inf has no weight.
                const Real old = states[r].sum > 0 ? exponential(states[r].max - max) : Real(0);
                const Real add = next.sum > 0 ? exponential(next.max - max) : Real(0);
                states[r] = {max, states[r].sum * old + next.sum * add};
                const Real *from = partials.out + (at + r) * padded_dim;
                Real *to = out + r * padded_dim;
                for (int64_t d = 0; d < padded_dim; d += lanes<Real>) {
                    store(to + d, load(to + d) * old + load(from + d) * add);
                }
            }
        }
        write_chunk(c, kv_head, 1, out, states);
    }

    bool run() const {
        Allocated<Partials<T>> partials(*this);
        if (!partials.ok()) {
            return false;
        }
        const int64_t at_once = heads_at_once(), parts = (p.kv_heads + at_once - 1) / at_once;
        const bool ok = run_tasks<ForwardScratch<T>>(
            plan.forward_count * parts, this->threads(),
            [&](int64_t i, ForwardScratch<T> &s) {
                const int64_t head = i % parts * at_once;
                forward_task(plan.forward_tasks[i / parts], head,
                             smaller(at_once, p.kv_heads - head), s, *partials);
            },
            *this);
        const ForwardTask *end = plan.forward_tasks + plan.forward_count;
        for (const ForwardTask *parts = plan.forward_tasks, *next; ok && parts < end;
             parts = next) {
            next = parts + 1;
            while (next < end && next->chunk == parts->chunk) {
                ++next;
            }
            for (int64_t kv_head = 0; next - parts > 1 && kv_head < p.kv_heads; ++kv_head) {
                combine(parts, next - parts, kv_head, *partials);
            }
        }
        return ok;
    }
};

} // namespace

bool flamingo::FLAMINGO_ISA::media_attention_forward(const flamingo_media_attention_params &p,
                                                     const TaskPlan &plan) {
    return with_storage_type(
        p.execution.dtype, [&](auto zero) { return MediaForward<decltype(zero)>(p, plan).run(); });
}
