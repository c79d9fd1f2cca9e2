// Vectors of the instruction set that a file is compiled for, storage types, and exp.
//
// GCC's vector extensions also compile widths that the processor lacks, so that any machine can
// test the tile shapes of AVX-512 (FLAMINGO_VECTOR_BYTES).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

template <typename Real> struct vector_of {
    static constexpr int lanes = FLAMINGO_VECTOR_BYTES / int(sizeof(Real));
    typedef Real type __attribute__((vector_size(FLAMINGO_VECTOR_BYTES)));
    typedef Real unaligned
        __attribute__((vector_size(FLAMINGO_VECTOR_BYTES), aligned(sizeof(Real)), may_alias));
};
template <typename Real> using vec = typename vector_of<Real>::type;
template <typename Real> constexpr int lanes = vector_of<Real>::lanes;

template <typename Real> inline vec<Real> load(const Real *from) {
    return *reinterpret_cast<const typename vector_of<Real>::unaligned *>(from);
}
template <typename Real> inline void store(Real *to, vec<Real> value) {
    *reinterpret_cast<typename vector_of<Real>::unaligned *>(to) = value;
}
// Compiles to a broadcast alone: x - 0 is x for every x, -0 included.
template <typename Real> inline vec<Real> broadcast(Real value) { return value - vec<Real>{}; }

template <typename Real> inline vec<Real> largest(vec<Real> a, vec<Real> b) {
    return a > b ? a : b;
}
// Reductions by halves: they combine lanes i and i ^ step for step = lanes / 2, ..., 1.
template <typename Real> inline Real sum_of(vec<Real> value) {
#pragma GCC unroll 8
    for (int step = lanes<Real> / 2; step > 0; step /= 2) {
        vec<Real> other = {};
#pragma GCC unroll 16
        for (int i = 0; i < lanes<Real>; ++i) {
            other[i] = value[i ^ step];
        }
        value += other;
    }
    return value[0];
}
template <typename Real> inline Real largest_of(vec<Real> value) {
#pragma GCC unroll 8
    for (int step = lanes<Real> / 2; step > 0; step /= 2) {
        vec<Real> other = {};
#pragma GCC unroll 16
        for (int i = 0; i < lanes<Real>; ++i) {
            other[i] = value[i ^ step];
        }
        value = largest<Real>(value, other);
    }
    return value[0];
}

// Lane i of the result is lane from[i] of `a` followed by `b`.
template <typename Real> struct lane_index;
template <> struct lane_index<float> {
    typedef int32_t type __attribute__((vector_size(FLAMINGO_VECTOR_BYTES)));
};
template <> struct lane_index<double> {
    typedef int64_t type __attribute__((vector_size(FLAMINGO_VECTOR_BYTES)));
};
template <typename Real>
inline vec<Real> shuffle(vec<Real> a, vec<Real> b, typename lane_index<Real>::type from) {
#if defined(__clang__)
    vec<Real> result;
    for (int i = 0; i < lanes<Real>; ++i) {
        result[i] = from[i] < lanes<Real> ? a[from[i]] : b[from[i] - lanes<Real>];
    }
    return result;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

// One step of transpose_square: rows i and i + STEP exchange the lanes that differ in STEP.
template <typename Real, int STEP, size_t... LANE>
inline void exchange(vec<Real> *rows, std::index_sequence<LANE...>) {
    typedef typename lane_index<Real>::type index;
    constexpr index upper = {(LANE & STEP ? lanes<Real> + int(LANE) - STEP : int(LANE))...};
    constexpr index lower = {(LANE & STEP ? lanes<Real> + int(LANE) : int(LANE) + STEP)...};
#pragma GCC unroll 16
    for (int i = 0; i < lanes<Real>; ++i) {
        if (!(i & STEP)) {
            const vec<Real> a = rows[i], b = rows[i + STEP];
            rows[i] = shuffle<Real>(a, b, upper);
            rows[i + STEP] = shuffle<Real>(a, b, lower);
        }
    }
}
// Transposes lanes x lanes values by exchanging halves, then quarters, down to neighbours.
template <typename Real, int STEP = lanes<Real> / 2> inline void transpose_square(vec<Real> *rows) {
    exchange<Real, STEP>(rows, std::make_index_sequence<lanes<Real>>{});
    if constexpr (STEP > 1) {
        transpose_square<Real, STEP / 2>(rows);
    }
}

// One step of sums_of: rows i and i + STEP become one, with the sums of lanes that differ in STEP.
template <typename Real, int STEP, size_t... LANE>
inline void add_halves(vec<Real> *rows, std::index_sequence<LANE...>) {
    typedef typename lane_index<Real>::type index;
    constexpr index upper = {(LANE & STEP ? lanes<Real> + int(LANE) - STEP : int(LANE))...};
    constexpr index lower = {(LANE & STEP ? lanes<Real> + int(LANE) : int(LANE) + STEP)...};
#pragma GCC unroll 16
    for (int i = 0; i < STEP; ++i) {
        const vec<Real> a = rows[i], b = rows[i + STEP];
        rows[i] = shuffle<Real>(a, b, upper) + shuffle<Real>(a, b, lower);
    }
}
// Lane i of the result is sum_of(rows[i]), with the same bits. Overwrites rows[lanes].
template <typename Real, int STEP = lanes<Real> / 2> inline vec<Real> sums_of(vec<Real> *rows) {
    add_halves<Real, STEP>(rows, std::make_index_sequence<lanes<Real>>{});
    if constexpr (STEP > 1) {
        return sums_of<Real, STEP / 2>(rows);
    } else {
        return rows[0];
    }
}

// The bits of a vector of float.
typedef uint32_t words __attribute__((vector_size(FLAMINGO_VECTOR_BYTES)));
inline vec<float> absolute(vec<float> x) { return (vec<float>)((words)x & 0x7fffffffu); }

inline int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t bigger(int64_t a, int64_t b) { return a > b ? a : b; }

// Storage types narrower than the type of accumulation.
struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <typename T> struct accumulation {
    using type = float;
};
template <> struct accumulation<double> {
    using type = double;
};
template <typename T> using real = typename accumulation<T>::type;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}
inline float widen(float16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    _Float16 half;
    memcpy(&half, &x.bits, sizeof half);
    return float(half);
#endif
}

