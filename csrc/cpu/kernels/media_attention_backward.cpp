// Backward of media attention: a task computes the gradients of neighbouring chunks for one kv
// head. Where tasks share media items, each writes partial sums of their d_k and d_v, which are
// added in the order of tasks.
#include "../kernels.h"
#include "media_attention.h"
#include "query_rows.h"
#include "softmax.h"
#include "storage_type.h"

namespace {

using flamingo::BackwardTask;
using flamingo::Chunk;
using flamingo::TaskPlan;

template <typename T> struct MediaBackward : Media<T> {
    using typename Media<T>::Real;
    using Media<T>::Media;
    using Media<T>::p;
    using Media<T>::group;
    using Media<T>::padded_dim;
    using Media<T>::blocks;
    using Media<T>::scale;
    using Media<T>::gate;

    // Values of the sums of one item and kv head: d_k, then d_v, both [R, padded_dim], without
    // scale and gate.
    int64_t partial_size() const { return 2 * p.latents * padded_dim; }

    // What tasks leave for the end.
    struct Partials {
        Real *sums;    // [partial_count, kv_heads, partial_size], grouped by task
        Real *d_gates; // [tasks]: of tanh(gate)

        Partials(Scratch &scratch, const MediaBackward &m, const TaskPlan &plan)
            : sums(scratch.take<Real>(plan.partial_count * m.p.kv_heads * m.partial_size())),
              d_gates(scratch.take<Real>(plan.task_count * m.p.kv_heads)) {}
    };

    // Where the partial sums of a task's item are.
    int64_t partial_offset(const BackwardTask &task, int64_t item, int64_t kv_head) const {
        const int64_t items = task.last + 1 - task.first;
        return (task.partial * p.kv_heads + items * kv_head + item - task.first) * partial_size();
    }

    // What a task works in. For each key that it sees these are three packed copies (K and the
    // transposes of K and V), two sums of gradients, and two columns of score_rows scores.
    struct TaskScratch {
        KeyBlock<Real> *keys;    // [widest_task * blocks]
        QueryRows<Real> queries; // with scores against as many blocks
        Real *d_q;               // [score_rows, padded_dim]
        Real *sums;              // [widest_task, partial_size], unless they are partial sums

        TaskScratch(Scratch &scratch, const MediaBackward &m, int64_t widest_task)
            : keys(scratch.take<KeyBlock<Real>>(widest_task * m.blocks)),
              queries(scratch, m.most_keys, m.p.head_dim, widest_task * m.blocks),
              d_q(scratch.take<Real>(score_rows * m.padded_dim)),
              sums(scratch.take<Real>(widest_task * m.partial_size())) {
            Real *v_buffer = scratch.take<Real>(m.most_keys * m.padded_dim);
            for (int64_t i = 0; i < widest_task * m.blocks; ++i) {
                const KeyBlock<Real> block(scratch, m.most_keys, m.p.head_dim, v_buffer);
                if (keys) {
                    keys[i] = block;
                }
            }
        }
    };

    void write_key_gradients(int64_t b, int64_t item, int64_t kv_head, const Real *sums) const {
        const Rows<T> d_k = media_rows<T>(p.d_k, b, item, 0, kv_head);
        const Rows<T> d_v = media_rows<T>(p.d_v, b, item, 0, kv_head);
        for (int64_t r = 0; r < p.latents; ++r) {
            narrow_row(sums + r * padded_dim, scale, d_k[r], p.head_dim);
            narrow_row(sums + (p.latents + r) * padded_dim, gate, d_v[r], p.head_dim);
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

    // Computes up to score_rows rows of a chunk, from `begin` on, with the scores of all keys of
    // its range at once: writes their d_q and adds to `sums`. Blocks of the task from
    // `first_unpacked` on are not packed yet and have no sums. Returns what the rows add to the
    // gradient of tanh(gate).
    Real backward_rows(const BackwardTask &task, const Chunk &c, int64_t kv_head, int64_t begin,
                       int64_t first_unpacked, TaskScratch &s, Real *sums) const {
        QueryRows<Real> &queries = s.queries;
        queries.rows = smaller(score_rows, group * (c.end - c.begin) - begin);
        for_each_head(
            c, kv_head, begin, queries.rows, [&](int64_t h, int64_t t, int64_t r, int64_t n) {
                queries.template pack<T>(r, text_rows<const T>(p.q, c.row, t, h),
                                         text_rows<const T>(p.d_out, c.row, t, h), n, p.head_dim);
            });
        RowState<Real> states[score_rows];
        clear_states(states, queries.rows);
        const int64_t first = (c.first - task.first) * blocks;
        const int64_t end = (c.last + 1 - task.first) * blocks;
        for (int64_t block = first; block < end; ++block) {
            KeyBlock<Real> &keys = s.keys[block];
            if (block >= first_unpacked) {
                this->pack(keys, c.row, task.first + block / blocks, block % blocks, kv_head);
            }
            const QueryRows<Real> scored = queries.of_block(block);
            scored.scores(keys, p.head_dim);
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
        for (int64_t block = first; block < end; ++block) {
            const KeyBlock<Real> &keys = s.keys[block];
            const QueryRows<Real> scored = queries.of_block(block);
            for (int64_t r = 0; r < scored.rows; ++r) {
                normalise_row(scored.weights + r * keys.padded_keys,
                              scored.score_grads + r * keys.padded_keys, keys.padded_keys,
                              1 / states[r].sum, deltas[r], gate);
            }
            Real *d_k =
                sums + block / blocks * partial_size() + block % blocks * key_block * padded_dim;
            scored.query_gradients(keys, s.d_q, block > first);
            scored.key_gradients(keys, d_k, d_k + p.latents * padded_dim, block < first_unpacked);
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

    // Returns what the task adds to the gradient of tanh(gate).
    Real backward_task(const TaskPlan &plan, const BackwardTask &task, int64_t kv_head,
                       TaskScratch &s, Real *partial_sums) const {
        const bool is_partial = task.partial >= 0;
        Real *sums = is_partial ? partial_sums + partial_offset(task, task.first, kv_head) : s.sums;
        Real d_gate = 0;
        int64_t first_unpacked = 0;
        for (int64_t chunk = task.begin; chunk < task.end; ++chunk) {
            const Chunk &c = plan.chunks[chunk];
            for (int64_t r = 0; r < group * (c.end - c.begin); r += score_rows) {
                d_gate += backward_rows(task, c, kv_head, r, first_unpacked, s, sums);
                first_unpacked = bigger(first_unpacked, (c.last + 1 - task.first) * blocks);
            }
        }
        for (int64_t item = task.first; item <= task.last && !is_partial; ++item) {
            write_key_gradients(task.row, item, kv_head,
                                sums + (item - task.first) * partial_size());
        }
        return d_gate;
    }

    // Writes d_k and d_v of an item, unless its only task did: the sum of its partial sums in the
    // order of tasks, or zeros if no token sees it. `index` counts the items of all batch rows.
    void add_partials(const TaskPlan &plan, int64_t index, int64_t kv_head,
                      Real *partial_sums) const {
        const int64_t b = index / p.media, item = index % p.media;
        const flamingo::TaskRange range = plan.item_tasks[index];
        Real *sums = nullptr;
        for (int64_t i = range.begin; i < range.end; ++i) {
            const BackwardTask &task = plan.tasks[i];
            if (item < task.first || item > task.last) {
                continue;
            }
            if (task.partial < 0) {
                return;
            }
            Real *partial = partial_sums + partial_offset(task, item, kv_head);
            if (sums) {
                for (int64_t d = 0; d < partial_size(); d += lanes<Real>) {
                    store(sums + d, load(sums + d) + load(partial + d));
                }
            } else {
                sums = partial;
            }
        }
        if (sums) {
            write_key_gradients(b, item, kv_head, sums);
            return;
        }
        for (int64_t r = 0; r < p.latents; ++r) {
            clear(media_rows<T>(p.d_k, b, item, r, kv_head).data, p.head_dim);
            clear(media_rows<T>(p.d_v, b, item, r, kv_head).data, p.head_dim);
        }
    }

    bool run(const TaskPlan &plan) const {
        for (int64_t chunk = plan.attended_count; chunk < plan.chunk_count; ++chunk) {
            for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
                this->write_zeros(p.d_q, plan.chunks[chunk], kv_head);
            }
        }
        const int64_t tasks = plan.task_count * p.kv_heads;
        const int64_t items = p.rows * p.media * p.kv_heads;
        Allocated<Partials> partials(*this, plan);
        if (!partials.ok()) {
            return false;
        }
        const bool ok = run_tasks<TaskScratch>(
            tasks, this->threads(),
            [&](int64_t i, TaskScratch &s) {
                partials->d_gates[i] = backward_task(plan, plan.tasks[i / p.kv_heads],
                                                     i % p.kv_heads, s, partials->sums);
            },
            *this, plan.widest_task);
        if (!ok) {
            return false;
        }
#pragma omp parallel for num_threads(this->threads()) schedule(dynamic)
        for (int64_t i = 0; i < items; ++i) {
            add_partials(plan, i / p.kv_heads, i % p.kv_heads, partials->sums);
        }
        if (p.d_gate) {
            Real d_tanh = 0;
            for (int64_t task = 0; task < tasks; ++task) {
                d_tanh += partials->d_gates[task];
            }
            *static_cast<Real *>(p.d_gate) = d_tanh * (1 - gate * gate);
        }
        return true;
    }
};

} // namespace

bool flamingo::FLAMINGO_ISA::media_attention_backward(const flamingo_media_attention_params &p,
                                                      const TaskPlan &plan) {
    return with_storage_type(p.execution.dtype,
                             [&](auto zero) { return MediaBackward<decltype(zero)>(p).run(plan); });
}
