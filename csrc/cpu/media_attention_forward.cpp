#include "kernels.h"

namespace {

int32_t validate(const flamingo_media_attention_forward_params &p) {
    const int64_t sizes[] = {p.rows,  p.tokens,   p.media,   p.latents,
                             p.heads, p.kv_heads, p.head_dim};
    for (const int64_t size : sizes) {
        if (size < 0) {
            return FLAMINGO_NEGATIVE_SIZE;
        }
    }
    if (p.dtype != FLAMINGO_FLOAT32 && p.dtype != FLAMINGO_FLOAT64) {
        return FLAMINGO_UNKNOWN_DTYPE;
    }
    if (p.threads < 1) {
        return FLAMINGO_NO_THREADS;
    }
    if (p.heads > 0 && (p.kv_heads == 0 || p.heads % p.kv_heads != 0)) {
        return FLAMINGO_HEADS_NOT_DIVISIBLE;
    }
    const bool has_tokens = p.rows > 0 && p.tokens > 0;
    const bool has_queries = has_tokens && p.heads > 0 && p.head_dim > 0;
    const bool has_keys = has_queries && p.media > 0 && p.latents > 0;
    if ((has_tokens && (!p.first || !p.last)) || (has_queries && (!p.q || !p.out)) ||
        (has_keys && (!p.k || !p.v))) {
        return FLAMINGO_NULL_POINTER;
    }
    const auto requested = static_cast<uint32_t>(p.instruction_set);
    const bool is_one_bit = requested != 0 && (requested & (requested - 1)) == 0;
    if (!is_one_bit || !(requested & flamingo_usable_instruction_sets())) {
        return FLAMINGO_INSTRUCTION_SET_UNUSABLE;
    }
    return FLAMINGO_OK;
}

} // namespace

int32_t flamingo_media_attention_forward(const flamingo_media_attention_forward_params *params) {
    const int32_t status = validate(*params);
    if (status != FLAMINGO_OK) {
        return status;
    }
    switch (params->instruction_set) {
#if defined(FLAMINGO_X86_64)
    case FLAMINGO_AVX2:
        flamingo::avx2::media_attention_forward(*params);
        break;
#endif
    default:
        flamingo::portable::media_attention_forward(*params);
    }
    return FLAMINGO_OK;
}
