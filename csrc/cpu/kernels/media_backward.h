// What both kinds of backward of media attention share: chunks as rows, and gradients as they are
// written.
#pragma once

#include "media_attention.h"
#include "query_rows.h"
#include "softmax.h"

namespace {

using flamingo::BackwardTask;
using flamingo::cell_keys;
using flamingo::Chunk;

template <typename T> struct Backward : Media<T> {
    using typename Media<T>::Real;
    using Media<T>::Media;
    using Media<T>::p;
    using Media<T>::plan;
    using Media<T>::group;
    using Media<T>::padded_dim;
    using Media<T>::scale;
    using Media<T>::gate;

    const int64_t most_keys = smaller(plan.widest_task, key_block); // of a block

    // Writes the gradients of `count` keys from sums[count, padded_dim] without scale and gate.
    void write_key_gradients(int64_t b, int64_t key, int64_t count, int64_t kv_head,
                             const Real *d_k_sums, const Real *d_v_sums) const {
        const KeyRows<T> d_k = this->template keys_of<T>(p.d_k, b, key, kv_head);
        const KeyRows<T> d_v = this->template keys_of<T>(p.d_v, b, key, kv_head);
        for (int64_t i = 0; i < count; ++i) {
            narrow_row(d_k_sums + i * padded_dim, scale, d_k[i], p.head_dim);
            narrow_row(d_v_sums + i * padded_dim, gate, d_v[i], p.head_dim);
        }
    }

    // The rows of a chunk are its tokens, one head of the group after the other. Calls visit(h, t,
    // r, n) for every head among the `count` rows from `begin` on: its n tokens from t on are rows
    // r, r + 1, ... of them.
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
    int64_t rows_of(const Chunk &c) const { return group * (c.end - c.begin); }

    // Packs up to score_rows rows of a chunk from `begin` on.
    void pack_rows_of(const Chunk &c, int64_t kv_head, int64_t begin,
                      QueryRows<Real> &queries) const {
        queries.rows = smaller(score_rows, rows_of(c) - begin);
        for_each_head(
            c, kv_head, begin, queries.rows, [&](int64_t h, int64_t t, int64_t r, int64_t n) {
                queries.template pack<T>(r, text_rows<const T>(p.q, c.row, t, h),
                                         text_rows<const T>(p.d_out, c.row, t, h), n, p.head_dim);
            });
    }
    void write_query_gradients(const Chunk &c, int64_t kv_head, int64_t begin, int64_t count,
                               const Real *sums) const {
        for_each_head(c, kv_head, begin, count, [&](int64_t h, int64_t t, int64_t r, int64_t n) {
            const Rows<T> d_q = text_rows<T>(p.d_q, c.row, t, h);
            for (int64_t i = 0; i < n; ++i) {
                narrow_row(sums + (r + i) * padded_dim, Real(1), d_q[i], p.head_dim);
            }
        });
    }
    // Clears d_q of the chunks that see nothing.
    void clear_unattended() const {
        for (int64_t chunk = plan.attended_count; chunk < plan.chunk_count; ++chunk) {
            for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
                this->write_zeros(p.d_q, plan.chunks[chunk], kv_head);
            }
        }
    }
    void write_gate_gradient(Real d_tanh) const {
        if (p.d_gate) {
            *static_cast<Real *>(p.d_gate) = d_tanh * (1 - gate * gate);
        }
    }

    // Writes d_k and d_v of the keys of a cell, unless the only task that sees them did: the sums
    // of partial sums in the order of tasks, or zeros where no token sees a key. `sums` [2,
    // cell_keys, padded_dim] is a buffer.
    void finish_cell(int64_t index, int64_t kv_head, Real *partial_sums, Real *sums) const {
        const int64_t b = index / plan.cells_of_row;
        const int64_t begin = index % plan.cells_of_row * cell_keys;
        const int64_t count = smaller(cell_keys, p.media * p.latents - begin);
        bool written[cell_keys] = {};
        int64_t left = count; // keys to write
        const flamingo::TaskRange range = plan.cells[index];
        for (int64_t i = range.begin; i < range.end; ++i) {
            const BackwardTask &task = plan.tasks[i];
            const int64_t stop = smaller(task.stop, begin + count);
            for (int64_t key = bigger(task.start, begin); key < stop && task.partial < 0; ++key) {
                written[key - begin] = true;
                --left; // no other task sees it
            }
        }
        if (left == 0) {
            return;
        }
        clear(sums, 2 * cell_keys * padded_dim);
        for (int64_t i = range.begin; i < range.end; ++i) {
            const BackwardTask &task = plan.tasks[i];
            const int64_t start = bigger(task.start, begin);
            const int64_t stop = smaller(task.stop, begin + count);
            if (task.partial < 0 || start >= stop) {
                continue;
            }
            const Real *d_k = partial_sums + partial_offset(task, start, kv_head);
            const Real *d_v = d_k + (task.stop - task.start) * padded_dim;
            Real *to = sums + (start - begin) * padded_dim;
            for (int64_t d = 0; d < (stop - start) * padded_dim; d += lanes<Real>) {
                store(to + d, load(to + d) + load(d_k + d));
                Real *to_v = to + cell_keys * padded_dim;
                store(to_v + d, load(to_v + d) + load(d_v + d));
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            if (!written[i]) {
                write_key_gradients(b, begin + i, 1, kv_head, sums + i * padded_dim,
                                    sums + (cell_keys + i) * padded_dim);
            }
        }
    }
    // Where the partial sums of a key of a task are: of d_k, and after all keys of the task of d_v.
    int64_t partial_offset(const BackwardTask &task, int64_t key, int64_t kv_head) const {
        const int64_t keys = task.stop - task.start;
        return (2 * (task.partial * p.kv_heads + keys * kv_head) + key - task.start) * padded_dim;
    }
    struct CellScratch {
        Real *sums; // [2, cell_keys, padded_dim]

        CellScratch(Scratch &scratch, const Backward &m)
            : sums(scratch.take<Real>(2 * cell_keys * m.padded_dim)) {}
    };
    bool finish_keys(Real *partial_sums) const {
        return run_tasks<CellScratch>(
            p.rows * plan.cells_of_row * p.kv_heads, this->threads(),
            [&](int64_t i, CellScratch &s) {
                finish_cell(i / p.kv_heads, i % p.kv_heads, partial_sums, s.sums);
            },
            *this);
    }
};

} // namespace
