// 3x3 convolutions with few channels on one side, on a GPU: kernels/narrow says how. A kernel is a matrix whose rows or
// columns, one for each tap and narrow channel, are filled up with zeros to 32 or 64.
#include "device_division.h"

namespace rlsd::ort {
namespace {

constexpr std::int64_t taps = 9;

// Of the matrix of `narrow` channels: kernels/narrow/triton_kernels.py, columns.
std::int64_t columns_of(std::int64_t narrow, const std::string &name) {
    if (narrow < 1 || taps * narrow > 64)
        throw OperatorError(name + ": " + std::to_string(narrow) + " channels are not between 1 and 7");
    return taps * narrow <= 32 ? 32 : 64;
}

// `at`: of the GroupNorm's weight among the inputs. total: what is normalised, which the statistics have read.
void multiply(const Call &call, const Division &d, const Shape &x, DevicePointer total, std::size_t at, const Bias &x_bias) {
    const DeviceNode &node = call.node;
    if (x.rank != 4) throw OperatorError(node.name + ": x has shape " + x.text() + ", [B, H, W, C] is needed");
    const std::int64_t columns = columns_of(node.planes, node.name), count = taps * node.planes;
    const Shape per_channel{{d.channels}, 1}, per_group{{d.samples, d.groups}, 2};
    const DevicePointer partial = node.op->shared->scratch.at(), spare = partial + scratch_bytes / 2;
    const DevicePointer weight = call.at(at, per_channel), bias = call.at(at + 1, per_channel),
                        kernel = call.at(at + 2, {{d.channels, columns}, 2});
    const DevicePointer out = call.out(0, {{d.samples, count, x.size[1], x.size[2]}, 4});
    const DevicePointer mean_out = call.out(1, per_group), rstd_out = call.out(2, per_group);
    const DevicePointer mean = mean_out != 0 ? mean_out : spare, rstd = rstd_out != 0 ? rstd_out : spare + scratch_bytes / 4;
    const std::int32_t pixels = small(d.pixels), groups = small(d.groups), size = small(d.size);
    const cuda::Kernel &finish = call.kernel("group_norm_finish");
    finish.launch({ceil_div(d.groups, finish.constant("GROUPS")), d.samples},
                  {partial, mean, rstd, pixels, groups, size, small(d.chunk), small(d.chunks), node.epsilon}, call.stream());
    const cuda::Kernel &multiplied = call.kernel("group_norm_taps_" + std::to_string(columns));
    multiplied.launch({ceil_div(d.pixels, multiplied.constant("ROWS")), d.samples},
                      {total, mean, rstd, weight, bias, x_bias.at, kernel, out, pixels, small(d.channels), groups, size,
                       x_bias.rows, small(node.silu), small(count)},
                      call.stream());
}

}  // namespace

void narrow_conv(const DeviceNode &node, OrtKernelContext *context) {
    const Call call{node, context};
    const Shape x = call.shape(0), matrix = call.shape(1);
    if (x.rank != 4 || is_empty(x) || matrix.rank != 2)
        throw OperatorError(node.name + ": x has shape " + x.text() + ", kernel " + matrix.text() +
                            ", four axes and two are needed, none of them empty");
    const bool first = node.channels_first != 0;
    const std::int64_t narrow = x.size[first ? 1 : 3], height = x.size[first ? 2 : 1], width = x.size[first ? 3 : 2];
    const std::int64_t columns = columns_of(narrow, node.name), channels = matrix.size[1];
    if (channels == 0 || channels % lanes_at_once != 0)
        throw OperatorError(node.name + ": the kernel has shape " + matrix.text() + ", a multiple of 16 channels is needed");
    const DevicePointer weight = call.at(1, {{columns, channels}, 2}),
                        bias = call.has(2) ? call.at(2, {{channels}, 1}) : node.op->shared->scratch.at();
    const cuda::Kernel &kernel = call.kernel("narrow_conv_" + std::to_string(columns));
    kernel.launch({tiles(kernel, height * width, channels), x.size[0]},
                  {call.at(0), weight, bias, call.out(0, {{x.size[0], height, width, channels}, 4}), small(height), small(width),
                   small(narrow), small(channels), std::int32_t(first), std::int32_t(call.has(2))},
                  call.stream());
}

void group_norm_taps(const DeviceNode &node, OrtKernelContext *context) {
    const Call call{node, context};
    const Shape x = call.shape(0);
    const Division d(call, x, "group_norm_statistics");
    const Bias x_bias(call, 4, x);
    measure(call, d, call.at(0), call.at(0), call.at(0), x_bias);
    multiply(call, d, x, call.at(0), 1, x_bias);
}

void add_group_norm_taps(const DeviceNode &node, OrtKernelContext *context) {
    const Call call{node, context};
    const Shape x = call.shape(0);
    const Division d(call, x, "add_group_norm_statistics");
    Bias x_bias(call, 5, x);
    const DevicePointer total = call.out(3, x);
    if (total == 0) throw OperatorError(node.name + ": the total is not among its outputs");
    measure(call, d, call.at(0), call.at(1, x), total, x_bias);
    x_bias.rows = 0;  // it is in the total
    multiply(call, d, x, total, 2, x_bias);
}

void sum_taps(const DeviceNode &node, OrtKernelContext *context) {
    const Call call{node, context};
    const Shape x = call.shape(0), bias = call.shape(1);
    const std::int64_t planes = bias.rank == 1 ? bias.size[0] : 0;
    if (x.rank != 4 || is_empty(x) || planes < 1 || x.size[1] != taps * planes)
        throw OperatorError(node.name + ": taps has shape " + x.text() + ", bias " + bias.text() +
                            ", [B, 9 P, H, W] and [P] are needed");
    const std::int64_t height = x.size[2], width = x.size[3];
    const cuda::Kernel &kernel = call.kernel("sum_taps");
    kernel.launch({ceil_div(height * width, kernel.constant("BLOCK")), x.size[0] * planes},
                  {call.at(0), call.at(1), call.out(0, {{x.size[0], planes, height, width}, 4}), small(height), small(width),
                   small(planes)},
                  call.stream());
}

}  // namespace rlsd::ort
