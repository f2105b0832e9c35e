/* Keys and values in their pages, as numbers or as codes: kv_compress/_coding.py in C, to the bit. */

#pragma once

#include <math.h>

#include "vectors.h"

enum coding { FULL_KV, INT8_KV, INT4_KV, FP8_KV, CHANNELS8_KV, CHANNELS4_KV };

typedef struct {         /* ctypes mirrors it in kv_store.py. A row is one token and head */
    void *codes;         /* of each page [B][G] rows: fp32, one byte or half a byte a channel */
    uint16_t *numbers;   /* fp16 [B][G]: scale; of int4 scale and lowest number; of fp8 none; of channels [2][G][W] */
    const float *scale;  /* [G] of fp8 */
    int64_t coding, tokens, slot_rows;        /* of a page; rows from one slot of it to the next */
    int64_t bytes_apart, numbers_apart;       /* from one page to the next: of codes, of numbers */
} kv_pages;

INLINE void *codes_of(const kv_pages *pages, int64_t page) { return (char *)pages->codes + page * pages->bytes_apart; }

INLINE uint16_t *numbers_of(const kv_pages *pages, int64_t page) { return pages->numbers + page * pages->numbers_apart; }

typedef union {
    float number;
    uint32_t bits;
} word;

INLINE float from_half(uint16_t half) {
    word x = {.bits = (uint32_t)(half & 0x7fff) << 13};
    x.number *= 0x1p112f;
    x.bits |= (half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    x.bits |= (uint32_t)(half & 0x8000) << 16;
    return x.number;
}

/* Rounds to the nearest, ties to even. */
INLINE uint16_t to_half(float number) {
    word x = {number};
    const uint32_t sign = x.bits & 0x80000000;
    x.bits ^= sign;
    uint32_t half;
    if (x.bits >= 0x47800000)
        half = x.bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    else if (x.bits < 0x38800000) { /* below the normal ones: the sum's last bit is worth as much as theirs */
        x.number += 0.5f;
        half = x.bits - 0x3f000000;
    } else
        half = (x.bits - 0x38000000 + 0xfff + (x.bits >> 13 & 1)) >> 13;
    return (uint16_t)(half | sign >> 16);
}

/* e4m3 to the nearest, ties to even; what is too large is clipped. */
INLINE uint8_t to_fp8(float number) {
    word x = {number};
    const uint8_t sign = x.bits >> 24 & 0x80;
    x.bits &= 0x7fffffff;
    if (x.bits > 0x7f800000) return sign | 0x7f;
    x.number = x.number > 448 ? 448 : x.number;
    if (x.number < 0x1p-6f) return sign | (uint8_t)rintf(x.number * 0x1p9f);
    return sign | (uint8_t)((x.bits + 0x7ffff + (x.bits >> 20 & 1)) >> 20) - (uint8_t)(120 << 3);
}

INLINE float from_fp8(uint8_t code) {
    const uint32_t size = code & 0x7f;
    word x = {.bits = (size << 20) + (120u << 23)};
    x.number = size < 8 ? (float)size * 0x1p-9f : x.number;
    x.bits = size == 0x7f ? 0x7fc00000 : x.bits;
    x.bits |= (uint32_t)(code & 0x80) << 24;
    return x.number;
}

/* The numbers of a page's row, but for `scale` and `shift` (number = scale * x + shift): where they lie, or in `room`.
 * Where channels have scales, the codes: those go to the query, and what is lowest to a score as a shift by 1. */
INLINE const float *row_at(const kv_pages *pages, int64_t page, int64_t row, int64_t group, int64_t width, float *room,
        float *scale, float *shift) {
    *scale = 1, *shift = 0;
    switch (pages->coding) {
    case INT8_KV: {
        const int8_t *codes = (const int8_t *)codes_of(pages, page) + row * width;
        for (int64_t d = 0; d < width; d++) room[d] = codes[d];
        *scale = from_half(numbers_of(pages, page)[row]);
        return room;
    }
    case CHANNELS8_KV: {
        const uint8_t *codes = (const uint8_t *)codes_of(pages, page) + row * width;
        for (int64_t d = 0; d < width; d++) room[d] = codes[d];
        *shift = 1;
        return room;
    }
    case INT4_KV:
    case CHANNELS4_KV: {
        const int64_t half = width / 2;
        const uint8_t *codes = (const uint8_t *)codes_of(pages, page) + row * half;
        for (int64_t d = 0; d < half; d++) room[d] = codes[d] & 15;
        for (int64_t d = 0; d < half; d++) room[half + d] = codes[d] >> 4;
        *shift = 1;
        if (pages->coding == INT4_KV) {
            *scale = from_half(numbers_of(pages, page)[2 * row]);
            *shift = from_half(numbers_of(pages, page)[2 * row + 1]);
        }
        return room;
    }
    case FP8_KV: {
        const uint8_t *codes = (const uint8_t *)codes_of(pages, page) + row * width;
        for (int64_t d = 0; d < width; d++) room[d] = from_fp8(codes[d]);
        *scale = pages->scale[group];
        return room;
    }
    default: return (const float *)codes_of(pages, page) + row * width;
    }
}

/* Put T tokens x [T][stride], G heads of W channels each, into slots. */
void kv_store(const kv_pages *pages, const float *x, int64_t stride, const int64_t *slot, int64_t tokens, int64_t groups,
        int64_t width);
