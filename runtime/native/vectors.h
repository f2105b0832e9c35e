/* fp32 vectors and what is done with them in more than one file. */

#pragma once

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 8

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float floats_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* anywhere in memory */

INLINE float total(floats x) {
    x += __builtin_shuffle(x, (ints){4, 5, 6, 7, 0, 1, 2, 3});
    x += __builtin_shuffle(x, (ints){2, 3, 0, 1, 6, 7, 4, 5});
    x += __builtin_shuffle(x, (ints){1, 0, 3, 2, 5, 4, 7, 6});
    return x[0];
}

/* e^x to 2 ulp, made of operations that vectorize; NaN stays NaN. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = x * 1.44269504f + 12582912.0f; /* rounds to an integer */
    n -= 12582912.0f;
    const float f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    const union { int32_t bits; float number; } power = {.bits = ((int32_t)n + 127) << 23};
    return p * power.number;
}
