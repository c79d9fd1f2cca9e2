// Kernels of every instruction set: each file in kernels/ is compiled once per set, with FLAMINGO_ISA
// naming the namespace it fills. Whatever else such a file defines sits in an anonymous namespace and
// it calls no inline or template function of the standard library: the linker keeps one copy of those
// for the whole library, and that copy could hold instructions this processor lacks.
#pragma once

#include "flamingo_cpu.h"

#define FLAMINGO_DECLARE_KERNELS(isa)                                                              \
    namespace flamingo::isa {                                                                      \
    void media_attention_forward(const flamingo_media_attention_forward_params &params);           \
    }

FLAMINGO_DECLARE_KERNELS(portable)
#if defined(FLAMINGO_X86_64)
FLAMINGO_DECLARE_KERNELS(avx2)
#endif
