/* A step of few tokens through a whole decoder, fp32 on a CPU: the operations of the other files, called from C.

   With few rows, what lies between two operations in Python takes as long as the operations do. A token of a prompt is
   a row like any other: all keys and values of a layer are stored before its attention, and each row says how many
   slots it sees. Shapes: M rows, one token each, N of which want logits, D hidden channels, H query heads and G
   key-value heads of W channels, R of them rotated, F inner channels of the feed-forward, V vocabulary.
   The result of a row does not depend on the other rows. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "linear.h"
#include "operations.h"

#define SERIAL_WORK (1 << 16) /* as in compress.core.compiling */

enum activation { SILU, GELU, GELU_TANH, RELU };

typedef struct { /* ctypes mirrors these in small_steps.py */
    const weight *weight;
    const float *bias; /* or NULL */
} linear;

typedef struct {
    linear qkv, output, gate_up, down;
    const float *before_attention, *after_attention, *before_ffn, *after_ffn, *q_norm, *k_norm; /* NULL: no norm */
    kv_pages k, v, k_coded, v_coded;
    int64_t heads, groups, width, inner, window, rope; /* window 0: none */
    float scale;
} layer;

typedef struct {
    const float *frequency; /* [R / 2] */
    int64_t rotated;
    float factor;
} rope;

typedef struct {
    const layer *layers;
    const rope *ropes;
    const float *norm;
    linear head;
    int64_t layer_count, rope_count, hidden, sinks;
    float eps, added, softcap; /* added: to the weights of norms; softcap 0: none */
    int32_t activation;
} decoder;

typedef struct {
    float *x;      /* [M][D], overwritten */
    float *logits; /* [N][V] */
    const int64_t *position, *slot; /* [M] */
    const int32_t *end, *table;     /* [M], [M][table_stride] */
    const int64_t *wanted;          /* [N], rising */
    const int32_t *coded;           /* [M], or NULL, as in operations.h */
    /* Where each row has tables for each layer and head (runtime/groups.py), else NULL: [layers][M][G], where keys and
       values go, how many slots are seen, and which line of `table`. Layers are alike, and lie one after another. */
    const int64_t *head_row, *head_line;
    const int32_t *head_end;
    int64_t rows, table_stride, wanted_rows;
    int32_t threads;
} step;

/* Working memory: everything that a layer leaves behind for the next operation. */
typedef struct {
    float *normal, *wide, *q, *k, *y;
    float *cosine, *sine; /* [rope][M][R] */
    int64_t *row;   /* [M][G] */
    int32_t *first; /* [M][G] */
} scratch;

