/* One entry to the products with every kind of weight. */

#include "linear.h"

int linear_product(const weight *w, int64_t M, const float *x, float *y, int threads) {
    switch (w->kind) {
    case FLOAT32:
    case BFLOAT16: return dense_product(w, M, x, y, threads);
    case BITMAP: return bitmap_product(w, M, x, y, threads);
    default: return int16_product(w, M, x, y, threads);
    }
}
