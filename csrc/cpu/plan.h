// How media attention is cut into tasks: a function of shapes and ranges alone, never of threads.
#pragma once

#include <stdint.h>

namespace flamingo {

// Neighbouring tokens of one batch row that see the same range of media items.
struct Chunk {
    int64_t row;          // batch row
    int64_t begin, end;   // tokens
    int64_t first, last;  // media items, clipped to the slots; empty if first > last
    int64_t run;          // tokens of the whole run of this range, however it was cut
    int64_t slot;         // where the backward keeps its share of d_k, d_v; -1: it is the only one
};

struct MediaPlan {
    const Chunk *chunks;          // those that see media come first, by batch row, item and token
    int64_t chunk_count;
    int64_t seeing_count;         // chunks that see media
    const int64_t *item_chunks;   // [B * I + 1]: chunks of an item where every range is one item
    const int64_t *row_chunks;    // [B + 1]: seeing chunks of a batch row
    int64_t longest;              // most tokens in a chunk
    int64_t slots;                // slots in use
    bool single_item;             // no range holds more than one item
};

} // namespace flamingo
