// How media attention is divided into tasks, for each kv head. Shapes and ranges alone decide,
// never the number of threads, so that the bits of results do not depend on it.
//
// The media items of a batch row lie end to end as a flat list of keys: item i has keys i * R to
// (i + 1) * R - 1. A token sees a range of them.
#pragma once

#include <stdint.h>

namespace flamingo {

// Consecutive tokens of one batch row that see the same keys, or nearly the same: a piece of a
// group, which has the same blocks of keys whatever the batch.
struct Chunk {
    int64_t row;         // batch row
    int64_t begin, end;  // tokens
    int64_t base;        // first key of the group, where its blocks of keys begin
    int64_t start, stop; // keys from the first to the last that a token sees; none if equal. A
                         // token of the group sees each of them
    int64_t group;       // tokens of the whole group
    bool uniform;        // every token sees all of these keys
};

// A task of the forward: a chunk and a part of its keys.
struct ForwardTask {
    int64_t chunk;
    int64_t start, stop; // keys
    int64_t partial; // tokens of split chunks before this task; -1 if it has all keys of its chunk
};

// Consecutive chunks of one batch row that a task of a backward takes in their order. Each of them
// shares keys with those before it.
struct BackwardTask {
    int64_t row;         // batch row
    int64_t begin, end;  // chunks
    int64_t start, stop; // keys that the chunks see
    int64_t partial;     // keys of earlier tasks with partial sums of d_k and d_v; -1 if no other
                         // task sees these keys, and the task writes the gradients itself
};

// Tasks from the first to the last that sees a key of a cell.
struct TaskRange {
    int64_t begin, end;
};

// Keys of a cell: cells share out the sums of the backward's partial sums.
constexpr int64_t cell_keys = 64;

struct TaskPlan {
    const Chunk *chunks;    // attended ones first, by batch row, first key and token
    int64_t chunk_count;    // of all chunks
    int64_t attended_count; // of chunks that see keys
    int64_t longest_chunk;  // most tokens of a chunk
    int64_t widest_chunk;   // most keys of a chunk
    int64_t pairs;          // tokens times keys of all chunks
    // The following are of the forward only.
    const ForwardTask *forward_tasks; // in the order of their chunks
    int64_t forward_count;
    int64_t partial_tokens; // of split chunks, once per part
    // The following are of the backward only.
    const BackwardTask *tasks; // in the order of their chunks
    int64_t task_count;
    const TaskRange *cells; // [B, cells of a row]
    int64_t cells_of_row;
    int64_t widest_task;   // most keys of a task
    int64_t partial_count; // keys of all partial sums of d_k and d_v
    bool wide;             // tasks are connected components; see media_backward_wide.h
};

} // namespace flamingo
