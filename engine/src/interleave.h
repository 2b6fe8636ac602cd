// The last step of upsampling by 2 folded into its convolution: four phase images become one.
#pragma once

#include <cstdint>

namespace rlsd {

// Planes of `phases` [planes * 4, height / 2 + 1, width / 2 + 1] to `image` [planes, height, width]: a pixel
// shuffle by 2 whose border of one pixel is cut off. height and width are even.
void interleave(const float *phases, std::int64_t planes, std::int64_t height, std::int64_t width, float *image);

// Its adjoint: `image` to `phases`; entries that reach no pixel are zero.
void interleave_pull(const float *image, std::int64_t planes, std::int64_t height, std::int64_t width, float *phases);

}  // namespace rlsd
