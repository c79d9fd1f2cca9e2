// Backward of media attention, of either kind.
#include "../kernels.h"
#include "media_backward_narrow.h"
#include "media_backward_wide.h"
#include "storage_type.h"

bool flamingo::FLAMINGO_ISA::media_attention_backward(const flamingo_media_attention_params &p,
                                                      const TaskPlan &plan) {
    return with_storage_type(p.execution.dtype, [&](auto zero) {
        using T = decltype(zero);
        return plan.wide ? WideBackward<T>(p, plan).run() : NarrowBackward<T>(p, plan).run();
    });
}
