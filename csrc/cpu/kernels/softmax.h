// Softmax of rows of scores, one block of keys after the other, and its gradient.
#pragma once

#include "vector.h"

namespace {

// Running softmax of one row over the keys so far, whose weights are exp(score - max).
template <typename Real> struct RowState {
    Real max; // largest score
    Real sum; // of the weights
    Real log_sum() const { return max + logarithm(sum); }
};

// states[rows] = the state before any key.
template <typename Real> inline void clear_states(RowState<Real> *states, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
        states[r] = {-Real(INFINITY), 0};
    }
}

// Raises the max of each state to the largest of its row of scores[rows, padded], whose columns
// from `keys` on become -inf. Runs for all rows before any weight, so that the weights of a row do
// not wait for its own max.
template <typename Real>
inline void update_max(Real *scores, int64_t rows, int64_t keys, int64_t padded,
                       RowState<Real> *states) {
    for (int64_t r = 0; r < rows; ++r) {
        Real *row = scores + r * padded;
        for (int64_t j = keys; j < padded; ++j) {
            row[j] = -Real(INFINITY);
        }
        vec<Real> max = load(row);
        for (int64_t j = lanes<Real>; j < padded; j += lanes<Real>) {
            max = largest<Real>(max, load(row + j));
        }
        const Real row_max = largest_of<Real>(max);
        states[r].max = row_max < states[r].max ? states[r].max : row_max;
    }
}

// Turns scores[rows, padded] into weights relative to each row's max, and adds them to its sum.
template <typename Real>
inline void weigh_rows(Real *scores, int64_t rows, int64_t padded, RowState<Real> *states) {
    for (int64_t r = 0; r < rows; ++r) {
        Real *row = scores + r * padded;
        // A row whose every score so far is -inf has weights of 0; a later block may hold others.
        const Real max = states[r].max == -Real(INFINITY) ? Real(0) : states[r].max;
        vec<Real> sum = {};
        for (int64_t j = 0; j < padded; j += lanes<Real>) {
            const vec<Real> weight = exponential(load(row + j) - max);
            sum += weight;
            store(row + j, weight);
        }
        states[r].sum += sum_of<Real>(sum);
    }
}

// Turns scores[rows, padded] into weights relative to each row's new max; columns from `keys` on
// become 0. `rescale`, unless null, receives for each row the factor that makes earlier sums
// relative to the new max.
template <typename Real>
inline void online_softmax(Real *scores, int64_t rows, int64_t keys, int64_t padded,
                           RowState<Real> *states, Real *rescale) {
    for (int64_t r = 0; r < rows && rescale; ++r) {
        rescale[r] = states[r].max;
    }
    update_max(scores, rows, keys, padded, states);
    for (int64_t r = 0; r < rows && rescale; ++r) {
        rescale[r] = states[r].sum > 0 ? exponential(rescale[r] - states[r].max) : Real(0);
        states[r].sum *= rescale[r];
    }
    weigh_rows(scores, rows, padded, states);
}

// Turns scores[padded] into final weights exp(score - log_sum); columns from `keys` on become 0.
template <typename Real>
inline void weigh_row(Real *scores, int64_t keys, int64_t padded, Real log_sum) {
    for (int64_t j = keys; j < padded; ++j) {
        scores[j] = -Real(INFINITY);
    }
    for (int64_t j = 0; j < padded; j += lanes<Real>) {
        store(scores + j, exponential(load(scores + j) - log_sum));
    }
}

// Returns the sum of weights[padded] * d_weights[padded].
template <typename Real>
inline Real weighted_sum(const Real *weights, const Real *d_weights, int64_t padded) {
    vec<Real> total = {};
    for (int64_t j = 0; j < padded; j += lanes<Real>) {
        total += load(weights + j) * load(d_weights + j);
    }
    return sum_of<Real>(total);
}

// Turns d_weights[padded] into the gradient of the scores: weights * (d_weights - delta).
template <typename Real>
inline void score_gradient_row(const Real *weights, Real *d_weights, int64_t padded, Real delta) {
    for (int64_t j = 0; j < padded; j += lanes<Real>) {
        store(d_weights + j, load(weights + j) * (load(d_weights + j) - delta));
    }
}

// Turns weights[padded] relative to the max into final weights, and d_weights[padded] into `factor`
// times the gradient of the scores.
template <typename Real>
inline void normalise_row(Real *weights, Real *d_weights, int64_t padded, Real inverse_sum,
                          Real delta, Real factor) {
    for (int64_t j = 0; j < padded; j += lanes<Real>) {
        const vec<Real> weight = load(weights + j) * inverse_sum;
        store(weights + j, weight);
        store(d_weights + j, factor * weight * (load(d_weights + j) - delta));
    }
}

// row[padded] *= factor.
template <typename Real> inline void scale_row(Real *row, int64_t padded, Real factor) {
    for (int64_t d = 0; d < padded; d += lanes<Real>) {
        store(row + d, load(row + d) * factor);
    }
}

} // namespace
