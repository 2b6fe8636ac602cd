// The element-wise steps of the algorithm on float32 arrays.
#pragma once

#include <cstddef>

namespace rlsd {

struct Adam {
    float beta1, beta2, rate, epsilon;
    float correction1, correction2;  // 1 / (1 - beta^n) at step n
};

// One Adam step: m, v and value are updated in place. Returns whether all of value and v stayed finite.
bool adam_step(const Adam &adam, const float *gradient, float *m, float *v, float *value, std::size_t count);

// out = a * x + b * y
void combine(float a, const float *x, float b, const float *y, float *out, std::size_t count);

// Whether no x is NaN or infinite.
bool finite(const float *x, std::size_t count);

// out += a * x
void add(float a, const float *x, float *out, std::size_t count);

}  // namespace rlsd
