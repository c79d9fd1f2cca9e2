// Matrix products of small tiles whose accumulators stay in registers.
#pragma once

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

// C[ROWS, VECTORS * lanes] (+)= A[ROWS, depth] B[depth, VECTORS * lanes]. The order of additions to an
// element does not depend on ROWS or VECTORS.
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

template <typename Real, int ROWS>
inline void product_rows(int64_t depth, Left<Real> left, const Real *b, int64_t b_row, Real *c,
                         int64_t c_row, int64_t columns, bool accumulate) {
    constexpr int64_t wide = tile_vectors * lanes<Real>;
    int64_t j = 0;
    for (; j + wide <= columns; j += wide) {
        product_tile<Real, ROWS, tile_vectors>(depth, left, b + j, b_row, c + j, c_row, accumulate);
    }
    for (; j < columns; j += lanes<Real>) {
        product_tile<Real, ROWS, 1>(depth, left, b + j, b_row, c + j, c_row, accumulate);
    }
}

// C[rows, columns] (+)= A[rows, depth] B[depth, columns]; columns a multiple of the vector length.
template <typename Real>
void product(int64_t rows, int64_t columns, int64_t depth, Left<Real> left, const Real *b,
             int64_t b_row, Real *c, int64_t c_row, bool accumulate) {
    for (int64_t i = 0; i < rows; i += tile_rows) {
        const Left<Real> part = {left.a + i * left.row, left.row, left.step};
        Real *to = c + i * c_row;
        switch (rows - i) {
        case 1:
            product_rows<Real, 1>(depth, part, b, b_row, to, c_row, columns, accumulate);
            break;
        case 2:
            product_rows<Real, 2>(depth, part, b, b_row, to, c_row, columns, accumulate);
            break;
        case 3:
            product_rows<Real, 3>(depth, part, b, b_row, to, c_row, columns, accumulate);
            break;
        case 4:
            product_rows<Real, 4>(depth, part, b, b_row, to, c_row, columns, accumulate);
            break;
        case 5:
            product_rows<Real, 5>(depth, part, b, b_row, to, c_row, columns, accumulate);
            break;
        default:
            product_rows<Real, tile_rows>(depth, part, b, b_row, to, c_row, columns, accumulate);
        }
    }
}

} // namespace
