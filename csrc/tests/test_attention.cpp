// Both attentions, forward and backward, against a naive double loop in a wider type. The budget is
// the project's rule: at most twice (gradients three times) the error that the same naive loop
// makes in the accumulation type on the same inputs, plus one rounding unit of storage.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "flamingo_cpu.h"

namespace {

// A tensor [outer..., vectors of D values], each vector followed by `gap` NaNs.
template <typename Scalar> struct Vectors {
    std::vector<Scalar> data;
    std::vector<int64_t> shape; // without D
    int64_t dim = 0, gap = 0;

    Vectors() = default;
    Vectors(std::vector<int64_t> outer, int64_t d, int64_t g) : shape(outer), dim(d), gap(g) {
        data.assign(count() * (d + g), std::numeric_limits<Scalar>::quiet_NaN());
    }
    int64_t count() const {
        int64_t total = 1;
        for (const int64_t size : shape) {
            total *= size;
        }
        return total;
    }
    Scalar *operator[](int64_t vector) { return data.data() + vector * (dim + gap); }
    const Scalar *operator[](int64_t vector) const { return data.data() + vector * (dim + gap); }
    void randomise(std::mt19937 &generator) {
        std::normal_distribution<double> normal;
        for (int64_t i = 0; i < count(); ++i) {
            for (int64_t d = 0; d < dim; ++d) {
                (*this)[i][d] = Scalar(1.5 * normal(generator));
            }
        }
    }
    flamingo_tensor describe() {
        flamingo_tensor result = {data.data(), {0, 0, 0, 0}};
        int64_t step = dim + gap;
        for (int64_t i = int64_t(shape.size()) - 1; i >= 0; --i) {
            result.stride[i] = step;
            step *= shape[i];
        }
        return result;
    }
    bool gaps_untouched() const {
        for (int64_t i = 0; i < count(); ++i) {
            for (int64_t d = dim; d < dim + gap; ++d) {
                if (!std::isnan((*this)[i][d])) {
                    return false;
                }
            }
        }
        return true;
    }
};

template <typename Wide, typename Scalar> Vectors<Wide> widened(const Vectors<Scalar> &x) {
    Vectors<Wide> result(x.shape, x.dim, 0);
    for (int64_t i = 0; i < x.count(); ++i) {
        for (int64_t d = 0; d < x.dim; ++d) {
            result[i][d] = Wide(x[i][d]);
        }
    }
    return result;
}

template <typename Scalar> bool same_bits(const Vectors<Scalar> &a, const Vectors<Scalar> &b) {
    return a.data.size() == b.data.size() &&
           (a.data.empty() ||
            std::memcmp(a.data.data(), b.data.data(), a.data.size() * sizeof(Scalar)) == 0);
}

template <typename Scalar>
bool within_budget(const Vectors<Scalar> &actual, const Vectors<Scalar> &plain,
                   const Vectors<long double> &exact, double factor) {
    long double error = 0, plain_error = 0, magnitude = 0;
    for (int64_t i = 0; i < exact.count(); ++i) {
        for (int64_t d = 0; d < exact.dim; ++d) {
            const long double difference = std::fabs((long double)actual[i][d] - exact[i][d]);
            if (!(difference <= std::numeric_limits<long double>::max())) {
                return false;
            }
            error = std::max(error, difference);
            plain_error = std::max(plain_error, std::fabs((long double)plain[i][d] - exact[i][d]));
            magnitude = std::max(magnitude, std::fabs(exact[i][d]));
        }
    }
    // Scores reach about 10: one that is off by a rounding changes its weight by ten roundings.
    const long double unit = std::numeric_limits<Scalar>::epsilon();
    return error <= factor * plain_error + 10 * unit * std::max(magnitude, 1.0L);
}

// Attention of one query, which adds to `out` and to the gradients for `d_out`.
template <typename Real> struct Naive {
    const Vectors<Real> &q, &k, &v, &d_out;
    Vectors<Real> &out, &d_q, &d_k, &d_v;
    Real scale, gate;

    // Returns what the query adds to the gradient of tanh(gate).
    Real run(int64_t query, const std::vector<int64_t> &keys) {
        if (keys.empty()) {
            return 0;
        }
        const int64_t dim = q.dim;
        std::vector<Real> weights, d_weights;
        Real top = -std::numeric_limits<Real>::infinity(), total = 0, delta = 0;
        for (const int64_t key : keys) {
            Real score = 0, d_weight = 0;
            for (int64_t d = 0; d < dim; ++d) {
                score += q[query][d] * k[key][d];
                d_weight += d_out[query][d] * v[key][d];
            }
            weights.push_back(score * scale);
            d_weights.push_back(d_weight);
            top = std::max(top, weights.back());
        }
        for (Real &weight : weights) {
            weight = std::exp(weight - top);
            total += weight;
        }
        for (size_t i = 0; i < keys.size(); ++i) {
            weights[i] /= total;
            delta += weights[i] * d_weights[i];
        }
        for (size_t i = 0; i < keys.size(); ++i) {
            const Real d_score = gate * weights[i] * (d_weights[i] - delta) * scale;
            for (int64_t d = 0; d < dim; ++d) {
                out[query][d] += gate * weights[i] * v[keys[i]][d];
                d_q[query][d] += d_score * k[keys[i]][d];
                d_k[keys[i]][d] += d_score * q[query][d];
                d_v[keys[i]][d] += gate * weights[i] * d_out[query][d];
            }
        }
        return delta;
    }
};

template <typename Real> Vectors<Real> zeros_like(const Vectors<Real> &x) {
    Vectors<Real> result(x.shape, x.dim, 0);
    std::fill(result.data.begin(), result.data.end(), Real(0));
    return result;
}

enum class Ranges { last_item, whole_history, pairs, of_each_token, beyond_the_slots, none };

struct MediaShape {
    int64_t B, T, I, R, H, Hkv, D, gap;
};

template <typename Scalar> struct MediaCase {
    MediaShape s;
    Vectors<Scalar> q, k, v, d_out, out, d_q, d_k, d_v;
    std::vector<int32_t> first, last;
    bool gated;
    Scalar gate = Scalar(0.7), d_gate = 0;
    double scale;

    MediaCase(const MediaShape &shape, Ranges ranges)
        : s(shape), q({s.B, s.T, s.H}, s.D, s.gap), k({s.B, s.I, s.R, s.Hkv}, s.D, s.gap),
          v(k.shape, s.D, s.gap), d_out(q.shape, s.D, s.gap), out(q.shape, s.D, s.gap),
          d_q(q.shape, s.D, s.gap), d_k(k.shape, s.D, s.gap), d_v(k.shape, s.D, s.gap),
          gated(s.gap != 0), scale(s.D ? 1 / std::sqrt(double(s.D)) : 1) {
        std::mt19937 generator(1234);
        for (auto *x : {&q, &k, &v, &d_out}) {
            x->randomise(generator);
        }
        for (int64_t b = 0; b < s.B; ++b) {
            for (int64_t t = 0; t < s.T; ++t) {
                // The first tokens of a row see nothing, and the last slot stays unseen.
                const auto index = int32_t(
                    t < 1 + b ? -1 : std::min(t * s.I / s.T, std::max<int64_t>(s.I - 2, 0)));
                int32_t from = index, to = index < 0 ? -2 : index;
                if (ranges == Ranges::whole_history) {
                    from = 0, to = index;
                } else if (ranges == Ranges::pairs) {
                    from = index / 2 * 2;
                } else if (ranges == Ranges::of_each_token && index >= 0 && s.I > 0) {
                    from = int32_t(t * 7 % s.I), to = int32_t(std::min(from + t % 3, s.I - 2));
                } else if (ranges == Ranges::beyond_the_slots) {
                    from = -5, to = int32_t(s.I + 5);
                } else if (ranges == Ranges::none) {
                    from = 0, to = -1;
                }
                first.push_back(from);
                last.push_back(to);
            }
        }
    }
    bool sees(int64_t b, int64_t t, int64_t item) const {
        return first[b * s.T + t] <= item && item <= last[b * s.T + t];
    }
    void poison_unseen() {
        for (int64_t b = 0; b < s.B; ++b) {
            for (int64_t item = 0; item < s.I; ++item) {
                bool seen = false;
                for (int64_t t = 0; t < s.T; ++t) {
                    seen = seen || sees(b, t, item);
                }
                for (int64_t r = 0; !seen && r < s.R * s.Hkv; ++r) {
                    const int64_t at = (b * s.I + item) * s.R * s.Hkv + r;
                    std::fill_n(k[at], s.D, std::numeric_limits<Scalar>::quiet_NaN());
                    std::fill_n(v[at], s.D, std::numeric_limits<Scalar>::quiet_NaN());
                }
            }
        }
    }
    int32_t run(int32_t set, int32_t threads) {
        flamingo_media_attention_params p{};
        p.q = q.describe(), p.k = k.describe(), p.v = v.describe(), p.out = out.describe();
        p.d_out = d_out.describe(), p.d_q = d_q.describe();
        p.d_k = d_k.describe(), p.d_v = d_v.describe();
        p.first = first.data(), p.last = last.data();
        p.gate = gated ? &gate : nullptr, p.d_gate = gated ? &d_gate : nullptr;
        p.rows = s.B, p.tokens = s.T, p.media = s.I, p.latents = s.R;
        p.heads = s.H, p.kv_heads = s.Hkv, p.head_dim = s.D;
        p.scale = scale;
        p.execution.dtype = sizeof(Scalar) == 4 ? FLAMINGO_FLOAT32 : FLAMINGO_FLOAT64;
        p.execution.threads = threads, p.execution.instruction_set = set;
        const int32_t status = flamingo_media_attention_forward(&p);
        return status ? status : flamingo_media_attention_backward(&p);
    }
    bool same_results(const MediaCase &other) const {
        return same_bits(out, other.out) && same_bits(d_q, other.d_q) &&
               same_bits(d_k, other.d_k) && same_bits(d_v, other.d_v) &&
               std::memcmp(&d_gate, &other.d_gate, sizeof d_gate) == 0;
    }
};

template <typename Real> struct Results {
    Vectors<Real> out, d_q, d_k, d_v;
    Real d_gate = 0;
};

template <typename Real, typename Scalar> Results<Real> naive(const MediaCase<Scalar> &c) {
    const MediaShape &s = c.s;
    const auto q = widened<Real>(c.q), k = widened<Real>(c.k), v = widened<Real>(c.v);
    const auto d_out = widened<Real>(c.d_out);
    Results<Real> r = {zeros_like(q), zeros_like(q), zeros_like(k), zeros_like(k)};
    const Real gate = c.gated ? std::tanh(Real(c.gate)) : Real(1);
    Naive<Real> attention = {q, k, v, d_out, r.out, r.d_q, r.d_k, r.d_v, Real(c.scale), gate};
    for (int64_t query = 0; query < q.count(); ++query) {
        const int64_t h = query % s.H, t = query / s.H % s.T, b = query / s.H / s.T;
        std::vector<int64_t> keys;
        for (int64_t item = 0; item < s.I; ++item) {
            for (int64_t latent = 0; latent < s.R && c.sees(b, t, item); ++latent) {
                keys.push_back(((b * s.I + item) * s.R + latent) * s.Hkv + h / (s.H / s.Hkv));
            }
        }
        r.d_gate += attention.run(query, keys);
    }
    r.d_gate *= 1 - gate * gate;
    return r;
}

template <typename Scalar>
void check_media(const char *type, const MediaShape &s, Ranges ranges, int32_t set,
                 const char *set_name) {
    const std::string what =
        std::string("media ") + type + " " + set_name + " B" + std::to_string(s.B) + " T" +
        std::to_string(s.T) + " I" + std::to_string(s.I) + " R" + std::to_string(s.R) + " H" +
        std::to_string(s.H) + "/" + std::to_string(s.Hkv) + " D" + std::to_string(s.D) + " gap " +
        std::to_string(s.gap) + " ranges " + std::to_string(int(ranges)) + ": ";
    const auto check = [&](bool ok, const char *which) { expect(ok, (what + which).c_str()); };
    MediaCase<Scalar> clean(s, ranges);
    check(clean.run(set, 1) == FLAMINGO_OK, "runs");
    const auto plain = naive<Scalar>(clean);
    const auto exact = naive<long double>(clean);
    check(within_budget(clean.out, plain.out, exact.out, 2), "out");
    check(within_budget(clean.d_q, plain.d_q, exact.d_q, 3), "d_q");
    check(within_budget(clean.d_k, plain.d_k, exact.d_k, 3), "d_k");
    check(within_budget(clean.d_v, plain.d_v, exact.d_v, 3), "d_v");
    const long double unit = std::numeric_limits<Scalar>::epsilon();
    const long double terms = std::sqrt((long double)(1 + s.B * s.T * s.H)) * (1 + s.D);
    check(!clean.gated || std::fabs(clean.d_gate - exact.d_gate) <= 10 * unit * terms, "d_gate");
    for (const auto *x : {&clean.out, &clean.d_q, &clean.d_k, &clean.d_v}) {
        check(x->gaps_untouched(), "writes nothing between vectors");
    }
    MediaCase<Scalar> poisoned(s, ranges);
    if (ranges != Ranges::beyond_the_slots) {
        poisoned.poison_unseen();
    }
    check(poisoned.run(set, 3) == FLAMINGO_OK && poisoned.same_results(clean),
          "same bits with NaN in unseen media and three threads");
}

struct LatentShape {
    int64_t N, L, M, H, Hkv, D, gap;
    bool ragged;
};

template <typename Scalar> struct LatentCase {
    LatentShape s;
    Vectors<Scalar> q, k_media, v_media, k_latents, v_latents, d_out, out;
    Vectors<Scalar> d_q, d_k_media, d_v_media, d_k_latents, d_v_latents;
    std::vector<int64_t> lengths;
    std::vector<Scalar> lse;
    double scale;

    explicit LatentCase(const LatentShape &shape)
        : s(shape), q({s.N, s.L, s.H}, s.D, s.gap), k_media({s.N, s.M, s.Hkv}, s.D, s.gap),
          v_media(k_media), k_latents({s.N, s.L, s.Hkv}, s.D, s.gap), v_latents(k_latents),
          d_out(q), out(q), d_q(q), d_k_media(k_media), d_v_media(k_media), d_k_latents(k_latents),
          d_v_latents(k_latents), lse(s.N * s.H * s.L),
          scale(s.D ? 1 / std::sqrt(double(s.D)) : 1) {
        std::mt19937 generator(99);
        for (auto *x : {&q, &k_media, &v_media, &k_latents, &v_latents, &d_out}) {
            x->randomise(generator);
        }
        for (int64_t n = 0; n < s.N; ++n) {
            lengths.push_back(s.ragged ? n * s.M / 2 : s.M);
            for (int64_t key = lengths[n]; key < s.M; ++key) {
                for (int64_t h = 0; h < s.Hkv; ++h) {
                    const int64_t at = (n * s.M + key) * s.Hkv + h;
                    std::fill_n(k_media[at], s.D, std::numeric_limits<Scalar>::quiet_NaN());
                    std::fill_n(v_media[at], s.D, std::numeric_limits<Scalar>::quiet_NaN());
                }
            }
        }
    }
    int32_t run(int32_t set, int32_t threads, bool trains = true) {
        flamingo_latent_attention_params p{};
        p.q = q.describe(), p.k_media = k_media.describe(), p.v_media = v_media.describe();
        p.k_latents = k_latents.describe(), p.v_latents = v_latents.describe();
        p.out = out.describe(), p.d_out = d_out.describe(), p.d_q = d_q.describe();
        p.d_k_media = d_k_media.describe(), p.d_v_media = d_v_media.describe();
        p.d_k_latents = d_k_latents.describe(), p.d_v_latents = d_v_latents.describe();
        p.lengths = s.ragged ? lengths.data() : nullptr, p.lse = trains ? lse.data() : nullptr;
        p.items = s.N, p.latents = s.L, p.features = s.M, p.heads = s.H;
        p.kv_heads = s.Hkv, p.head_dim = s.D;
        p.scale = scale;
        p.execution.dtype = sizeof(Scalar) == 4 ? FLAMINGO_FLOAT32 : FLAMINGO_FLOAT64;
        p.execution.threads = threads, p.execution.instruction_set = set;
        const int32_t status = flamingo_latent_attention_forward(&p);
        return status || !trains ? status : flamingo_latent_attention_backward(&p);
    }
    // The results with the keys of each item in one tensor, media before latents.
    template <typename Real> Results<Real> joined() const {
        const int64_t keys = s.M + s.L;
        Results<Real> r = {widened<Real>(out), widened<Real>(d_q),
                           Vectors<Real>({s.N, keys, s.Hkv}, s.D, 0),
                           Vectors<Real>({s.N, keys, s.Hkv}, s.D, 0)};
        join(d_k_media, d_k_latents, &r.d_k);
        join(d_v_media, d_v_latents, &r.d_v);
        return r;
    }
    template <typename Real>
    void join(const Vectors<Scalar> &media, const Vectors<Scalar> &own, Vectors<Real> *to) const {
        for (int64_t n = 0; n < s.N; ++n) {
            for (int64_t i = 0; i < (s.M + s.L) * s.Hkv; ++i) {
                const Scalar *from = i < s.M * s.Hkv ? media[n * s.M * s.Hkv + i]
                                                     : own[n * s.L * s.Hkv + i - s.M * s.Hkv];
                for (int64_t d = 0; d < s.D; ++d) {
                    (*to)[n * (s.M + s.L) * s.Hkv + i][d] = Real(from[d]);
                }
            }
        }
    }
};

template <typename Real, typename Scalar> Results<Real> naive(const LatentCase<Scalar> &c) {
    const LatentShape &s = c.s;
    const int64_t keys_per_item = s.M + s.L;
    const auto q = widened<Real>(c.q), d_out = widened<Real>(c.d_out);
    Vectors<Real> k({s.N, keys_per_item, s.Hkv}, s.D, 0), v(k);
    c.join(c.k_media, c.k_latents, &k);
    c.join(c.v_media, c.v_latents, &v);
    Results<Real> r = {zeros_like(q), zeros_like(q), zeros_like(k), zeros_like(k)};
    Naive<Real> attention = {q, k, v, d_out, r.out, r.d_q, r.d_k, r.d_v, Real(c.scale), Real(1)};
    for (int64_t query = 0; query < q.count(); ++query) {
        const int64_t h = query % s.H, n = query / s.H / s.L;
        std::vector<int64_t> keys;
        for (int64_t key = 0; key < keys_per_item; ++key) {
            if (key < c.lengths[n] || key >= s.M) {
                keys.push_back((n * keys_per_item + key) * s.Hkv + h / (s.H / s.Hkv));
            }
        }
        attention.run(query, keys);
    }
    return r;
}

template <typename Scalar>
void check_latent(const char *type, const LatentShape &s, int32_t set, const char *set_name) {
    const std::string what =
        std::string("latent ") + type + " " + set_name + " N" + std::to_string(s.N) + " L" +
        std::to_string(s.L) + " M" + std::to_string(s.M) + " H" + std::to_string(s.H) + "/" +
        std::to_string(s.Hkv) + " D" + std::to_string(s.D) + (s.ragged ? " ragged: " : ": ");
    const auto check = [&](bool ok, const char *which) { expect(ok, (what + which).c_str()); };
    LatentCase<Scalar> c(s), again(s), alone(s);
    check(c.run(set, 1) == FLAMINGO_OK, "runs");
    check(alone.run(set, 1, false) == FLAMINGO_OK && same_bits(c.out, alone.out),
          "same bits of a forward without lse");
    const auto actual = c.template joined<Scalar>();
    const auto plain = naive<Scalar>(c);
    const auto exact = naive<long double>(c);
    check(within_budget(actual.out, plain.out, exact.out, 2), "out");
    check(within_budget(actual.d_q, plain.d_q, exact.d_q, 3), "d_q");
    check(within_budget(actual.d_k, plain.d_k, exact.d_k, 3), "d_k");
    check(within_budget(actual.d_v, plain.d_v, exact.d_v, 3), "d_v");
    for (const auto *x : {&c.out, &c.d_q, &c.d_k_media, &c.d_v_latents}) {
        check(x->gaps_untouched(), "writes nothing between vectors");
    }
    check(again.run(set, 3) == FLAMINGO_OK && same_bits(c.out, again.out) &&
              same_bits(c.d_q, again.d_q) && same_bits(c.d_k_media, again.d_k_media) &&
              same_bits(c.d_v_latents, again.d_v_latents),
          "same bits with three threads");
}

} // namespace

