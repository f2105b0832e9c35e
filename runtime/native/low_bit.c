/* Products with weights of 2, 4 or 8 bits for a few rows, and their dequantization, for CPUs.

   Weights stay as a QuantTensor packs them: each output channel is one stream of codes, least significant bits first,
   here in blocks of 8 bytes. A byte holds c = 8 / bits codes, so that a block meets c vectors of 8 inputs: input
   (8 * block + lane) * c + place. Levels become fp32 in registers; sums are fp32; a group's scale is applied once a
   group. Zero points cost one product with the sum of the group's inputs:

   y[m][o] = sum over groups g of scale[o][g] * (sum of level * x - zero[o][g] * sum of x)

   The order of sums of a row does not depend on the other rows. Shapes: M rows, K input channels, O output channels, G
   groups, B bytes of an output channel (a multiple of 8, as are those of a group). */

#include "linear.h"

#include <stdlib.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define FP8_UNIT 0x1p-120f
#define FP8_LIFT 0x1p60f /* half of what is missing goes to the inputs: products of those above 1e-15 stay normal */

typedef int8_t signed_bytes_at __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t bytes_at __attribute__((vector_size(LANES), aligned(1), may_alias));

/* Eight bytes, those of fp8 with their sign. */
INLINE ints widen(const uint8_t *from, const enum kind kind) {
#ifdef __AVX2__ /* gcc takes several instructions for what is one */
    const __m128i octets = _mm_loadl_epi64((const __m128i *)from);
    return (ints)(kind == FP8 ? _mm256_cvtepi8_epi32(octets) : _mm256_cvtepu8_epi32(octets));
#else
    if (kind == FP8) return __builtin_convertvector(*(const signed_bytes_at *)from, ints);
    return __builtin_convertvector(*(const bytes_at *)from, ints);
#endif
}

/* fp32 levels of the codes at one place of each byte. fp8 (e4m3): its bits, put where those of fp32 are, mean FP8_UNIT
   of the value, also where it is subnormal. */
INLINE floats levels(ints octets, const int place, const int bits, const enum kind kind, floats low, floats high) {
    const ints shifted = octets >> (place * bits);
#ifdef __AVX2__ /* the permutation looks at the lowest three bits alone, the choice at the sign */
    if (kind == TABLE)
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, (__m256i)shifted),
            _mm256_permutevar8x32_ps(high, (__m256i)shifted), (__m256)(octets << (28 - place * bits)));
#endif
    const ints code = shifted & ((1 << bits) - 1);
    if (kind == TABLE) return __builtin_shuffle(low, high, code);
    if (kind == INTEGER) return __builtin_convertvector(code, floats);
    return (floats)((octets << 20) & (int32_t)0x87f00000);
}

/* R output channels from `o` on for M rows. x [B / 8][M][c][8], x_sum [M][G], y [M][O]. R * M sums live in registers;
   one load of x serves R channels. */
