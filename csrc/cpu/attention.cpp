// Entry points of the attention kernels: they validate, plan and choose the instruction set.
#include <new>

#include "kernels.h"
#include "planner.h"
#include "validate.h"

namespace {

using flamingo::Planner;

using MediaParams = flamingo_media_attention_params;
using LatentParams = flamingo_latent_attention_params;

// Whether every key/value head is that of as many query heads.
template <typename Params> bool groups_heads(const Params &p) {
    return p.heads == 0 || (p.kv_heads > 0 && p.heads % p.kv_heads == 0);
}

int32_t validate(const MediaParams &p, bool backward) {
    const int64_t sizes[] = {p.rows, p.tokens, p.media, p.latents, p.heads, p.kv_heads, p.head_dim};
    if (flamingo::has_negative(sizes, 7)) {
        return FLAMINGO_NEGATIVE_SIZE;
    }
    if (!groups_heads(p)) {
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
    const int64_t sizes[] = {p.items, p.latents, p.features, p.heads, p.kv_heads, p.head_dim};
    if (flamingo::has_negative(sizes, 6)) {
        return FLAMINGO_NEGATIVE_SIZE;
    }
    if (!groups_heads(p)) {
        return FLAMINGO_HEADS_NOT_DIVISIBLE;
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

// Returns the status of `call`, which returns false or throws if it is out of memory.
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
                                   Planner(p, false).plan());
    });
}

int32_t flamingo_media_attention_backward(const MediaParams *params) {
    const MediaParams &p = *params;
    const int32_t status = validate(p, true);
    // Without queries, d_k and d_v are still to be cleared.
    if (status != FLAMINGO_OK || p.rows * p.kv_heads * p.head_dim == 0) {
        return status;
    }
    return guarded([&] {
        return FLAMINGO_RUN_KERNEL(p.execution.instruction_set, media_attention_backward, p,
                                   Planner(p, true).plan());
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
    if (status != FLAMINGO_OK || p.items * p.kv_heads * p.head_dim == 0) {
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
