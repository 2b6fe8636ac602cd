// How a tensor is divided among the programs of a GroupNorm on a GPU, and what is added to it first.
#pragma once

#include "device_call.h"

#include <algorithm>

namespace rlsd::ort {

using cuda::ceil_div;

inline constexpr std::int64_t chunks_at_most = 128, steps_at_least = 8;  // kernels/norm/tiles.py: CHUNKS, STEPS
inline constexpr std::size_t scratch_bytes = std::size_t(8) << 20;

// What a GroupNorm adds to every pixel of x first: `rows` of it, one a sample or one for all, or none.
struct Bias {
    DevicePointer at;
    std::int32_t rows;

    Bias(const Call &call, std::size_t index, const Shape &x) : at(call.at(0)), rows(0) {
        if (!call.has(index)) return;
        const Shape given = call.shape(index);
        const std::int64_t channels = x.size[x.rank - 1], count = given.rank == 0 ? 0 : given.size[0];
        if (product(given, 0, given.rank) != count * channels || given.size[given.rank - 1] != channels ||
            (count != 1 && count != x.size[0]))
            throw OperatorError(call.node.name + ": x_bias has shape " + given.text() + ", x " + x.text());
        at = call.at(index), rows = small(count);
    }
};

// How [samples, pixels, channels] is divided among programs: kernels/norm/tiles.py, divide.
struct Division {
    std::int64_t samples, channels, pixels, groups, size, block, width = 0, chunk, chunks;

    Division(const Call &call, const Shape &x, const char *kernel)
        : samples(x.size[0]), channels(channels_of(x, call.node.name)), pixels(product(x, 1, x.rank - 1)),
          groups(call.node.groups), size(groups > 0 ? channels / groups : 0) {
        if (groups < 1 || channels % groups != 0 || size > 128)
            throw OperatorError(call.node.name + ": " + std::to_string(groups) + " groups of " + std::to_string(channels) +
                                " channels are not possible: they must divide them into 128 at most");
        block = 64 % size == 0 ? 64 : 128;
        name = kernel;
        name += block == 64 ? "_64" : "_128";
        const cuda::Kernel &sized = call.kernel(name);
        const std::int64_t vector = 16 / std::int64_t(width_of(call.node.op->type));
        for (std::int64_t n = std::min({groups, sized.constant("GROUPS"), block / size}); n > 0; --n)
            if (n * size % vector == 0 || n == groups) {
                width = n * size;
                break;
            }
        if (width == 0)
            throw OperatorError(call.node.name + ": groups of " + std::to_string(size) + " channels are not possible: a " +
                                "multiple of " + std::to_string(vector) + " of 128 at most must be whole groups");
        const std::int64_t rows = sized.constant("ROWS");
        chunk = rows * std::max(steps_at_least, ceil_div(pixels, rows * chunks_at_most));
        chunks = ceil_div(pixels, chunk);
        if (std::size_t(samples * chunks * 2 * groups) * sizeof(float) > scratch_bytes / 2)
            throw OperatorError(call.node.name + ": a batch of " + std::to_string(samples) + " is too large");
    }

    std::string name;
    cuda::Grid grid() const { return {ceil_div(channels, width), chunks, samples}; }
};

// Means and moments of total = x + residual + x_bias to the scratch memory; total is x where d is not of a sum.
inline void measure(const Call &call, const Division &d, DevicePointer x, DevicePointer residual, DevicePointer total,
                    const Bias &x_bias) {
    call.kernel(d.name).launch(d.grid(), {x, residual, x_bias.at, total, call.node.op->shared->scratch.at(), small(d.pixels),
                                          small(d.channels), small(d.groups), small(d.size), small(d.width), small(d.chunk),
                                          x_bias.rows},
                               call.stream());
}

}  // namespace rlsd::ort
