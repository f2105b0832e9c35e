/* Weights of linear layers, and what their kernels share. */

#pragma once

#include "vectors.h"

#define MOST_ROWS 4
#define MOST_CHANNELS 4 /* no weight has fewer */
#define TILE 16         /* output channels whose weights stay in the cache while all rows meet them */

enum kind { INTEGER, TABLE, FP8, FLOAT32, BFLOAT16, BITMAP };

typedef struct {           /* ctypes mirrors it in linear.py */
    const void *codes;     /* [O][B]; of dense weights, these themselves; of bitmaps, the numbers that are not zero */
    const float *scale;    /* [O][G] */
    const uint8_t *zero;   /* [O][G], or NULL: `middle` for all */
    const float *table;    /* 16 levels, or NULL */
    const uint32_t *map;   /* of bitmaps: a bit for each number [O][K / 32] */
    const int64_t *start;  /* of bitmaps: where the numbers of each output channel begin */
    int64_t rows, width, row_bytes, groups, group_bytes;
    float middle;
    int32_t bits, kind;
} weight;

/* How many rows to take at once when `left` are left. */
INLINE int rows_at_once(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

/* Tiles of output channels; the last one takes what is left over. */
INLINE int64_t tiles_of(const weight *w) { return w->rows < TILE ? 1 : w->rows / TILE; }

/* y [M][O] = x Wt for x [M][K]. 0, or 1 if there is no memory. */
int linear_product(const weight *w, int64_t M, const float *x, float *y, int threads);

int dense_product(const weight *w, int64_t M, const float *x, float *y, int threads);
int low_bit_product(const weight *w, int64_t M, const float *x, float *y, int threads);
int bitmap_product(const weight *w, int64_t M, const float *x, float *y, int threads);
int int16_product(const weight *w, int64_t M, const float *x, float *y, int threads);
