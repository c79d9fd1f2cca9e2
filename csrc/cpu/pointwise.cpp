// Entry points of gated residual, gated activation and LayerNorm: they validate and choose the
// instruction set.
#include "kernels.h"
#include "validate.h"

namespace {

bool is_negative(const flamingo_rows &rows) { return rows.inner_rows < 0; }

int32_t validate_sizes(int64_t rows, int64_t channels, const flamingo_execution &execution) {
    return rows < 0 || channels < 0 ? FLAMINGO_NEGATIVE_SIZE : flamingo::validate(execution);
}

int32_t validate(const flamingo_gated_residual_params &p, bool backward) {
    const int32_t status = validate_sizes(p.rows, p.channels, p.execution);
    if (status != FLAMINGO_OK) {
        return status;
    }
    const flamingo_rows &other = backward ? p.d_out : p.x;
    if (is_negative(p.y) || is_negative(other)) {
        return FLAMINGO_NEGATIVE_SIZE;
    }
    const bool has_values = p.rows > 0 && p.channels > 0;
    const bool has_gates = p.channels > 0 || !p.gate_per_channel;
    const bool tensors = p.y.data && other.data && (backward ? p.d_y : p.out);
    const bool gates = p.gate && (!backward || p.d_gate);
    if ((has_values && !tensors) || (has_gates && !gates)) {
        return FLAMINGO_NULL_POINTER;
    }
    return FLAMINGO_OK;
}

int32_t validate(const flamingo_gated_activation_params &p, bool backward) {
    const int32_t status = validate_sizes(p.rows, p.channels, p.execution);
    if (status != FLAMINGO_OK) {
        return status;
    }
    if (is_negative(p.x) || (backward && is_negative(p.d_out))) {
        return FLAMINGO_NEGATIVE_SIZE;
    }
    if (p.activation < FLAMINGO_GELU || p.activation > FLAMINGO_RELU) {
        return FLAMINGO_UNKNOWN_ACTIVATION;
    }
    const bool has_values = p.rows > 0 && p.channels > 0;
    const bool tensors = p.x.data && (backward ? p.d_out.data && p.d_x : p.out != nullptr);
    if ((has_values && !tensors) || (backward && p.gate && !p.d_gate)) {
        return FLAMINGO_NULL_POINTER;
    }
    return FLAMINGO_OK;
}

int32_t validate(const flamingo_layer_norm_params &p, bool backward) {
    const int32_t status = validate_sizes(p.rows, p.channels, p.execution);
    if (status != FLAMINGO_OK) {
        return status;
    }
    if (is_negative(p.x) || (backward && is_negative(p.d_out))) {
        return FLAMINGO_NEGATIVE_SIZE;
    }
    const bool has_values = p.rows > 0 && p.channels > 0;
    const bool tensors = p.x.data && (backward ? p.d_out.data && p.d_x : p.out != nullptr);
    if ((has_values && !tensors) || (backward && p.rows > 0 && (!p.mean || !p.rstd))) {
        return FLAMINGO_NULL_POINTER;
    }
    return FLAMINGO_OK;
}

// Returns the status of a call: of its params, or of `kernel`, which returns false if it is out of
// memory.
template <typename Params, typename Kernel>
int32_t checked(const Params &p, bool backward, Kernel kernel) {
    const int32_t status = validate(p, backward);
    if (status != FLAMINGO_OK) {
        return status;
    }
    return kernel() ? FLAMINGO_OK : FLAMINGO_OUT_OF_MEMORY;
}

} // namespace

int32_t flamingo_gated_residual_forward(const flamingo_gated_residual_params *params) {
    return checked(*params, false, [&] {
        return FLAMINGO_RUN_KERNEL(params->execution.instruction_set, gated_residual_forward,
                                   *params);
    });
}

int32_t flamingo_gated_residual_backward(const flamingo_gated_residual_params *params) {
    return checked(*params, true, [&] {
        return FLAMINGO_RUN_KERNEL(params->execution.instruction_set, gated_residual_backward,
                                   *params);
    });
}

int32_t flamingo_gated_activation_forward(const flamingo_gated_activation_params *params) {
    return checked(*params, false, [&] {
        return FLAMINGO_RUN_KERNEL(params->execution.instruction_set, gated_activation_forward,
                                   *params);
    });
}

int32_t flamingo_gated_activation_backward(const flamingo_gated_activation_params *params) {
    return checked(*params, true, [&] {
        return FLAMINGO_RUN_KERNEL(params->execution.instruction_set, gated_activation_backward,
                                   *params);
    });
}

int32_t flamingo_layer_norm_forward(const flamingo_layer_norm_params *params) {
    return checked(*params, false, [&] {
        return FLAMINGO_RUN_KERNEL(params->execution.instruction_set, layer_norm_forward, *params);
    });
}

int32_t flamingo_layer_norm_backward(const flamingo_layer_norm_params *params) {
    return checked(*params, true, [&] {
        return FLAMINGO_RUN_KERNEL(params->execution.instruction_set, layer_norm_backward, *params);
    });
}
