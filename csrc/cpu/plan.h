// How media attention is cut into tasks: a function of shapes and ranges alone, never of threads.
#pragma once

#include <stdint.h>

namespace flamingo {

// Neighbouring tokens of one batch row that see the same range of media items.
struct Chunk {
    int64_t row;         // batch row
    int64_t begin, end;  // tokens
    int64_t first, last; // media items, clipped to the slots; empty if first > last
    int64_t run;         // tokens of the whole run of this range, however it was cut
};

// Chunks that one task of the backward takes one after the other: of one batch row, each with items
// in common with those before.
struct Part {
    int64_t row;         // batch row
    int64_t begin, end;  // chunks
    int64_t first, last; // media items, each seen by one of the chunks
    int64_t slot; // of the first item's share of d_k, d_v; -1: no other part sees these items
};

// From the first to the last of the parts that see an item.
struct PartRange {
    int64_t begin, end;
};

struct MediaPlan {
    const Chunk *chunks; // those that see media come first, by batch row, first item and token
    int64_t chunk_count;
    int64_t seeing_count; // chunks that see media
    int64_t longest;      // most tokens in a chunk
    // The backward's:
    const Part *parts; // in the order of chunks
    int64_t part_count;
    const PartRange *item_parts; // [B * I]
    int64_t widest;              // most items in a part
    int64_t slots;               // shares of d_k and d_v, for each kv head
};

} // namespace flamingo
