// Pointwise kernels against naive loops in long double, in every dtype, layout and instruction set.
#include "flamingo_pointwise.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "expect.h"

namespace {

using Wide = long double;

// A 16-bit storage type: the value of its bits, and the bits of a value that it can hold.
template <typename Bits, int EXPONENT_BITS, int MANTISSA_BITS> struct Small {
    Bits bits;
    static constexpr int bias = (1 << (EXPONENT_BITS - 1)) - 1;
    static constexpr double epsilon = 1.0 / (1 << MANTISSA_BITS);

    static Small from(double value) {
        if (value != value) {
            return {Bits(((1 << EXPONENT_BITS) - 1) << MANTISSA_BITS | 1 << (MANTISSA_BITS - 1))};
        }
        int exponent = 0;
        const double fraction = std::frexp(std::fabs(value), &exponent); // in [0.5, 1)
        const Bits sign = Bits(std::signbit(value) << (EXPONENT_BITS + MANTISSA_BITS));
        if (value == 0) {
            return {sign};
        }
        const auto mantissa =
            Bits(std::ldexp(fraction, MANTISSA_BITS + 1)) & ((1 << MANTISSA_BITS) - 1);
        return {Bits(sign | (exponent - 1 + bias) << MANTISSA_BITS | mantissa)};
    }
    operator double() const {
        const int exponent = bits >> MANTISSA_BITS & ((1 << EXPONENT_BITS) - 1);
        const int mantissa = bits & ((1 << MANTISSA_BITS) - 1);
        const double sign = bits >> (EXPONENT_BITS + MANTISSA_BITS) & 1 ? -1 : 1;
        if (exponent == (1 << EXPONENT_BITS) - 1) {
            return mantissa ? std::nan("") : sign * HUGE_VAL;
        }
        if (exponent == 0) {
            return sign * std::ldexp(mantissa, 1 - bias - MANTISSA_BITS);
        }
        return sign * std::ldexp(mantissa + (1 << MANTISSA_BITS), exponent - bias - MANTISSA_BITS);
    }
};
using Bf16 = Small<uint16_t, 8, 7>;
using Half = Small<uint16_t, 5, 10>;

template <typename T> struct traits {
    using Real = float;
    static constexpr double epsilon = T::epsilon;
    static T from(double value) { return T::from(value); }
};
template <> struct traits<float> {
    using Real = float;
    static constexpr double epsilon = std::numeric_limits<float>::epsilon();
    static float from(double value) { return float(value); }
};
template <> struct traits<double> {
    using Real = double;
    static constexpr double epsilon = std::numeric_limits<double>::epsilon();
    static double from(double value) { return value; }
};
template <typename T> constexpr int32_t dtype_of = FLAMINGO_FLOAT32;
template <> constexpr int32_t dtype_of<double> = FLAMINGO_FLOAT64;
template <> constexpr int32_t dtype_of<Bf16> = FLAMINGO_BFLOAT16;
template <> constexpr int32_t dtype_of<Half> = FLAMINGO_FLOAT16;

template <typename T>
double unit_of_sums = std::numeric_limits<typename traits<T>::Real>::epsilon();

std::mt19937 generator(1234);

// Returns a value of eight significant bits, which every dtype can hold.
double random_value() {
    std::normal_distribution<double> normal;
    int exponent = 0;
    const double fraction = std::frexp(normal(generator), &exponent);
    return exponent < -10 ? 0 : std::ldexp(std::round(fraction * 256) / 256, exponent);
}

struct Shape {
    int64_t rows, channels;
};
const Shape shapes[] = {{1, 1}, {3, 5}, {4, 64}, {2, 65}, {97, 33}, {70, 1100}, {1100, 16}};

enum class Layout { contiguous, gaps, two_levels };
const Layout layouts[] = {Layout::contiguous, Layout::gaps, Layout::two_levels};

// A tensor [rows, channels] in a layout, with NaN between its rows.
template <typename T> struct Input {
    Shape shape;
    std::vector<T> storage;
    flamingo_rows rows{};

    Input(Shape s, Layout layout, double offset = 0) : shape(s) {
        rows.inner_stride = s.channels + (layout == Layout::contiguous ? 0 : 3);
        if (layout == Layout::two_levels) {
            rows.inner_rows = 7;
            rows.outer_stride = 7 * rows.inner_stride + 11;
        }
        storage.assign(s.rows > 0 ? at(s.rows - 1, 0) + s.channels + 16 : 16,
                       traits<T>::from(std::nan("")));
        rows.data = storage.data();
        for (int64_t r = 0; r < s.rows; ++r) {
            for (int64_t c = 0; c < s.channels; ++c) {
                storage[at(r, c)] = traits<T>::from(random_value() + offset);
            }
        }
    }
    Input(const Input &) = delete;
    int64_t at(int64_t r, int64_t c) const {
        const int64_t inner = rows.inner_rows ? rows.inner_rows : shape.rows + 1;
        return r / inner * rows.outer_stride + r % inner * rows.inner_stride + c;
    }
    Wide operator()(int64_t r, int64_t c) const { return Wide(double(storage[at(r, c)])); }
};

// A contiguous output filled with NaN, followed by a margin that must stay NaN.
template <typename T> struct Output {
    int64_t size;
    std::vector<T> storage;
    explicit Output(int64_t n) : size(n), storage(n + 16, traits<T>::from(std::nan(""))) {}
    T *data() { return storage.data(); }
    bool margin_kept() const {
        return std::all_of(storage.begin() + size, storage.end(),
                           [](T x) { return std::isnan(double(x)); });
    }
    bool operator==(const Output &other) const {
        return std::memcmp(storage.data(), other.storage.data(), size * sizeof(T)) == 0;
    }
};

// The largest error of outputs, relative to the allowed error.
struct Budget {
    double worst = 0;
    // `terms` is the largest sum of absolute values on the way to a result, in the accumulation
    // type.
    template <typename T> void add(T actual, Wide exact, Wide terms) {
        const Wide rounding = traits<T>::epsilon * std::fabs(exact) * Wide(0.5001);
        const Wide smallest = dtype_of<T> == FLAMINGO_FLOAT16 ? 6e-8L : 1e-37L;
        const Wide error = std::fabs(Wide(double(actual)) - exact);
        const Wide allowed = (sizeof(T) == 2 ? rounding : 0) + unit_of_sums<T> * terms + smallest;
        worst = error <= allowed * 1e6L ? std::max(worst, double(error / allowed)) : HUGE_VAL;
    }
};

flamingo_execution execution(int32_t dtype, int32_t set, int32_t threads) {
    flamingo_execution result{};
    result.dtype = dtype, result.instruction_set = set, result.threads = threads;
    return result;
}

std::string name(const char *what, int32_t dtype, int32_t set, Shape s, Layout layout) {
    return std::string(what) + " dtype " + std::to_string(dtype) + " set " + std::to_string(set) +
           " [" + std::to_string(s.rows) + ", " + std::to_string(s.channels) + "] layout " +
           std::to_string(int(layout));
}

template <typename T> void test_gated_residual(int32_t set, Shape s, Layout layout, bool vector) {
    using Real = typename traits<T>::Real;
    const Input<T> x(s, layout), y(s, Layout::gaps), d_out(s, layout);
    const int64_t gates = vector ? s.channels : 1;
    const int64_t size = s.rows * s.channels;
    std::vector<Real> gate(gates);
    for (Real &g : gate) {
        g = Real(random_value());
    }
    flamingo_gated_residual_params p{};
    p.x = x.rows, p.y = y.rows, p.d_out = d_out.rows;
    p.gate = gate.data();
    p.rows = s.rows, p.channels = s.channels;
    p.gate_per_channel = vector;

    Output<T> out[2] = {Output<T>(size), Output<T>(size)}, d_y[2] = {out[0], out[0]};
    Output<Real> d_gate[2] = {Output<Real>(gates), Output<Real>(gates)};
    for (const int k : {0, 1}) {
        p.execution = execution(dtype_of<T>, set, k == 0 ? 1 : 3);
        p.out = out[k].data(), p.d_y = d_y[k].data(), p.d_gate = d_gate[k].data();
        const std::string what = name("gated residual", dtype_of<T>, set, s, layout);
        expect(flamingo_gated_residual_forward(&p) == FLAMINGO_OK &&
                   flamingo_gated_residual_backward(&p) == FLAMINGO_OK && out[k].margin_kept() &&
                   d_y[k].margin_kept() && d_gate[k].margin_kept(),
               what.c_str());
    }
    expect(out[0] == out[1] && d_y[0] == d_y[1] && d_gate[0] == d_gate[1],
           "gated residual: bits do not depend on threads");

    Budget budget;
    std::vector<Wide> sums(gates), magnitudes(gates);
    for (int64_t r = 0; r < s.rows; ++r) {
        for (int64_t c = 0; c < s.channels; ++c) {
            const int64_t at = r * s.channels + c, g = vector ? c : 0;
            const Wide t = std::tanh(Wide(gate[g]));
            budget.add(out[0].storage[at], x(r, c) + t * y(r, c),
                       4 * (std::fabs(x(r, c)) + std::fabs(t * y(r, c))));
            budget.add(d_y[0].storage[at], t * d_out(r, c), 4 * std::fabs(t * d_out(r, c)));
            sums[g] += (1 - t * t) * d_out(r, c) * y(r, c);
            magnitudes[g] += std::fabs(d_out(r, c) * y(r, c));
        }
    }
    for (int64_t g = 0; g < gates; ++g) {
        budget.add(d_gate[0].storage[g], sums[g], 4 * magnitudes[g]);
    }
    expect(budget.worst <= 1,
           name("gated residual within its error", dtype_of<T>, set, s, layout).c_str());
}

Wide activation_of(int32_t activation, Wide x) {
    return activation == FLAMINGO_GELU   ? x * std::erfc(-x / std::sqrt(Wide(2))) / 2
           : activation == FLAMINGO_RELU ? std::max(x, Wide(0))
                                         : std::max(x, Wide(0)) * std::max(x, Wide(0));
}
Wide slope_of(int32_t activation, Wide x) {
    const Wide pi = std::acos(Wide(-1));
    return activation == FLAMINGO_GELU   ? std::erfc(-x / std::sqrt(Wide(2))) / 2 +
                                               x * std::exp(-x * x / 2) / std::sqrt(2 * pi)
           : activation == FLAMINGO_RELU ? Wide(x > 0)
                                         : 2 * std::max(x, Wide(0));
}

template <typename T>
void test_gated_activation(int32_t set, Shape s, Layout layout, int32_t activation, bool gated) {
    using Real = typename traits<T>::Real;
    const Input<T> x(s, layout), d_out(s, Layout::gaps);
    const int64_t size = s.rows * s.channels;
    const Real gate = Real(0.7);
    flamingo_gated_activation_params p{};
    p.x = x.rows, p.d_out = d_out.rows;
    p.gate = gated ? &gate : nullptr;
    p.rows = s.rows, p.channels = s.channels;
    p.activation = activation;

    Output<T> out[2] = {Output<T>(size), Output<T>(size)}, d_x[2] = {out[0], out[0]};
    Output<Real> d_gate[2] = {Output<Real>(1), Output<Real>(1)};
    for (const int k : {0, 1}) {
        p.execution = execution(dtype_of<T>, set, k == 0 ? 1 : 3);
        p.out = out[k].data(), p.d_x = d_x[k].data();
        p.d_gate = gated ? d_gate[k].data() : nullptr;
        const std::string what = name("gated activation", dtype_of<T>, set, s, layout);
        expect(flamingo_gated_activation_forward(&p) == FLAMINGO_OK &&
                   flamingo_gated_activation_backward(&p) == FLAMINGO_OK && out[k].margin_kept() &&
                   d_x[k].margin_kept() && d_gate[k].margin_kept(),
               what.c_str());
    }
    expect(out[0] == out[1] && d_x[0] == d_x[1] && d_gate[0] == d_gate[1],
           "gated activation: bits do not depend on threads");

    Budget budget;
    const Wide t = gated ? std::tanh(Wide(gate)) : Wide(1);
    Wide sum = 0, magnitude = 0;
    for (int64_t r = 0; r < s.rows; ++r) {
        for (int64_t c = 0; c < s.channels; ++c) {
            const int64_t at = r * s.channels + c;
            const Wide value = activation_of(activation, x(r, c));
            const Wide slope = slope_of(activation, x(r, c)) * t * d_out(r, c);
            // In float64 the rounding of x / sqrt(2) costs erfc x^2 units.
            const Wide tail = sizeof(T) == 8 ? 8 + x(r, c) * x(r, c) : 8;
            budget.add(out[0].storage[at], t * value, tail * std::fabs(t * value));
            budget.add(d_x[0].storage[at], slope, tail * std::fabs(slope) + std::fabs(d_out(r, c)));
            sum += (1 - t * t) * value * d_out(r, c);
            magnitude += std::fabs(value * d_out(r, c));
        }
    }
    if (gated) {
        budget.add(d_gate[0].storage[0], sum, 4 * magnitude);
    }
    expect(budget.worst <= 1,
           name("gated activation within its error", dtype_of<T>, set, s, layout).c_str());
}

template <typename T>
void test_layer_norm(int32_t set, Shape s, Layout layout, bool has_weight, bool has_bias) {
    using Real = typename traits<T>::Real;
    const double offset = sizeof(T) == 2 ? 0 : 3;
    const Input<T> x(s, layout, offset), d_out(s, Layout::gaps);
    const int64_t size = s.rows * s.channels;
    std::vector<Real> weight(s.channels), bias(s.channels);
    for (int64_t c = 0; c < s.channels; ++c) {
        weight[c] = Real(random_value()), bias[c] = Real(random_value());
    }
    flamingo_layer_norm_params p{};
    p.x = x.rows, p.d_out = d_out.rows;
    p.weight = has_weight ? weight.data() : nullptr;
    p.bias = has_bias ? bias.data() : nullptr;
    p.rows = s.rows, p.channels = s.channels;
    p.eps = 1e-5;

    Output<T> out[2] = {Output<T>(size), Output<T>(size)}, d_x[2] = {out[0], out[0]};
    Output<Real> mean(s.rows), rstd(s.rows);
    Output<Real> d_weight[2] = {Output<Real>(s.channels), Output<Real>(s.channels)};
    Output<Real> d_bias[2] = {d_weight[0], d_weight[0]};
    for (const int k : {0, 1}) {
        p.execution = execution(dtype_of<T>, set, k == 0 ? 1 : 3);
        p.out = out[k].data(), p.d_x = d_x[k].data();
        p.mean = mean.data(), p.rstd = rstd.data();
        p.d_weight = has_weight ? d_weight[k].data() : nullptr;
        p.d_bias = has_bias ? d_bias[k].data() : nullptr;
        const std::string what = name("LayerNorm", dtype_of<T>, set, s, layout);
        expect(flamingo_layer_norm_forward(&p) == FLAMINGO_OK &&
                   flamingo_layer_norm_backward(&p) == FLAMINGO_OK && out[k].margin_kept() &&
                   d_x[k].margin_kept() && mean.margin_kept() && rstd.margin_kept() &&
                   d_weight[k].margin_kept() && d_bias[k].margin_kept(),
               what.c_str());
    }
    expect(out[0] == out[1] && d_x[0] == d_x[1] && d_weight[0] == d_weight[1] &&
               d_bias[0] == d_bias[1],
           "LayerNorm: bits do not depend on threads");

    Budget budget;
    const auto C = Wide(s.channels);
    std::vector<Wide> w_sum(s.channels), w_size(s.channels), b_sum(s.channels), b_size(s.channels);
    for (int64_t r = 0; r < s.rows; ++r) {
        Wide average = 0, variance = 0, top = 0;
        for (int64_t c = 0; c < s.channels; ++c) {
            average += x(r, c) / C;
            top = std::max(top, std::fabs(x(r, c)));
        }
        for (int64_t c = 0; c < s.channels; ++c) {
            variance += (x(r, c) - average) * (x(r, c) - average) / C;
        }
        const Wide inverse = 1 / std::sqrt(variance + Wide(p.eps));
        budget.add(mean.storage[r], average, 4 * top);
        budget.add(rstd.storage[r], inverse, 4 * inverse * (1 + top * inverse));
        // Rounding of x - mean, in units of the normalised value.
        const Wide blur = top * inverse + 1;
        Wide sum = 0, product = 0, largest = 0;
        for (int64_t c = 0; c < s.channels; ++c) {
            const Wide normed = (x(r, c) - average) * inverse;
            const Wide g = d_out(r, c) * (has_weight ? Wide(weight[c]) : 1);
            const Wide w = has_weight ? Wide(weight[c]) : 1, b = has_bias ? Wide(bias[c]) : 0;
            const Wide exact = normed * w + b;
            budget.add(out[0].storage[r * s.channels + c], exact,
                       4 * (std::fabs(w) * (std::fabs(normed) + 1) * blur + std::fabs(b)));
            sum += g / C, product += g * normed / C;
            largest = std::max(largest, std::fabs(g));
            w_sum[c] += d_out(r, c) * normed, b_sum[c] += d_out(r, c);
            w_size[c] += std::fabs(d_out(r, c)) * (std::fabs(normed) + 1) * blur;
            b_size[c] += std::fabs(d_out(r, c));
        }
        for (int64_t c = 0; c < s.channels; ++c) {
            const Wide normed = (x(r, c) - average) * inverse;
            const Wide g = d_out(r, c) * (has_weight ? Wide(weight[c]) : 1);
            const Wide exact = inverse * (g - sum - normed * product);
            budget.add(d_x[0].storage[r * s.channels + c], exact,
                       4 * inverse * largest * (1 + std::fabs(normed)) * (1 + std::fabs(normed)) *
                           blur);
        }
    }
    for (int64_t c = 0; c < s.channels; ++c) {
        if (has_weight) {
            budget.add(d_weight[0].storage[c], w_sum[c], 4 * w_size[c]);
        }
        if (has_bias) {
            budget.add(d_bias[0].storage[c], b_sum[c], 4 * b_size[c]);
        }
    }
    expect(budget.worst <= 1,
           name("LayerNorm within its error", dtype_of<T>, set, s, layout).c_str());
}

template <typename T> void test_all(int32_t set) {
    for (const Shape s : shapes) {
        for (const Layout layout : layouts) {
            for (const bool option : {false, true}) {
                test_gated_residual<T>(set, s, layout, option);
                for (const int32_t activation :
                     {FLAMINGO_GELU, FLAMINGO_SQUARED_RELU, FLAMINGO_RELU}) {
                    test_gated_activation<T>(set, s, layout, activation, option);
                }
                test_layer_norm<T>(set, s, layout, true, option);
                test_layer_norm<T>(set, s, layout, false, option);
            }
        }
    }
}

// Distance of two values in units in the last place of fp32 at `exact`, or at the smallest normal
// number if that is larger.
double units(float actual, Wide exact) {
    int exponent = 0;
    std::frexp(std::max(std::fabs(exact), Wide(std::numeric_limits<float>::min())), &exponent);
    return double(std::fabs(Wide(actual) - exact) / std::ldexp(Wide(1), exponent - 24));
}

// Checks the bounds that gate.h and activations.h state, on thousands of values of both signs in
// each octave.
void test_function_errors(int32_t set) {
    std::vector<float> values;
    for (float x = std::ldexp(1.0f, -30); x < 20; x *= 1 + 1.0f / 8191) {
        values.push_back(x);
        values.push_back(-x);
    }
    const auto count = int64_t(values.size());
    std::vector<float> zeros(count, 0.0f), ones(count, 1.0f), out(count), d_x(count), d_gate(count);
    flamingo_gated_activation_params a{};
    a.x.data = values.data(), a.d_out.data = ones.data();
    a.out = out.data(), a.d_x = d_x.data();
    a.rows = 1, a.channels = count;
    a.execution = execution(FLAMINGO_FLOAT32, set, 1);
    expect(flamingo_gated_activation_forward(&a) == FLAMINGO_OK &&
               flamingo_gated_activation_backward(&a) == FLAMINGO_OK,
           "GELU runs");
    double value_error = 0, slope_error = 0, slope_absolute = 0, tail_error = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Wide value = activation_of(FLAMINGO_GELU, values[i]);
        const Wide slope = slope_of(FLAMINGO_GELU, values[i]);
        const bool tiny = std::fabs(values[i]) > 13; // there the error is absolute
        tail_error = std::max(tail_error, tiny ? double(std::fabs(Wide(out[i]) - value)) : 0);
        tail_error = std::max(tail_error, tiny && values[i] < 0 ? std::fabs(double(d_x[i])) : 0);
        if (!tiny) {
            value_error = std::max(value_error, units(out[i], value));
        }
        if (std::fabs(values[i] + 0.7518f) < 0.4f) { // around its zero
            slope_absolute = std::max(slope_absolute, double(std::fabs(Wide(d_x[i]) - slope)));
        } else if (!tiny) {
            slope_error = std::max(slope_error, units(d_x[i], slope));
        }
    }
    flamingo_gated_residual_params g{};
    g.x.data = zeros.data(), g.y.data = g.d_out.data = ones.data();
    g.out = out.data(), g.d_y = d_x.data(), g.d_gate = d_gate.data();
    g.gate = values.data();
    g.gate_per_channel = 1;
    g.rows = 1, g.channels = count;
    g.execution = a.execution;
    expect(flamingo_gated_residual_forward(&g) == FLAMINGO_OK &&
               flamingo_gated_residual_backward(&g) == FLAMINGO_OK,
           "tanh runs");
    double tanh_error = 0, tanh_slope_error = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Wide cosh = std::cosh(Wide(values[i]));
        tanh_error = std::max(tanh_error, units(out[i], std::tanh(Wide(values[i]))));
        tanh_slope_error = std::max(tanh_slope_error, units(d_gate[i], 1 / (cosh * cosh)));
    }
    std::printf("set %d, largest errors in units in the last place: GELU %.2f, its slope %.2f "
                "(around its zero absolute %.1e), tanh %.2f, its slope %.2f\n",
                set, value_error, slope_error, slope_absolute, tanh_error, tanh_slope_error);
    expect(value_error <= 6, "GELU is within 6 units in the last place");
    expect(slope_error <= 5, "the slope of GELU is within 5 units in the last place");
    expect(slope_absolute <= 8e-8, "the slope of GELU around its zero is within 8e-8");
    expect(tail_error <= 2e-36, "the far tail of GELU is below 2e-36");
    expect(tanh_error <= 3, "tanh is within 3 units in the last place");
    expect(tanh_slope_error <= 5, "the slope of tanh is within 5 units in the last place");
}