inline void narrow(float value, float *to) { *to = value; }
inline void narrow(double value, double *to) { *to = value; }
inline void narrow(float value, bfloat16 *to) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to->bits = value == value ? uint16_t(rounded) : uint16_t(0x7fc0);
}
inline void narrow(float value, float16 *to) {
#if defined(__F16C__)
    to->bits = uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
    const _Float16 half = _Float16(value);
    memcpy(&to->bits, &half, sizeof half);
#endif
}

// Copy `size` values from storage to accumulation type, and back times `factor`.
template <typename T, typename Real>
inline void widen_row(const T *__restrict from, Real *__restrict to, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
        to[i] = widen(from[i]);
    }
}
template <typename T, typename Real>
inline void narrow_row(const Real *__restrict from, Real factor, T *__restrict to, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
        narrow(from[i] * factor, &to[i]);
    }
}
#if defined(__F16C__)
inline void widen_row(const float16 *__restrict from, float *__restrict to, int64_t size) {
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i));
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
    }
    for (; i < size; ++i) {
        to[i] = widen(from[i]);
    }
}
#endif

// exp(x) for x <= 0, within 1.3 units in the last place of fp32, and exactly 0 below -88. With x =
// n ln 2 + r and |r| <= ln 2 / 2, exp(r) is the minimax polynomial of Cephes' expf. The lowest n is
// -127, for which the bits of 2^n come out as 0.
inline vec<float> exponential(vec<float> x) {
    typedef int32_t integers __attribute__((vector_size(FLAMINGO_VECTOR_BYTES)));
    x = largest<float>(broadcast(-88.0f), x); // a NaN stays
    const float to_integer = 12582912.0f;     // 1.5 * 2^23: adding it rounds to the nearest integer
    const vec<float> shifted = x * 1.44269504088896341f + to_integer;
    const vec<float> n = shifted - to_integer;
    vec<float> r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    const vec<float> square = r * r; // powers in pairs: a shorter chain than Horner's
    vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * square + (r * 8.3334519073e-3f + 4.1665795894e-2f);
    p = p * square + (r * 1.6666665459e-1f + 5.0000001201e-1f);
    p = p * square + (r + 1.0f);
    return p * (vec<float>)(((integers)shifted << 23) + 0x3f800000);
}
inline vec<double> exponential(vec<double> x) {
    for (int i = 0; i < lanes<double>; ++i) {
        x[i] = ::exp(x[i]);
    }
    return x;
}
inline float exponential(float x) { return ::expf(x); }
inline double exponential(double x) { return ::exp(x); }
inline float logarithm(float x) { return ::logf(x); }
inline double logarithm(double x) { return ::log(x); }
inline float hyperbolic_tangent(float x) { return ::tanhf(x); }
inline double hyperbolic_tangent(double x) { return ::tanh(x); }

} // namespace
