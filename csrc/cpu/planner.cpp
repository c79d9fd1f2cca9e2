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
// Query rows whose products take as long as packing the keys for them.
constexpr int64_t packing_rows = 48;
// Keys of a part of a chunk, where there are only a few tokens to share among threads.
constexpr int64_t split_keys_size = 512;
constexpr int64_t few_tokens = 16;
// Keys of a chunk above which a task of the backward cannot keep all scores and packed keys in a
// cache.
constexpr int64_t narrow_keys = 2048;

template <typename T> int64_t size_of(const std::vector<T> &values) {
    return static_cast<int64_t>(values.size());
}

struct KeyRange {
    int64_t start, stop;

    int64_t size() const { return stop - start; }
    bool empty() const { return stop <= start; }
    bool operator==(const KeyRange &other) const {
        return start == other.start && stop == other.stop;
    }
    bool overlaps(const KeyRange &other) const { return start < other.stop && other.start < stop; }
    KeyRange united(const KeyRange &other) const {
        return {std::min(start, other.start), std::max(stop, other.stop)};
    }
};

// The keys that tokens see, clipped to those there are; {0, 0} for none.
class Ranges {
  public:
    Ranges(const Params &p, int64_t row)
        : p_(p), first_(p.first + row * p.tokens), last_(p.last + row * p.tokens) {}

    KeyRange operator[](int64_t t) const {
        const KeyRange items = {std::max<int64_t>(first_[t], 0),
                                std::min<int64_t>(last_[t], p_.media - 1) + 1};
        return items.empty() || p_.heads == 0 || p_.latents == 0
                   ? KeyRange{0, 0}
                   : KeyRange{items.start * p_.latents, items.stop * p_.latents};
    }
    int64_t end_of_run(int64_t begin) const {
        int64_t end = begin + 1;
        while (end < p_.tokens && (*this)[end] == (*this)[begin]) {
            ++end;
        }
        return end;
    }

  private:
    const Params &p_;
    const int32_t *first_, *last_;
};

int64_t cost_of(const Chunk &c) { return (c.end - c.begin) * (c.stop - c.start); }

} // namespace

Planner::Planner(const Params &p, bool backward) {
    cut_chunks(p);
    if (!backward) {
        split_keys(p);
        return;
    }
    group_tasks(p);
    place_partials(p);
}

TaskPlan Planner::plan() const {
    TaskPlan plan = plan_;
    plan.chunks = chunks_.data();
    plan.chunk_count = size_of(chunks_);
    plan.forward_tasks = forward_tasks_.data();
    plan.forward_count = size_of(forward_tasks_);
    plan.tasks = tasks_.data();
    plan.task_count = size_of(tasks_);
    plan.cells = cells_.data();
    return plan;
}

// A group takes in the next run of tokens with one range where that saves more time for packing
// keys than the products with keys that a token does not see cost. Ranges that share no key are
// never joined. Groups depend on nothing but the ranges; the pieces that they are cut into depend
// on the batch too.
void Planner::cut_chunks(const Params &p) {
    const int64_t fair_share = p.rows * p.tokens * p.kv_heads / wanted_tasks;
    const int64_t limit = std::min(most_tokens, std::max(least_tokens, fair_share));
    const int64_t packing =
        p.heads == 0 ? 0 : std::max<int64_t>(1, packing_rows * p.kv_heads / p.heads);
    std::vector<Chunk> unattended;
    for (int64_t b = 0; b < p.rows; ++b) {
        const Ranges ranges(p, b);
        for (int64_t begin = 0, end = 0; begin < p.tokens; begin = end) {
            KeyRange keys = ranges[begin];
            end = ranges.end_of_run(begin);
            bool uniform = true;
            while (end < p.tokens && !keys.empty()) {
                const KeyRange next = ranges[end], both = keys.united(next);
                const int64_t next_end = ranges.end_of_run(end);
                const int64_t joined = (next_end - begin + packing) * both.size();
                const int64_t apart = (end - begin + packing) * keys.size() +
                                      (next_end - end + packing) * next.size();
                if (!keys.overlaps(next) || next_end - begin > most_tokens || joined > apart) {
                    break;
                }
                keys = both, end = next_end, uniform = false;
            }
            for (int64_t t = begin; t < end; t += limit) {
                Chunk c = {b,           t,          std::min(end, t + limit),
                           keys.start,  keys.start, keys.stop,
                           end - begin, uniform};
                if (!uniform) {
                    KeyRange seen = ranges[t];
                    for (int64_t i = t + 1; i < c.end; ++i) {
                        seen = seen.united(ranges[i]);
                    }
                    c.start = seen.start, c.stop = seen.stop;
                }
                plan_.longest_chunk = std::max(plan_.longest_chunk, c.end - c.begin);
                plan_.widest_chunk = std::max(plan_.widest_chunk, c.stop - c.start);
                plan_.pairs += cost_of(c);
                (keys.empty() ? unattended : chunks_).push_back(c);
            }
        }
    }
    std::stable_sort(chunks_.begin(), chunks_.end(), [](const Chunk &a, const Chunk &b) {
        return a.row != b.row ? a.row < b.row : a.start < b.start;
    });
    plan_.attended_count = size_of(chunks_);
    chunks_.insert(chunks_.end(), unattended.begin(), unattended.end());
}

