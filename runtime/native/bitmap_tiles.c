/* Products of weights that are mostly zero with bf16 inputs for some rows, in the tiles of CPUs with AMX.

   16 output channels are spread out 32 numbers at a time into a buffer of 1 KiB, which is a tile as it lies, and meet up
   to four tiles of 16 rows. Sums are fp32. Rows are filled up with zeros to whole tiles; what one gives does not depend
   on the others. Shapes: M rows, G tiles of them, K input channels (a multiple of 32), B words, O output channels. */

#define _GNU_SOURCE
#include "bitmap.h"

#if defined(__AMX_BF16__) && defined(__AVX512VBMI2__) && defined(__linux__)
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 16   /* channels, rows and pairs of numbers of a tile */
#define GROUPS 4  /* tiles of rows that meet the weights at once */
#define BUFFERS 4 /* so that one is filled while another is read */
#define ASK_FOR_TILES 0x1023 /* ARCH_REQ_XCOMP_PERM: the kernel wants to be asked before the first use */
#define TILE_DATA 18

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tiles_config;

static void configure(void) {
    tiles_config config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.bytes[tile] = LINE, config.rows[tile] = SIDE;
    _tile_loadconfig(&config);
}

int bitmap_tiles_served(void) { return syscall(SYS_arch_prctl, ASK_FOR_TILES, TILE_DATA) == 0; }

/* x bf16 [M][K] -> pairs of numbers [G][B][16 pairs][16 rows], one word b of one tile g. */
INLINE void arrange(const uint16_t *x, int64_t M, int64_t K, int64_t g, int64_t b, uint32_t *to) {
    for (int64_t p = 0; p < SIDE; p++)
        for (int64_t row = 0; row < SIDE; row++) {
            const int64_t m = g * SIDE + row;
            to[p * SIDE + row] = m < M ? ((const uint32_t *)(x + m * K))[b * SIDE + p] : 0;
        }
}

/* 16 output channels from `o` on for the tiles of rows [g, g + count). x [G][B][16][16], y [M][O]. */
static void channels(const weight *w, int64_t o, int64_t g, int count, int64_t M, const uint32_t *x, float *y) {
    const int64_t B = w->width / STEP, words = SIDE * SIDE, next = B * words;
    const uint32_t *map = w->map + o * B;
    const uint16_t *values[SIDE];
    uint16_t buffer[BUFFERS][SIDE][STEP] __attribute__((aligned(LINE)));
    float sums[GROUPS][SIDE][SIDE] __attribute__((aligned(LINE)));
    for (int r = 0; r < SIDE; r++) values[r] = (const uint16_t *)w->codes + w->start[o + r];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    x += g * next;
    for (int64_t b = 0; b < B; b++, x += words) {
        uint16_t (*at)[STEP] = buffer[b % BUFFERS];
        for (int r = 0; r < SIDE; r++) {
            __m512i pairs;
            values[r] = spread(values[r], map[r * B + b], &pairs);
            _mm512_store_si512(at[r], pairs);
        }
        _tile_loadd(4, at, LINE);
        _tile_loadd(5, x, LINE);
        _tile_dpbf16ps(0, 4, 5);
        if (count > 1) { _tile_loadd(6, x + next, LINE); _tile_dpbf16ps(1, 4, 6); }
        if (count > 2) { _tile_loadd(7, x + 2 * next, LINE); _tile_dpbf16ps(2, 4, 7); }
        if (count > 3) { _tile_loadd(5, x + 3 * next, LINE); _tile_dpbf16ps(3, 4, 5); }
    }
    _tile_stored(0, sums[0], LINE);
    _tile_stored(1, sums[1], LINE);
    _tile_stored(2, sums[2], LINE);
    _tile_stored(3, sums[3], LINE);
    for (int64_t m = g * SIDE; m < M && m < (g + count) * SIDE; m++)
        for (int r = 0; r < SIDE; r++) y[m * w->rows + o + r] = sums[m / SIDE - g][r][m % SIDE];
}

/* y [M][O] = x Wt for bf16 x [M][K]; at least 16 output channels. 0, or 1 if there is no memory. */
int bitmap_tiles_product(const weight *w, int64_t M, const uint16_t *x, float *y, int threads) {
    const int64_t B = w->width / STEP, G = (M + SIDE - 1) / SIDE, blocks = (w->rows + SIDE - 1) / SIDE;
    uint32_t *arranged = aligned_alloc(LINE, (size_t)(G * B * SIDE * LINE));
    if (!arranged) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t each = 0; each < G * B; each++)
            arrange(x, M, w->width, each / B, each % B, arranged + each * SIDE * SIDE);
        configure();
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t o = block * SIDE < w->rows - SIDE ? block * SIDE : w->rows - SIDE;
            for (int64_t g = 0; g < G; g += GROUPS)
                channels(w, o, g, (int)(G - g < GROUPS ? G - g : GROUPS), M, arranged, y);
        }
        _tile_release();
    }
    free(arranged);
    return 0;
}

#else
int bitmap_tiles_served(void) { return 0; }

int bitmap_tiles_product(const weight *w, int64_t M, const uint16_t *x, float *y, int threads) {
    (void)w, (void)M, (void)x, (void)y, (void)threads;
    return 1;
}
#endif
