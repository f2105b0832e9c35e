/* Products of weights that are mostly zero with fp32 inputs for a few rows, and their way back to dense, for CPUs.

   A weight is a bit for each number that says whether it is other than zero, and those numbers in bf16, one behind the
   other: half of them zero are 9/16 of the dense bytes, wherever they lie. 32 numbers at a time are spread out to their
   places in a register and multiplied as dense.c does it, zeros too, so that an infinite input makes NaN there as here.
   The order of sums of a row does not depend on the other rows. Shapes: M rows, K input channels (a multiple of 32),
   O output channels, B words of 32 bits of an output channel. 32 numbers more than there are can be read. */

#include "bitmap.h"

#ifdef __AVX512VBMI2__
#include <stdlib.h>

#define HALF (STEP / 2)
#define AT_ONCE 8 /* rows, or output channels times rows: there are registers for twice as many sums */

typedef __m512 vector;

/* R output channels from `o` on for M rows. x [B][M][2][16], y [M][O]. */
INLINE void channels(const weight *w, int64_t o, const int R, const int M, const float *x, float *y) {
    const int64_t B = w->width / STEP;
    const uint32_t *map = w->map + o * B;
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    const uint16_t *values[MOST_CHANNELS];
    vector even[MOST_CHANNELS][AT_ONCE], odd[MOST_CHANNELS][AT_ONCE];
    for (int r = 0; r < R; r++) {
        values[r] = (const uint16_t *)w->codes + w->start[o + r];
        for (int m = 0; m < M; m++) even[r][m] = odd[r][m] = _mm512_setzero_ps();
    }
    for (int64_t b = 0; b < B; b++, x += STEP * M)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            __m512i pairs;
            values[r] = spread(values[r], map[r * B + b], &pairs);
            const vector first = (vector)_mm512_slli_epi32(pairs, 16), second = (vector)_mm512_and_si512(pairs, high);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                even[r][m] += first * *(const vector *)(x + m * STEP);
                odd[r][m] += second * *(const vector *)(x + m * STEP + HALF);
            }
        }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) y[m * w->rows + o + r] = _mm512_reduce_add_ps(even[r][m] + odd[r][m]);
}

/* How many rows to take at once when `left` are left. */
INLINE int rows_of(int64_t left) { return left >= AT_ONCE ? AT_ONCE : rows_at_once(left); }

/* At least MOST_CHANNELS output channels [first, end) for 1, 2, 4 or 8 rows. The last ones may be done twice. */
static void product_of(const weight *w, int64_t first, int64_t end, int M, const float *x, float *y) {
    const int64_t at_once = M == 1 ? MOST_CHANNELS : AT_ONCE / M;
    for (int64_t next = first; next < end; next += at_once) {
        const int64_t o = next < end - at_once ? next : end - at_once;
        if (M == 1) channels(w, o, MOST_CHANNELS, 1, x, y);
        else if (M == 2) channels(w, o, AT_ONCE / 2, 2, x, y);
        else if (M == 4) channels(w, o, AT_ONCE / 4, 4, x, y);
        else channels(w, o, 1, AT_ONCE, x, y);
    }
}

/* x [M][K] -> [B][M][2][16]: of every 32 inputs, those at even places and those at odd ones. */
static void arrange(const weight *w, int64_t M, const float *x, float *to) {
    for (int64_t m = 0; m < M; m++, x += w->width)
        for (int64_t k = 0; k < w->width; k += STEP) {
            float *place = to + k * M + m * STEP;
            for (int64_t lane = 0; lane < HALF; lane++) {
                place[lane] = x[k + 2 * lane];
                place[HALF + lane] = x[k + 2 * lane + 1];
            }
        }
}

int bitmap_served(void) { return 1; }

int bitmap_product(const weight *w, int64_t M, const float *x, float *y, int threads) {
    const int64_t tiles = tiles_of(w), K = w->width;
    float *arranged = aligned_alloc(LINE, sizeof(float) * (size_t)(M * K));
    if (!arranged) return 1;
    for (int64_t m = 0; m < M; m += rows_of(M - m)) arrange(w, rows_of(M - m), x + m * K, arranged + m * K);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t o = tile * TILE, end = tile == tiles - 1 ? w->rows : o + TILE;
        for (int64_t m = 0; m < M; m += rows_of(M - m))
            product_of(w, o, end, rows_of(M - m), arranged + m * K, y + m * w->rows);
    }
    free(arranged);
    return 0;
}

/* Output channels [first, end) as dense bf16 [end - first][K]. */
void bitmap_expand(const weight *w, int64_t first, int64_t end, uint16_t *to, int threads) {
    const int64_t B = w->width / STEP;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = first; o < end; o++) {
        const uint16_t *values = (const uint16_t *)w->codes + w->start[o];
        for (int64_t b = 0; b < B; b++) {
            __m512i pairs;
            values = spread(values, w->map[o * B + b], &pairs);
            _mm512_storeu_si512(to + ((o - first) * B + b) * STEP, pairs);
        }
    }
}

#else
int bitmap_served(void) { return 0; }

int bitmap_product(const weight *w, int64_t M, const float *x, float *y, int threads) {
    (void)w, (void)M, (void)x, (void)y, (void)threads;
    return 1;
}

void bitmap_expand(const weight *w, int64_t first, int64_t end, uint16_t *to, int threads) {
    (void)w, (void)first, (void)end, (void)to, (void)threads;
}
#endif

/* The map [O][B] of dense bf16 [O][K], and how many bits are set in each of its rows. Minus zero is zero. */
void bitmap_map(const uint16_t *dense, int64_t O, int64_t K, uint32_t *map, int64_t *count, int threads) {
    const int64_t B = K / STEP;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < O; o++) {
        int64_t set = 0;
        for (int64_t b = 0; b < B; b++) {
            const uint16_t *from = dense + o * K + b * STEP;
            uint32_t word = 0;
            for (int bit = 0; bit < STEP; bit++) word |= (uint32_t)((from[bit] & 0x7fff) != 0) << bit;
            map[o * B + b] = word;
            set += __builtin_popcount(word);
        }
        count[o] = set;
    }
}

/* The numbers of dense bf16 whose bits are set; those of output channel o from start[o] on. */
void bitmap_values(const uint16_t *dense, int64_t O, int64_t K, const uint32_t *map, const int64_t *start,
        uint16_t *values, int threads) {
    const int64_t B = K / STEP;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < O; o++) {
        uint16_t *to = values + start[o];
        for (int64_t b = 0; b < B; b++)
            for (uint32_t left = map[o * B + b]; left; left &= left - 1)
                *to++ = dense[o * K + b * STEP + __builtin_ctz(left)];
    }
}
