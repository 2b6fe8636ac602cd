// Operators of transformers, along the last axis: kernels/norm/rows.py.
#include "device_call.h"

namespace rlsd::ort {

void add_layer_norm(const DeviceNode &node, OrtKernelContext *context) {
    const Call call{node, context};
    const Shape x = call.shape(0);
    const std::int64_t channels = channels_of(x, node.name);
    if (channels > 2048) throw OperatorError(node.name + ": x has shape " + x.text() + ", with more than 2048 channels");
    const Shape vector{{channels}, 1};
    const DevicePointer residual = call.has(4) ? call.at(4, x) : call.at(0), y = call.out(0, x), total = call.out(1, x);
    call.kernel(channels > 1024 ? "add_layer_norm_2048" : channels > 512 ? "add_layer_norm_1024" : "add_layer_norm_512")
        .launch({product(x, 0, x.rank - 1)},
                {call.at(0), call.at(1, vector), residual, call.at(2, vector), call.at(3, vector), y, total != 0 ? total : y,
                 small(channels), node.epsilon, std::int32_t(call.has(4))},
                call.stream());
}

void layer_norm_pull(const DeviceNode &node, OrtKernelContext *context) {
    const Call call{node, context};
    const Shape x = call.shape(1);
    const std::int64_t channels = channels_of(x, node.name);
    if (channels > 1024) throw OperatorError(node.name + ": x has shape " + x.text() + ", with more than 1024 channels");
    const DevicePointer cotangent = call.at(0, x), weight = call.at(2, {{channels}, 1}),
                        added = call.has(3) ? call.at(3, x) : cotangent;
    call.kernel(channels > 512 ? "layer_norm_pull_1024" : "layer_norm_pull_512")
        .launch({product(x, 0, x.rank - 1)}, {cotangent, call.at(1), weight, added, call.out(0, x), small(channels),
                                              node.epsilon, std::int32_t(call.has(3))},
                call.stream());
}

void gelu_pull(const DeviceNode &node, OrtKernelContext *context) {
    const Call call{node, context};
    const Shape x = call.shape(1);
    const std::int64_t size = product(x, 0, x.rank);
    if (size == 0 || size % lanes_at_once != 0 || size > INT32_MAX)
        throw OperatorError(node.name + ": x has shape " + x.text() + ", a multiple of 16 values is needed, below 2^31");
    const cuda::Kernel &kernel = call.kernel("gelu_pull");
    kernel.launch({cuda::ceil_div(size, kernel.constant("BLOCK"))}, {call.at(0, x), call.at(1), call.out(0, x), small(size)},
                  call.stream());
}

void softmax_pull(const DeviceNode &node, OrtKernelContext *context) {
    const Call call{node, context};
    const Shape y = call.shape(1);
    if (y.rank < 2 || is_empty(y)) throw OperatorError(node.name + ": y has shape " + y.text() + ", [..., columns] is needed");
    const std::int64_t columns = y.size[y.rank - 1];
    call.kernel(columns % lanes_at_once == 0 ? "softmax_pull_wide" : "softmax_pull_any")
        .launch({product(y, 0, y.rank - 1)}, {call.at(0, y), call.at(1), call.out(0, y), small(columns), node.scale},
                call.stream());
}

}  // namespace rlsd::ort
