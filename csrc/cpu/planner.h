// Divides media attention into tasks.
#pragma once

#include <vector>

#include "flamingo_cpu.h"
#include "task_plan.h"

namespace flamingo {

class Planner {
  public:
    // Throws std::bad_alloc if it is out of memory.
    Planner(const flamingo_media_attention_params &p, bool backward);

    // The plan points into the planner.
    TaskPlan plan() const;

  private:
    void cut_chunks(const flamingo_media_attention_params &p);
    void group_tasks(const flamingo_media_attention_params &p);
    void place_partials(const flamingo_media_attention_params &p);

    std::vector<Chunk> chunks_;
    std::vector<BackwardTask> tasks_;
    std::vector<TaskRange> item_tasks_;
    int64_t attended_count_ = 0;
    int64_t longest_chunk_ = 1;
    int64_t widest_task_ = 0;
    int64_t partial_count_ = 0;
};

} // namespace flamingo
