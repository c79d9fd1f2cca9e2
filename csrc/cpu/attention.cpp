// Entry points of the attention kernels: validation, the plan, the instruction set.
#include <algorithm>
#include <new>
#include <vector>

#include "kernels.h"
#include "validate.h"

namespace {

using flamingo::Chunk;
using flamingo::MediaPlan;
using flamingo::Part;
using flamingo::PartRange;

using MediaParams = flamingo_media_attention_params;
using LatentParams = flamingo_latent_attention_params;

// Most tokens in a chunk: enough to pay for packing the keys, few enough to share the work.
constexpr int64_t longest_chunk = 256;
constexpr int64_t shortest_chunk = 48;
constexpr int64_t wanted_tasks = 64;

struct Plan : MediaPlan {
    std::vector<Chunk> storage;
    std::vector<Part> part_storage;
    std::vector<PartRange> of_item;

    Plan(const MediaParams &p, bool backward) : MediaPlan{} {
        const int64_t share = p.rows * p.tokens * p.kv_heads / wanted_tasks;
        const int64_t limit = std::min(longest_chunk, std::max(shortest_chunk, share));
        longest = 1;
        std::vector<Chunk> blind;
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
                longest = std::max(longest, end - begin);
                if (c.first > c.last || p.latents == 0 || p.heads == 0) {
                    c.first = 0, c.last = -1;
                    blind.push_back(c);
                } else {
                    storage.push_back(c);
                }
            }
        }
        std::stable_sort(storage.begin(), storage.end(), [](const Chunk &a, const Chunk &b) {
            return a.row != b.row ? a.row < b.row : a.first < b.first;
        });
        seeing_count = static_cast<int64_t>(storage.size());
        storage.insert(storage.end(), blind.begin(), blind.end());
        chunks = storage.data();
        chunk_count = static_cast<int64_t>(storage.size());
        if (backward) {
            divide(p);
        }
    }

  private:
    static int64_t cost(const Chunk &c) { return (c.end - c.begin) * (c.last + 1 - c.first); }

    // A part ends when it costs a task's fair share, where the next chunk has no item in common
    // with it, and before it sees more than twice the items of its widest chunk, which bounds a
    // task's scratch. Where a batch row has ranges of about one width, shares hold at most about
    // wanted_tasks + B * Hkv times the d_k and d_v of a batch row's kv head.
    void divide(const MediaParams &p) {
        int64_t total = 0, part_cost = 0, widest_chunk = 0;
        for (int64_t i = 0; i < seeing_count; ++i) {
            total += cost(chunks[i]);
        }
        for (int64_t i = 0; i < seeing_count; ++i) {
            const Chunk &c = chunks[i];
            const int64_t width = c.last + 1 - c.first;
            widest_chunk = std::max(widest_chunk, width);
            if (part_storage.empty() || part_storage.back().row != c.row ||
                part_storage.back().last < c.first ||
                c.last + 1 - part_storage.back().first > 2 * widest_chunk ||
                part_cost * wanted_tasks >= total * p.kv_heads) {
                part_storage.push_back({c.row, i, i, c.first, c.last, -1});
                part_cost = 0;
                widest_chunk = width;
            }
            Part &part = part_storage.back();
            part.end = i + 1;
            part.last = std::max(part.last, c.last);
            part_cost += cost(c);
            widest = std::max(widest, part.last + 1 - part.first);
        }
        part_count = static_cast<int64_t>(part_storage.size());
        of_item.assign(p.rows * p.media, {0, 0});
        for (int64_t i = 0; i < part_count; ++i) {
            const Part &part = part_storage[i];
            for (int64_t item = part.first; item <= part.last; ++item) {
                PartRange &range = of_item[part.row * p.media + item];
                range = {range.end ? range.begin : i, i + 1};
            }
        }
        for (Part &part : part_storage) {
            const PartRange *items = of_item.data() + part.row * p.media;
            if (std::any_of(items + part.first, items + part.last + 1,
                            [](const PartRange &range) { return range.end - range.begin > 1; })) {
                part.slot = slots;
                slots += part.last + 1 - part.first;
            }
        }
        parts = part_storage.data();
        item_parts = of_item.data();
    }
};