void test_special_values(int32_t set) {
    const float infinity = HUGE_VALF;
    const std::vector<float> x = {infinity, -infinity, std::nanf(""), 3e38f, -3e38f, -0.0f, 1e-40f};
    std::vector<float> out(x.size());
    flamingo_gated_activation_params p{};
    p.x.data = x.data(), p.out = out.data();
    p.rows = 1, p.channels = int64_t(x.size());
    p.execution = execution(FLAMINGO_FLOAT32, set, 1);
    for (const int32_t activation : {FLAMINGO_GELU, FLAMINGO_RELU}) {
        p.activation = activation;
        expect(flamingo_gated_activation_forward(&p) == FLAMINGO_OK && out[0] == infinity &&
                   std::fabs(out[1]) < 1e-36f && std::isnan(out[2]) && out[3] == x[3] &&
                   std::fabs(out[4]) < 1e-36f && out[5] == 0 && std::fabs(out[6]) < 2e-40f,
               "activations of infinities, NaN and the largest values");
    }
}

// Checks that a row alone has the same bits as among others.
template <typename T> void test_row_alone(int32_t set) {
    const Shape s = {70, 1100};
    const Input<T> x(s, Layout::gaps);
    Output<T> all(s.rows * s.channels), alone(s.channels);
    Output<float> mean(s.rows), rstd(s.rows);
    const float gate = 0.3f;
    flamingo_layer_norm_params n{};
    n.x = x.rows, n.mean = mean.data(), n.rstd = rstd.data();
    n.channels = s.channels;
    n.eps = 1e-5;
    flamingo_gated_activation_params a{};
    a.x = x.rows, a.gate = &gate;
    a.channels = s.channels;
    n.execution = a.execution = execution(dtype_of<T>, set, 2);
    const auto run = [&](bool norm, int64_t rows, const void *data, T *out) {
        n.rows = a.rows = rows;
        n.x.data = a.x.data = data;
        n.out = a.out = out;
        return norm ? flamingo_layer_norm_forward(&n) : flamingo_gated_activation_forward(&a);
    };
    for (const bool norm : {false, true}) {
        bool same = run(norm, s.rows, x.storage.data(), all.data()) == FLAMINGO_OK;
        for (const int64_t row : {0, 31, 69}) {
            same = same &&
                   run(norm, 1, x.storage.data() + x.at(row, 0), alone.data()) == FLAMINGO_OK &&
                   std::memcmp(alone.data(), all.data() + row * s.channels,
                               s.channels * sizeof(T)) == 0;
        }
        expect(same, "a row has the same bits alone");
    }
}

