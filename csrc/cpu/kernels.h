// The kernels of every instruction set.
//
// Each file in kernels/ is compiled once per set, with FLAMINGO_ISA as the namespace of its
// kernels. All else that such a file defines is in an anonymous namespace, and it calls no inline
// or template function of the standard library: the linker keeps one copy of those for the whole
// library, which could hold instructions that this processor lacks.
#pragma once

#include "flamingo_cpu.h"
#include "flamingo_pointwise.h"
#include "task_plan.h"

// A kernel that returns bool returns false if it is out of memory.
#define FLAMINGO_DECLARE_KERNELS(isa)                                                              \
    namespace flamingo::isa {                                                                      \
    bool media_attention_forward(const flamingo_media_attention_params &p, const TaskPlan &plan);  \
    bool media_attention_backward(const flamingo_media_attention_params &p, const TaskPlan &plan); \
    bool latent_attention_forward(const flamingo_latent_attention_params &p);                      \
    bool latent_attention_backward(const flamingo_latent_attention_params &p);                     \
    bool gated_residual_forward(const flamingo_gated_residual_params &p);                          \
    bool gated_residual_backward(const flamingo_gated_residual_params &p);                         \
    bool gated_activation_forward(const flamingo_gated_activation_params &p);                      \
    bool gated_activation_backward(const flamingo_gated_activation_params &p);                     \
    bool layer_norm_forward(const flamingo_layer_norm_params &p);                                  \
    bool layer_norm_backward(const flamingo_layer_norm_params &p);                                 \
    double multiply_add_rate(const flamingo_execution &execution, double seconds);                 \
    }

FLAMINGO_DECLARE_KERNELS(portable)
#if defined(FLAMINGO_X86_64)
FLAMINGO_DECLARE_KERNELS(avx2)
FLAMINGO_DECLARE_KERNELS(avx512)
FLAMINGO_DECLARE_KERNELS(avx512_bf16)
#endif

// Calls kernel(arguments...) of an instruction set.
#if defined(FLAMINGO_X86_64)
#define FLAMINGO_RUN_KERNEL(set, kernel, ...)                                                      \
    ((set) == FLAMINGO_AVX512_BF16 ? flamingo::avx512_bf16::kernel(__VA_ARGS__)                    \
     : (set) == FLAMINGO_AVX512    ? flamingo::avx512::kernel(__VA_ARGS__)                         \
     : (set) == FLAMINGO_AVX2      ? flamingo::avx2::kernel(__VA_ARGS__)                           \
                                   : flamingo::portable::kernel(__VA_ARGS__))
#else
#define FLAMINGO_RUN_KERNEL(set, kernel, ...) flamingo::portable::kernel(__VA_ARGS__)
#endif
