/* Rotary position embedding of the first `rotated` channels of every head, halves against each other, fp32. */
#include <string.h>

#include "operations.h"

static void rotate(const float *x, const float *cosine, const float *sine, float *out, int64_t width, int64_t rotated) {
    int64_t half = rotated / 2;
    for (int64_t d = 0; d < half; d++) {
        out[d] = x[d] * cosine[d] - x[d + half] * sine[d];
        out[d + half] = x[d + half] * cosine[d + half] + x[d] * sine[d + half];
    }
    memcpy(out + rotated, x + rotated, (width - rotated) * sizeof(float));
}

/* x [tokens, heads, width] for queries and for keys; rows of tokens are `stride` apart, heads lie side by side. */
void rotary(const float *q, const float *k, const float *cosine, const float *sine, float *q_out, float *k_out,
            int64_t tokens, int64_t heads, int64_t groups, int64_t width, int64_t rotated, int64_t q_stride,
            int64_t k_stride, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t token = 0; token < tokens; token++) {
        const float *c = cosine + token * rotated, *s = sine + token * rotated;
        for (int64_t head = 0; head < heads; head++)
            rotate(q + token * q_stride + head * width, c, s, q_out + (token * heads + head) * width, width, rotated);
        for (int64_t group = 0; group < groups; group++)
            rotate(k + token * k_stride + group * width, c, s, k_out + (token * groups + group) * width, width, rotated);
    }
}