void test_no_work(int32_t set) {
    for (const Shape s : {Shape{0, 8}, Shape{3, 0}, Shape{0, 0}}) {
        float gate[8] = {1, 1, 1, 1, 1, 1, 1, 1}, d_gate[8], d_weight[8], d_bias[8], rows[3];
        const auto poison = [](float (&values)[8]) { std::fill_n(values, 8, std::nanf("")); };
        const auto is_zero = [](const float *values, int64_t count) {
            return std::all_of(values, values + count, [](float v) { return v == 0; });
        };
        for (const int32_t vector : {0, 1}) {
            poison(d_gate);
            flamingo_gated_residual_params g{};
            g.gate = gate, g.d_gate = d_gate;
            g.rows = s.rows, g.channels = s.channels;
            g.gate_per_channel = vector;
            g.execution = execution(FLAMINGO_FLOAT32, set, 2);
            expect(flamingo_gated_residual_forward(&g) == FLAMINGO_OK &&
                       flamingo_gated_residual_backward(&g) == FLAMINGO_OK &&
                       is_zero(d_gate, vector ? s.channels : 1),
                   "gated residual without work");
        }
        poison(d_gate);
        flamingo_gated_activation_params a{};
        a.gate = gate, a.d_gate = d_gate;
        a.rows = s.rows, a.channels = s.channels;
        a.execution = execution(FLAMINGO_FLOAT32, set, 2);
        expect(flamingo_gated_activation_forward(&a) == FLAMINGO_OK &&
                   flamingo_gated_activation_backward(&a) == FLAMINGO_OK && d_gate[0] == 0,
               "gated activation without work");
        poison(d_weight), poison(d_bias);
        flamingo_layer_norm_params n{};
        n.mean = rows, n.rstd = rows;
        n.d_weight = d_weight, n.d_bias = d_bias;
        n.rows = s.rows, n.channels = s.channels;
        n.eps = 1e-5;
        n.execution = a.execution;
        expect(flamingo_layer_norm_forward(&n) == FLAMINGO_OK &&
                   flamingo_layer_norm_backward(&n) == FLAMINGO_OK &&
                   is_zero(d_weight, s.channels) && is_zero(d_bias, s.channels),
               "LayerNorm without work");
    }
}

