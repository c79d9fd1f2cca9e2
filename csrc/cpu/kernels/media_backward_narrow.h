// Backward of media attention for ranges whose scores fit a cache. Tasks keep the scores of all
// keys that a chunk sees, and the packed keys of all their chunks, so that nothing is computed
// twice.
#pragma once

#include "media_backward.h"

namespace {

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
        Real d_gate = 0;
        for (int64_t task = 0; task < tasks; ++task) {
            d_gate += partials->d_gates[task];
        }
        this->write_gate_gradient(d_gate);
        return true;
    }
};

} // namespace
