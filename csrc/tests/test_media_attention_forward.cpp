// Media attention against a naive double loop in a wider type. The budget is the project's rule: at most
// twice the error that the same naive loop makes in the tested type, plus one rounding unit.
#include "flamingo_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "expect.h"

namespace {

struct Shape {
    int64_t B, T, I, R, H, Hkv, D;
    // Extra elements, filled with NaN, after each row of q, k, v and out.
    int64_t gap;
};

enum class Ranges { last_item, whole_history, beyond_the_slots, none };

template <typename Scalar> struct Case {
    Shape s;
    std::vector<Scalar> q, k, v, out;
    std::vector<int32_t> first, last;
    Scalar gate = Scalar(0.7);
    bool gated = false;
    double scale = 0;

    int64_t text_stride() const { return s.D + s.gap; }
    int64_t q_at(int64_t b, int64_t t, int64_t h) const {
        return ((b * s.T + t) * s.H + h) * text_stride();
    }
    int64_t kv_at(int64_t b, int64_t i, int64_t r, int64_t h) const {
        return (((b * s.I + i) * s.R + r) * s.Hkv + h) * text_stride();
    }
};

template <typename Scalar> constexpr Scalar nan_of = std::numeric_limits<Scalar>::quiet_NaN();

template <typename Scalar> Case<Scalar> make_case(const Shape &s, Ranges ranges) {
    Case<Scalar> c;
    c.s = s;
    c.scale = s.D ? 1 / std::sqrt(double(s.D)) : 1;
    std::mt19937 generator(1234);
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<Scalar> &x, int64_t vectors) {
        x.assign(vectors * c.text_stride(), nan_of<Scalar>);
        for (int64_t i = 0; i < vectors; ++i) {
            for (int64_t d = 0; d < s.D; ++d) {
                x[i * c.text_stride() + d] = Scalar(2 * normal(generator));
            }
        }
    };
    fill(c.q, s.B * s.T * s.H);
    fill(c.k, s.B * s.I * s.R * s.Hkv);
    fill(c.v, s.B * s.I * s.R * s.Hkv);
    c.out.assign(s.B * s.T * s.H * c.text_stride(), nan_of<Scalar>);
    for (int64_t b = 0; b < s.B; ++b) {
        for (int64_t t = 0; t < s.T; ++t) {
            // Media starts at token 1 + b, so the first tokens of a row see nothing; slot 0 of row 0 and the
            // last slot of every row stay unseen where there are enough.
            const auto index = int32_t(t < 1 + b ? -1 : std::min(t * s.I / s.T, s.I - 1));
            int32_t first = index, last = index < 0 ? -2 : index;
            if (ranges == Ranges::whole_history) {
                first = 0, last = index;
            } else if (ranges == Ranges::beyond_the_slots) {
                first = -5, last = int32_t(s.I + 5);
            } else if (ranges == Ranges::none) {
                first = 0, last = -1;
            }
            c.first.push_back(first);
            c.last.push_back(last);
        }
    }
    return c;
}

// Fills with NaN every media item that no token of its row sees.
template <typename Scalar> void poison_unseen(Case<Scalar> &c) {
    const int64_t item_size = c.s.R * c.s.Hkv * c.text_stride();
    for (int64_t b = 0; b < c.s.B; ++b) {
        for (int64_t i = 0; i < c.s.I; ++i) {
            bool seen = false;
            for (int64_t t = 0; t < c.s.T; ++t) {
                const int64_t at = b * c.s.T + t;
                seen = seen || (c.first[at] <= i && i <= c.last[at]);
            }
            if (!seen) {
                const int64_t begin = (b * c.s.I + i) * item_size;
                std::fill_n(c.k.begin() + begin, item_size, nan_of<Scalar>);
                std::fill_n(c.v.begin() + begin, item_size, nan_of<Scalar>);
            }
        }
    }
}