// Checks rows more than 2^31 elements apart, in memory that is reserved but not touched.
void test_large_strides(int32_t set) {
    const int64_t stride = (int64_t{1} << 31) + 4096, bytes = 3 * stride * 2;
    void *memory = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        std::printf("no address space for the test of strides over 2^31\n");
        return;
    }
    auto *values = static_cast<uint16_t *>(memory);
    for (int64_t r = 0; r < 3; ++r) {
        values[r * stride] = Bf16::from(double(r + 1)).bits;
    }
    Bf16 out[3];
    flamingo_gated_activation_params p{};
    p.x.data = memory;
    p.out = out;
    p.rows = 3, p.channels = 1;
    p.activation = FLAMINGO_RELU;
    p.execution = execution(FLAMINGO_BFLOAT16, set, 1);
    for (const int64_t inner : {0, 1}) {
        p.x.inner_rows = inner;
        p.x.inner_stride = inner ? 0 : stride;
        p.x.outer_stride = inner ? stride : 0;
        expect(flamingo_gated_activation_forward(&p) == FLAMINGO_OK && double(out[0]) == 1 &&
                   double(out[1]) == 2 && double(out[2]) == 3,
               "rows over 2^31 elements apart");
    }
    munmap(memory, size_t(bytes));
}

template <typename Params, typename Change>
int32_t status_after(int32_t (*run)(const Params *), Params p, Change change) {
    change(p);
    return run(&p);
}

