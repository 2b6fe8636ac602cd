// The operators of ONNX domain "rlsd" on a GPU: they launch the bundle's kernels of kernels/norm on ONNX Runtime's
// stream. Tensors have their channels last and are halves or float32; weights, biases and statistics are float32, but
// x_bias, [1 or B, 1, 1, C], has the type of x, to which it is added first. Below, what is in halves only: taps are
// float32 planes [B, 9 planes, H, W], the kernels of convolutions halves, as is the bias of SumTaps.
//
//   GroupNormNhwc(x, weight, bias [, x_bias]; groups, epsilon, silu) -> y, mean, rstd
//   AddGroupNormNhwc(x, residual, weight, bias [, x_bias]; groups, epsilon, silu) -> y, mean, rstd, total
//   GroupNormPullNhwc(cotangent, x, mean, rstd, weight, bias [, added] [, x_bias]; groups, silu) -> x_cotangent
//   BiasResidual(x, bias [, residual]; silu) -> y
//   InterleaveNhwc(phases [, bias]) -> image, InterleavePullNhwc(image) -> phases
//   AddLayerNorm(x, x_bias, weight, bias [, residual]; epsilon) -> y, total, along the last axis; x_bias is float32
//   LayerNormPull(cotangent, x, weight [, added]; epsilon) -> x_cotangent, along the last axis
//   GeluPull(cotangent, x) -> x_cotangent, SoftmaxPull(cotangent, y; scale) -> x_cotangent, y being softmax(x)
// In halves only:
//   GroupNormPullPhases, as GroupNormPullNhwc: x_cotangent as InterleavePullNhwc would give it
//   NarrowConv(x, kernel [, bias]; channels_first) -> y, a 3x3 convolution of few channels, which may come first
//   GroupNormTaps(x, weight, bias, kernel [, x_bias]; groups, epsilon, silu, planes) -> taps, mean, rstd
//   AddGroupNormTaps(x, residual, weight, bias, kernel [, x_bias]; as before) -> taps, mean, rstd, total (needed)
//   SumTaps(taps, bias) -> y [B, planes, H, W]: with either of them a GroupNorm and a 3x3 convolution to few channels
#pragma once

#include "cubins.h"
#include "ort.h"

#include <memory>

namespace rlsd::ort {

class DeviceOperators {
  public:
    // kernels must outlive it, and it must outlive the sessions that use its domain.
    DeviceOperators(const Api &api, const cuda::Device &device, cuda::Kernels &kernels);
    ~DeviceOperators();

    OrtCustomOpDomain *domain() const noexcept;

  private:
    struct Implementation;
    std::unique_ptr<Implementation> implementation_;
};

}  // namespace rlsd::ort