int main() {
    const MediaShape media_shapes[] = {
        // B, T, I, R, H, Hkv, D, gap
        {1, 1, 1, 1, 1, 1, 1, 0},
        {2, 5, 3, 1, 2, 2, 24, 0},
        {1, 17, 3, 63, 2, 1, 40, 3},
        {2, 29, 4, 64, 4, 2, 64, 0},
        {1, 16, 3, 65, 2, 2, 80, 0},
        {2, 15, 3, 130, 4, 2, 96, 5},
        {1, 330, 5, 16, 2, 2, 16, 0},
        {2, 65, 33, 3, 1, 1, 8, 1},
        {1, 14, 3, 200, 3, 1, 128, 2},
        {0, 5, 2, 4, 2, 2, 8, 0},
        {2, 0, 2, 4, 2, 2, 8, 0},
        {2, 5, 0, 4, 2, 2, 8, 0},
        {2, 5, 2, 0, 2, 2, 8, 0},
        {2, 5, 2, 4, 0, 2, 8, 0},
        {2, 5, 2, 4, 2, 2, 0, 0},
        // Keys that are no items: blocks of many, and as many as a chunk splits or passes twice.
        {2, 70, 500, 1, 4, 2, 24, 1},
        {1, 3, 4500, 1, 2, 1, 8, 0},
    };
    const LatentShape latent_shapes[] = {
        // N, L, M, H, Hkv, D, gap, ragged
        {1, 1, 1, 1, 1, 1, 0, false},    {2, 4, 0, 2, 2, 8, 0, false},
        {3, 64, 100, 2, 2, 64, 0, true}, {2, 65, 257, 1, 1, 96, 3, true},
        {1, 7, 300, 3, 3, 40, 0, false}, {2, 130, 5, 1, 1, 24, 1, true},
        {3, 7, 150, 6, 2, 40, 2, true},  {2, 64, 129, 4, 1, 16, 0, true},
        {1, 33, 20, 4, 2, 96, 1, false}, {0, 4, 4, 2, 2, 8, 0, false},
        {2, 0, 4, 2, 2, 8, 0, false},    {2, 4, 4, 0, 0, 8, 0, false},
        {2, 4, 4, 0, 2, 8, 0, false},
    };
    for (int number = 0; flamingo_instruction_set_name(number); ++number) {
        const int32_t set = 1 << number;
        const char *name = flamingo_instruction_set_name(number);
        if (!(flamingo_usable_instruction_sets() & uint32_t(set))) {
            continue;
        }
        for (const MediaShape &s : media_shapes) {
            for (const Ranges ranges :
                 {Ranges::last_item, Ranges::whole_history, Ranges::pairs, Ranges::of_each_token,
                  Ranges::beyond_the_slots, Ranges::none}) {
                check_media<float>("float32", s, ranges, set, name);
                check_media<double>("float64", s, ranges, set, name);
            }
        }
        for (const LatentShape &s : latent_shapes) {
            check_latent<float>("float32", s, set, name);
            check_latent<double>("float64", s, set, name);
        }
    }
    return report();
}
