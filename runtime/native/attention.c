/* Paged attention of decodes on a CPU: one query per sequence, keys and values read where they lie.
 *
 * A task is one sequence, one key-value head and at most SEGMENT slots; the heads of its group share what is read. Tasks
 * go to threads; segments of a long sequence are joined afterwards. A row's result depends on nothing but its own
 * sequence. All numbers are fp32. Codes become whole numbers once for all heads of a group; what they are multiplied by
 * and what is added goes to scores and to probabilities. Where a whole page is coded, what its channels are multiplied by
 * goes to the query, once a page.
 */
#include <stdlib.h>
#include <string.h>

#include "operations.h"

#define TILE 64       /* slots whose scores are held at once */
#define SEGMENT 1024  /* slots of a task */
#define SPAN (8 * LANES)

INLINE float dot(const float *a, const float *b, int64_t width) {
    floats x = {0}, y = {0};
    int64_t d = 0;
    for (; d + 2 * LANES <= width; d += 2 * LANES) {
        x += *(const floats_at *)(a + d) * *(const floats_at *)(b + d);
        y += *(const floats_at *)(a + d + LANES) * *(const floats_at *)(b + d + LANES);
    }
    float rest = 0;
    for (; d < width; d++)
        rest += a[d] * b[d];
    return total(x + y) + rest;
}

/* acc = acc * fade + sum of weight[j] * rows[j] */
static void gather(float *acc, float fade, const float *weight, const float *const *rows, int64_t count, int64_t width) {
    int64_t d = 0;
    for (; d + SPAN <= width; d += SPAN) {
        floats sums[SPAN / LANES];
        for (int i = 0; i < SPAN / LANES; i++)
            sums[i] = *(floats_at *)(acc + d + i * LANES) * fade;
        for (int64_t j = 0; j < count; j++)
            for (int i = 0; i < SPAN / LANES; i++)
                sums[i] += *(const floats_at *)(rows[j] + d + i * LANES) * weight[j];
        for (int i = 0; i < SPAN / LANES; i++)
            *(floats_at *)(acc + d + i * LANES) = sums[i];
    }
    for (; d + LANES <= width; d += LANES) {
        floats sums = *(floats_at *)(acc + d) * fade;
        for (int64_t j = 0; j < count; j++)
            sums += *(const floats_at *)(rows[j] + d) * weight[j];
        *(floats_at *)(acc + d) = sums;
    }
    for (; d < width; d++) {
        float sum = acc[d] * fade;
        for (int64_t j = 0; j < count; j++)
            sum += rows[j][d] * weight[j];
        acc[d] = sum;
    }
}

/* A tile of keys or values: number = scale * row + shift. */
typedef struct {
    const float *rows[TILE];
    float scale[TILE], shift[TILE];
    int64_t coding;
} tile;

static void read_tile(const decodes *all, const kv_pages *pages, const int32_t *table, int64_t g, int64_t slot,
        int64_t count, float *room, tile *to) {
    to->coding = pages->coding;
    for (int64_t j = 0; j < count; j++, slot++) {
        const int64_t row = slot % pages->tokens * pages->slot_rows + g;
        to->rows[j] = row_at(pages, table[slot / pages->tokens], row, g, all->width, room + j * all->width,
            to->scale + j, to->shift + j);
    }
}

/* Tokens that lie alike, from token `at` on: all in full pages, or all in one page that is coded. */
typedef struct {
    int64_t count, slot; /* counted from the first entry of `table`, all of whose pages are of one kind */
    const int32_t *table;
    int coded;
} run;

static run run_at(const decodes *all, int64_t s, int64_t at, int64_t end) {
    const int32_t *table = all->table + (all->line ? all->line[s] : s) * all->table_stride;
    run found = {end - at < TILE ? end - at : TILE, at, table, 0};
    if (!all->coded || at < all->sinks) {
        if (all->coded && all->sinks - at < found.count) found.count = all->sinks - at;
        return found;
    }
    const int64_t tokens = all->k_coded.tokens, behind = at - all->sinks, pages = all->coded[s];
    if (behind >= pages * tokens) { /* a coded page takes one entry of the table, as one of `block` tokens does */
        found.slot = at - pages * (tokens - all->k.tokens);
        return found;
    }
    const int64_t left = tokens - behind % tokens;
    if (left < found.count) found.count = left;
    found.slot = behind % tokens;
    found.table = table + all->sinks / all->k.tokens + behind / tokens;
    found.coded = 1;
    return found;
}