void test_statuses() {
    static float values[1] = {1}, out[1];
    const flamingo_execution portable = execution(FLAMINGO_FLOAT32, FLAMINGO_PORTABLE, 1);
    flamingo_gated_residual_params g{};
    g.x.data = g.y.data = g.d_out.data = g.gate = values;
    g.out = g.d_y = g.d_gate = out;
    g.rows = g.channels = 1;
    g.execution = portable;
    flamingo_gated_activation_params a{};
    a.x.data = a.d_out.data = a.gate = values;
    a.out = a.d_x = a.d_gate = out;
    a.rows = a.channels = 1;
    a.execution = portable;
    flamingo_layer_norm_params n{};
    n.x.data = n.d_out.data = n.weight = n.bias = values;
    n.out = n.d_x = n.mean = n.rstd = n.d_weight = n.d_bias = out;
    n.rows = n.channels = 1;
    n.execution = portable;

    const auto shared = [](auto run, auto params) {
        expect(status_after(run, params, [](auto &) {}) == FLAMINGO_OK, "a valid call");
        expect(status_after(run, params, [](auto &p) { p.rows = -1; }) == FLAMINGO_NEGATIVE_SIZE,
               "-1 rows");
        expect(status_after(run, params, [](auto &p) { p.channels = -1; }) ==
                   FLAMINGO_NEGATIVE_SIZE,
               "-1 channels");
        expect(status_after(run, params, [](auto &p) { p.execution.dtype = 4; }) ==
                   FLAMINGO_UNKNOWN_DTYPE,
               "dtype 4");
        expect(status_after(run, params, [](auto &p) { p.execution.threads = 0; }) ==
                   FLAMINGO_NO_THREADS,
               "no threads");
        expect(status_after(run, params, [](auto &p) { p.execution.instruction_set = 3; }) ==
                   FLAMINGO_INSTRUCTION_SET_UNUSABLE,
               "two instruction sets");
    };
    shared(flamingo_gated_residual_forward, g);
    shared(flamingo_gated_residual_backward, g);
    shared(flamingo_gated_activation_forward, a);
    shared(flamingo_gated_activation_backward, a);
    shared(flamingo_layer_norm_forward, n);
    shared(flamingo_layer_norm_backward, n);

    using Residual = flamingo_gated_residual_params;
    using Activation = flamingo_gated_activation_params;
    using Norm = flamingo_layer_norm_params;
    const auto null = FLAMINGO_NULL_POINTER;
    expect(status_after(flamingo_gated_residual_forward, g,
                        [](Residual &p) { p.x.data = nullptr; }) == null,
           "x missing");
    expect(status_after(flamingo_gated_residual_forward, g,
                        [](Residual &p) { p.gate = nullptr; }) == null,
           "gate missing");
    expect(status_after(flamingo_gated_residual_backward, g,
                        [](Residual &p) { p.x.data = p.out = nullptr; }) == FLAMINGO_OK,
           "the backward needs no x");
    expect(status_after(flamingo_gated_residual_backward, g,
                        [](Residual &p) { p.d_gate = nullptr; }) == null,
           "d_gate missing");
    expect(status_after(flamingo_gated_residual_forward, g,
                        [](Residual &p) { p.y.inner_rows = -1; }) == FLAMINGO_NEGATIVE_SIZE,
           "-1 inner rows");
    expect(status_after(flamingo_gated_activation_backward, a,
                        [](Activation &p) { p.d_gate = nullptr; }) == null,
           "d_gate missing");
    expect(status_after(flamingo_gated_activation_backward, a,
                        [](Activation &p) { p.gate = p.d_gate = nullptr; }) == FLAMINGO_OK,
           "no gate needs no gradient of it");
    for (const int32_t activation : {-1, 3}) {
        expect(status_after(flamingo_gated_activation_forward, a,
                            [&](Activation &p) { p.activation = activation; }) ==
                   FLAMINGO_UNKNOWN_ACTIVATION,
               "an activation that is none");
    }
    expect(status_after(flamingo_layer_norm_forward, n,
                        [](Norm &p) { p.mean = p.rstd = nullptr; }) == FLAMINGO_OK,
           "statistics are optional");
    expect(status_after(flamingo_layer_norm_backward, n, [](Norm &p) { p.mean = nullptr; }) == null,
           "mean missing");
    expect(status_after(flamingo_layer_norm_backward, n, [](Norm &p) { p.d_x = nullptr; }) == null,
           "d_x missing");
    expect(status_after(flamingo_layer_norm_backward, n,
                        [](Norm &p) { p.weight = p.bias = p.d_weight = p.d_bias = nullptr; }) ==
               FLAMINGO_OK,
           "parameters are optional");
}

} // namespace

int main() {
    test_statuses();
    for (int32_t bit = 0; flamingo_instruction_set_name(bit); ++bit) {
        const int32_t set = 1 << bit;
        if (!(flamingo_usable_instruction_sets() & uint32_t(set))) {
            continue;
        }
        test_all<float>(set);
        test_all<double>(set);
        test_all<Bf16>(set);
        test_all<Half>(set);
        test_function_errors(set);
        test_special_values(set);
        test_row_alone<float>(set);
        test_row_alone<Bf16>(set);
        test_no_work(set);
        test_large_strides(set);
    }
    return report();
}
