/* Writing keys and values into their pages. Shapes: T tokens, G key-value heads, W channels of a head. */

#include <string.h>

#include "kv_codes.h"

INLINE float inverse(float scale) { return scale == 0 ? 0 : 1 / scale; }

static void store_int8(const kv_pages *pages, int64_t page, int64_t row, const float *x, int64_t width) {
    int8_t *codes = (int8_t *)codes_of(pages, page) + row * width;
    uint16_t *numbers = numbers_of(pages, page);
    word largest = {0};
    for (int64_t d = 0; d < width; d++) { /* sizes are ordered as their bits are, and NaN comes last */
        const word y = {x[d]};
        const uint32_t size = y.bits & 0x7fffffff;
        largest.bits = size > largest.bits ? size : largest.bits;
    }
    numbers[row] = to_half(largest.number / 127);
    const float by = inverse(from_half(numbers[row]));
    for (int64_t d = 0; d < width; d++) {
        float code = rintf(x[d] * by);
        code = code > 127 ? 127 : code < -127 ? -127 : code;
        codes[d] = code == code ? (int8_t)code : 0;
    }
}

static void store_int4(const kv_pages *pages, int64_t page, int64_t row, const float *x, int64_t width) {
    const int64_t half = width / 2;
    uint8_t *codes = (uint8_t *)codes_of(pages, page) + row * half;
    uint16_t *numbers = numbers_of(pages, page);
    float low = x[0], high = x[0];
    int nan = 0;
    for (int64_t d = 0; d < width; d++) {
        low = x[d] < low ? x[d] : low;
        high = x[d] > high ? x[d] : high;
        nan |= x[d] != x[d];
    }
    if (nan) low = high = NAN;
    numbers[2 * row] = to_half((high - low) / 15);
    numbers[2 * row + 1] = to_half(low);
    low = from_half(numbers[2 * row + 1]);
    const float by = inverse(from_half(numbers[2 * row]));
    for (int64_t d = 0; d < half; d++) {
        float a = rintf((x[d] - low) * by), b = rintf((x[d + half] - low) * by);
        a = a > 15 ? 15 : a > 0 ? a : 0; /* NaN gives 0 */
        b = b > 15 ? 15 : b > 0 ? b : 0;
        codes[d] = (uint8_t)((uint8_t)a | (uint8_t)b << 4);
    }
}

static void store_row(const kv_pages *pages, int64_t page, int64_t row, int64_t group, const float *x, int64_t width) {
    switch (pages->coding) {
    case INT8_KV: store_int8(pages, page, row, x, width); break;
    case INT4_KV: store_int4(pages, page, row, x, width); break;
    case FP8_KV:
        for (int64_t d = 0; d < width; d++)
            ((uint8_t *)codes_of(pages, page))[row * width + d] = to_fp8(x[d] / pages->scale[group]);
        break;
    default: memcpy((float *)codes_of(pages, page) + row * width, x, (size_t)width * sizeof(float));
    }
}

void kv_store(const kv_pages *pages, const float *x, int64_t stride, const int64_t *slot, int64_t tokens, int64_t groups,
        int64_t width) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t g = 0; g < groups; g++)
            store_row(pages, slot[t] / pages->tokens, slot[t] % pages->tokens * groups + g, g, x + t * stride + g * width,
                width);
}
