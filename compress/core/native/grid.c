/* The rounding error of every group of weights on a given grid, squared or cubed, weighted by the importance of its
   channels. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define LEVELS 16

void rounding_error(const float *weight, const float *importance, const float *scale, const float *zero, float *error,
                    int64_t rows, int64_t groups, int64_t size, float lowest, float highest, int cubed, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t group = 0; group < groups; group++) {
            const int64_t at = row * groups + group;
            const float *from = weight + at * size, *weights = importance ? importance + group * size : NULL;
            const float inverse = 1 / scale[at], shift = zero ? zero[at] : 0;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t k = 0; k < size; k++) {
                const float exact = from[k] * inverse + shift;
                float rounded = rintf(exact);
                rounded = rounded < lowest ? lowest : rounded > highest ? highest : rounded;
                const float residual = rounded - exact;
                float cost = residual * residual;
                cost = cubed ? cost * fabsf(residual) : cost;
                sum += weights ? cost * weights[k] : cost;
            }
            sum *= scale[at] * scale[at];
            error[at] = cubed ? sum * fabsf(scale[at]) : sum;
        }
}

/* The same for levels instead of whole numbers: the scale's multiples of the 16 numbers in `levels`, ascending. */
void level_error(const float *weight, const float *importance, const float *scale, const float *levels, float *error,
                 int64_t rows, int64_t groups, int64_t size, int cubed, int threads) {
    float middle[LEVELS - 1];
    for (int i = 0; i < LEVELS - 1; i++)
        middle[i] = (levels[i] + levels[i + 1]) / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t group = 0; group < groups; group++) {
            const int64_t at = row * groups + group;
            const float *from = weight + at * size, *weights = importance ? importance + group * size : NULL;
            const float inverse = 1 / scale[at];
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t k = 0; k < size; k++) {
                const float exact = from[k] * inverse;
                float level = levels[0];
                for (int i = 0; i < LEVELS - 1; i++) {
                    const float above = levels[i + 1];
                    level = exact > middle[i] ? above : level;
                }
                const float residual = level - exact;
                float cost = residual * residual;
                cost = cubed ? cost * fabsf(residual) : cost;
                sum += weights ? cost * weights[k] : cost;
            }
            sum *= scale[at] * scale[at];
            error[at] = cubed ? sum * fabsf(scale[at]) : sum;
        }
}
