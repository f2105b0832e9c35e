/* One entry to the products with every kind of weight. */

#include "linear.h"

int linear_product(const weight *w, int64_t M, const float *x, float *y, int threads) {
    const int dense = w->kind == FLOAT32 || w->kind == BFLOAT16;
    return (dense ? dense_product : int16_product)(w, M, x, y, threads);
}