// Where a row has few tokens, the keys of a chunk are shared out instead.
void Planner::split_keys(const Params &p) {
    const int64_t size = p.tokens <= few_tokens ? split_keys_size : INT64_MAX / 2;
    for (int64_t i = 0; i < size_of(chunks_); ++i) {
        const Chunk &c = chunks_[i];
        if (c.stop - c.start <= size) {
            forward_tasks_.push_back({i, c.start, c.stop, -1});
            continue;
        }
        for (int64_t start = c.base; start < c.stop; start += size) {
            forward_tasks_.push_back({i, std::max(start, c.start), std::min(start + size, c.stop),
                                      plan_.partial_tokens});
            plan_.partial_tokens += c.end - c.begin;
        }
    }
}

// A task ends before a chunk that shares no key with it. Where no chunk is wide it also ends once
// it costs its fair share, and before it sees more than twice the keys of its widest chunk, which
// bounds the scratch of a task: then all partial sums take at most about wanted_tasks + B * Hkv
// times the memory of d_k and d_v of one batch row and kv head.
void Planner::group_tasks(const Params &p) {
    plan_.wide = plan_.widest_chunk > narrow_keys;
    int64_t task_cost = 0, widest_chunk = 0;
    for (int64_t i = 0; i < plan_.attended_count; ++i) {
        const Chunk &c = chunks_[i];
        widest_chunk = std::max(widest_chunk, c.stop - c.start);
        const bool apart =
            tasks_.empty() || tasks_.back().row != c.row || tasks_.back().stop <= c.start;
        if (apart || (!plan_.wide && (c.stop - tasks_.back().start > 2 * widest_chunk ||
                                      task_cost * wanted_tasks >= plan_.pairs * p.kv_heads))) {
            tasks_.push_back({c.row, i, i, c.start, c.stop, -1});
            task_cost = 0;
            widest_chunk = c.stop - c.start;
        }
        BackwardTask &task = tasks_.back();
        task.end = i + 1;
        task.stop = std::max(task.stop, c.stop);
        task_cost += cost_of(c);
        plan_.widest_task = std::max(plan_.widest_task, task.stop - task.start);
    }
}

// Finds the tasks of every cell, and gives partial sums to each task that shares a key with
// another.
void Planner::place_partials(const Params &p) {
    plan_.cells_of_row = (p.media * p.latents + cell_keys - 1) / cell_keys;
    cells_.assign(p.rows * plan_.cells_of_row, {0, 0});
    for (int64_t i = 0, shared_until = 0; i < size_of(tasks_); ++i) {
        BackwardTask &task = tasks_[i];
        for (int64_t cell = task.start / cell_keys; cell <= (task.stop - 1) / cell_keys; ++cell) {
            TaskRange &range = cells_[task.row * plan_.cells_of_row + cell];
            range = {range.end ? range.begin : i, i + 1};
        }
        // Tasks are in the order of their first keys.
        if (i == 0 || tasks_[i - 1].row != task.row) {
            shared_until = 0;
        }
        const bool before = task.start < shared_until;
        const bool after = i + 1 < size_of(tasks_) && tasks_[i + 1].row == task.row &&
                           tasks_[i + 1].start < task.stop;
        if (before || after) {
            task.partial = plan_.partial_count;
            plan_.partial_count += task.stop - task.start;
        }
        shared_until = std::max(shared_until, task.stop);
    }
}

} // namespace flamingo
