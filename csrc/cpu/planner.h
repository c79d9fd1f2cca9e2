// Divides media attention into tasks.
#pragma once

#include <vector>

#include "flamingo_cpu.h"
#include "task_plan.h"

namespace flamingo {

// Owns the arrays of a plan. Throws std::bad_alloc.
class Planner {
  public:
    // `backward`: also the tasks of the backward, in place of those of the forward.
    Planner(const flamingo_media_attention_params &p, bool backward);
    TaskPlan plan() const;

  private:
    void cut_chunks(const flamingo_media_attention_params &p);
    void split_keys(const flamingo_media_attention_params &p);
    void group_tasks(const flamingo_media_attention_params &p);
    void place_partials(const flamingo_media_attention_params &p);

    std::vector<Chunk> chunks_;
    std::vector<ForwardTask> forward_tasks_;
    std::vector<BackwardTask> tasks_;
    std::vector<TaskRange> cells_;
    TaskPlan plan_{}; // all but the pointers
};

} // namespace flamingo