int32_t validate(const MediaParams &p, bool backward) {
    const int64_t sizes[] = {p.rows, p.tokens, p.media, p.latents, p.heads, p.kv_heads, p.head_dim};
    if (flamingo::has_negative(sizes, 7)) {
        return FLAMINGO_NEGATIVE_SIZE;
    }
    if (p.heads > 0 && (p.kv_heads == 0 || p.heads % p.kv_heads != 0)) {
        return FLAMINGO_HEADS_NOT_DIVISIBLE;
    }
    const bool has_tokens = p.rows > 0 && p.tokens > 0;
    const bool has_queries = has_tokens && p.heads > 0 && p.head_dim > 0;
    const bool has_keys =
        p.rows > 0 && p.heads > 0 && p.head_dim > 0 && p.media > 0 && p.latents > 0;
    const void *written = backward ? p.d_q.data : p.out.data;
    if ((has_tokens && (!p.first || !p.last)) || (has_queries && (!p.q.data || !written)) ||
        (backward && has_queries && !p.d_out.data) ||
        (has_queries && has_keys && (!p.k.data || !p.v.data)) ||
        (backward && has_keys && (!p.d_k.data || !p.d_v.data)) ||
        (backward && p.gate && !p.d_gate)) {
        return FLAMINGO_NULL_POINTER;
    }
    return flamingo::validate(p.execution);
}

int32_t validate(const LatentParams &p, bool backward) {
    const int64_t sizes[] = {p.items, p.latents, p.features, p.heads, p.head_dim};
    if (flamingo::has_negative(sizes, 5)) {
        return FLAMINGO_NEGATIVE_SIZE;
    }
    if (p.items > 0 && p.latents > 0 && p.heads > 0) {
        bool missing = backward && !p.lse;
        if (p.head_dim > 0) {
            missing = missing || !p.q.data || !p.k_latents.data || !p.v_latents.data || !p.out.data;
            missing = missing || (p.features > 0 && (!p.k_media.data || !p.v_media.data));
            if (backward) {
                missing = missing || !p.d_out.data || !p.d_q.data || !p.d_k_latents.data ||
                          !p.d_v_latents.data;
                missing = missing || (p.features > 0 && (!p.d_k_media.data || !p.d_v_media.data));
            }
        }
        if (missing) {
            return FLAMINGO_NULL_POINTER;
        }
    }
    return flamingo::validate(p.execution);
}

// Runs `call`, with failed allocations as a status.
template <typename Call> int32_t guarded(Call call) {
    try {
        return call() ? FLAMINGO_OK : FLAMINGO_OUT_OF_MEMORY;
    } catch (const std::bad_alloc &) {
        return FLAMINGO_OUT_OF_MEMORY;
    }
}

} // namespace

int32_t flamingo_media_attention_forward(const MediaParams *params) {
    const MediaParams &p = *params;
    const int32_t status = validate(p, false);
    if (status != FLAMINGO_OK || p.rows * p.tokens * p.heads * p.head_dim == 0) {
        return status;
    }
    return guarded([&] {
        return FLAMINGO_RUN_KERNEL(p.execution.instruction_set, media_attention_forward, p,
                                   Plan(p, false));
    });
}

int32_t flamingo_media_attention_backward(const MediaParams *params) {
    const MediaParams &p = *params;
    const int32_t status = validate(p, true);
    // Without a query there are still d_k and d_v to clear.
    if (status != FLAMINGO_OK || p.rows * p.kv_heads * p.head_dim == 0) {
        return status;
    }
    return guarded([&] {
        return FLAMINGO_RUN_KERNEL(p.execution.instruction_set, media_attention_backward, p,
                                   Plan(p, true));
    });
}

int32_t flamingo_latent_attention_forward(const LatentParams *params) {
    const LatentParams &p = *params;
    const int32_t status = validate(p, false);
    if (status != FLAMINGO_OK || p.items * p.latents * p.heads * p.head_dim == 0) {
        return status;
    }
    return guarded([&] {
        return FLAMINGO_RUN_KERNEL(p.execution.instruction_set, latent_attention_forward, p);
    });
}

int32_t flamingo_latent_attention_backward(const LatentParams *params) {
    const LatentParams &p = *params;
    const int32_t status = validate(p, true);
    if (status != FLAMINGO_OK || p.items * p.heads * p.head_dim == 0) {
        return status;
    }
    return guarded([&] {
        return FLAMINGO_RUN_KERNEL(p.execution.instruction_set, latent_attention_backward, p);
    });
}

double flamingo_multiply_add_rate(const flamingo_execution *execution, double seconds) {
    if (flamingo::validate(*execution) != FLAMINGO_OK) {
        return 0;
    }
    return FLAMINGO_RUN_KERNEL(execution->instruction_set, multiply_add_rate, *execution, seconds);
}