static int threads_for(int64_t work, const step *now) { return work < SERIAL_WORK ? 1 : now->threads; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* One allocation, or NULL. */
static void *allocate(const decoder *model, int64_t M, scratch *made) {
    int64_t wide = 0, q = 0, k = 0, angles = 0, groups = 1;
    for (int64_t i = 0; i < model->layer_count; i++) {
        const layer *l = model->layers + i;
        wide = larger(wide, larger((l->heads + 2 * l->groups) * l->width, 2 * l->inner));
        q = larger(q, larger(l->heads * l->width, l->inner));
        k = larger(k, l->groups * l->width);
        groups = larger(groups, l->groups);
    }
    for (int64_t i = 0; i < model->rope_count; i++) angles += model->ropes[i].rotated;
    const int64_t y = larger(q, model->hidden);
    char *memory = malloc((size_t)M * (sizeof(float) * (size_t)(model->hidden + wide + q + k + y + 2 * angles)
                                       + (size_t)groups * (sizeof(int64_t) + sizeof(int32_t))));
    if (!memory) return NULL;
    made->row = (int64_t *)memory;
    for (int64_t i = 0; i < M * groups; i++) made->row[i] = i;
    made->normal = (float *)(made->row + M * groups);
    made->wide = made->normal + M * model->hidden;
    made->q = made->wide + M * wide;
    made->k = made->q + M * q;
    made->y = made->k + M * k;
    made->cosine = made->y + M * y;
    made->sine = made->cosine + M * angles;
    made->first = (int32_t *)(made->sine + M * angles);
    return memory;
}

static void fill_angles(const decoder *model, const step *now, scratch *at) {
    float *cosine = at->cosine, *sine = at->sine;
    for (int64_t i = 0; i < model->rope_count; i++) {
        const rope *r = model->ropes + i;
        const int64_t half = r->rotated / 2;
        for (int64_t m = 0; m < now->rows; m++, cosine += r->rotated, sine += r->rotated)
            for (int64_t f = 0; f < half; f++) {
                const float angle = (float)now->position[m] * r->frequency[f];
                cosine[f] = cosine[f + half] = cosf(angle) * r->factor;
                sine[f] = sine[f + half] = sinf(angle) * r->factor;
            }
    }
}

static void norm(const decoder *model, const step *now, const float *x, const float *weight, float *out) {
    const int threads = threads_for(now->rows * model->hidden, now);
    rms_norm(x, weight, out, now->rows, model->hidden, model->eps, model->added, threads);
}

/* y [M][O] = x Wt + b */
static int product(const linear *of, const step *now, const float *x, float *y) {
    const int64_t rows = of->weight->rows;
    if (linear_product(of->weight, now->rows, x, y, threads_for(rows * of->weight->row_bytes, now))) return 1;
    if (of->bias)
        for (int64_t m = 0; m < now->rows; m++)
            for (int64_t o = 0; o < rows; o++) y[m * rows + o] += of->bias[o];
    return 0;
}

/* x += y, or its norm */
static void add(const decoder *model, const step *now, float *y, const float *weight) {
    if (weight) norm(model, now, y, weight, y);
    const int64_t count = now->rows * model->hidden;
    for (int64_t i = 0; i < count; i++) now->x[i] += y[i];
}

/* The same memory as pages of one row (one token and head) each. */
static kv_pages rows_of(const kv_pages *pages, int64_t groups) {
    kv_pages found = *pages;
    found.bytes_apart /= pages->tokens * groups;
    found.numbers_apart /= pages->tokens * groups;
    found.tokens = found.slot_rows = 1;
    return found;
}

/* Stores a layer's keys and values and attends to them, each row and head by itself. */
static int by_head(const decoder *model, const layer *l, const step *now, scratch *at, int64_t v_at, int64_t v_stride) {
    const int64_t M = now->rows, G = l->groups, skipped = (l - model->layers) * M * G;
    const int64_t *row = now->head_row + skipped;
    const int32_t *end = now->head_end + skipped;
    /* those of the first layer begin where those of all layers do */
    kv_pages k = rows_of(&model->layers->k, G), v = rows_of(&model->layers->v, G);
    kv_store(&k, at->k, l->width, row, M * G, 1, l->width);
    for (int64_t m = 0; m < M; m++)
        kv_store(&v, at->wide + m * v_stride + v_at, l->width, row + m * G, G, 1, l->width);
    int64_t seen = 0;
    for (int64_t i = 0; i < M * G; i++) {
        at->first[i] = (int32_t)(l->window ? larger(0, end[i] - l->window) : 0);
        seen += end[i] - at->first[i];
    }
    k.tokens = v.tokens = l->k.tokens, k.slot_rows = v.slot_rows = G; /* a page goes by its first row */
    const decodes all = {
        .q = at->q, .k = k, .v = v, .out = at->y, .table = now->table, .line = now->head_line + skipped,
        .row = at->row, .first = at->first, .end = end, .sequences = M * G, .table_stride = now->table_stride,
        .q_stride = l->heads / G * l->width, .heads = l->heads / G, .groups = 1, .width = l->width,
        .scale = l->scale, .softcap = model->softcap,
    };
    return paged_decode(&all, threads_for(seen * l->width, now));
}

static int attention(const decoder *model, const layer *l, const step *now, scratch *at) {
    const int64_t M = now->rows, q_width = l->heads * l->width, k_width = l->groups * l->width;
    const int64_t stride = q_width + 2 * k_width;
    if (product(&l->qkv, now, at->normal, at->wide)) return 1;
    int64_t angles = 0;
    for (int64_t i = 0; i < l->rope; i++) angles += M * model->ropes[i].rotated;
    for (int64_t m = 0; m < M && l->q_norm; m++) {
        float *q = at->wide + m * stride, *k = q + q_width;
        rms_norm(q, l->q_norm, q, l->heads, l->width, model->eps, model->added, 1);
        rms_norm(k, l->k_norm, k, l->groups, l->width, model->eps, model->added, 1);
    }
    rotary(at->wide, at->wide + q_width, at->cosine + angles, at->sine + angles, at->q, at->k, M, l->heads, l->groups,
        l->width, model->ropes[l->rope].rotated, stride, stride, threads_for(M * (q_width + k_width), now));
    if (now->head_row)
        return by_head(model, l, now, at, q_width + k_width, stride) || product(&l->output, now, at->y, at->normal);
    kv_store(&l->k, at->k, k_width, now->slot, M, l->groups, l->width);
    kv_store(&l->v, at->wide + q_width + k_width, stride, now->slot, M, l->groups, l->width);
    int64_t seen = 0;
    for (int64_t m = 0; m < M; m++) {
        at->first[m] = (int32_t)(l->window ? larger(0, now->end[m] - l->window) : 0);
        seen += now->end[m] - at->first[m];
    }
    const decodes all = {
        .q = at->q, .k = l->k, .v = l->v, .k_coded = l->k_coded, .v_coded = l->v_coded, .out = at->y,
        .table = now->table, .row = at->row, .first = at->first, .end = now->end, .coded = now->coded, .sequences = M,
        .table_stride = now->table_stride, .q_stride = q_width, .heads = l->heads, .groups = l->groups,
        .width = l->width, .sinks = model->sinks, .scale = l->scale, .softcap = model->softcap,
    };
    return paged_decode(&all, threads_for(seen * k_width, now)) || product(&l->output, now, at->y, at->normal);
}

INLINE float activated(float x, const int32_t activation) {
    switch (activation) {
    case SILU: return x / (1 + exponential(-x));
    case GELU: return 0.5f * x * (1 + erff(x * 0.70710678f));
    case GELU_TANH: return x - x / (1 + exponential(1.59576912f * (x + 0.044715f * x * x * x)));
    default: return x > 0 ? x : x * 0; /* NaN stays NaN */
    }
}

/* [M][2][F] -> [M][F]: activation(gate) * up */
INLINE void gate(const float *from, float *to, int64_t M, int64_t F, const int32_t activation) {
    for (int64_t m = 0; m < M; m++, from += 2 * F, to += F)
        for (int64_t f = 0; f < F; f++) to[f] = activated(from[f], activation) * from[F + f];
}

static int feed_forward(const decoder *model, const layer *l, const step *now, scratch *at) {
    if (product(&l->gate_up, now, at->normal, at->wide)) return 1;
    switch (model->activation) {
    case SILU: gate(at->wide, at->q, now->rows, l->inner, SILU); break;
    case GELU: gate(at->wide, at->q, now->rows, l->inner, GELU); break;
    case GELU_TANH: gate(at->wide, at->q, now->rows, l->inner, GELU_TANH); break;
    default: gate(at->wide, at->q, now->rows, l->inner, RELU);
    }
    return product(&l->down, now, at->q, at->normal);
}

/* Logits of the wanted rows; keys and values of all are stored. 0, or 1 if there is no memory. */
int decoder_step(const decoder *model, const step *asked) {
    step known = *asked;
    const step *now = &known;
    scratch at;
    void *memory = allocate(model, now->rows, &at);
    if (!memory) return 1;
    fill_angles(model, now, &at);
    int failed = 0;
    for (int64_t i = 0; i < model->layer_count && !failed; i++) {
        const layer *l = model->layers + i;
        norm(model, now, now->x, l->before_attention, at.normal);
        failed = attention(model, l, now, &at);
        if (failed) break;
        add(model, now, at.normal, l->after_attention);
        norm(model, now, now->x, l->before_ffn, at.normal);
        failed = feed_forward(model, l, now, &at);
        if (!failed) add(model, now, at.normal, l->after_ffn);
    }
    if (!failed) {
        for (int64_t n = 0; n < known.wanted_rows; n++)
            memmove(known.x + n * model->hidden, known.x + known.wanted[n] * model->hidden,
                (size_t)model->hidden * sizeof(float));
        known.rows = known.wanted_rows;
    }
    if (!failed && known.rows) {
        norm(model, now, now->x, model->norm, at.normal);
        failed = product(&model->head, now, at.normal, now->logits);
    }
    free(memory);
    return failed;
}
