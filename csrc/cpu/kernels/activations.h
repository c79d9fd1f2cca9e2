// Activation functions with their derivatives.
#pragma once

#include "flamingo_pointwise.h"
#include "vector.h"

namespace {

// exp(high + low) for -87 <= high <= 0 and |low| < 0.03, without the rounding error of their sum.
// The remainder of the division by ln 2, at most 0.375, goes through a minimax polynomial with a
// relative error of 5e-9.
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
    // The lowest bits of `shifted` hold n: this multiplies by 2^n.
    return (vec<float>)((words)(p + 1) + ((words)shifted << 23));
}

// An activation and its derivative.
template <typename Real> struct Activated {
    vec<Real> value, slope;
};

// How far GELU is below ReLU, and its slope from the step function: with a = |x|, area =
// 1 - Phi(a) and density = phi(a), value = a * area and slope = area - a * density. GELU(x) is
// relu(x) - value; its derivative is `slope` for x < 0 and 1 - slope for x > 0. Neither form
// cancels, as 1 + erf(x / sqrt 2) does.
template <typename Real> struct Shortfall {
    vec<Real> value, slope;
};

// Errors that remain in fp32: GELU is within 6 units in the last place (1 on average), its slope
// within 5, around its zero at -0.7518 within an absolute 8e-8. area * exp(a^2 / 2) is a minimax
// quotient of polynomials for a in [0, 13.25] with a relative error of 5e-9 and no cancelling sum.
// Above 13 the result is that of 13, where value and slope are below 2e-36.
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
    // Rounding a^2 / 2 would cost the exponential a^2 / 4 units. The square of the upper 12 bits of
    // `a` is exact.
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
// The comparisons of both ReLUs keep NaN.
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

// Calls run(activation) with an object of the type that `activation`, a flamingo_activation, names.
template <typename Run> void with_activation(int32_t activation, Run run) {
    switch (activation) {
    case FLAMINGO_GELU:
        return run(Gelu{});
    case FLAMINGO_SQUARED_RELU:
        return run(SquaredRelu{});
    default:
        return run(Relu{});
    }
}

} // namespace
