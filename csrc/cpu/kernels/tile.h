// Matrix products of small tiles whose accumulators stay in registers.
#pragma once

#include <type_traits>

#include "vector.h"

namespace {

// 6 rows by FLAMINGO_TILE_VECTORS vectors: 12 of 16 registers with AVX2, 24 of 32 with AVX-512.
constexpr int tile_rows = 6;
constexpr int tile_vectors = FLAMINGO_TILE_VECTORS;

// A(i, k) is a[i * row + k * step].
template <typename Real> struct Left {
    const Real *a;
    int64_t row, step;
};

// C[ROWS, VECTORS * lanes] (+)= A[ROWS, depth] B[depth, VECTORS * lanes]. The order of additions to
// an element does not depend on ROWS or VECTORS.
template <typename Real, int ROWS, int VECTORS>
inline void product_tile(int64_t depth, Left<Real> left, const Real *__restrict b, int64_t b_row,
                         Real *__restrict c, int64_t c_row, bool accumulate) {
    vec<Real> sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) {
            sum[i][j] = accumulate ? load(c + i * c_row + j * lanes<Real>) : vec<Real>{};
        }
    }
    const Real *a = left.a;
    for (int64_t k = 0; k < depth; ++k) {
        vec<Real> right[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) {
            right[j] = load(b + j * lanes<Real>);
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const vec<Real> value = broadcast(a[i * left.row]);
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; ++j) {
                sum[i][j] += value * right[j];
            }
        }
        a += left.step;
        b += b_row;
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) {
            store(c + i * c_row + j * lanes<Real>, sum[i][j]);
        }
    }
}

// C[rows, VECTORS * lanes] (+)= A[rows, depth] B[depth, VECTORS * lanes].
template <typename Real, int VECTORS>
inline void product_panel(int64_t rows, int64_t depth, Left<Real> left, const Real *b,
                          int64_t b_row, Real *c, int64_t c_row, bool accumulate) {
    int64_t i = 0;
    const auto next = [&](auto count) {
        product_tile<Real, decltype(count)::value, VECTORS>(
            depth, {left.a + i * left.row, left.row, left.step}, b, b_row, c + i * c_row, c_row,
            accumulate);
        i += decltype(count)::value;
    };
    while (i + tile_rows <= rows) {
        next(std::integral_constant<int, tile_rows>{});
    }
    switch (rows - i) {
    case 1:
        return next(std::integral_constant<int, 1>{});
    case 2:
        return next(std::integral_constant<int, 2>{});
    case 3:
        return next(std::integral_constant<int, 3>{});
    case 4:
        return next(std::integral_constant<int, 4>{});
    case 5:
        return next(std::integral_constant<int, 5>{});
    }
}

// C[rows, columns] (+)= A[rows, depth] B[depth, columns], where `columns` is a multiple of the
// vector length. A panel of B stays in the first level of cache while all rows of A pass.
template <typename Real>
void product(int64_t rows, int64_t columns, int64_t depth, Left<Real> left, const Real *b,
             int64_t b_row, Real *c, int64_t c_row, bool accumulate) {
    constexpr int64_t wide = tile_vectors * lanes<Real>;
    int64_t j = 0;
    for (; j + wide <= columns; j += wide) {
        product_panel<Real, tile_vectors>(rows, depth, left, b + j, b_row, c + j, c_row,
                                          accumulate);
    }
    for (; j < columns; j += lanes<Real>) {
        product_panel<Real, 1>(rows, depth, left, b + j, b_row, c + j, c_row, accumulate);
    }
}

} // namespace
