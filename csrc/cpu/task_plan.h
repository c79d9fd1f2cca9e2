// How media attention is divided into tasks, for each kv head. Shapes and ranges alone decide,
// never the number of threads, so that the bits of results do not depend on it.
#pragma once

#include <stdint.h>

namespace flamingo {

// Consecutive tokens of one batch row that see the same range of media items: a task of the
// forward.
struct Chunk {
    int64_t row;         // batch row
    int64_t begin, end;  // tokens
    int64_t first, last; // media items, clipped to the slots; none if first > last
    int64_t run;         // tokens of the whole run of this range, of which the chunk is a piece
};

// Consecutive chunks of one batch row that a task of the backward takes in their order. Each of
// them shares media items with those before it.
struct BackwardTask {
    int64_t row;         // batch row
    int64_t begin, end;  // chunks
    int64_t first, last; // media items that the chunks see; at least one chunk sees each
    int64_t partial; // index of the first item's partial sums of d_k and d_v; -1 if no other task
                     // sees these items, and the task writes the gradients itself
};

// Tasks from the first to the last that sees an item.
struct TaskRange {
    int64_t begin, end;
};

struct TaskPlan {
    const Chunk *chunks;    // attended ones first, by batch row, first item and token
    int64_t chunk_count;    // of all chunks
    int64_t attended_count; // of chunks that see media
    int64_t longest_chunk;  // most tokens of a chunk
    // The following are of the backward only.
    const BackwardTask *tasks; // in the order of their chunks
    int64_t task_count;
    const TaskRange *item_tasks; // [B * I]
    int64_t widest_task;         // most media items of a task
    int64_t partial_count;       // partial sums of an item's d_k and d_v
};

} // namespace flamingo