template <typename Scalar>
int32_t run(Case<Scalar> &c, int32_t instruction_set, int32_t threads) {
    const Shape &s = c.s;
    const int64_t vector = c.text_stride();
    flamingo_media_attention_forward_params p{};
    p.q = c.q.data(), p.k = c.k.data(), p.v = c.v.data(), p.out = c.out.data();
    p.first = c.first.data(), p.last = c.last.data();
    p.gate = c.gated ? &c.gate : nullptr;
    p.rows = s.B, p.tokens = s.T, p.media = s.I, p.latents = s.R;
    p.heads = s.H, p.kv_heads = s.Hkv, p.head_dim = s.D;
    p.q_stride_h = p.out_stride_h = vector;
    p.q_stride_t = p.out_stride_t = s.H * vector;
    p.q_stride_b = p.out_stride_b = s.T * s.H * vector;
    p.k_stride_h = p.v_stride_h = vector;
    p.k_stride_r = p.v_stride_r = s.Hkv * vector;
    p.k_stride_i = p.v_stride_i = s.R * s.Hkv * vector;
    p.k_stride_b = p.v_stride_b = s.I * s.R * s.Hkv * vector;
    p.first_stride_t = p.last_stride_t = 1;
    p.first_stride_b = p.last_stride_b = s.T;
    p.scale = c.scale;
    p.dtype = sizeof(Scalar) == sizeof(float) ? FLAMINGO_FLOAT32 : FLAMINGO_FLOAT64;
    p.threads = threads;
    p.instruction_set = instruction_set;
    return flamingo_media_attention_forward(&p);
}

// [B, T, H, D] contiguous, computed in Wide.
template <typename Wide, typename Scalar> std::vector<Wide> naive(const Case<Scalar> &c) {
    const Shape &s = c.s;
    std::vector<Wide> out(s.B * s.T * s.H * s.D, 0);
    for (int64_t b = 0; b < s.B; ++b) {
        for (int64_t t = 0; t < s.T; ++t) {
            for (int64_t h = 0; h < s.H; ++h) {
                const int64_t first = std::max<int64_t>(c.first[b * s.T + t], 0);
                const int64_t last = std::min<int64_t>(c.last[b * s.T + t], s.I - 1);
                std::vector<Wide> scores;
                std::vector<int64_t> keys;
                for (int64_t i = first; i <= last; ++i) {
                    for (int64_t r = 0; r < s.R; ++r) {
                        keys.push_back(c.kv_at(b, i, r, h / (s.H / s.Hkv)));
                        Wide score = 0;
                        for (int64_t d = 0; d < s.D; ++d) {
                            score += Wide(c.q[c.q_at(b, t, h) + d]) * Wide(c.k[keys.back() + d]);
                        }
                        scores.push_back(score * Wide(c.scale));
                    }
                }
                if (scores.empty()) {
                    continue;
                }
                const Wide largest = *std::max_element(scores.begin(), scores.end());
                Wide total = 0;
                for (Wide &score : scores) {
                    score = std::exp(score - largest);
                    total += score;
                }
                const Wide gate = c.gated ? std::tanh(Wide(c.gate)) : Wide(1);
                for (size_t key = 0; key < keys.size(); ++key) {
                    for (int64_t d = 0; d < s.D; ++d) {
                        out[((b * s.T + t) * s.H + h) * s.D + d] +=
                            gate * scores[key] / total * Wide(c.v[keys[key] + d]);
                    }
                }
            }
        }
    }
    return out;
}

template <typename Wide, typename Scalar>
bool within_budget(const Case<Scalar> &c) {
    const std::vector<Wide> expected = naive<Wide>(c);
    const std::vector<Scalar> plain = naive<Scalar>(c);
    Wide error = 0, plain_error = 0, magnitude = 0;
    for (int64_t row = 0; row < c.s.B * c.s.T * c.s.H; ++row) {
        for (int64_t d = 0; d < c.s.D; ++d) {
            const int64_t at = row * c.s.D + d;
            const Wide difference = std::abs(Wide(c.out[row * c.text_stride() + d]) - expected[at]);
            if (!(difference <= std::numeric_limits<Wide>::max())) {
                return false;
            }
            error = std::max(error, difference);
            plain_error = std::max(plain_error, std::abs(Wide(plain[at]) - expected[at]));
            magnitude = std::max(magnitude, std::abs(expected[at]));
        }
    }
    return error <= 2 * plain_error + magnitude * Wide(std::numeric_limits<Scalar>::epsilon());
}

