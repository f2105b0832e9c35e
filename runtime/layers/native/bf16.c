/* Products of bf16 weights with fp32 inputs for a few rows, for CPUs: half the bytes that fp32 weights would take.

   A weight is the upper half of the fp32 number that it is, so that one load of 16 of them is two vectors: the odd ones
   with what lies below them masked off, the even ones shifted up. Inputs are arranged once to meet them: of every 16,
   first those at even places. Sums are fp32. The order of sums of a row does not depend on the other rows.
   Shapes: M rows, K input channels (a multiple of 16), O output channels. */

#include <stdlib.h>

#include "low_bit.h"

#define LANES 8
#define STEP 16 /* weights of a load */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef float floats_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words_at __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

INLINE float total(floats value) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
}

/* R output channels from `o` on for M rows. w [O][K], x [K / 16][M][2][8], y [M][O]. */
INLINE void channels(const uint16_t *w, int64_t O, int64_t K, int64_t o, const int R, const int M, const float *x,
        float *y) {
    floats even[MOST_CHANNELS][MOST_ROWS] = {{{0}}}, odd[MOST_CHANNELS][MOST_ROWS] = {{{0}}};
    const uint16_t *from = w + o * K;
    for (int64_t k = 0; k < K; k += STEP, x += STEP * M)
        for (int r = 0; r < R; r++) {
            const words pair = *(const words_at *)(from + r * K + k);
            const floats low = (floats)(pair << 16), high = (floats)(pair & 0xffff0000u);
            for (int m = 0; m < M; m++) {
                even[r][m] += low * *(const floats_at *)(x + m * STEP);
                odd[r][m] += high * *(const floats_at *)(x + m * STEP + LANES);
            }
        }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) y[m * O + o + r] = total(even[r][m] + odd[r][m]);
}

/* At least MOST_CHANNELS output channels [first, end) for 1, 2 or 4 rows. The last ones may be done twice. */
static void product_of(const uint16_t *w, int64_t O, int64_t K, int64_t first, int64_t end, int64_t M, const float *x,
        float *y) {
    const int64_t at_once = M == 1 ? 4 : M == 2 ? 2 : 1;
    for (int64_t next = first; next < end; next += at_once) {
        const int64_t o = next < end - at_once ? next : end - at_once;
        if (M == 1) channels(w, O, K, o, 4, 1, x, y);
        else if (M == 2) channels(w, O, K, o, 2, 2, x, y);
        else channels(w, O, K, o, 1, 4, x, y);
    }
}

/* x [M][K] -> [K / 16][M][2][8]. */
static void arrange(int64_t M, int64_t K, const float *x, float *to) {
    for (int64_t m = 0; m < M; m++, x += K)
        for (int64_t k = 0; k < K; k += STEP) {
            float *place = to + k * M + m * STEP;
            for (int64_t lane = 0; lane < LANES; lane++) {
                place[lane] = x[k + 2 * lane];
                place[LANES + lane] = x[k + 2 * lane + 1];
            }
        }
}

/* y [M][O] = x Wt for x [M][K]. 0, or 1 if there is no memory. */
int bf16_product(const uint16_t *w, int64_t O, int64_t K, int64_t M, const float *x, float *y, int threads) {
    const int64_t tiles = O < TILE ? 1 : O / TILE;
    float *arranged = malloc(sizeof(float) * (size_t)(M * K));
    if (!arranged) return 1;
    for (int64_t m = 0; m < M; m += rows_at_once(M - m)) arrange(rows_at_once(M - m), K, x + m * K, arranged + m * K);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t o = tile * TILE, end = tile == tiles - 1 ? O : o + TILE;
        for (int64_t m = 0; m < M; m += rows_at_once(M - m))
            product_of(w, O, K, o, end, rows_at_once(M - m), arranged + m * K, y + m * O);
    }
    free(arranged);
    return 0;
}
