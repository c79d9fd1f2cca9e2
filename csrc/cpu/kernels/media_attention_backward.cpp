// Backward of media attention: a task computes the gradients of neighbouring chunks for one kv
// head. Where tasks share keys, each writes partial sums of their d_k and d_v, which are added in
// the order of tasks.
#include "../kernels.h"
#include "media_attention.h"
#include "query_rows.h"
#include "softmax.h"
#include "storage_type.h"

namespace {

using flamingo::BackwardTask;
using flamingo::cell_keys;
using flamingo::Chunk;
using flamingo::TaskPlan;

// What both kinds of backward share: chunks as rows, and gradients as they are written.
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
    void write_gate_gradient(const Real *d_tanh, int64_t count) const {
        if (p.d_gate) {
            Real sum = 0;
            for (int64_t i = 0; i < count; ++i) {
                sum += d_tanh[i];
            }
            *static_cast<Real *>(p.d_gate) = sum * (1 - gate * gate);
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
        clear(sums, 2 * cell_keys * padded_dim);
        const flamingo::TaskRange range = plan.cells[index];
        for (int64_t i = range.begin; i < range.end; ++i) {
            const BackwardTask &task = plan.tasks[i];
            const int64_t start = bigger(task.start, begin);
            const int64_t stop = smaller(task.stop, begin + count);
            for (int64_t key = start; key < stop && task.partial < 0; ++key) {
                written[key - begin] = true;
            }
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

// Tasks keep the scores of all keys that a chunk sees, and the packed keys of all their chunks, so
// that nothing is computed twice.
template <typename T> struct NarrowBackward : Backward<T> {
    using typename Media<T>::Real;
    using Backward<T>::Backward;
    using Backward<T>::most_keys;
    using Media<T>::p;
    using Media<T>::plan;
    using Media<T>::padded_dim;
    using Media<T>::gate;

    // What tasks leave for the end.
    struct Partials {
        Real *sums;    // [kv_heads, partial_count, 2, padded_dim], grouped by task
        Real *d_gates; // [tasks]: of tanh(gate)

        Partials(Scratch &scratch, const NarrowBackward &m)
            : sums(scratch.take<Real>(2 * m.plan.partial_count * m.p.kv_heads * m.padded_dim)),
              d_gates(scratch.take<Real>(m.plan.task_count * m.p.kv_heads)) {}
    };

    // What a task works in. For each key that it sees these are three packed copies (K and the
    // transposes of K and V), two sums of gradients, and two columns of score_rows scores.
    struct TaskScratch {
        KeyBlock<Real> *keys;    // [blocks]
        QueryRows<Real> queries; // with scores against as many blocks
        Real *d_q;               // [score_rows, padded_dim]
        Real *sums;              // [2, widest_task, padded_dim], unless they are partial sums

        TaskScratch(Scratch &scratch, const NarrowBackward &m)
            : TaskScratch(scratch, m, (m.plan.widest_task + key_block - 1) / key_block) {}
        TaskScratch(Scratch &scratch, const NarrowBackward &m, int64_t blocks)
            : keys(scratch.take<KeyBlock<Real>>(blocks)),
              queries(scratch, m.most_keys, m.p.head_dim, blocks),
              d_q(scratch.take<Real>(score_rows * m.padded_dim)),
              sums(scratch.take<Real>(2 * m.plan.widest_task * m.padded_dim)) {
            Real *v_buffer = scratch.take<Real>(m.most_keys * m.padded_dim);
            for (int64_t i = 0; i < blocks; ++i) {
                const KeyBlock<Real> block(scratch, m.most_keys, m.p.head_dim, v_buffer);
                if (keys) {
                    keys[i] = block;
                }
            }
        }
    };

    // Computes up to score_rows rows of a chunk, from `begin` on, with the scores of all keys of
    // its range at once: writes their d_q and adds to `sums`. Blocks of the task from
    // `first_unpacked` on are not packed yet and have no sums. Returns what the rows add to the
    // gradient of tanh(gate).
    Real backward_rows(const BackwardTask &task, const Chunk &c, int64_t kv_head, int64_t begin,
                       int64_t first_unpacked, TaskScratch &s, Real *sums) const {
        QueryRows<Real> &queries = s.queries;
        this->pack_rows_of(c, kv_head, begin, queries);
        RowState<Real> states[score_rows];
        clear_states(states, queries.rows);
        const int64_t first = (c.start - task.start) / key_block;
        const int64_t end = end_block(task, c);
        for (int64_t block = first; block < end; ++block) {
            KeyBlock<Real> &keys = s.keys[block];
            const int64_t key = task.start + block * key_block;
            if (block >= first_unpacked) {
                this->pack(keys, c.row, key, smaller(key_block, task.stop - key), kv_head);
            }
            const QueryRows<Real> scored = queries.of_block(block);
            scored.scores(keys, p.head_dim);
            this->hide(scored.weights, scored.rows, keys.padded_keys, c, begin, key, keys.keys);
            update_max(scored.weights, scored.rows, keys.keys, keys.padded_keys, states);
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
            deltas[r] /= states[r].sum;
            d_gate += deltas[r];
        }
        Real *d_v_sums = sums + (task.stop - task.start) * padded_dim;
        for (int64_t block = first; block < end; ++block) {
            const KeyBlock<Real> &keys = s.keys[block];
            const QueryRows<Real> scored = queries.of_block(block);
            for (int64_t r = 0; r < scored.rows; ++r) {
                normalise_row(scored.weights + r * keys.padded_keys,
                              scored.score_grads + r * keys.padded_keys, keys.padded_keys,
                              1 / states[r].sum, deltas[r], gate);
            }
            const int64_t offset = block * key_block * padded_dim;
            scored.query_gradients(keys, s.d_q, block > first);
            scored.key_gradients(keys, sums + offset, d_v_sums + offset, block < first_unpacked);
        }
        this->write_query_gradients(c, kv_head, begin, queries.rows, s.d_q);
        return d_gate;
    }
    // After the last block of the task that the chunk sees.
    static int64_t end_block(const BackwardTask &task, const Chunk &c) {
        return (c.stop - task.start + key_block - 1) / key_block;
    }

    // Returns what the task adds to the gradient of tanh(gate).
    Real backward_task(const BackwardTask &task, int64_t kv_head, TaskScratch &s,
                       Real *partial_sums) const {
        const bool is_partial = task.partial >= 0;
        Real *sums =
            is_partial ? partial_sums + this->partial_offset(task, task.start, kv_head) : s.sums;
        Real d_gate = 0;
        int64_t first_unpacked = 0;
        for (int64_t chunk = task.begin; chunk < task.end; ++chunk) {
            const Chunk &c = plan.chunks[chunk];
            for (int64_t r = 0; r < this->rows_of(c); r += score_rows) {
                d_gate += backward_rows(task, c, kv_head, r, first_unpacked, s, sums);
                first_unpacked = bigger(first_unpacked, end_block(task, c));
            }
        }
        if (!is_partial) {
            const int64_t keys = task.stop - task.start;
            this->write_key_gradients(task.row, task.start, keys, kv_head, sums,
                                      sums + keys * padded_dim);
        }
        return d_gate;
    }

    bool run() const {
        this->clear_unattended();
        const int64_t tasks = plan.task_count * p.kv_heads;
        Allocated<Partials> partials(*this);
        const bool ok = partials.ok() &&
                        run_tasks<TaskScratch>(
                            tasks, this->threads(),
                            [&](int64_t i, TaskScratch &s) {
                                partials->d_gates[i] = backward_task(
                                    plan.tasks[i / p.kv_heads], i % p.kv_heads, s, partials->sums);
                            },
                            *this);
        if (!ok || !this->finish_keys(partials->sums)) {
            return false;
        }
        this->write_gate_gradient(partials->d_gates, tasks);
        return true;
    }
};

// For ranges of many keys: a first pass leaves the log-sum and the delta of each row, a second one
// goes through blocks of keys, for all rows that see them. It computes the scores twice, and keeps
// no more than a block of them.
template <typename T> struct WideBackward : Backward<T> {
    using typename Media<T>::Real;
    using Backward<T>::Backward;
    using Backward<T>::most_keys;
    using Media<T>::p;
    using Media<T>::plan;
    using Media<T>::group;
    using Media<T>::padded_dim;
    using Media<T>::gate;

    // Shares of the blocks of a task that have sums of d_q of their own: enough to share the work,
    // few enough to bound the memory.
    const int64_t shares = bigger(1, smaller(8, 16 / bigger(p.rows * p.kv_heads, 1)));

    // Rows are [B, kv_heads, T, group], grouped by chunk: first_row.
    struct Statistics {
        Real *log_sums, *deltas; // [rows]
        Real *d_q;               // [shares, rows, padded_dim]

        Statistics(Scratch &scratch, const WideBackward &m)
            : log_sums(scratch.take<Real>(m.all_rows())), deltas(scratch.take<Real>(m.all_rows())),
              d_q(scratch.take<Real>(m.shares * m.all_rows() * m.padded_dim)) {}
    };
    int64_t all_rows() const { return p.rows * p.tokens * p.heads; }
    int64_t first_row(const Chunk &c, int64_t kv_head) const {
        return ((c.row * p.kv_heads + kv_head) * p.tokens + c.begin) * group;
    }

    struct TaskScratch {
        KeyBlock<Real> keys;
        QueryRows<Real> queries;
        RowState<Real> *states; // [rows of a chunk]
        Real *q, *d_out;        // [rows of a chunk, padded_dim]
        Real *d_k, *d_v;        // [most_keys, padded_dim]

        TaskScratch(Scratch &scratch, const WideBackward &m)
            : keys(scratch, m.most_keys, m.p.head_dim,
                   scratch.take<Real>(m.most_keys * m.padded_dim)),
              queries(scratch, m.most_keys, m.p.head_dim) {
            const int64_t rows = m.group * m.plan.longest_chunk;
            states = scratch.take<RowState<Real>>(rows);
            q = scratch.take<Real>(rows * m.padded_dim);
            d_out = scratch.take<Real>(rows * m.padded_dim);
            d_k = scratch.take<Real>(m.most_keys * m.padded_dim);
            d_v = scratch.take<Real>(m.most_keys * m.padded_dim);
        }
    };

    // Scores of rows `begin`, ... of a chunk against the packed keys from `key` on, and gradients
    // of their weights.
    void score(const QueryRows<Real> &queries, const KeyBlock<Real> &keys, const Chunk &c,
               int64_t begin, int64_t key) const {
        queries.scores(keys, p.head_dim);
        this->hide(queries.weights, queries.rows, keys.padded_keys, c, begin, key, keys.keys);
        queries.weight_gradients(keys, p.head_dim);
    }

    // The first pass, for one chunk.
    void find_log_sums(const Chunk &c, int64_t kv_head, TaskScratch &s,
                       const Statistics &to) const {
        const int64_t rows = this->rows_of(c), at = first_row(c, kv_head);
        QueryRows<Real> queries = s.queries;
        for (int64_t r = 0; r < rows; r += score_rows) {
            queries.q = s.q + r * padded_dim, queries.d_out = s.d_out + r * padded_dim;
            this->pack_rows_of(c, kv_head, r, queries);
        }
        clear_states(s.states, rows);
        Real *deltas = to.deltas + at;
        clear(deltas, rows);
        for (int64_t key = c.start; key < c.stop; key += key_block) {
            this->pack(s.keys, c.row, key, smaller(key_block, c.stop - key), kv_head);
            for (int64_t r = 0; r < rows; r += score_rows) {
                queries.q = s.q + r * padded_dim, queries.d_out = s.d_out + r * padded_dim;
                queries.rows = smaller(score_rows, rows - r);
                score(queries, s.keys, c, r, key);
                Real rescale[score_rows];
                online_softmax(queries.weights, queries.rows, s.keys.keys, s.keys.padded_keys,
                               s.states + r, rescale);
                for (int64_t i = 0; i < queries.rows; ++i) {
                    const int64_t row = i * s.keys.padded_keys;
                    deltas[r + i] = deltas[r + i] * rescale[i] +
                                    weighted_sum(queries.weights + row, queries.score_grads + row,
                                                 s.keys.padded_keys);
                }
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            to.log_sums[at + r] = s.states[r].log_sum();
            deltas[r] /= s.states[r].sum;
        }
    }

    // The second pass, for one block of a task's keys: writes their gradients, adds to d_q.
    void backward_block(const BackwardTask &task, int64_t key, int64_t kv_head, TaskScratch &s,
                        const Statistics &rows, Real *d_q) const {
        const int64_t count = smaller(key_block, task.stop - key);
        this->pack(s.keys, task.row, key, count, kv_head);
        clear(s.d_k, count * padded_dim);
        clear(s.d_v, count * padded_dim);
        for (int64_t chunk = task.begin; chunk < task.end; ++chunk) {
            const Chunk &c = plan.chunks[chunk];
            if (c.stop <= key || key + count <= c.start) {
                continue;
            }
            const int64_t at = first_row(c, kv_head);
            for (int64_t r = 0; r < this->rows_of(c); r += score_rows) {
                this->pack_rows_of(c, kv_head, r, s.queries);
                score(s.queries, s.keys, c, r, key);
                for (int64_t i = 0; i < s.queries.rows; ++i) {
                    Real *weights = s.queries.weights + i * s.keys.padded_keys;
                    Real *d_weights = s.queries.score_grads + i * s.keys.padded_keys;
                    weigh_row(weights, count, s.keys.padded_keys, rows.log_sums[at + r + i]);
                    normalise_row(weights, d_weights, s.keys.padded_keys, Real(1),
                                  rows.deltas[at + r + i], gate);
                }
                s.queries.query_gradients(s.keys, d_q + (at + r) * padded_dim, true);
                s.queries.key_gradients(s.keys, s.d_k, s.d_v, true);
            }
        }
        this->write_key_gradients(task.row, key, count, kv_head, s.d_k, s.d_v);
    }

    // Adds the shares of d_q of a chunk in order, and writes it.
    void finish_queries(const Chunk &c, int64_t kv_head, const Statistics &rows) const {
        Real *sums = rows.d_q + first_row(c, kv_head) * padded_dim;
        const int64_t count = this->rows_of(c) * padded_dim;
        for (int64_t share = 1; share < shares; ++share) {
            const Real *from = sums + share * all_rows() * padded_dim;
            for (int64_t d = 0; d < count; d += lanes<Real>) {
                store(sums + d, load(sums + d) + load(from + d));
            }
        }
        this->write_query_gradients(c, kv_head, 0, this->rows_of(c), sums);
    }

    bool run() const {
        this->clear_unattended();
        Allocated<Statistics> rows(*this);
        if (!rows.ok()) {
            return false;
        }
        const int64_t chunks = plan.attended_count * p.kv_heads;
        bool ok = run_tasks<TaskScratch>(
            chunks, this->threads(),
            [&](int64_t i, TaskScratch &s) {
                const Chunk &c = plan.chunks[i / p.kv_heads];
                find_log_sums(c, i % p.kv_heads, s, *rows);
                for (int64_t share = 0; share < shares; ++share) {
                    const int64_t row = share * all_rows() + first_row(c, i % p.kv_heads);
                    clear(rows->d_q + row * padded_dim, this->rows_of(c) * padded_dim);
                }
            },
            *this);
        ok = ok && run_tasks<TaskScratch>(
                       plan.task_count * p.kv_heads * shares, this->threads(),
                       [&](int64_t i, TaskScratch &s) {
                           const int64_t share = i % shares, kv_head = i / shares % p.kv_heads;
                           const BackwardTask &task = plan.tasks[i / shares / p.kv_heads];
                           const int64_t blocks =
                               (task.stop - task.start + key_block - 1) / key_block;
                           const int64_t begin = blocks * share / shares;
                           const int64_t end = blocks * (share + 1) / shares;
                           for (int64_t block = begin; block < end; ++block) {
                               backward_block(task, task.start + block * key_block, kv_head, s,
                                              *rows, rows->d_q + share * all_rows() * padded_dim);
                           }
                       },
                       *this);
        if (!ok || !this->finish_keys(nullptr)) {
            return false;
        }
#pragma omp parallel for num_threads(this->threads()) schedule(dynamic)
        for (int64_t i = 0; i < chunks; ++i) {
            finish_queries(plan.chunks[i / p.kv_heads], i % p.kv_heads, *rows);
        }
        write_gate_sums(*rows);
        return true;
    }
    // The gradient of the gate, chunk by chunk.
    void write_gate_sums(const Statistics &rows) const {
        if (!p.d_gate) {
            return;
        }
        Real sum = 0;
        for (int64_t i = 0; i < plan.attended_count * p.kv_heads; ++i) {
            const Chunk &c = plan.chunks[i / p.kv_heads];
            const Real *deltas = rows.deltas + first_row(c, i % p.kv_heads);
            Real of_chunk = 0;
            for (int64_t r = 0; r < this->rows_of(c); ++r) {
                of_chunk += deltas[r];
            }
            sum += of_chunk;
        }
        this->write_gate_gradient(&sum, 1);
    }
};

} // namespace

bool flamingo::FLAMINGO_ISA::media_attention_backward(const flamingo_media_attention_params &p,
                                                      const TaskPlan &plan) {
    return with_storage_type(p.execution.dtype, [&](auto zero) {
        using T = decltype(zero);
        return plan.wide ? WideBackward<T>(p, plan).run() : NarrowBackward<T>(p, plan).run();
    });
}
