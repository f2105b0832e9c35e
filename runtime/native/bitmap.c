/* Products of weights that are mostly zero with fp32 inputs for a few rows, and their way back to dense, for CPUs.

   A weight is a bit for each number that says whether it is other than zero, and those numbers in bf16, one behind the
   other: half of them zero are 9/16 of the dense bytes, wherever they lie. 32 numbers at a time are spread out to their
   places in a register and multiplied as dense.c does it, zeros too, so that an infinite input makes NaN there as here.
   The order of sums of a row does not depend on the other rows. Shapes: M rows, K input channels (a multiple of 32),
   O output channels, B words of 32 bits of an output channel. 32 numbers more than there are can be read. */

#include "linear.h"

#include <stdlib.h>
#include <string.h>

#define STEP 32 /* numbers of a word of the map */

#ifdef __AVX2__
#include <immintrin.h>

#define HALF (STEP / 2)

INLINE int64_t words_of(const weight *w) { return w->width / STEP; }

#ifdef __AVX512VBMI2__
typedef __m512 vector;
#define VECTORS 1 /* of numbers at even places of a word, and as many at odd ones */

/* The numbers of a word as pairs of bf16. Returns where those of the next begin. */
INLINE const uint16_t *spread(const uint16_t *values, uint32_t map, __m512i *pairs) {
    *pairs = _mm512_maskz_expand_epi16(map, _mm512_loadu_si512(values));
    return values + __builtin_popcount(map);
}

INLINE vector even(__m512i pairs) { return (vector)_mm512_slli_epi32(pairs, 16); }
INLINE vector odd(__m512i pairs) { return (vector)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)); }
INLINE void store(uint16_t *to, __m512i pairs) { _mm512_storeu_si512(to, pairs); }
typedef __m512i numbers;

#else
typedef __m256 vector;
#define VECTORS 2
typedef __m256i numbers;

/* For each byte of a map, where the bytes of eight numbers come from; 0x80: zero. */
static uint8_t places[256][16] __attribute__((aligned(16)));

__attribute__((constructor)) static void fill_places(void) {
    for (int map = 0; map < 256; map++)
        for (int bit = 0, from = 0; bit < 8; bit++) {
            const int set = map >> bit & 1;
            places[map][2 * bit] = set ? (uint8_t)(2 * from) : 0x80;
            places[map][2 * bit + 1] = set ? (uint8_t)(2 * from + 1) : 0x80;
            from += set;
        }
}

INLINE __m128i spread_eight(const uint16_t *values, uint32_t map) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)values), *(const __m128i *)places[map]);
}

INLINE const uint16_t *spread(const uint16_t *values, uint32_t map, __m256i *pairs) {
    for (int half = 0; half < VECTORS; half++, map >>= HALF) {
        const __m128i low = spread_eight(values, map & 0xff);
        values += __builtin_popcount(map & 0xff);
        pairs[half] = _mm256_set_m128i(spread_eight(values, map >> 8 & 0xff), low);
        values += __builtin_popcount(map & 0xff00);
    }
    return values;
}

INLINE vector even(__m256i pairs) { return (vector)_mm256_slli_epi32(pairs, 16); }
INLINE vector odd(__m256i pairs) { return (vector)_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)); }
INLINE void store(uint16_t *to, __m256i pairs) { _mm256_storeu_si256((__m256i *)to, pairs); }
#endif

#define VECTOR_FLOATS (HALF / VECTORS)
typedef vector vector_at __attribute__((aligned(4), may_alias));

INLINE float sum_of(vector x) {
    float lanes[VECTOR_FLOATS];
    memcpy(lanes, &x, sizeof x);
    for (int width = VECTOR_FLOATS / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
    return lanes[0];
}

/* R output channels from `o` on for M rows. x [B][M][2][16], y [M][O]. */
INLINE void channels(const weight *w, int64_t o, const int R, const int M, const float *x, float *y) {
    const int64_t B = words_of(w);
    const uint32_t *map = (const uint32_t *)w->map + o * B;
    const uint16_t *values[MOST_CHANNELS];
    vector one[MOST_CHANNELS][MOST_ROWS], other[MOST_CHANNELS][MOST_ROWS];
    for (int r = 0; r < R; r++) {
        values[r] = (const uint16_t *)w->codes + w->start[o + r];
        for (int m = 0; m < M; m++) one[r][m] = other[r][m] = (vector){0};
    }
    for (int64_t b = 0; b < B; b++, x += STEP * M)
        for (int r = 0; r < R; r++) {
            numbers pairs[VECTORS];
            values[r] = spread(values[r], map[r * B + b], pairs);
            for (int v = 0; v < VECTORS; v++) {
                const vector first = even(pairs[v]), second = odd(pairs[v]);
                for (int m = 0; m < M; m++) {
                    const float *at = x + m * STEP + v * VECTOR_FLOATS;
                    one[r][m] += first * *(const vector_at *)at;
                    other[r][m] += second * *(const vector_at *)(at + HALF);
                }
            }
        }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) y[m * w->rows + o + r] = sum_of(one[r][m] + other[r][m]);
}

/* At least MOST_CHANNELS output channels [first, end) for 1, 2 or 4 rows. The last ones may be done twice. */
static void product_of(const weight *w, int64_t first, int64_t end, int M, const float *x, float *y) {
    const int64_t at_once = M == 1 ? 4 : M == 2 ? 2 : 1;
    for (int64_t next = first; next < end; next += at_once) {
        const int64_t o = next < end - at_once ? next : end - at_once;
        if (M == 1) channels(w, o, 4, 1, x, y);
        else if (M == 2) channels(w, o, 2, 2, x, y);
        else channels(w, o, 1, 4, x, y);
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

/* Output channels [first, end) as dense bf16 [end - first][K]. */
void bitmap_expand(const weight *w, int64_t first, int64_t end, uint16_t *to, int threads) {
    const int64_t B = words_of(w);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = first; o < end; o++) {
        const uint32_t *map = (const uint32_t *)w->map + o * B;
        const uint16_t *values = (const uint16_t *)w->codes + w->start[o];
        uint16_t *place = to + (o - first) * w->width;
        for (int64_t b = 0; b < B; b++) {
            numbers pairs[VECTORS];
            values = spread(values, map[b], pairs);
            for (int v = 0; v < VECTORS; v++, place += STEP / VECTORS) store(place, pairs[v]);
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
