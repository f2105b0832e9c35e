/* 4-bit floats (e2m1): sign, two bits of exponent, one of mantissa. One choice to a statement: so loops become vectors. */
#pragma once

#include <math.h>

/* The level nearest to a number: fp32 numbers near 1.5 * 2^22 are multiples of 0.5, near 1.5 * 2^23 of 1. */
static inline float nearest_e2m1(float number) {
    float size = fabsf(number), shift = 0x1.8p22f;
    size = size > 6 ? 6 : size;
    shift += size >= 2 ? 0x1.8p22f : 0;
    shift += size >= 4 ? 0x1.8p23f : 0;
    return copysignf((size + shift) - shift, number);
}

/* The code of a level; zero has no sign. */
static inline float code_of_e2m1(float level) {
    const float size = fabsf(level);
    float code = size + size;
    code -= size >= 3 ? 1 : 0;
    code -= size >= 4 ? 1 : 0;
    code -= size >= 6 ? 3 : 0;
    code += level < 0 ? 8 : 0;
    return code;
}
