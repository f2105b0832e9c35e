/* What the kernels of this folder share. */

#pragma once

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

#define MOST_ROWS 4
#define MOST_CHANNELS 4 /* no weight has fewer */
#define TILE 16         /* output channels whose codes stay in the cache while all rows meet them */

enum kind { INTEGER, TABLE, FP8 };

typedef struct {          /* ctypes mirrors it in __init__.py */
    const uint8_t *codes; /* [O][B] */
    const float *scale;   /* [O][G] */
    const uint8_t *zero;  /* [O][G], or NULL: `middle` for all */
    const float *table;   /* 16 levels, or NULL */
    int64_t rows, width, row_bytes, groups, group_bytes;
    float middle;
    int32_t bits, kind;
} weight;

/* How many rows to take at once when `left` are left. */
INLINE int rows_at_once(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

/* Tiles of output channels; the last one takes what is left over. */
INLINE int64_t tiles_of(const weight *w) { return w->rows < TILE ? 1 : w->rows / TILE; }

/* y [M][O] = x Wt for x [M][K]. 0, or 1 if there is no memory. */
int low_bit_product(const weight *w, int64_t M, const float *x, float *y, int threads);
int int16_product(const weight *w, int64_t M, const float *x, float *y, int threads);
