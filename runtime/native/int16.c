/* Products of low-bit weights with inputs in 16 bits, for CPUs with AVX2: half the instructions of the fp32 ones.

   Inputs become whole numbers of 16 bits with a scale for each of their blocks, a group of the weight's or part of one.
   That is closer to them than bf16 is. Codes are widened to 16 bits; pairs of products are added in 32, where a whole
   block, less its zero point, cannot overflow; sums of blocks are fp32. Levels of tables are rounded to 14 bits.

   A step takes 32 bytes of an output channel. Shapes as in low_bit.c, and N blocks of inputs. */

#include "linear.h"

#ifdef __AVX2__
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define STEP 32
#define SHORTS 16
#define INTEGER_LIMIT 32767.0f /* times 255, in blocks of 256 bytes: below 2^29 a lane */
#define INTEGER_BLOCK 256
#define TABLE_LIMIT 16383.0f   /* times 8191, in blocks of 64 inputs: below 2^31 a lane */
#define TABLE_BLOCK 32
#define LEVEL_LIMIT 8191.0f
#define MOST_INPUTS (4 * INTEGER_BLOCK)

typedef struct {
    const weight *w;
    int64_t block_bytes, blocks;
    __m256i low, high; /* bytes of the levels of a table, twice */
} plan;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

static plan plan_of(const weight *w) {
    plan made = {.w = w, .block_bytes = smaller(w->group_bytes, w->kind == TABLE ? TABLE_BLOCK : INTEGER_BLOCK)};
    const int64_t last_bytes = w->row_bytes - (w->groups - 1) * w->group_bytes;
    made.blocks = (w->groups - 1) * parts(w->group_bytes, made.block_bytes) + parts(last_bytes, made.block_bytes);
    if (w->kind == TABLE) {
        uint8_t low[STEP], high[STEP];
        for (int i = 0; i < STEP; i++) {
            const int level = (int)lrintf(w->table[i % 16] * LEVEL_LIMIT);
            low[i] = (uint8_t)level, high[i] = (uint8_t)(level >> 8);
        }
        made.low = _mm256_loadu_si256((const __m256i *)low), made.high = _mm256_loadu_si256((const __m256i *)high);
    }
    return made;
}

/* Levels, 16 bits each, of the codes at one place of 32 bytes: those of bytes 0-7 and 16-23 in `halves[0]`, the others
   in `halves[1]`. */
INLINE void levels(const plan *made, __m256i octets, const int place, const int bits, const int kind, __m256i *halves) {
    const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1));
    const __m256i code = bits == 8 ? octets : _mm256_and_si256(_mm256_srli_epi16(octets, place * bits), mask);
    const __m256i low = kind == TABLE ? _mm256_shuffle_epi8(made->low, code) : code;
    const __m256i high = kind == TABLE ? _mm256_shuffle_epi8(made->high, code) : _mm256_setzero_si256();
    halves[0] = _mm256_unpacklo_epi8(low, high), halves[1] = _mm256_unpackhi_epi8(low, high);
}

