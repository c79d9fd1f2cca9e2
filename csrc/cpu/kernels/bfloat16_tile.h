// Products of bfloat16 tiles in fp32, two neighbours of the inner dimension at a time.
//
// With AVX-512 BF16 a step is one instruction. Without it, which is for tests
// (FLAMINGO_BFLOAT16_DOT), a step is shifts and fp32 multiply-adds.
#pragma once

#include "row_vectors.h"
#include "tile.h"

#if defined(FLAMINGO_BFLOAT16_DOT)

namespace {

// Two bfloat16 in one 32-bit lane, the first in the low half.
typedef uint32_t pair __attribute__((may_alias));
typedef uint32_t pair_vector __attribute__((vector_size(FLAMINGO_VECTOR_BYTES)));
typedef uint32_t unaligned_pairs
    __attribute__((vector_size(FLAMINGO_VECTOR_BYTES), aligned(4), may_alias));

inline vec<float> add_pair_products(vec<float> sum, uint32_t left, pair_vector right) {
    const pair_vector spread = left - pair_vector{};
#if defined(__AVX512BF16__)
    return (vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)spread, (__m512bh)right);
#else
    sum += (vec<float>)(spread << 16) * (vec<float>)(right << 16);
    return sum + (vec<float>)(spread & 0xffff0000u) * (vec<float>)(right & 0xffff0000u);
#endif
}

// C[ROWS, VECTORS * lanes] = A[ROWS, 2 depth] B[2 depth, VECTORS * lanes], like product_tile. A is
// rows of `depth` pairs, B is [depth, columns] pairs.
template <int ROWS, int VECTORS>
inline void pair_product_tile(int64_t depth, const pair *a, int64_t a_row, const pair *__restrict b,
                              int64_t b_row, float *__restrict c, int64_t c_row) {
    vec<float> sum[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < depth; ++k) {
        pair_vector right[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) {
            right[j] = *reinterpret_cast<const unaligned_pairs *>(b + j * lanes<float>);
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; ++j) {
                sum[i][j] = add_pair_products(sum[i][j], a[i * a_row + k], right[j]);
            }
        }
        b += b_row;
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) {
            store(c + i * c_row + j * lanes<float>, sum[i][j]);
        }
    }
}

template <int ROWS>
inline void pair_product_rows(int64_t depth, const pair *a, int64_t a_row, const pair *b,
                              int64_t b_row, float *c, int64_t c_row, int64_t columns) {
    constexpr int64_t wide = tile_vectors * lanes<float>;
    int64_t j = 0;
    for (; j + wide <= columns; j += wide) {
        pair_product_tile<ROWS, tile_vectors>(depth, a, a_row, b + j, b_row, c + j, c_row);
    }
    for (; j < columns; j += lanes<float>) {
        pair_product_tile<ROWS, 1>(depth, a, a_row, b + j, b_row, c + j, c_row);
    }
}

// C[rows, columns] = A B, where A is rows of `depth` pairs and B is [depth, columns] pairs.
inline void pair_product(int64_t rows, int64_t columns, int64_t depth, const pair *a, int64_t a_row,
                         const pair *b, int64_t b_row, float *c, int64_t c_row) {
    int64_t i = 0;
    for (; i + tile_rows <= rows; i += tile_rows) {
        pair_product_rows<tile_rows>(depth, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row,
                                     columns);
    }
    for (; i + 2 <= rows; i += 2) {
        pair_product_rows<2>(depth, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row, columns);
    }
    for (; i < rows; ++i) {
        pair_product_rows<1>(depth, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row, columns);
    }
}

inline uint32_t make_pair(bfloat16 first, bfloat16 second) {
    return uint32_t(first.bits) | uint32_t(second.bits) << 16;
}

// Packs a row of `size` values as to[(size + 1) / 2] pairs: neighbours in memory already are pairs.
inline void pair_row(const bfloat16 *from, int64_t size, pair *to) {
    memcpy(to, from, size_t(size) * sizeof(bfloat16));
    if (size % 2) {
        to[size / 2] = make_pair(from[size - 1], bfloat16{0});
    }
}
// Rounds a row of `size` values, a multiple of the vector length, to pairs in place. A vector is
// stored no further than it was loaded, so it overwrites no value that is still to be read.
inline void narrow_to_pairs(float *row, int64_t size) {
    bfloat16 *to = reinterpret_cast<bfloat16 *>(row);
    for (int64_t i = 0; i < size; i += lanes<float>) {
        put(load(row + i), to + i, AllLanes{});
    }
}

} // namespace

#endif
