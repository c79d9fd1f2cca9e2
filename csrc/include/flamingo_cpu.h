/* C interface of the flamingo_kernels CPU library: the library itself and the attention kernels.
 *
 * No torch, no C++ in the interface: raw pointers, sizes and strides, so one build serves every
 * torch and Python version. Functions are thread-safe and throw nothing.
 *
 * Shape letters: B rows, T text tokens, I media slots, R latents per media item, H query heads, Hkv
 * key/value heads, D head dim; N media items, L latents, M features.
 */
#ifndef FLAMINGO_CPU_H
#define FLAMINGO_CPU_H

#include <stdint.h>

#if defined(FLAMINGO_BUILDING_LIBRARY)
#define FLAMINGO_API __attribute__((visibility("default")))
#else
#define FLAMINGO_API
#endif

/* Raised by one whenever a struct or a signature of any header changes. */
#define FLAMINGO_ABI_VERSION 5

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flamingo_status {
    FLAMINGO_OK = 0,
    FLAMINGO_NEGATIVE_SIZE = 1,
    FLAMINGO_NULL_POINTER = 2,
    FLAMINGO_HEADS_NOT_DIVISIBLE = 3,
    FLAMINGO_UNKNOWN_DTYPE = 4,
    FLAMINGO_NO_THREADS = 5,
    FLAMINGO_INSTRUCTION_SET_UNUSABLE = 6,
    FLAMINGO_OUT_OF_MEMORY = 7,
    FLAMINGO_UNKNOWN_ACTIVATION = 8
} flamingo_status;

/* The dtype of storage. The accumulation dtype, of sums, softmax and gates, is float64 for float64
 * and float32 for the others. */
typedef enum flamingo_dtype {
    FLAMINGO_FLOAT32 = 0,
    FLAMINGO_FLOAT64 = 1,
    FLAMINGO_BFLOAT16 = 2,
    FLAMINGO_FLOAT16 = 3
} flamingo_dtype;

/* Bits of a mask, slowest first: a higher bit is the better choice where a machine has both. */
typedef enum flamingo_instruction_set {
    FLAMINGO_PORTABLE = 1 << 0,
    FLAMINGO_AVX2 = 1 << 1,       /* AVX2, FMA and F16C */
    FLAMINGO_AVX512 = 1 << 2,     /* FLAMINGO_AVX2 and AVX-512 F, DQ, BW and VL */
    FLAMINGO_AVX512_BF16 = 1 << 3 /* FLAMINGO_AVX512 and its bfloat16 dot products */
} flamingo_instruction_set;

/* How to run a kernel. */
typedef struct flamingo_execution {
    int32_t dtype;           /* flamingo_dtype of every tensor without a stated dtype */
    int32_t instruction_set; /* one bit of flamingo_usable_instruction_sets() */
    int32_t threads;         /* OpenMP threads to use, at least 1; results do not depend on it */
} flamingo_execution;

/* A tensor: its first element, and the stride in elements of every dimension but the last, whose
 * stride is 1. */
typedef struct flamingo_tensor {
    void *data;
    int64_t stride[4];
} flamingo_tensor;

typedef struct flamingo_media_attention_params {
    flamingo_tensor q;     /* [B, T, H, D] */
    flamingo_tensor k;     /* [B, I, R, Hkv, D] */
    flamingo_tensor v;     /* [B, I, R, Hkv, D] */
    flamingo_tensor out;   /* [B, T, H, D], written by the forward */
    flamingo_tensor d_out; /* [B, T, H, D], read by the backward */
    flamingo_tensor d_q;   /* [B, T, H, D], written by the backward */
    flamingo_tensor d_k;   /* [B, I, R, Hkv, D], written by the backward */
    flamingo_tensor d_v;   /* [B, I, R, Hkv, D], written by the backward */
    const int32_t *first;  /* [B, T] contiguous: first media item that a token sees */
    const int32_t *last;   /* [B, T] contiguous: last one, inclusive; none if first > last */
    const void *gate;      /* [1], accumulation dtype; null for no gate */
    void *d_gate; /* [1], accumulation dtype, written by the backward; null without a gate */

    int64_t rows;     /* B */
    int64_t tokens;   /* T */
    int64_t media;    /* I */
    int64_t latents;  /* R */
    int64_t heads;    /* H, a multiple of kv_heads */
    int64_t kv_heads; /* Hkv; query head h reads key/value head h / (H / Hkv) */
    int64_t head_dim; /* D */

    double scale; /* multiplies q . k */
    flamingo_execution execution;
} flamingo_media_attention_params;

