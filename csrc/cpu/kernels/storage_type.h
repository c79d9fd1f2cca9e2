// From a dtype of the C interface to the C++ type of storage.
#pragma once

#include "flamingo_cpu.h"
#include "vector.h"

namespace {

// Returns run(zero), with a zero of the type that `dtype` names: decltype(zero) is that type.
template <typename Run> bool with_storage_type(int32_t dtype, Run run) {
    switch (dtype) {
    case FLAMINGO_FLOAT64:
        return run(double{});
    case FLAMINGO_BFLOAT16:
        return run(bfloat16{});
    case FLAMINGO_FLOAT16:
        return run(float16{});
    default:
        return run(float{});
    }
}

} // namespace
