/* C interface of the flamingo_kernels CPU library.
 *
 * No torch, no C++ in the interface: raw pointers, sizes and strides, so one build serves every torch
 * and Python version. Shape letters: B rows, T text tokens, I media slots, R latents per media item,
 * H query heads, Hkv key/value heads, D head dim. Strides count elements, not bytes; the last
 * dimension of every floating-point tensor has stride 1. Functions are thread-safe and throw nothing.
 */
#ifndef FLAMINGO_CPU_H
#define FLAMINGO_CPU_H

#include <stdint.h>

#if defined(FLAMINGO_BUILDING_LIBRARY)
#define FLAMINGO_API __attribute__((visibility("default")))
#else
#define FLAMINGO_API
#endif

/* Raised by one whenever a struct or a signature below changes. */
#define FLAMINGO_ABI_VERSION 1

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
    FLAMINGO_INSTRUCTION_SET_UNUSABLE = 6
} flamingo_status;

typedef enum flamingo_dtype { FLAMINGO_FLOAT32 = 0, FLAMINGO_FLOAT64 = 1 } flamingo_dtype;

/* Bits of a mask, slowest first: a higher bit is the better choice where a machine has both. */
typedef enum flamingo_instruction_set {
    FLAMINGO_PORTABLE = 1 << 0,
    FLAMINGO_AVX2 = 1 << 1,        /* AVX2 and FMA */
    FLAMINGO_AVX512 = 1 << 2,      /* AVX-512 F, DQ, BW and VL */
    FLAMINGO_AVX512_BF16 = 1 << 3  /* FLAMINGO_AVX512 and its bfloat16 dot products */
} flamingo_instruction_set;

typedef struct flamingo_media_attention_forward_params {
    const void *q;        /* [B, T, H, D],   strides q_stride_{b,t,h}, 1 */
    const void *k;        /* [B, I, R, Hkv, D], strides k_stride_{b,i,r,h}, 1 */
    const void *v;        /* [B, I, R, Hkv, D], strides v_stride_{b,i,r,h}, 1 */
    const int32_t *first; /* [B, T], strides first_stride_{b,t}: first media item a token sees */
    const int32_t *last;  /* [B, T], strides last_stride_{b,t}: last one, inclusive; empty if first > last */
    const void *gate;     /* [1] of the same dtype, or null for no gate */
    void *out;            /* [B, T, H, D],   strides out_stride_{b,t,h}, 1; every element is written */

    int64_t rows;     /* B */
    int64_t tokens;   /* T */
    int64_t media;    /* I */
    int64_t latents;  /* R */
    int64_t heads;    /* H, a multiple of kv_heads */
    int64_t kv_heads; /* Hkv; query head h reads key/value head h / (H / Hkv) */
    int64_t head_dim; /* D */

    int64_t q_stride_b, q_stride_t, q_stride_h;
    int64_t k_stride_b, k_stride_i, k_stride_r, k_stride_h;
    int64_t v_stride_b, v_stride_i, v_stride_r, v_stride_h;
    int64_t first_stride_b, first_stride_t;
    int64_t last_stride_b, last_stride_t;
    int64_t out_stride_b, out_stride_t, out_stride_h;

    double scale;            /* multiplies q . k */
    int32_t dtype;           /* flamingo_dtype of q, k, v, gate and out; also the accumulation type */
    int32_t threads;         /* OpenMP threads to use, at least 1 */
    int32_t instruction_set; /* one bit of flamingo_usable_instruction_sets() */
} flamingo_media_attention_forward_params;

FLAMINGO_API int32_t flamingo_abi_version(void);
FLAMINGO_API const char *flamingo_version(void);
FLAMINGO_API const char *flamingo_build_flags(void);
FLAMINGO_API const char *flamingo_status_message(int32_t status);

/* What this processor and its operating system support, by cpuid and xgetbv. */
FLAMINGO_API uint32_t flamingo_detected_instruction_sets(void);
/* The detected ones that kernels were compiled for. */
FLAMINGO_API uint32_t flamingo_usable_instruction_sets(void);
/* Name of the set at bit number `bit` (0 for FLAMINGO_PORTABLE), null past the last. */
FLAMINGO_API const char *flamingo_instruction_set_name(int32_t bit);

/* out = tanh(gate) * softmax(scale * q k^T) v over the R latents of media items first..last of each
 * token, the range clipped to [0, I). An empty range gives exact zeros. Media outside every range is
 * never read. The bits of a row depend on nothing but that row: not on the batch, not on `threads`.
 * Returns a flamingo_status; `out` is untouched unless it is FLAMINGO_OK. */
FLAMINGO_API int32_t
flamingo_media_attention_forward(const flamingo_media_attention_forward_params *params);

#ifdef __cplusplus
}
#endif

#endif