template <typename Scalar> bool gaps_untouched(const Case<Scalar> &c) {
    for (int64_t row = 0; row < c.s.B * c.s.T * c.s.H; ++row) {
        for (int64_t d = c.s.D; d < c.text_stride(); ++d) {
            if (!std::isnan(c.out[row * c.text_stride() + d])) {
                return false;
            }
        }
    }
    return true;
}

template <typename Scalar> bool same_bits(const std::vector<Scalar> &a, const std::vector<Scalar> &b) {
    return a.size() == b.size() &&
           (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Scalar)) == 0);
}

template <typename Wide, typename Scalar>
void check(const char *type, const Shape &s, Ranges ranges, int32_t set, int set_number) {
    const std::string what = std::string(type) + " " + flamingo_instruction_set_name(set_number) +
                             " B" + std::to_string(s.B) + " T" + std::to_string(s.T) + " I" +
                             std::to_string(s.I) + " R" + std::to_string(s.R) + " H" +
                             std::to_string(s.H) + "/" + std::to_string(s.Hkv) + " D" +
                             std::to_string(s.D) + " gap " + std::to_string(s.gap) + " ranges " +
                             std::to_string(int(ranges)) + ": ";
    Case<Scalar> clean = make_case<Scalar>(s, ranges);
    clean.gated = s.gap != 0;
    expect(run(clean, set, 1) == FLAMINGO_OK, (what + "runs").c_str());
    expect(within_budget<Wide>(clean), (what + "agrees with the naive loop").c_str());
    expect(gaps_untouched(clean), (what + "writes nothing between rows").c_str());

    Case<Scalar> poisoned = make_case<Scalar>(s, ranges);
    poisoned.gated = clean.gated;
    if (ranges != Ranges::beyond_the_slots) {
        poison_unseen(poisoned);
    }
    expect(run(poisoned, set, 3) == FLAMINGO_OK && same_bits(clean.out, poisoned.out),
           (what + "same bits with NaN in unseen media and three threads").c_str());

    // Row 0 alone must have the bits it had in the batch.
    if (s.B > 1) {
        Case<Scalar> alone = make_case<Scalar>(s, ranges);
        alone.gated = clean.gated;
        alone.s.B = 1;
        alone.out.resize(alone.out.size() / s.B);
        clean.out.resize(alone.out.size());
        expect(run(alone, set, 2) == FLAMINGO_OK && same_bits(clean.out, alone.out),
               (what + "same bits outside the batch").c_str());
    }
}

} // namespace

int main() {
    const Shape shapes[] = {
        // B, T, I, R, H, Hkv, D, gap
        {1, 1, 1, 1, 1, 1, 1, 0},     {2, 5, 3, 1, 2, 2, 24, 0},   {1, 7, 2, 63, 2, 1, 40, 3},
        {2, 9, 4, 64, 4, 2, 64, 0},   {1, 6, 3, 65, 2, 2, 80, 0},  {3, 5, 2, 130, 6, 2, 96, 5},
        {1, 130, 8, 16, 2, 2, 16, 0}, {2, 65, 33, 3, 1, 1, 8, 1},  {1, 4, 2, 200, 3, 1, 128, 2},
        {0, 5, 2, 4, 2, 2, 8, 0},     {2, 0, 2, 4, 2, 2, 8, 0},    {2, 5, 0, 4, 2, 2, 8, 0},
        {2, 5, 2, 0, 2, 2, 8, 0},     {2, 5, 2, 4, 0, 2, 8, 0},    {2, 5, 2, 4, 2, 2, 0, 0},
    };
    for (int number = 0; flamingo_instruction_set_name(number); ++number) {
        const int32_t set = 1 << number;
        if (!(flamingo_usable_instruction_sets() & uint32_t(set))) {
            continue;
        }
        for (const Shape &s : shapes) {
            for (const Ranges ranges : {Ranges::last_item, Ranges::whole_history,
                                        Ranges::beyond_the_slots, Ranges::none}) {
                check<double, float>("float32", s, ranges, set, number);
                check<long double, double>("float64", s, ranges, set, number);
            }
        }
    }
    return report();
}