/* R output channels from `o` on for M rows. x int16 [B / 32][M][c][2][16], x_scale and x_sum [M][N], y [M][O]. */
INLINE void channels(const plan *made, int64_t o, const int bits, const int kind, const int R, const int M,
        const int16_t *x, const float *x_scale, const int32_t *x_sum, float *y) {
    const weight *w = made->w;
    const int c = 8 / bits;
    const int64_t B = w->row_bytes, N = made->blocks;
    const uint8_t *codes = (const uint8_t *)w->codes + o * B;
    __m256 sums[MOST_CHANNELS][MOST_ROWS];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r][m] = _mm256_setzero_ps();
    for (int64_t g = 0, n = 0; g < w->groups; g++) {
        const int64_t group_end = g == w->groups - 1 ? B : (g + 1) * w->group_bytes;
        float scale[MOST_CHANNELS];
        int32_t zero[MOST_CHANNELS];
        for (int r = 0; r < R; r++) {
            const int64_t at = (o + r) * w->groups + g;
            scale[r] = w->scale[at], zero[r] = w->zero ? w->zero[at] : (int32_t)w->middle;
        }
        for (int64_t start = g * w->group_bytes; start < group_end; start += made->block_bytes, n++) {
            const int64_t end = smaller(start + made->block_bytes, group_end);
            const int16_t *inputs = x + start * M * c;
            __m256i sum[MOST_CHANNELS][MOST_ROWS];
            for (int r = 0; r < R; r++)
                for (int m = 0; m < M; m++)
                    sum[r][m] = _mm256_zextsi128_si256(_mm_cvtsi32_si128(-zero[r] * x_sum[m * N + n]));
            for (int64_t j = start; j < end; j += STEP, inputs += STEP * M * c)
                for (int r = 0; r < R; r++) {
                    const __m256i octets = _mm256_loadu_si256((const __m256i *)(codes + r * B + j));
                    for (int p = 0; p < c; p++) {
                        __m256i halves[2];
                        levels(made, octets, p, bits, kind, halves);
                        for (int m = 0; m < M; m++)
                            for (int h = 0; h < 2; h++) {
                                const void *at = inputs + ((m * c + p) * 2 + h) * SHORTS;
                                const __m256i products = _mm256_madd_epi16(halves[h], _mm256_loadu_si256(at));
                                sum[r][m] = _mm256_add_epi32(sum[r][m], products);
                            }
                    }
                }
            for (int r = 0; r < R; r++)
                for (int m = 0; m < M; m++) {
                    const __m256 factor = _mm256_set1_ps(scale[r] * x_scale[m * N + n]);
                    sums[r][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][m]), factor, sums[r][m]);
                }
        }
    }
    const float unit = kind == TABLE ? 1 / LEVEL_LIMIT : 1;
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) y[m * w->rows + o + r] = total((floats)sums[r][m]) * unit;
}

#define OF_KIND(R, M)                                                                          \
    if (made->w->kind == TABLE) channels(made, o, 4, TABLE, R, M, x, x_scale, x_sum, y);       \
    else if (made->w->bits == 2) channels(made, o, 2, INTEGER, R, M, x, x_scale, x_sum, y);    \
    else if (made->w->bits == 4) channels(made, o, 4, INTEGER, R, M, x, x_scale, x_sum, y);    \
    else channels(made, o, 8, INTEGER, R, M, x, x_scale, x_sum, y)

/* At least MOST_CHANNELS output channels [first, end) for 1, 2 or 4 rows. The last ones may be done twice. */
static void product_of(const plan *made, int64_t first, int64_t end, int M, const int16_t *x, const float *x_scale,
        const int32_t *x_sum, float *y) {
    const int64_t at_once = M == 4 ? 2 : MOST_CHANNELS;
    for (int64_t next = first; next < end; next += at_once) {
        const int64_t o = smaller(next, end - at_once);
        if (M == 1) { OF_KIND(4, 1); }
        else if (M == 2) { OF_KIND(4, 2); }
        else { OF_KIND(2, 4); }
    }
}

/* Largest magnitude of `count` numbers (a multiple of 8); NaN if one is not finite. */
static float largest_of(const float *x, int64_t count) {
    const __m256 sign = _mm256_set1_ps(-0.0f), limit = _mm256_set1_ps(FLT_MAX);
    __m256 largest = _mm256_setzero_ps(), finite = _mm256_cmp_ps(largest, largest, _CMP_EQ_OQ);
    for (int64_t k = 0; k < count; k += 8) {
        const __m256 size = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + k));
        largest = _mm256_max_ps(size, largest);
        finite = _mm256_and_ps(finite, _mm256_cmp_ps(size, limit, _CMP_LE_OQ));
    }
    float lanes[8], found = 0;
    _mm256_storeu_ps(lanes, largest);
    for (int lane = 0; lane < 8; lane++) found = fmaxf(found, lanes[lane]);
    return _mm256_movemask_ps(finite) == 0xff ? found : NAN;
}

