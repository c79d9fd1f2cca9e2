// A row as vectors of the accumulation type: loads and stores of every storage type, and the loop
// over the vectors of a row.
#pragma once

#include "vector.h"

namespace {

// The lanes of a vector that hold elements: all of them, or the first ones at the end of a row. The
// same operations run on both, so an element has the same bits wherever its row ends.
struct AllLanes {};
struct FirstLanes {
    int64_t count;
};

typedef uint16_t half_words __attribute__((vector_size(FLAMINGO_VECTOR_BYTES / 2)));

inline vec<float> fetch(const float *from, AllLanes) { return load(from); }
inline vec<double> fetch(const double *from, AllLanes) { return load(from); }
inline vec<float> fetch(const bfloat16 *from, AllLanes) {
#if defined(__AVX2__) && FLAMINGO_VECTOR_BYTES == 32
    // GCC 12 takes more instructions than these to widen and to narrow.
    __m128i packed;
    memcpy(&packed, from, sizeof packed);
    return (vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16);
#else
    half_words bits;
    memcpy(&bits, from, sizeof bits);
    return (vec<float>)(__builtin_convertvector(bits, words) << 16);
#endif
}
inline vec<float> fetch(const float16 *from, AllLanes) {
#if defined(__AVX512F__) && FLAMINGO_VECTOR_BYTES == 64
    // The plain intrinsics warn of an uninitialised value in GCC 12.
    __m256i half;
    memcpy(&half, from, sizeof half);
    return (vec<float>)_mm512_maskz_cvtph_ps(0xffff, half);
#else
    float values[lanes<float>];
    widen_row(from, values, lanes<float>);
    return load(values);
#endif
}
// Returns `filling` in the other lanes. Not inlined: ends of rows are rare, and the code stays
// small.
template <typename T>
__attribute__((noinline)) vec<real<T>> fetch(const T *from, FirstLanes mask, real<T> filling = 0) {
    vec<real<T>> result = broadcast(filling);
    for (int64_t i = 0; i < mask.count; ++i) {
        result[i] = widen(from[i]);
    }
    return result;
}
template <typename T> inline vec<real<T>> fetch(const T *from, AllLanes mask, real<T>) {
    return fetch(from, mask);
}

inline void put(vec<float> value, float *to, AllLanes) { store(to, value); }
inline void put(vec<double> value, double *to, AllLanes) { store(to, value); }
inline void put(vec<float> value, bfloat16 *to, AllLanes) {
    const words bits = (words)value;
    const words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const words quiet_nan = words{} + 0x7fc0u;
    const words chosen = value == value ? rounded : quiet_nan;
#if defined(__AVX2__) && FLAMINGO_VECTOR_BYTES == 32
    const __m128i result = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)chosen),
                                            _mm256_extracti128_si256((__m256i)chosen, 1));
#else
    const half_words result = __builtin_convertvector(chosen, half_words);
#endif
    memcpy(to, &result, sizeof result);
}
inline void put(vec<float> value, float16 *to, AllLanes) {
#if defined(__AVX512F__) && FLAMINGO_VECTOR_BYTES == 64
    const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
    memcpy(to, &half, sizeof half);
#elif defined(__F16C__)
    float values[lanes<float>];
    store(values, value);
    for (int i = 0; i < lanes<float>; i += 8) {
        const __m128i half =
            _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
        memcpy(to + i, &half, sizeof half);
    }
#else
    for (int i = 0; i < lanes<float>; ++i) {
        narrow(value[i], &to[i]);
    }
#endif
}
template <typename T>
__attribute__((noinline)) void put(vec<real<T>> value, T *to, FirstLanes mask) {
    for (int64_t i = 0; i < mask.count; ++i) {
        narrow(value[i], &to[i]);
    }
}

// Calls body(first element, mask, accumulator) for each vector of a row of `size` elements. The
// accumulator counts from 0 to UNROLL - 1, to keep UNROLL independent sums in flight.
template <typename Real, int UNROLL = 1, typename Body>
__attribute__((always_inline)) inline void along_row(int64_t size, Body body) {
    int64_t i = 0;
    for (; i + UNROLL * lanes<Real> <= size; i += UNROLL * lanes<Real>) {
#pragma GCC unroll 8
        for (int u = 0; u < UNROLL; ++u) {
            body(i + u * lanes<Real>, AllLanes{}, u);
        }
    }
    if (UNROLL > 1) {
        for (; i + lanes<Real> <= size; i += lanes<Real>) {
            body(i, AllLanes{}, 0);
        }
    }
    if (i < size) {
        body(i, FirstLanes{size - i}, 0);
    }
}

// The sum of the four accumulators of along_row<Real, 4>.
template <typename Real> inline Real total_of(const vec<Real> (&sums)[4]) {
    return sum_of<Real>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

} // namespace
