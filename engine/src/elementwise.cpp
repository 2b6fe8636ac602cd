#include "elementwise.h"

#include <cmath>

namespace rlsd {

bool adam_step(const Adam &adam, const float *gradient, float *m, float *v, float *value, std::size_t count) {
    float worst = 0;  // 0 * x is 0 for every finite x and NaN otherwise
    for (std::size_t e = 0; e < count; ++e) {
        const float g = gradient[e];
        m[e] = adam.beta1 * m[e] + (1 - adam.beta1) * g;
        v[e] = adam.beta2 * v[e] + (1 - adam.beta2) * g * g;
        value[e] -= adam.rate * (m[e] * adam.correction1) / (std::sqrt(v[e] * adam.correction2) + adam.epsilon);
        worst += 0 * value[e] + 0 * v[e];  // v: a gradient whose square overflows would stop value for good
    }
    return worst == 0;
}

bool finite(const float *x, std::size_t count) {
    float worst = 0;
    for (std::size_t e = 0; e < count; ++e) worst += 0 * x[e];
    return worst == 0;
}

void combine(float a, const float *x, float b, const float *y, float *out, std::size_t count) {
    for (std::size_t e = 0; e < count; ++e) out[e] = a * x[e] + b * y[e];
}

void add(float a, const float *x, float *out, std::size_t count) {
    for (std::size_t e = 0; e < count; ++e) out[e] += a * x[e];
}

}  // namespace rlsd