/* One block of inputs [first, last) of row `m` of M: whole numbers, their scale and their sum. A block that is not
   finite has a scale of NaN. */
static void round_block(const weight *w, const float *x, int64_t first, int64_t last, int64_t M, int64_t m, int16_t *to,
        float *scale, int32_t *sum) {
    const int64_t c = 8 / w->bits, count = last - first, known = smaller(last, w->width) - first;
    float inputs[MOST_INPUTS] = {0};
    int32_t numbers[MOST_INPUTS];
    memcpy(inputs, x + first, (size_t)(known > 0 ? known : 0) * sizeof(float));
    const float limit = w->kind == TABLE ? TABLE_LIMIT : INTEGER_LIMIT, largest = largest_of(inputs, count);
    const __m256 inverse = _mm256_set1_ps(largest > FLT_MIN * limit ? limit / largest : 0);
    for (int64_t k = 0; k < count; k += 8) {
        const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(inputs + k), inverse));
        _mm256_storeu_si256((__m256i *)(numbers + k), rounded);
    }
    int32_t whole = 0;
    for (int64_t k = 0; k < count; k++) whole += numbers[k];
    for (int64_t k = 0; k < count; k += STEP * c) {
        int16_t *step = to + ((first + k) * M + m * STEP * c);
        for (int64_t p = 0; p < c; p++)
            for (int64_t byte = 0; byte < 8; byte++) {
                const int32_t *from = numbers + k + byte * c + p;
                int16_t *place = step + p * STEP + byte;
                place[0] = (int16_t)from[0], place[8] = (int16_t)from[16 * c];
                place[SHORTS] = (int16_t)from[8 * c], place[SHORTS + 8] = (int16_t)from[24 * c];
            }
    }
    *scale = largest > FLT_MIN * limit ? largest / limit : largest * 0; /* NaN stays NaN */
    *sum = whole;
}

static void round_rows(const plan *made, int64_t M, const float *x, int16_t *to, float *scale, int32_t *sum) {
    const weight *w = made->w;
    const int64_t c = 8 / w->bits;
    for (int64_t m = 0; m < M; m++)
        for (int64_t g = 0; g < w->groups; g++) {
            const int64_t group_end = g == w->groups - 1 ? w->row_bytes : (g + 1) * w->group_bytes;
            for (int64_t start = g * w->group_bytes; start < group_end; start += made->block_bytes) {
                const int64_t end = smaller(start + made->block_bytes, group_end);
                round_block(w, x + m * w->width, start * c, end * c, M, m, to, scale++, sum++);
            }
        }
}

int int16_product(const weight *w, int64_t M, const float *x, float *y, int threads) {
    if (w->kind == FP8 || w->row_bytes % STEP || w->group_bytes % STEP) return low_bit_product(w, M, x, y, threads);
    const plan made = plan_of(w);
    const int64_t wide = 8 / w->bits * w->row_bytes, tiles = tiles_of(w), N = made.blocks;
    int16_t *numbers = malloc((size_t)M * ((size_t)wide * sizeof(int16_t) + 2 * (size_t)N * sizeof(float)));
    if (!numbers) return 1;
    float *x_scale = (float *)(numbers + M * wide);
    int32_t *x_sum = (int32_t *)(x_scale + M * N);
    for (int64_t m = 0; m < M; m += rows_at_once(M - m))
        round_rows(&made, rows_at_once(M - m), x + m * w->width, numbers + m * wide, x_scale + m * N, x_sum + m * N);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t o = tile * TILE, end = tile == tiles - 1 ? w->rows : o + TILE;
        for (int64_t m = 0; m < M; m += rows_at_once(M - m))
            product_of(&made, o, end, rows_at_once(M - m), numbers + m * wide, x_scale + m * N, x_sum + m * N,
                y + m * w->rows);
    }
    free(numbers);
    return 0;
}

#else
int int16_product(const weight *w, int64_t M, const float *x, float *y, int threads) {
    return low_bit_product(w, M, x, y, threads);
}
#endif
