/* C interface of the flamingo_kernels CPU library: gated residual, gated activation and LayerNorm.
 *
 * A tensor [..., C] is a list of rows of `channels` values with stride 1. Forward and backward of
 * an op share a struct; each uses the pointers whose comment names it and ignores the others.
 * Outputs are contiguous.
 */
#ifndef FLAMINGO_POINTWISE_H
#define FLAMINGO_POINTWISE_H

#include "flamingo_cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flamingo_activation {
    FLAMINGO_GELU = 0, /* x Phi(x), Phi by the error function */
    FLAMINGO_SQUARED_RELU = 1,
    FLAMINGO_RELU = 2
} flamingo_activation;

/* Row r of an input starts (r / inner_rows) * outer_stride + (r % inner_rows) * inner_stride
 * elements after `data`. With inner_rows = 0 it starts r * inner_stride elements after `data`. */
typedef struct flamingo_rows {
    const void *data;
    int64_t inner_rows;
    int64_t outer_stride;
    int64_t inner_stride;
} flamingo_rows;

typedef struct flamingo_gated_residual_params {
    flamingo_rows x;     /* [rows, channels]: forward */
    flamingo_rows y;     /* [rows, channels]: forward, backward */
    flamingo_rows d_out; /* [rows, channels]: backward */
    void *out;           /* [rows, channels], written by the forward */
    void *d_y;           /* [rows, channels], written by the backward */
    const void *gate;    /* [1] or [channels], accumulation dtype: forward, backward */
    void *d_gate;        /* as gate, written by the backward */

    int64_t rows;
    int64_t channels;
    int32_t gate_per_channel; /* 0 for one gate */
    flamingo_execution execution;
} flamingo_gated_residual_params;

typedef struct flamingo_gated_activation_params {
    flamingo_rows x;     /* [rows, channels]: forward, backward */
    flamingo_rows d_out; /* [rows, channels]: backward */
    void *out;           /* [rows, channels], written by the forward */
    void *d_x;           /* [rows, channels], written by the backward */
    const void *gate;    /* [1], accumulation dtype, or null for no gate: forward, backward */
    void *d_gate;        /* [1], accumulation dtype, written by the backward; null without a gate */

    int64_t rows;
    int64_t channels;
    int32_t activation; /* flamingo_activation */
    flamingo_execution execution;
} flamingo_gated_activation_params;

typedef struct flamingo_layer_norm_params {
    flamingo_rows x;     /* [rows, channels]: forward, backward */
    flamingo_rows d_out; /* [rows, channels]: backward */
    void *out;           /* [rows, channels], written by the forward */
    void *d_x;           /* [rows, channels], written by the backward */
    const void *weight;  /* [channels], accumulation dtype, or null for ones: forward, backward */
    const void *bias;    /* [channels], accumulation dtype, or null for zeros: forward */
    void *mean;     /* [rows], accumulation dtype, written by the forward unless null, read by the
                       backward */
    void *rstd;     /* [rows], accumulation dtype: 1 / sqrt(variance + eps); as mean */
    void *d_weight; /* [channels], accumulation dtype, written by the backward unless null */
    void *d_bias;   /* [channels], accumulation dtype, written by the backward unless null */

    int64_t rows;
    int64_t channels;
    double eps; /* added to the variance */
    flamingo_execution execution;
} flamingo_layer_norm_params;

/* All return a flamingo_status; nothing is written unless it is FLAMINGO_OK. The bits of a row of a
 * forward depend on that row alone. Gradients of parameters are sums over blocks of rows in their
 * order; the blocks depend on the number of rows alone. */

/* out = x + tanh(gate) * y; the gradient of x is d_out. */
FLAMINGO_API int32_t flamingo_gated_residual_forward(const flamingo_gated_residual_params *params);
FLAMINGO_API int32_t flamingo_gated_residual_backward(const flamingo_gated_residual_params *params);

/* out = tanh(gate) * activation(x). */
FLAMINGO_API int32_t
flamingo_gated_activation_forward(const flamingo_gated_activation_params *params);
FLAMINGO_API int32_t
flamingo_gated_activation_backward(const flamingo_gated_activation_params *params);

/* out = (x - mean) * rstd * weight + bias, mean and (biased) variance over the channels. */
FLAMINGO_API int32_t flamingo_layer_norm_forward(const flamingo_layer_norm_params *params);
FLAMINGO_API int32_t flamingo_layer_norm_backward(const flamingo_layer_norm_params *params);

#ifdef __cplusplus
}
#endif

#endif
