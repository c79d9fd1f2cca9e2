// What forward and backward of media attention share: sizes, where the vectors of a head are, and
// which keys a token sees.
#pragma once

#include "../task_plan.h"
#include "flamingo_cpu.h"
#include "key_block.h"
#include "tasks.h"

namespace {

// The vectors of one head of q, out or their gradients for tokens t, t + 1, ...
template <typename T> Rows<T> text_rows(const flamingo_tensor &x, int64_t b, int64_t t, int64_t h) {
    return {static_cast<T *>(x.data) + b * x.stride[0] + t * x.stride[1] + h * x.stride[2],
            x.stride[1]};
}

// The vectors of one head of k, v or their gradients for consecutive keys, whatever the strides of
// items and of the latents in them.
template <typename T> struct KeyRows {
    T *data;
    int64_t stride;
    int64_t item_stride, latents; // 0 latents: the keys are `stride` apart across items too
    int64_t first;                // key of an item that `data` points to, unless latents is 0

    T *operator[](int64_t i) const {
        if (latents == 0) {
            return data + i * stride;
        }
        const int64_t item = (first + i) / latents;
        return data + item * item_stride + (first + i - item * latents) * stride;
    }
};

// The values of `x` from position `first` of a list on.
template <typename T>
KeyRows<T> key_rows(const flamingo_tensor &x, int64_t b, int64_t key, int64_t h, int64_t items,
                    int64_t latents) {
    T *data = static_cast<T *>(x.data) + b * x.stride[0] + h * x.stride[3];
    if (latents == 1) {
        return {data + key * x.stride[1], x.stride[1], 0, 0, 0};
    }
    if (items == 1 || x.stride[1] == latents * x.stride[2]) {
        return {data + key * x.stride[2], x.stride[2], 0, 0, 0};
    }
    const int64_t item = key / latents;
    return {data + item * x.stride[1], x.stride[2], x.stride[1], latents, key - item * latents};
}

template <typename T> struct Media {
    using Real = real<T>;

    const flamingo_media_attention_params &p;
    const flamingo::TaskPlan &plan;
    const int64_t group = p.heads / p.kv_heads; // query heads of a kv head
    const int64_t padded_dim = round_up(p.head_dim, lanes<Real>);
    const Real scale = static_cast<Real>(p.scale);
    const Real gate = p.gate ? hyperbolic_tangent(*static_cast<const Real *>(p.gate)) : Real(1);

    Media(const flamingo_media_attention_params &params, const flamingo::TaskPlan &task_plan)
        : p(params), plan(task_plan) {}

    int threads() const {
        return threads_for(plan.pairs * p.heads * p.head_dim, p.execution.threads);
    }
    template <typename U>
    KeyRows<U> keys_of(const flamingo_tensor &x, int64_t b, int64_t key, int64_t kv_head) const {
        return key_rows<U>(x, b, key, kv_head, p.media, p.latents);
    }
    // Calls body(rows of k, rows of v) for the keys from `key` on: plain rows where they are evenly
    // apart, as nearly always, so that the loops over them do not ask for each.
    template <typename Body>
    void with_keys(int64_t b, int64_t key, int64_t kv_head, Body body) const {
        const KeyRows<const T> k = keys_of<const T>(p.k, b, key, kv_head);
        const KeyRows<const T> v = keys_of<const T>(p.v, b, key, kv_head);
        if (k.latents == 0 && v.latents == 0) {
            body(Rows<const T>{k.data, k.stride}, Rows<const T>{v.data, v.stride});
        } else {
            body(k, v);
        }
    }
    void pack(KeyBlock<Real> &keys, int64_t b, int64_t key, int64_t count, int64_t kv_head) const {
        with_keys(b, key, kv_head,
                  [&](auto k, auto v) { keys.pack(k, v, count, p.head_dim, scale); });
    }
    // Clears a chunk of out or d_q, for all query heads of a kv head.
    void write_zeros(const flamingo_tensor &to, const flamingo::Chunk &c, int64_t kv_head) const {
        for (int64_t t = c.begin; t < c.end; ++t) {
            for (int64_t g = 0; g < group; ++g) {
                clear(text_rows<T>(to, c.row, t, kv_head * group + g).data, p.head_dim);
            }
        }
    }
    // Makes -inf of those of scores[rows, padded] that belong to keys outside a token's range. The
    // columns are `count` keys from `key` on; the rows are rows `begin`, `begin` + 1, ... of a
    // chunk: its tokens, one head of the group after the other.
    void hide(Real *scores, int64_t rows, int64_t padded, const flamingo::Chunk &c, int64_t begin,
              int64_t key, int64_t count) const {
        if (c.uniform && c.start <= key && key + count <= c.stop) {
            return;
        }
        const int64_t length = c.end - c.begin;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = c.row * p.tokens + c.begin + (begin + r) % length;
            const int64_t start = bigger(p.first[at], 0) * p.latents;
            const int64_t stop = (smaller(p.last[at], p.media - 1) + 1) * p.latents;
            Real *row = scores + r * padded;
            for (int64_t j = 0; j < smaller(start - key, count); ++j) {
                row[j] = -Real(INFINITY);
            }
            for (int64_t j = bigger(stop - key, 0); j < count; ++j) {
                row[j] = -Real(INFINITY);
            }
        }
    }
};

} // namespace
