// Checks shared by the entry points.
#pragma once

#include "flamingo_cpu.h"

namespace flamingo {

inline bool has_negative(const int64_t *sizes, int count) {
    for (int i = 0; i < count; ++i) {
        if (sizes[i] < 0) {
            return true;
        }
    }
    return false;
}

inline int32_t validate(const flamingo_execution &execution) {
    if (execution.dtype < FLAMINGO_FLOAT32 || execution.dtype > FLAMINGO_FLOAT16) {
        return FLAMINGO_UNKNOWN_DTYPE;
    }
    if (execution.threads < 1) {
        return FLAMINGO_NO_THREADS;
    }
    const auto requested = static_cast<uint32_t>(execution.instruction_set);
    const bool is_one_bit = requested != 0 && (requested & (requested - 1)) == 0;
    if (!is_one_bit || !(requested & flamingo_usable_instruction_sets())) {
        return FLAMINGO_INSTRUCTION_SET_UNUSABLE;
    }
    return FLAMINGO_OK;
}

} // namespace flamingo
