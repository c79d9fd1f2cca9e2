// Rows of a strided tensor, and their copies in the layout of the tile products.
#pragma once

#include "vector.h"

namespace {

// Vectors of contiguous values, each `stride` elements after the one before.
template <typename T> struct Rows {
    T *data;
    int64_t stride;
    T *operator[](int64_t i) const { return data + i * stride; }
};

// to[count, padded]: the rows from[i][:size] times `factor`, followed by zeros.
template <typename From, typename Real>
void pack_rows(From from, int64_t count, int64_t size, Real factor, Real *to, int64_t padded) {
    for (int64_t i = 0; i < count; ++i) {
        Real *row = to + i * padded;
        widen_row(from[i], row, size);
        if (factor != 1) {
            for (int64_t d = 0; d < size; ++d) {
                row[d] *= factor;
            }
        }
        for (int64_t d = size; d < padded; ++d) {
            row[d] = 0;
        }
    }
}

// to[row_size, padded]: the transpose of from[count, row_size], with zeros in the columns from
// `count` on. `row_size` and `padded` are multiples of the vector length.
template <typename Real>
void transpose(const Real *from, int64_t row_size, int64_t count, Real *to, int64_t padded) {
    for (int64_t i = 0; i < padded; i += lanes<Real>) {
        for (int64_t d = 0; d < row_size; d += lanes<Real>) {
            vec<Real> square[lanes<Real>];
#pragma GCC unroll 16
            for (int64_t j = 0; j < lanes<Real>; ++j) {
                square[j] = i + j < count ? load(from + (i + j) * row_size + d) : vec<Real>{};
            }
            transpose_square<Real>(square);
#pragma GCC unroll 16
            for (int64_t j = 0; j < lanes<Real>; ++j) {
                store(to + (d + j) * padded + i, square[j]);
            }
        }
    }
}

// values[count] = 0.
template <typename Real> inline void clear(Real *values, int64_t count) {
    memset(values, 0, size_t(count) * sizeof(Real));
}

} // namespace
