// Rows of a tensor [..., C] divided into blocks for threads, and sums over all rows.
#pragma once

#include <stdlib.h>

#include "flamingo_pointwise.h"
#include "vector.h"

namespace {

// Elements that are worth waking one more thread for.
constexpr int64_t least_work = 16384;
// Elements of a forward's block of rows, about.
constexpr int64_t task_elements = 8192;
// Rows of a backward's block, over which a gradient of a parameter is summed before the blocks'
// sums are added. More rows keep those sums few beside the rows; fewer rows share the work among
// threads. The number of blocks is bounded to bound the memory of the sums. Both depend on the
// number of rows alone, so the bits of a gradient do too.
constexpr int64_t shortest_block = 32;
constexpr int64_t most_blocks = 512;
// Columns that one task adds up, or whose gates it keeps at hand for all rows of a block.
constexpr int64_t column_panel = 1024;

inline int64_t blocks_of(int64_t rows, int64_t size) { return (rows + size - 1) / size; }

inline int64_t forward_block(int64_t channels) {
    return bigger(1, task_elements / bigger(channels, 1));
}

inline int64_t backward_block(int64_t rows) {
    return bigger(shortest_block, blocks_of(rows, most_blocks));
}

// Calls body(block, first row, end row) for every block of `size` rows, on up to `threads` threads.
template <typename Body>
void over_blocks(int64_t rows, int64_t size, int64_t elements, int32_t threads, Body body) {
    const int64_t blocks = blocks_of(rows, size);
    const auto used = int(smaller(smaller(threads, blocks), 1 + elements / least_work));
    if (used <= 1) {
        for (int64_t b = 0; b < blocks; ++b) {
            body(b, b * size, smaller(rows, (b + 1) * size));
        }
        return;
    }
#pragma omp parallel for num_threads(used) schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        body(b, b * size, smaller(rows, (b + 1) * size));
    }
}

// The first element of a row.
template <typename T> inline const T *row_of(const flamingo_rows &rows, int64_t row) {
    const T *data = static_cast<const T *>(rows.data);
    if (rows.inner_rows == 0 || row < rows.inner_rows) {
        return data + row * rows.inner_stride;
    }
    const int64_t outer = row / rows.inner_rows;
    return data + outer * rows.outer_stride + (row - outer * rows.inner_rows) * rows.inner_stride;
}

// The gradient of a parameter of `size` values, summed over all rows: each block of rows has sums
// of its own, block 0 in the result itself, and `finish` adds the others to it in their order.
template <typename Real> class BlockSums {
  public:
    BlockSums(void *result, int64_t size, int64_t blocks)
        : result_(static_cast<Real *>(result)), size_(size), blocks_(blocks) {
        if (result_ && size > 0 && blocks > 1) {
            others_ = static_cast<Real *>(malloc(size_t((blocks - 1) * size) * sizeof(Real)));
        }
    }
    ~BlockSums() { free(others_); }
    BlockSums(const BlockSums &) = delete;
    BlockSums &operator=(const BlockSums &) = delete;

    bool ok() const { return !result_ || size_ == 0 || blocks_ <= 1 || others_; }

    // Returns the [size] sums of a block, cleared; null if no gradient is wanted.
    Real *start(int64_t block) const {
        if (!result_) {
            return nullptr;
        }
        Real *sums = block == 0 ? result_ : others_ + (block - 1) * size_;
        memset(sums, 0, size_t(size_) * sizeof(Real));
        return sums;
    }
    void finish(int32_t threads) const {
        if (!result_ || size_ == 0) {
            return;
        }
        if (blocks_ == 0) {
            start(0);
        }
        over_blocks(size_, column_panel, size_ * blocks_, threads,
                    [&](int64_t, int64_t begin, int64_t end) {
                        for (int64_t b = 0; b < blocks_ - 1; ++b) {
                            const Real *__restrict from = others_ + b * size_;
                            Real *__restrict to = result_;
                            for (int64_t i = begin; i < end; ++i) {
                                to[i] += from[i];
                            }
                        }
                    });
    }

  private:
    Real *result_;
    Real *others_ = nullptr;
    int64_t size_, blocks_;
};

} // namespace
