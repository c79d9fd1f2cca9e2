// Pointwise kernels of every instruction set; the rules of kernels.h hold.
#pragma once

#include "flamingo_pointwise.h"

// Each returns false if it is out of memory.
#define FLAMINGO_DECLARE_POINTWISE_KERNELS(isa)                                                    \
    namespace flamingo::isa {                                                                      \
    bool gated_residual_forward(const flamingo_gated_residual_params &p);                          \
    bool gated_residual_backward(const flamingo_gated_residual_params &p);                         \
    bool gated_activation_forward(const flamingo_gated_activation_params &p);                      \
    bool gated_activation_backward(const flamingo_gated_activation_params &p);                     \
    bool layer_norm_forward(const flamingo_layer_norm_params &p);                                  \
    bool layer_norm_backward(const flamingo_layer_norm_params &p);                                 \
    }

FLAMINGO_DECLARE_POINTWISE_KERNELS(portable)
#if defined(FLAMINGO_X86_64)
FLAMINGO_DECLARE_POINTWISE_KERNELS(avx2)
FLAMINGO_DECLARE_POINTWISE_KERNELS(avx512)
FLAMINGO_DECLARE_POINTWISE_KERNELS(avx512_bf16)
#endif
