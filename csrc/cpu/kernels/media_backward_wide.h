// Backward of media attention for ranges of many keys: a first pass leaves the log-sum and the
// delta of each row, a second one goes through blocks of keys, for all rows that see them. It
// computes the scores twice, and keeps no more than a block of them.
#pragma once

#include "media_backward.h"

namespace {

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
        this->write_gate_gradient(p.d_gate ? sum_of_deltas(*rows) : Real(0));
        return true;
    }
    // Chunk by chunk: rows that see nothing have no delta.
    Real sum_of_deltas(const Statistics &rows) const {
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
        return sum;
    }
};

} // namespace