/* Queries as a coded page wants them: times its scales; and their products with its lowest numbers. */
static void fit_queries(const decodes *all, const float *q, int64_t repeats, int64_t g, int64_t page, float *to,
        float *sums) {
    const uint16_t *numbers = numbers_of(&all->k_coded, page) + g * all->width;
    for (int64_t r = 0; r < repeats; r++)
        sums[r] = 0;
    for (int64_t d = 0; d < all->width; d++) {
        const float scale = from_half(numbers[d]), lowest = from_half(numbers[all->groups * all->width + d]);
        for (int64_t r = 0; r < repeats; r++) {
            to[r * all->width + d] = q[r * all->width + d] * scale;
            sums[r] += q[r * all->width + d] * lowest;
        }
    }
}

/* Scores of one query. */
static void score(const decodes *all, const float *q, float q_sum, const tile *keys, int64_t count, float *to) {
    for (int64_t j = 0; j < count; j++)
        to[j] = dot(q, keys->rows[j], all->width) * all->scale;
    if (keys->coding != FULL_KV)
        for (int64_t j = 0; j < count; j++)
            to[j] = to[j] * keys->scale[j] + q_sum * all->scale * keys->shift[j];
    if (all->softcap != 0)
        for (int64_t j = 0; j < count; j++)
            to[j] = all->softcap * (1 - 2 / (1 + exponential(2 * to[j] / all->softcap)));
}

/* acc = acc * fade + sum of weight[j] * values[j]; overwrites `weight`. */
static void add_values(const decodes *all, float *acc, float fade, float *weight, const tile *values, int64_t count) {
    float shift = 0;
    if (values->coding != FULL_KV)
        for (int64_t j = 0; j < count; j++) {
            shift += weight[j] * values->shift[j];
            weight[j] *= values->scale[j];
        }
    gather(acc, fade, weight, values->rows, count, all->width);
    if (values->coding == INT4_KV)
        for (int64_t d = 0; d < all->width; d++)
            acc[d] += shift;
}

/* Slots first … end - 1 for all heads of group g: acc [heads of a group, width], top and total [heads of a group].
 * `room` holds the numbers of two tiles. */
static void attend(const decodes *all, int64_t s, int64_t g, int64_t first, int64_t end, float *acc, float *top,
        float *total, float *room) {
    int64_t width = all->width, repeats = all->heads / all->groups;
    const float *q = all->q + all->row[s] * all->q_stride + g * repeats * width;
    const int per_channel = all->coded && all->k_coded.coding >= CHANNELS8_KV;
    tile keys, values;
    float weight[TILE], q_sum[repeats], fitted[per_channel ? repeats * width : 1], fitted_sum[repeats];
    const int32_t *fitted_to = NULL;
    memset(acc, 0, repeats * width * sizeof(float));
    for (int64_t r = 0; r < repeats; r++) {
        top[r] = -1e30f;
        total[r] = q_sum[r] = 0;
        for (int64_t d = 0; d < width; d++)
            q_sum[r] += q[r * width + d];
    }
    for (int64_t at = first, count; at < end; at += count) {
        const run here = run_at(all, s, at, end);
        const int fits = here.coded && per_channel;
        count = here.count;
        if (fits && here.table != fitted_to) {
            fit_queries(all, q, repeats, g, *here.table, fitted, fitted_sum);
            fitted_to = here.table;
        }
        read_tile(all, here.coded ? &all->k_coded : &all->k, here.table, g, here.slot, count, room, &keys);
        read_tile(all, here.coded ? &all->v_coded : &all->v, here.table, g, here.slot, count, room + TILE * width,
            &values);
        for (int64_t r = 0; r < repeats; r++) {
            float highest = top[r];
            score(all, (fits ? fitted : q) + r * width, fits ? fitted_sum[r] : q_sum[r], &keys, count, weight);
#pragma omp simd reduction(max : highest)
            for (int64_t j = 0; j < count; j++)
                highest = weight[j] > highest ? weight[j] : highest;
            float fade = exponential(top[r] - highest), added = 0;
#pragma omp simd reduction(+ : added)
            for (int64_t j = 0; j < count; j++)
                added += weight[j] = exponential(weight[j] - highest);
            total[r] = total[r] * fade + added;
            top[r] = highest;
            add_values(all, acc + r * width, fade, weight, &values, count);
        }
    }
}

