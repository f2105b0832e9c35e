/* The column sweep of GPTQ inside one block of columns, for rows that are independent of each other: a strip of rows
   keeps its errors in the first-level cache while the columns go by, from the last to the first. */
#include "e2m1.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 8, VECTORS = 4, STRIP = LANES * VECTORS };
typedef float vector __attribute__((vector_size(LANES * sizeof(float))));

typedef struct {
    const float *target;   /* [columns, rows]: what the columns should have, after the blocks before this one */
    const float *original; /* [columns, rows]: the weights */
    const float *feedback; /* [columns, columns]: row i holds what the error of column j > i adds to column i */
    const float *scale;    /* [groups, rows] */
    const float *zero;     /* [groups, rows], or null */
    const int64_t *group;  /* [columns]: the group of each column */
    const int64_t *channel; /* [columns]: the row of `codes` for each column */
    const float *cost;     /* [columns]: the squared pivot */
    float *error;          /* [columns, rows]: weight minus rounded weight */
    int8_t *codes;         /* [channels, rows] */
    float *loss;           /* [rows]: added to */
    int64_t columns, rows;
    float lowest, highest;
    int floats; /* levels are 4-bit floats instead of whole numbers */
    int keep_zeros; /* weights that are zero stay zero */
} Sweep;

/* A strip of one column: codes, and what they stand for. */
static inline void round_strip(const Sweep *s, const float *target, const float *scale, const float *zero, float *code,
                               float *chosen) {
    for (int lane = 0; lane < STRIP; lane++) {
        float rounded = rintf(target[lane] * (1 / scale[lane])) + zero[lane];
        rounded = rounded < s->lowest ? s->lowest : rounded > s->highest ? s->highest : rounded;
        chosen[lane] = (rounded - zero[lane]) * scale[lane];
        code[lane] = rounded;
    }
}

static inline void round_strip_e2m1(const float *target, const float *scale, float *code, float *chosen) {
    for (int lane = 0; lane < STRIP; lane++) {
        const float level = nearest_e2m1(target[lane] * (1 / scale[lane]));
        chosen[lane] = level * scale[lane];
        code[lane] = code_of_e2m1(level);
    }
}

static inline void keep_zeros(const float *original, const float *zero, float *code, float *chosen) {
    for (int lane = 0; lane < STRIP; lane++) {
        code[lane] = original[lane] == 0 ? zero[lane] : code[lane];
        chosen[lane] = original[lane] == 0 ? 0 : chosen[lane];
    }
}

static void aim(const Sweep *s, int64_t i, const vector (*error)[VECTORS], float *target) {
    vector sum[VECTORS];
    memcpy(sum, target, sizeof sum);
    const float *feedback = s->feedback + i * s->columns;
    for (int64_t j = i + 1; j < s->columns; j++)
        for (int v = 0; v < VECTORS; v++)
            sum[v] += feedback[j] * error[j][v];
    memcpy(target, sum, sizeof sum);
}

static void sweep_strip(const Sweep *s, int64_t first, int count, vector (*error)[VECTORS]) {
    float target[STRIP] = {0}, original[STRIP] = {0}, scale[STRIP], zero[STRIP] = {0}, code[STRIP], loss[STRIP] = {0};
    float chosen[STRIP];
    for (int lane = 0; lane < STRIP; lane++)
        scale[lane] = 1;
    for (int64_t i = s->columns - 1; i >= 0; i--) {
        const int64_t at = i * s->rows + first, grid = s->group[i] * s->rows + first;
        memcpy(target, s->target + at, count * sizeof(float));
        memcpy(original, s->original + at, count * sizeof(float));
        memcpy(scale, s->scale + grid, count * sizeof(float));
        if (s->zero)
            memcpy(zero, s->zero + grid, count * sizeof(float));
        aim(s, i, error, target);
        float *wrong = (float *)error[i];
        if (s->floats)
            round_strip_e2m1(target, scale, code, chosen);
        else
            round_strip(s, target, scale, zero, code, chosen);
        if (s->keep_zeros)
            keep_zeros(original, zero, code, chosen);
        for (int lane = 0; lane < STRIP; lane++) {
            const float residual = target[lane] - chosen[lane];
            wrong[lane] = original[lane] - chosen[lane];
            loss[lane] += residual * residual * s->cost[i];
        }
        memcpy(s->error + at, wrong, count * sizeof(float));
        int8_t *codes = s->codes + s->channel[i] * s->rows + first;
        for (int lane = 0; lane < count; lane++)
            codes[lane] = (int8_t)code[lane];
    }
    for (int lane = 0; lane < count; lane++)
        s->loss[first + lane] += loss[lane];
}

/* 0, or 1 if there is no memory. Rows do not depend on each other: any number of threads gives the same bits. */
int sweep_block(const Sweep *s, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        vector(*error)[VECTORS] = aligned_alloc(64, s->columns * sizeof *error);
        if (error == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < s->rows; first += STRIP)
            if (error != NULL)
                sweep_strip(s, first, s->rows - first < STRIP ? (int)(s->rows - first) : STRIP, error);
        free(error);
    }
    return failed;
}
