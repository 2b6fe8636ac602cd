// One call of an operator of bundles for CUDA: its tensors, checked, its kernel and its stream.
#pragma once

#include "cubins.h"
#include "cuda.h"
#include "operator.h"

#include <functional>
#include <numeric>
#include <string>

namespace rlsd::ort {

using cuda::DevicePointer;

inline constexpr std::int64_t lanes_at_once = 16;  // what channels must be a multiple of

// What the operators of one engine share: its kernels, and memory between two launches, which follow each other on one
// stream.
struct Shared {
    const cuda::Device &device;
    cuda::Kernels &kernels;
    cuda::Buffer scratch;
};

// One node's operator, in a version for this numeric type.
struct DeviceOperator : Operator {
    Shared *shared;
    Type type;
};

struct DeviceNode {
    const DeviceOperator *op;
    std::string name;
    std::int64_t groups = 0, silu = 0, planes = 0, channels_first = 0;
    float epsilon = 1e-5f, scale = 1;
};

// The tensors of one call.
struct Call {
    const DeviceNode &node;
    OrtKernelContext *context;
    const Api &api = *node.op->api;
    std::size_t given = count();

    Input in(std::size_t index) const { return input(api, context, index, what(index).c_str()); }
    Shape shape(std::size_t index) const { return in(index).shape; }
    DevicePointer at(std::size_t index) const { return address(in(index).data); }
    // An optional input may be left out between others.
    bool has(std::size_t index) const {
        const OrtValue *value = nullptr;
        if (index < given) api.check(api.kernel_input(context, index, &value), what(index).c_str());
        return value != nullptr;
    }

    // A tensor that must have this shape.
    DevicePointer at(std::size_t index, const Shape &wanted) const {
        const Input tensor = in(index);
        expect(tensor, wanted, what(index).c_str());
        return address(tensor.data);
    }

    DevicePointer out(std::size_t index, const Shape &shape) const {
        return address(output(api, context, index, shape, node.name.c_str()));
    }

    // ONNX Runtime must work on the engine's stream: on another one nothing would wait for anything. Off a GPU
    // (Driver::hosted) the default one, which is immediate.
    cuda::StreamHandle *stream() const {
        const cuda::Device &device = node.op->shared->device;
        if (device.driver().hosted) return nullptr;
        void *stream = nullptr;
        api.check(api.compute_stream(context, &stream), "cannot read the stream");
        if (stream != device.stream()) throw OperatorError(node.name + ": ONNX Runtime does not work on the engine's stream");
        return device.stream();
    }

    const cuda::Kernel &kernel(const std::string &name) const {
        return node.op->shared->kernels.get(name + (node.op->type == Type::float16 ? "_fp16" : "_fp32"));
    }

  private:
    static DevicePointer address(const void *pointer) { return reinterpret_cast<DevicePointer>(pointer); }
    std::string what(std::size_t index) const { return node.name + ": input " + std::to_string(index); }
    std::size_t count() const {
        std::size_t number = 0;
        api.check(api.kernel_input_count(context, &number), "cannot count inputs");
        return number;
    }
};

inline std::int32_t small(std::int64_t value) { return static_cast<std::int32_t>(value); }

inline std::int64_t product(const Shape &shape, std::size_t from, std::size_t to) {
    return std::accumulate(shape.size.begin() + std::ptrdiff_t(from), shape.size.begin() + std::ptrdiff_t(to),
                           std::int64_t(1), std::multiplies<>());
}

inline bool is_empty(const Shape &shape) { return product(shape, 0, shape.rank) == 0; }

inline std::int64_t channels_of(const Shape &x, const std::string &name) {
    if (x.rank < 2 || is_empty(x) || x.size[x.rank - 1] % lanes_at_once != 0)
        throw OperatorError(name + ": x has shape " + x.text() + ", [batch, ..., channels] is needed, which is not empty, "
                                                                 "with a multiple of 16 channels");
    return x.size[x.rank - 1];
}

// How many programs of so many rows and channels each cover a matrix.
inline std::int64_t tiles(const cuda::Kernel &kernel, std::int64_t rows, std::int64_t channels) {
    return cuda::ceil_div(rows, kernel.constant("ROWS")) * cuda::ceil_div(channels, kernel.constant("BLOCK"));
}

// LayerNorm, and pull-backs along the last axis: device_rows.cpp.
void add_layer_norm(const DeviceNode &node, OrtKernelContext *context);
void layer_norm_pull(const DeviceNode &node, OrtKernelContext *context);
void gelu_pull(const DeviceNode &node, OrtKernelContext *context);
void softmax_pull(const DeviceNode &node, OrtKernelContext *context);

// Convolutions with few channels on one side: device_narrow.cpp.
void narrow_conv(const DeviceNode &node, OrtKernelContext *context);
void group_norm_taps(const DeviceNode &node, OrtKernelContext *context);
void add_group_norm_taps(const DeviceNode &node, OrtKernelContext *context);
void sum_taps(const DeviceNode &node, OrtKernelContext *context);

}  // namespace rlsd::ort
