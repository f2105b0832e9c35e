/* The operations between linear layers, for those who call them from C. */

#pragma once

#include "kv_codes.h"
#include "vectors.h"

typedef struct { /* ctypes mirrors it in attention.py */
    kv_pages k, v, k_coded, v_coded;
    const float *q;
    float *out;
    const int32_t *table;       /* [lines, table_stride] */
    const int64_t *line;        /* of each sequence; NULL: the first ones in turn */
    const int64_t *row;         /* of each sequence's query in q and out */
    const int32_t *first, *end; /* the slots it sees: tokens, where pages are coded as a whole */
    const int32_t *coded;       /* of each sequence the pages behind `sinks` tokens that are coded; or NULL */
    int64_t sequences, table_stride, q_stride, heads, groups, width, sinks;
    float scale, softcap; /* softcap 0: none */
} decodes;

/* 0, or 1 if there is no memory. */
int paged_decode(const decodes *all, int threads);

void rms_norm(const float *x, const float *weight, float *out, int64_t rows, int64_t width, float eps, float added,
        int threads);

void rotary(const float *q, const float *k, const float *cosine, const float *sine, float *q_out, float *k_out,
        int64_t tokens, int64_t heads, int64_t groups, int64_t width, int64_t rotated, int64_t q_stride,
        int64_t k_stride, int threads);