INLINE void channels(const weight *w, int64_t o, const int bits, const enum kind kind, const int R, const int M,
        const float *x, const float *x_sum, float *y) {
    const int c = 8 / bits;
    const int64_t B = w->row_bytes, G = w->groups;
    const uint8_t *codes = (const uint8_t *)w->codes + o * B;
    floats low = {0}, high = {0}, sums[MOST_CHANNELS][MOST_ROWS] = {{{0}}};
    float shift[MOST_CHANNELS][MOST_ROWS] = {{0}};
    if (kind == TABLE) low = *(const floats_at *)w->table, high = *(const floats_at *)(w->table + LANES);
    for (int64_t g = 0; g < G; g++) {
        const int64_t start = g * w->group_bytes, end = g == G - 1 ? B : start + w->group_bytes;
        floats sum[MOST_CHANNELS][MOST_ROWS] = {{{0}}};
        const float *inputs = x + start * M * c;
        for (int64_t j = start; j < end; j += LANES, inputs += LANES * M * c) {
            ints octets[MOST_CHANNELS];
            for (int r = 0; r < R; r++) octets[r] = widen(codes + r * B + j, kind);
            for (int p = 0; p < c; p++)
                for (int r = 0; r < R; r++) {
                    const floats level = levels(octets[r], p, bits, kind, low, high);
                    for (int m = 0; m < M; m++) sum[r][m] += level * *(const floats_at *)(inputs + (m * c + p) * LANES);
                }
        }
        for (int r = 0; r < R; r++) {
            const int64_t at = (o + r) * G + g;
            const float scale = w->scale[at], zero = w->zero ? (float)w->zero[at] : w->middle;
            for (int m = 0; m < M; m++) {
                sums[r][m] += sum[r][m] * (kind == FP8 ? scale * FP8_LIFT : scale);
                shift[r][m] += scale * zero * x_sum[m * G + g];
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) y[m * w->rows + o + r] = total(sums[r][m]) - shift[r][m];
}

#define OF_KIND(R, M)                                                                                 \
    if (w->kind == FP8) channels(w, o, 8, FP8, R, M, x, x_sum, y);                                    \
    else if (w->kind == TABLE) channels(w, o, 4, TABLE, R, M, x, x_sum, y);                           \
    else if (w->bits == 2) channels(w, o, 2, INTEGER, R, M, x, x_sum, y);                             \
    else if (w->bits == 4) channels(w, o, 4, INTEGER, R, M, x, x_sum, y);                             \
    else channels(w, o, 8, INTEGER, R, M, x, x_sum, y)

/* At least MOST_CHANNELS output channels [first, end) for 1, 2 or 4 rows. The last ones may be done twice. */
static void product_of(const weight *w, int64_t first, int64_t end, int M, const float *x, const float *x_sum,
        float *y) {
    const int64_t at_once = M == 4 ? 2 : MOST_CHANNELS;
    for (int64_t next = first; next < end; next += at_once) {
        const int64_t o = next < end - at_once ? next : end - at_once;
        if (M == 1) { OF_KIND(4, 1); }
        else if (M == 2) { OF_KIND(4, 2); }
        else { OF_KIND(2, 4); }
    }
}

/* x [M][K] -> [B / 8][M][c][8], with zeros behind the last input, and the sums of its groups [M][G]. */
static void arrange(const weight *w, int64_t M, const float *x, float *to, float *x_sum) {
    const int64_t c = 8 / w->bits, G = w->groups, K = w->width, block = LANES * c, size = w->group_bytes * c;
    const float lift = w->kind == FP8 ? FP8_LIFT : 1;
    for (int64_t m = 0; m < M; m++, x += K, x_sum += G) {
        for (int64_t k = 0; k < w->row_bytes * c; k += block) {
            float *place = to + k * M + m * block;
            for (int64_t p = 0; p < c; p++)
                for (int64_t lane = 0; lane < LANES; lane++) {
                    const int64_t at = k + lane * c + p;
                    place[p * LANES + lane] = at < K ? x[at] * lift : 0;
                }
        }
        for (int64_t g = 0; g < G; g++) {
            const int64_t end = g == G - 1 ? K : (g + 1) * size;
            float lanes[LANES] = {0}, sum = 0;
            int64_t k = g * size;
            for (; k + LANES <= end; k += LANES)
                for (int lane = 0; lane < LANES; lane++) lanes[lane] += x[k + lane];
            for (; k < end; k++) sum += x[k];
            for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
            x_sum[g] = sum;
        }
    }
}

int low_bit_product(const weight *w, int64_t M, const float *x, float *y, int threads) {
    const int64_t wide = 8 / w->bits * w->row_bytes, tiles = tiles_of(w);
    float *arranged = malloc(sizeof(float) * (size_t)(M * (wide + w->groups)));
    if (!arranged) return 1;
    float *x_sum = arranged + M * wide;
    for (int64_t m = 0; m < M; m += rows_at_once(M - m))
        arrange(w, rows_at_once(M - m), x + m * w->width, arranged + m * wide, x_sum + m * w->groups);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t o = tile * TILE, end = tile == tiles - 1 ? w->rows : o + TILE;
        for (int64_t m = 0; m < M; m += rows_at_once(M - m))
            product_of(w, o, end, rows_at_once(M - m), arranged + m * wide, x_sum + m * w->groups, y + m * w->rows);
    }
    free(arranged);
    return 0;
}

INLINE void dense_channel(const weight *w, int64_t o, const int bits, const enum kind kind, float *to) {
    const int c = 8 / bits;
    const int64_t B = w->row_bytes, G = w->groups;
    const uint8_t *codes = (const uint8_t *)w->codes + o * B;
    floats low = {0}, high = {0};
    if (kind == TABLE) low = *(const floats_at *)w->table, high = *(const floats_at *)(w->table + LANES);
    for (int64_t g = 0; g < G; g++) {
        const int64_t start = g * w->group_bytes, end = g == G - 1 ? B : start + w->group_bytes;
        const float scale = w->scale[o * G + g], zero = w->zero ? (float)w->zero[o * G + g] : w->middle;
        for (int64_t j = start; j < end; j += LANES) {
            const ints octets = widen(codes + j, kind);
            for (int p = 0; p < c; p++)
                *(floats_at *)(to + p * B + j) =
                    (levels(octets, p, bits, kind, low, high) * (kind == FP8 ? 1 / FP8_UNIT : 1) - zero) * scale;
        }
    }
}

/* Output channels [first, last) as fp32 [last - first][c][B]: place p of byte j is input j * c + p. */
void low_bit_dequantize(const weight *w, int64_t first, int64_t last, float *to, int threads) {
    const int64_t wide = 8 / w->bits * w->row_bytes;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = first; o < last; o++) {
        float *row = to + (o - first) * wide;
        if (w->kind == FP8) dense_channel(w, o, 8, FP8, row);
        else if (w->kind == TABLE) dense_channel(w, o, 4, TABLE, row);
        else if (w->bits == 2) dense_channel(w, o, 2, INTEGER, row);
        else if (w->bits == 4) dense_channel(w, o, 4, INTEGER, row);
        else dense_channel(w, o, 8, INTEGER, row);
    }
}