typedef struct flamingo_latent_attention_params {
    flamingo_tensor q;           /* [N, L, H, D] */
    flamingo_tensor k_media;     /* [N, M, Hkv, D] */
    flamingo_tensor v_media;     /* [N, M, Hkv, D] */
    flamingo_tensor k_latents;   /* [N, L, Hkv, D] */
    flamingo_tensor v_latents;   /* [N, L, Hkv, D] */
    flamingo_tensor out;         /* [N, L, H, D], written by the forward, read by the backward */
    flamingo_tensor d_out;       /* [N, L, H, D], read by the backward */
    flamingo_tensor d_q;         /* [N, L, H, D], written by the backward */
    flamingo_tensor d_k_media;   /* [N, M, Hkv, D], written by the backward */
    flamingo_tensor d_v_media;   /* [N, M, Hkv, D], written by the backward */
    flamingo_tensor d_k_latents; /* [N, L, Hkv, D], written by the backward */
    flamingo_tensor d_v_latents; /* [N, L, Hkv, D], written by the backward */
    const int64_t *lengths;      /* [N] contiguous: valid media keys of each item; null for all M */
    void *lse; /* [N, H, L] contiguous, accumulation dtype: log of the sum of exp(scores) per query;
                  written by the forward unless null, read by the backward */

    int64_t items;    /* N */
    int64_t latents;  /* L */
    int64_t features; /* M */
    int64_t heads;    /* H, a multiple of kv_heads */
    int64_t kv_heads; /* Hkv; query head h reads key/value head h / (H / Hkv) */
    int64_t head_dim; /* D */

    double scale; /* multiplies q . k */
    flamingo_execution execution;
} flamingo_latent_attention_params;

FLAMINGO_API int32_t flamingo_abi_version(void);
FLAMINGO_API const char *flamingo_version(void);
FLAMINGO_API const char *flamingo_build_flags(void);
FLAMINGO_API const char *flamingo_status_message(int32_t status);
/* Bytes of the struct named `name` ("flamingo_tensor") of any header, padding included; -1 if no
 * header has a struct of that name. */
FLAMINGO_API int64_t flamingo_sizeof(const char *name);

/* Mask of what this processor and its operating system support, by cpuid and xgetbv. */
FLAMINGO_API uint32_t flamingo_detected_instruction_sets(void);
/* Mask of the detected sets that kernels were compiled for. */
FLAMINGO_API uint32_t flamingo_usable_instruction_sets(void);
/* Name of the set of bit number `bit` (0 for FLAMINGO_PORTABLE), null after the last. */
FLAMINGO_API const char *flamingo_instruction_set_name(int32_t bit);

/* out = tanh(gate) * softmax(scale * q k^T) v over the R latents of media items first..last of each
 * token, a range that is clipped to [0, I). An empty range gives exact zeros. Media outside every
 * range is never read. The bits of a row depend on that row alone, not on the batch or on threads.
 * Both functions return a flamingo_status; unless it is FLAMINGO_OK or FLAMINGO_OUT_OF_MEMORY they
 * write nothing. */
FLAMINGO_API int32_t
flamingo_media_attention_forward(const flamingo_media_attention_params *params);
/* Computes all gradients from the inputs; the forward saves nothing. d_gate is the gradient of the
 * gate before its tanh. Shapes and ranges fix the order of every sum. */
FLAMINGO_API int32_t
flamingo_media_attention_backward(const flamingo_media_attention_params *params);

/* out = softmax(scale * q [k_media; k_latents]^T) [v_media; v_latents] per item and head. Media
 * keys from lengths[n] on are never read, and their gradients are zero. Both functions return a
 * flamingo_status. */
FLAMINGO_API int32_t
flamingo_latent_attention_forward(const flamingo_latent_attention_params *params);
FLAMINGO_API int32_t
flamingo_latent_attention_backward(const flamingo_latent_attention_params *params);

/* Returns the floating point operations per second that `threads` threads reach on registers alone,
 * two for each multiply-add, measured for about `seconds`: the ceiling of the attention kernels in
 * the accumulation dtype of `dtype`. Returns 0 for an invalid `execution`. */
FLAMINGO_API double flamingo_multiply_add_rate(const flamingo_execution *execution, double seconds);

#ifdef __cplusplus
}
#endif

#endif
