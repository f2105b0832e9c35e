/* Products of dense weights, bf16 or fp32, with fp32 inputs for a few rows, for CPUs.

   bf16 weights take half the bytes that fp32 ones would. Each is the upper half of the fp32 number that it is, so that
   one load of 16 of them is two vectors: the odd ones with what lies below them masked off, the even ones shifted up.
   Inputs are arranged once to meet them: of every 16, first those at even places. Sums are fp32. The order of sums of a
   row does not depend on the other rows. Shapes: M rows, K input channels (a multiple of 16), O output channels. */

#include <stdlib.h>
#include <string.h>

#include "linear.h"

#define STEP 16 /* weights taken at once */

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint32_t words_at __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

/* STEP weights as two vectors. */
INLINE void load(const void *from, int64_t at, const enum kind kind, floats *first, floats *second) {
    if (kind == BFLOAT16) {
        const words pair = *(const words_at *)((const uint16_t *)from + at);
        *first = (floats)(pair << 16), *second = (floats)(pair & 0xffff0000u);
    } else {
        *first = *(const floats_at *)((const float *)from + at);
        *second = *(const floats_at *)((const float *)from + at + LANES);
    }
}

/* R output channels from `o` on for M rows. x [K / 16][M][2][8], y [M][O]. */
INLINE void channels(const weight *w, int64_t o, const enum kind kind, const int R, const int M, const float *x,
        float *y) {
    floats one[MOST_CHANNELS][MOST_ROWS] = {{{0}}}, other[MOST_CHANNELS][MOST_ROWS] = {{{0}}};
    const int64_t K = w->width;
    for (int64_t k = 0; k < K; k += STEP, x += STEP * M)
        for (int r = 0; r < R; r++) {
            floats first, second;
            load(w->codes, (o + r) * K + k, kind, &first, &second);
            for (int m = 0; m < M; m++) {
                one[r][m] += first * *(const floats_at *)(x + m * STEP);
                other[r][m] += second * *(const floats_at *)(x + m * STEP + LANES);
            }
        }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) y[m * w->rows + o + r] = total(one[r][m] + other[r][m]);
}

#define OF_KIND(R, M)                                                  \
    if (w->kind == BFLOAT16) channels(w, o, BFLOAT16, R, M, x, y);     \
    else channels(w, o, FLOAT32, R, M, x, y)

/* At least MOST_CHANNELS output channels [first, end) for 1, 2 or 4 rows. The last ones may be done twice. */
static void product_of(const weight *w, int64_t first, int64_t end, int M, const float *x, float *y) {
    const int64_t at_once = M == 1 ? 4 : M == 2 ? 2 : 1;
    for (int64_t next = first; next < end; next += at_once) {
        const int64_t o = next < end - at_once ? next : end - at_once;
        if (M == 1) { OF_KIND(4, 1); }
        else if (M == 2) { OF_KIND(2, 2); }
        else { OF_KIND(1, 4); }
    }
}

/* x [M][K] -> [K / 16][M][2][8]. */
static void arrange(const weight *w, int64_t M, const float *x, float *to) {
    for (int64_t m = 0; m < M; m++, x += w->width)
        for (int64_t k = 0; k < w->width; k += STEP) {
            float *place = to + k * M + m * STEP;
            if (w->kind == FLOAT32) memcpy(place, x + k, STEP * sizeof(float));
            else
                for (int64_t lane = 0; lane < LANES; lane++) {
                    place[lane] = x[k + 2 * lane];
                    place[LANES + lane] = x[k + 2 * lane + 1];
                }
        }
}

int dense_product(const weight *w, int64_t M, const float *x, float *y, int threads) {
    const int64_t tiles = tiles_of(w), K = w->width;
    float *arranged = malloc(sizeof(float) * (size_t)(M * K));
    if (!arranged) return 1;
    for (int64_t m = 0; m < M; m += rows_at_once(M - m)) arrange(w, rows_at_once(M - m), x + m * K, arranged + m * K);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t o = tile * TILE, end = tile == tiles - 1 ? w->rows : o + TILE;
        for (int64_t m = 0; m < M; m += rows_at_once(M - m))
            product_of(w, o, end, rows_at_once(M - m), arranged + m * K, y + m * w->rows);
    }
    free(arranged);
    return 0;
}