static int64_t segments_of(const decodes *all, int64_t s) {
    int64_t slots = all->end[s] - all->first[s];
    return slots > SEGMENT ? (slots + SEGMENT - 1) / SEGMENT : 1;
}

/* Joins a group's segments, which lie one after another in `parts`, into `out`. */
static void join(const float *parts, int64_t segments, int64_t part, int64_t repeats, int64_t width, float *out) {
    for (int64_t r = 0; r < repeats; r++) {
        float highest = -1e30f, total = 0;
        for (int64_t i = 0; i < segments; i++) {
            float top = parts[i * part + repeats * width + r];
            highest = top > highest ? top : highest;
        }
        memset(out + r * width, 0, width * sizeof(float));
        for (int64_t i = 0; i < segments; i++) {
            const float *acc = parts + i * part;
            float share = exponential(acc[repeats * width + r] - highest);
            total += share * acc[repeats * width + repeats + r];
            for (int64_t d = 0; d < width; d++)
                out[r * width + d] += share * acc[r * width + d];
        }
        for (int64_t d = 0; d < width; d++)
            out[r * width + d] /= total;
    }
}

/* 0, or 1 if there is no memory. */
int paged_decode(const decodes *all, int threads) {
    int64_t repeats = all->heads / all->groups, part = repeats * (all->width + 2), pieces = 0;
    for (int64_t s = 0; s < all->sequences; s++)
        pieces += segments_of(all, s);
    int64_t coded = all->coded || all->k.coding != FULL_KV || all->v.coding != FULL_KV, room = coded ? 2 * TILE * all->width : 1;
    float *parts = malloc(pieces * all->groups * part * sizeof(float));
    int64_t *begins = malloc((all->sequences + 1) * sizeof(int64_t)), *owner = malloc(pieces * sizeof(int64_t));
    if (!parts || !begins || !owner) {
        free(parts), free(begins), free(owner);
        return 1;
    }
    begins[0] = 0;
    for (int64_t s = 0; s < all->sequences; s++) {
        begins[s + 1] = begins[s] + segments_of(all, s);
        for (int64_t i = begins[s]; i < begins[s + 1]; i++)
            owner[i] = s;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < pieces * all->groups; task++) {
        int64_t piece = task / all->groups, g = task % all->groups, s = owner[piece];
        int64_t segment = piece - begins[s], segments = begins[s + 1] - begins[s];
        int64_t first = all->first[s] + segment * SEGMENT;
        int64_t end = first + SEGMENT < all->end[s] ? first + SEGMENT : all->end[s];
        float *acc = parts + (begins[s] * all->groups + g * segments + segment) * part;
        float numbers[room];
        attend(all, s, g, first, end, acc, acc + repeats * all->width, acc + repeats * (all->width + 1), numbers);
    }
    for (int64_t s = 0; s < all->sequences; s++)
        for (int64_t g = 0; g < all->groups; g++) {
            int64_t segments = begins[s + 1] - begins[s];
            const float *group = parts + (begins[s] * all->groups + g * segments) * part;
            float *out = all->out + (all->row[s] * all->heads + g * repeats) * all->width;
            join(group, segments, part, repeats, all->width, out);
        }
    free(parts), free(begins), free(owner);
    return 0;
}
