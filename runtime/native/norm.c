/* Root-mean-square norm of rows, fp32: out = x / sqrt(mean(x^2) + eps) * (weight + added). */
#include <math.h>

#include "operations.h"

void rms_norm(const float *x, const float *weight, float *out, int64_t rows, int64_t width, float eps, float added,
              int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * width;
        float *to = out + row * width, squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < width; d++)
            squares += from[d] * from[d];
        float factor = 1 / sqrtf(squares / width + eps);
        for (int64_t d = 0; d < width; d++)
            to[d] = from[d] * factor * (weight[d] + added);
    }
}
