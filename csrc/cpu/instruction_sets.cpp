#include "flamingo_cpu.h"

#if defined(FLAMINGO_X86_64)
#include <cpuid.h>
#endif

namespace {

#if defined(FLAMINGO_X86_64)

constexpr uint32_t bit(int position) { return uint32_t{1} << position; }

constexpr bool has_all(uint32_t value, uint32_t mask) { return (value & mask) == mask; }

// Returns the register states that the operating system saves. An instruction on any other state
// faults, even if the processor supports it.
uint32_t enabled_register_states() {
    uint32_t low = 0;
    uint32_t high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

uint32_t detect() {
    uint32_t sets = FLAMINGO_PORTABLE;
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;

    constexpr uint32_t fma = bit(12), osxsave = bit(27), avx = bit(28), f16c = bit(29);
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has_all(ecx, fma | osxsave | avx | f16c)) {
        return sets;
    }
    constexpr uint32_t ymm_state = bit(1) | bit(2);
    constexpr uint32_t zmm_state = ymm_state | bit(5) | bit(6) | bit(7);
    const uint32_t states = enabled_register_states();

    constexpr uint32_t avx2 = bit(5);
    if (!has_all(states, ymm_state) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) ||
        !has_all(ebx, avx2)) {
        return sets;
    }
    sets |= FLAMINGO_AVX2;

    constexpr uint32_t avx512f = bit(16), avx512dq = bit(17), avx512bw = bit(30),
                       avx512vl = bit(31);
    if (!has_all(states, zmm_state) || !has_all(ebx, avx512f | avx512dq | avx512bw | avx512vl)) {
        return sets;
    }
    sets |= FLAMINGO_AVX512;

    const uint32_t last_subleaf = eax;
    constexpr uint32_t avx512_bf16 = bit(5);
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) &&
        has_all(eax, avx512_bf16)) {
        sets |= FLAMINGO_AVX512_BF16;
    }
    return sets;
}

constexpr uint32_t compiled =
    FLAMINGO_PORTABLE | FLAMINGO_AVX2 | FLAMINGO_AVX512 | FLAMINGO_AVX512_BF16;

#else

uint32_t detect() { return FLAMINGO_PORTABLE; }

constexpr uint32_t compiled = FLAMINGO_PORTABLE;

#endif

} // namespace

uint32_t flamingo_detected_instruction_sets() {
    static const uint32_t detected = detect();
    return detected;
}

uint32_t flamingo_usable_instruction_sets() {
    return flamingo_detected_instruction_sets() & compiled;
}

const char *flamingo_instruction_set_name(int32_t bit_number) {
    switch (bit_number) {
    case 0:
        return "portable";
    case 1:
        return "avx2";
    case 2:
        return "avx512";
    case 3:
        return "avx512_bf16";
    default:
        return nullptr;
    }
}
