/* Bitmaps: how 32 numbers of a word are spread out to their places in a register. For CPUs with AVX-512 VBMI2: without
   its one instruction for that, dense weights are as fast. */

#pragma once

#include "linear.h"

#define STEP 32 /* numbers of a word of the map */

#ifdef __AVX512VBMI2__
#include <immintrin.h>

#define LINE 64 /* bytes of a register */

/* The numbers of a word as pairs of bf16. Returns where those of the next begin. */
INLINE const uint16_t *spread(const uint16_t *values, uint32_t map, __m512i *pairs) {
    *pairs = _mm512_maskz_expand_epi16(map, _mm512_loadu_si512(values));
    return values + __builtin_popcount(map);
}

#endif
