// Vectors of any storage type, loops over a row, and the functions of one element: gates,
// activations.
#pragma once

#include "vector.h"

namespace {

template <typename T> using real = typename accumulation<T>::type;

// How much of a vector a step of a loop covers; the same operations on both give the same bits.
struct Whole {};
struct Part {
    int64_t count;
};

typedef int32_t signed_words __attribute__((vector_size(FLAMINGO_VECTOR_BYTES)));
typedef uint32_t words __attribute__((vector_size(FLAMINGO_VECTOR_BYTES)));
typedef uint16_t half_words __attribute__((vector_size(FLAMINGO_VECTOR_BYTES / 2)));

inline vec<float> fetch(const float *from, Whole) { return load(from); }
inline vec<double> fetch(const double *from, Whole) { return load(from); }
inline vec<float> fetch(const bfloat16 *from, Whole) {
#if defined(__AVX2__) && FLAMINGO_VECTOR_BYTES == 32
    // GCC 12 widens and narrows by more instructions than there need to be.
    __m128i packed;
    memcpy(&packed, from, sizeof packed);
    return (vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16);
#else
    half_words bits;
    memcpy(&bits, from, sizeof bits);
    return (vec<float>)(__builtin_convertvector(bits, words) << 16);
#endif
}
inline vec<float> fetch(const float16 *from, Whole) {
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
// Lanes past the part hold `filling`. Ends of rows are rare: not inlined, to keep the code small.
template <typename T>
__attribute__((noinline)) vec<real<T>> fetch(const T *from, Part part, real<T> filling = 0) {
    vec<real<T>> result = broadcast(filling);
    for (int64_t i = 0; i < part.count; ++i) {
        result[i] = widen(from[i]);
    }
    return result;
}
template <typename T> inline vec<real<T>> fetch(const T *from, Whole whole, real<T>) {
    return fetch(from, whole);
}

inline void put(vec<float> value, float *to, Whole) { store(to, value); }
inline void put(vec<double> value, double *to, Whole) { store(to, value); }
inline void put(vec<float> value, bfloat16 *to, Whole) {
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
inline void put(vec<float> value, float16 *to, Whole) {
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
template <typename T> __attribute__((noinline)) void put(vec<real<T>> value, T *to, Part part) {
    for (int64_t i = 0; i < part.count; ++i) {
        narrow(value[i], &to[i]);
    }
}

// Calls body(first element, Whole or Part, number of the accumulator to use) along a row: UNROLL
// accumulators keep as many additions in flight.
template <typename Real, int UNROLL = 1, typename Body>
__attribute__((always_inline)) inline void along_row(int64_t size, Body body) {
    int64_t i = 0;
    for (; i + UNROLL * lanes<Real> <= size; i += UNROLL * lanes<Real>) {
#pragma GCC unroll 8
        for (int u = 0; u < UNROLL; ++u) {
            body(i + u * lanes<Real>, Whole{}, u);
        }
    }
    if (UNROLL > 1) {
        for (; i + lanes<Real> <= size; i += lanes<Real>) {
            body(i, Whole{}, 0);
        }
    }
    if (i < size) {
        body(i, Part{size - i}, 0);
    }
}

inline vec<float> absolute(vec<float> x) { return (vec<float>)((words)x & 0x7fffffffu); }

// tanh(gate), and its derivative.
template <typename Real> struct Gate {
    vec<Real> value, slope;
};

// Errors of fp32 in units in the last place: value 3, slope 5. Below 0.625, where 1 - exp(-2 x)
// cancels, tanh(x) / x is a minimax polynomial of degree 5 in x^2 (error 6e-10).
inline Gate<float> gate_of(vec<float> x) {
    const vec<float> e = exponential(-2 * absolute(x));
    const vec<float> inverse = 1 / (1 + e);
    const vec<float> far = (1 - e) * inverse;
    const vec<float> z = x * x;
    vec<float> p = broadcast(2.2989419e-3f);
    p = p * z - 8.35000848e-3f;
    p = p * z + 2.17709959e-2f;
    p = p * z - 5.39595503e-2f;
    p = p * z + 1.3333305e-1f;
    p = p * z - 3.33333332e-1f;
    const vec<float> near = x + x * (z * p);
    const vec<float> signed_far = x < 0 ? -far : far;
    return {absolute(x) < 0.625f ? near : signed_far, (4 * e * inverse) * inverse};
}
inline Gate<double> gate_of(vec<double> x) {
    Gate<double> result;
    for (int i = 0; i < lanes<double>; ++i) {
        result.value[i] = ::tanh(x[i]);
        const double e = ::exp(-2 * ::fabs(x[i]));
        result.slope[i] = 4 * e / ((1 + e) * (1 + e));
    }
    return result;
}

// exp(high + low) for -87 <= high <= 0 and |low| < 0.03, without the rounding of their sum. The
// rest of the division by ln 2, at most 0.375, goes through a minimax polynomial, relative error
// 5e-9.
inline vec<float> exponential_of_sum(vec<float> high, vec<float> low) {
    const float to_integer = 12582912.0f; // 1.5 * 2^23: adding it rounds to the nearest integer
    const vec<float> shifted = high * 1.44269504088896341f + to_integer;
    const vec<float> n = shifted - to_integer;
    vec<float> r = high - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    r = r + low;
    vec<float> p = broadcast(1.38022024e-3f);
    p = p * r + 8.37472387e-3f;
    p = p * r + 4.166901867e-2f;
    p = p * r + 1.6666466988e-1f;
    p = p * r + 4.9999989529e-1f;
    p = p * (r * r) + r;
    // Times 2^n: n is in the lowest bits of `shifted`.
    return (vec<float>)((words)(p + 1) + ((words)shifted << 23));
}

template <typename Real> struct Activated {
    vec<Real> value, slope;
};

// What GELU lacks to ReLU, and its slope to the step: with a = |x|, area = 1 - Phi(a) and density
// phi(a), value = a * area and slope = area - a * density. GELU is relu(x) - value, and its slope
// is that slope for x < 0 and 1 minus it for x > 0, which nowhere cancels as 1 + erf(x / sqrt 2)
// does.
template <typename Real> struct Shortfall {
    vec<Real> value, slope;
};

// The errors that this leaves in fp32, in units in the last place: GELU 6 (1 on average), its slope
// 5, around its zero at -0.7518 absolute 8e-8. area * exp(a^2 / 2) is a minimax quotient of
// polynomials for a in [0, 13.25], relative error 5e-9, without a cancelling sum. From 13 on all is
// as at 13, where value and slope are below 2e-36.
inline Shortfall<float> shortfall(vec<float> x) {
    vec<float> a = absolute(x);
    a = a > 13.0f ? broadcast(13.0f) : a; // keeps NaN
    vec<float> above = broadcast(4.0159401231e-3f);
    above = above * a + 3.9955342271e-2f;
    above = above * a + 1.8122087222e-1f;
    above = above * a + 4.3556972651e-1f;
    above = above * a + 0.5f;
    vec<float> below = broadcast(1.0066324719e-2f);
    below = below * a + 1.001606158e-1f;
    below = below * a + 4.6415366934e-1f;
    below = below * a + 1.1941264114f;
    below = below * a + 1.6690243695f;
    below = below * a + 1.0f;
    const vec<float> ratio = above / below;
    // a^2 / 2 rounded would cost the exponential a^2 / 4 units; the square of a's upper 12 bits is
    // exact.
    const vec<float> upper = (vec<float>)(((words)a + 0x800u) & 0xfffff000u);
    const vec<float> weight =
        exponential_of_sum(upper * upper * -0.5f, (a - upper) * (a + upper) * -0.5f);
    const float density = 0.398942280401f; // 1 / sqrt(2 pi)
    return {(a * ratio) * weight, weight * (ratio - a * density)};
}
inline Shortfall<double> shortfall(vec<double> x) {
    Shortfall<double> result;
    for (int i = 0; i < lanes<double>; ++i) {
        const double magnitude = ::fabs(x[i]);
        const double a = magnitude > 40 ? 40 : magnitude; // keeps NaN
        const double area = 0.5 * ::erfc(a * 0.70710678118654752440);
        result.value[i] = a * area;
        result.slope[i] = area - a * (0.39894228040143267794 * ::exp(-0.5 * a * a));
    }
    return result;
}

struct Gelu {
    template <typename Real> static Activated<Real> at(vec<Real> x) {
        const Shortfall<Real> lacking = shortfall(x);
        const vec<Real> relu = x > 0 ? x : vec<Real>{};
        return {relu - lacking.value, x < 0 ? lacking.slope : 1 - lacking.slope};
    }
};
// Comparisons are such that NaN stays NaN.
struct SquaredRelu {
    template <typename Real> static Activated<Real> at(vec<Real> x) {
        const vec<Real> relu = x < 0 ? vec<Real>{} : x;
        return {relu * relu, 2 * relu};
    }
};
struct Relu {
    template <typename Real> static Activated<Real> at(vec<Real> x) {
        const vec<Real> one = broadcast(Real(1));
        return {x < 0 ? vec<Real>{} : x, x <= 0 ? vec<Real>{} : one};
    }
};

} // namespace
