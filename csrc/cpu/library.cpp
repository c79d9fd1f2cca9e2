// What the library says of itself: version, build flags, sizes of structs, messages.
#include <string.h>

#include "flamingo_cpu.h"
#include "flamingo_pointwise.h"

int32_t flamingo_abi_version() { return FLAMINGO_ABI_VERSION; }

const char *flamingo_version() { return FLAMINGO_VERSION; }

const char *flamingo_build_flags() { return FLAMINGO_BUILD_FLAGS; }

int64_t flamingo_sizeof(const char *name) {
#define FLAMINGO_SIZE_OF(type) #type, sizeof(type)
    static constexpr struct {
        const char *name;
        int64_t size;
    } structs[] = {
        {FLAMINGO_SIZE_OF(flamingo_execution)},
        {FLAMINGO_SIZE_OF(flamingo_tensor)},
        {FLAMINGO_SIZE_OF(flamingo_media_attention_params)},
        {FLAMINGO_SIZE_OF(flamingo_latent_attention_params)},
        {FLAMINGO_SIZE_OF(flamingo_rows)},
        {FLAMINGO_SIZE_OF(flamingo_gated_residual_params)},
        {FLAMINGO_SIZE_OF(flamingo_gated_activation_params)},
        {FLAMINGO_SIZE_OF(flamingo_layer_norm_params)},
    };
#undef FLAMINGO_SIZE_OF
    for (const auto &entry : structs) {
        if (strcmp(entry.name, name) == 0) {
            return entry.size;
        }
    }
    return -1;
}

const char *flamingo_status_message(int32_t status) {
    switch (status) {
    case FLAMINGO_OK:
        return "ok";
    case FLAMINGO_NEGATIVE_SIZE:
        return "a size is negative";
    case FLAMINGO_NULL_POINTER:
        return "a tensor with elements has a null pointer";
    case FLAMINGO_HEADS_NOT_DIVISIBLE:
        return "the number of query heads is not a multiple of the number of key/value heads";
    case FLAMINGO_UNKNOWN_DTYPE:
        return "the dtype is none of float32, float64, bfloat16 and float16";
    case FLAMINGO_NO_THREADS:
        return "the number of threads is below 1";
    case FLAMINGO_INSTRUCTION_SET_UNUSABLE:
        return "the instruction set was not compiled in or this processor lacks it";
    case FLAMINGO_OUT_OF_MEMORY:
        return "out of memory for the kernel's scratch space";
    case FLAMINGO_UNKNOWN_ACTIVATION:
        return "the activation is none of GELU, squared ReLU and ReLU";
    default:
        return "unknown status";
    }
}
