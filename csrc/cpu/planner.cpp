#include "planner.h"

#include <algorithm>

namespace flamingo {

namespace {

using Params = flamingo_media_attention_params;

// Most tokens of a chunk: enough to pay for packing the keys, few enough to share the work.
constexpr int64_t most_tokens = 256;
// The same where there are too few tokens for wanted_tasks tasks.
constexpr int64_t least_tokens = 48;
constexpr int64_t wanted_tasks = 64;

int64_t items_of(const Chunk &c) { return c.last + 1 - c.first; }

int64_t cost_of(const Chunk &c) { return (c.end - c.begin) * items_of(c); }

template <typename T> int64_t size_of(const std::vector<T> &values) {
    return static_cast<int64_t>(values.size());
}

} // namespace

Planner::Planner(const Params &p, bool backward) {
    cut_chunks(p);
    if (backward) {
        group_tasks(p);
        place_partials(p);
    }
}

TaskPlan Planner::plan() const {
    TaskPlan plan{};
    plan.chunks = chunks_.data();
    plan.chunk_count = size_of(chunks_);
    plan.attended_count = attended_count_;
    plan.longest_chunk = longest_chunk_;
    plan.tasks = tasks_.data();
    plan.task_count = size_of(tasks_);
    plan.item_tasks = item_tasks_.data();
    plan.widest_task = widest_task_;
    plan.partial_count = partial_count_;
    return plan;
}

void Planner::cut_chunks(const Params &p) {
    const int64_t fair_share = p.rows * p.tokens * p.kv_heads / wanted_tasks;
    const int64_t limit = std::min(most_tokens, std::max(least_tokens, fair_share));
    std::vector<Chunk> unattended;
    for (int64_t b = 0; b < p.rows; ++b) {
        const int32_t *first = p.first + b * p.tokens, *last = p.last + b * p.tokens;
        for (int64_t begin = 0, end = 0, run = 0, run_end = 0; begin < p.tokens; begin = end) {
            if (begin == run_end) {
                while (run_end < p.tokens && first[run_end] == first[begin] &&
                       last[run_end] == last[begin]) {
                    ++run_end;
                }
                run = run_end - begin;
            }
            end = std::min(run_end, begin + limit);
            Chunk c = {b,
                       begin,
                       end,
                       std::max<int64_t>(first[begin], 0),
                       std::min<int64_t>(last[begin], p.media - 1),
                       run};
            longest_chunk_ = std::max(longest_chunk_, end - begin);
            if (c.first > c.last || p.latents == 0 || p.heads == 0) {
                c.first = 0, c.last = -1;
                unattended.push_back(c);
            } else {
                chunks_.push_back(c);
            }
        }
    }
    std::stable_sort(chunks_.begin(), chunks_.end(), [](const Chunk &a, const Chunk &b) {
        return a.row != b.row ? a.row < b.row : a.first < b.first;
    });
    attended_count_ = size_of(chunks_);
    chunks_.insert(chunks_.end(), unattended.begin(), unattended.end());
}

// A task ends before a chunk that shares no item with it, once it costs its fair share, and before
// it sees more than twice the items of its widest chunk, which bounds the scratch of a task. Where
// the ranges of a batch row are about equally wide, all partial sums take at most about
// wanted_tasks + B * Hkv times the memory of d_k and d_v of one batch row and kv head.
void Planner::group_tasks(const Params &p) {
    int64_t total_cost = 0, task_cost = 0, widest_chunk = 0;
    for (int64_t i = 0; i < attended_count_; ++i) {
        total_cost += cost_of(chunks_[i]);
    }
    for (int64_t i = 0; i < attended_count_; ++i) {
        const Chunk &c = chunks_[i];
        widest_chunk = std::max(widest_chunk, items_of(c));
        if (tasks_.empty() || tasks_.back().row != c.row || tasks_.back().last < c.first ||
            c.last + 1 - tasks_.back().first > 2 * widest_chunk ||
            task_cost * wanted_tasks >= total_cost * p.kv_heads) {
            tasks_.push_back({c.row, i, i, c.first, c.last, -1});
            task_cost = 0;
            widest_chunk = items_of(c);
        }
        BackwardTask &task = tasks_.back();
        task.end = i + 1;
        task.last = std::max(task.last, c.last);
        task_cost += cost_of(c);
        widest_task_ = std::max(widest_task_, task.last + 1 - task.first);
    }
}

// Finds the tasks of every item, and gives partial sums to each task that shares an item with
// another.
void Planner::place_partials(const Params &p) {
    item_tasks_.assign(p.rows * p.media, {0, 0});
    for (int64_t i = 0; i < size_of(tasks_); ++i) {
        const BackwardTask &task = tasks_[i];
        for (int64_t item = task.first; item <= task.last; ++item) {
            TaskRange &range = item_tasks_[task.row * p.media + item];
            range = {range.end ? range.begin : i, i + 1};
        }
    }
    for (BackwardTask &task : tasks_) {
        const TaskRange *items = item_tasks_.data() + task.row * p.media;
        if (std::any_of(items + task.first, items + task.last + 1,
                        [](const TaskRange &range) { return range.end - range.begin > 1; })) {
            task.partial = partial_count_;
            partial_count_ += task.last + 1 - task.first;
        }
    }
}

} // namespace flamingo
