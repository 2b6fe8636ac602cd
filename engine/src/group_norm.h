// Group normalisation with an optional SiLU, and its pull-back, on the CPU.
//
// Both run on the calling thread, allocate nothing, and give the same bytes for a sample whatever
// else is in the batch (on processors with the same vector width). Tensors are contiguous, float32,
// batch x channels x spatial.
#pragma once

#include <cstdint>

namespace rlsd {

// All at least 1, except that batch and spatial may be 0; groups divides channels.
struct GroupNormShape {
    std::int64_t batch, channels, spatial, groups;
};

// y = act(weight * (x - mean) * rstd + bias), act = SiLU if silu, else the identity, with the mean
// and the biased variance of each sample's group: rstd = 1 / sqrt(variance + epsilon).
// x, y: [batch, channels, spatial], y may be x. weight, bias: [channels]. mean, rstd: [batch,
// groups], or null where they are not wanted. Statistics are accurate to float32's rounding for
// any offset; SiLU to 2e-7 relative, and it is 0 below -87.
void group_norm(const GroupNormShape &shape, const float *x, const float *weight, const float *bias, float epsilon,
                bool silu, float *y, float *mean, float *rstd) noexcept;

// The vector-Jacobian product of group_norm in x, with mean and rstd as group_norm gave them.
// cotangent (of y), x, x_cotangent: [batch, channels, spatial]; x_cotangent may be cotangent, not x.
void group_norm_pull(const GroupNormShape &shape, const float *cotangent, const float *x, const float *mean,
                     const float *rstd, const float *weight, const float *bias, bool silu,
                     float *x_cotangent) noexcept;

}  // namespace rlsd
