// Scratch memory: one allocation, cut into aligned arrays by the constructors that use them.
#pragma once

#include <stdlib.h>

#include "vector.h"

namespace {

// Hands out the arrays of one allocation in order. Without memory every array is null and `taken`
// still counts, so that the code that takes arrays also says how many bytes they need.
class Scratch {
  public:
    Scratch() = default;
    explicit Scratch(int64_t bytes) {
        void *memory = nullptr;
        if (posix_memalign(&memory, alignment, size_t(bytes + alignment)) == 0) {
            memory_ = static_cast<char *>(memory);
        }
    }
    ~Scratch() { free(memory_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;

    bool has_memory() const { return memory_ != nullptr; }
    int64_t taken() const { return taken_; } // bytes

    // Returns an array of `count` values that are not initialised.
    template <typename T> T *take(int64_t count) {
        char *array = memory_ ? memory_ + taken_ : nullptr;
        taken_ += round_up(count * int64_t(sizeof(T)), alignment);
        return reinterpret_cast<T *>(array);
    }

  private:
    static constexpr int64_t alignment = 64;
    char *memory_ = nullptr;
    int64_t taken_ = 0;
};

// A Layout in an allocation of the size that it needs. Layout(scratch, arguments...) takes its
// arrays from `scratch`. It is constructed twice, first without memory to count the bytes, so it
// must not write to an array that is null.
template <typename Layout> class Allocated {
  public:
    template <typename... Arguments>
    explicit Allocated(const Arguments &...arguments)
        : scratch_(bytes_of(arguments...)), layout_(scratch_, arguments...) {}

    bool ok() const { return scratch_.has_memory(); }
    Layout &operator*() { return layout_; }
    Layout *operator->() { return &layout_; }

  private:
    template <typename... Arguments> static int64_t bytes_of(const Arguments &...arguments) {
        Scratch counter;
        const Layout counted(counter, arguments...);
        (void)counted;
        return counter.taken();
    }

    Scratch scratch_;
    Layout layout_;
};

} // namespace
