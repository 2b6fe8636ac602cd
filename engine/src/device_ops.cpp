#include "device_ops.h"

#include "device_division.h"

#include <algorithm>
#include <deque>

namespace rlsd::ort {
namespace {

// y, mean, rstd of x, which `statistics` has read; what the node does not ask for goes to the scratch memory.
void normalise(const Call &call, const Division &d, const Shape &x, DevicePointer total, std::size_t weight, const Bias &x_bias) {
    const Shape per_channel{{d.channels}, 1}, per_group{{d.samples, d.groups}, 2};
    const DevicePointer partial = call.node.op->shared->scratch.at(), spare = partial + scratch_bytes / 2;
    const DevicePointer w = call.at(weight, per_channel), b = call.at(weight + 1, per_channel);
    const DevicePointer y = call.out(0, x), mean = call.out(1, per_group), rstd = call.out(2, per_group);
    call.kernel("group_norm_apply_" + std::to_string(d.block))
        .launch(d.grid(), {total, partial, w, b, x_bias.at, y, mean != 0 ? mean : spare, rstd != 0 ? rstd : spare + scratch_bytes / 4,
                           small(d.pixels), small(d.channels), small(d.groups), small(d.size), small(d.width), small(d.chunk),
                           x_bias.rows, call.node.epsilon, small(call.node.silu)},
                call.stream());
}

void group_norm(const DeviceNode &node, OrtKernelContext *context) {
    const Call call{node, context};
    const Shape x = call.shape(0);
    const Division d(call, x, "group_norm_statistics");
    const Bias x_bias(call, 3, x);
    measure(call, d, call.at(0), call.at(0), call.at(0), x_bias);
    normalise(call, d, x, call.at(0), 1, x_bias);
}

void add_group_norm(const DeviceNode &node, OrtKernelContext *context) {
    const Call call{node, context};
    const Shape x = call.shape(0);
    const Division d(call, x, "add_group_norm_statistics");
    Bias x_bias(call, 4, x);
    const DevicePointer sum = call.out(3, x), total = sum != 0 ? sum : call.out(0, x);
    measure(call, d, call.at(0), call.at(1, x), total, x_bias);
    x_bias.rows = 0;  // it is in the total
    normalise(call, d, x, total, 2, x_bias);
}

// With `phases`, of an interleave's image x, whose cotangent is written as that of its phases.
void pull(const DeviceNode &node, OrtKernelContext *context, bool phases) {
    const Call call{node, context};
    const Shape x = call.shape(1);
    if (phases && (x.rank != 4 || x.size[1] % 2 != 0 || x.size[2] % 2 != 0))
        throw OperatorError(node.name + ": x has shape " + x.text() + ", [B, 2 H, 2 W, C] is needed");
    const Division d(call, x, "group_norm_pull_sums");
    const Bias x_bias(call, 7, x);
    const Shape per_channel{{d.channels}, 1}, per_group{{d.samples, d.groups}, 2};
    const DevicePointer cotangent = call.at(0, x), value = call.at(1), mean = call.at(2, per_group),
                        rstd = call.at(3, per_group), weight = call.at(4, per_channel), bias = call.at(5, per_channel),
                        partial = node.op->shared->scratch.at(), added = call.has(6) ? call.at(6, x) : value;
    const std::int32_t pixels = small(d.pixels), channels = small(d.channels), groups = small(d.groups),
                       size = small(d.size), width = small(d.width), chunk = small(d.chunk), silu = small(node.silu);
    call.kernel(d.name).launch(d.grid(), {cotangent, value, mean, rstd, weight, bias, x_bias.at, partial, pixels, channels,
                                          groups, size, width, chunk, x_bias.rows, silu},
                               call.stream());
    const Shape out = phases ? Shape{{x.size[0], x.size[1] / 2 + 1, x.size[2] / 2 + 1, 4 * d.channels}, 4} : x;
    const DevicePointer pulled = call.out(0, out);
    const std::int32_t add = std::int32_t(call.has(6));
    if (!phases) {
        call.kernel("group_norm_pull_apply_" + std::to_string(d.block))
            .launch(d.grid(), {cotangent, value, mean, rstd, weight, bias, x_bias.at, partial, added, pulled, pixels, channels,
                               groups, size, width, chunk, x_bias.rows, silu, add},
                    call.stream());
        return;
    }
    const cuda::Kernel &last = call.kernel("group_norm_pull_phases_" + std::to_string(d.block));
    const std::int64_t rows = product(out, 1, out.rank) / d.channels, tile = last.constant("ROWS");
    const std::int64_t part = ceil_div(rows, d.chunks * tile) * tile;  // as in kernels/norm/pull.py
    last.launch(d.grid(), {cotangent, value, mean, rstd, weight, bias, x_bias.at, partial, added, pulled, pixels, channels, groups,
                           size, width, small(part), x_bias.rows, silu, add, small(rows), small(x.size[2])},
                call.stream());
}

void group_norm_pull(const DeviceNode &node, OrtKernelContext *context) { pull(node, context, false); }

void group_norm_pull_phases(const DeviceNode &node, OrtKernelContext *context) { pull(node, context, true); }

void bias_residual(const DeviceNode &node, OrtKernelContext *context) {
    const Call call{node, context};
    const Shape x = call.shape(0);
    const std::int64_t channels = channels_of(x, node.name), pixels = product(x, 0, x.rank - 1);
    const DevicePointer bias = call.at(1, {{channels}, 1}), residual = call.has(2) ? call.at(2, x) : call.at(0);
    const cuda::Kernel &kernel = call.kernel("bias_residual");
    kernel.launch({tiles(kernel, pixels, channels)},
                  {call.at(0), bias, residual, call.out(0, x), small(pixels), small(channels), std::int32_t(call.has(2)),
                   small(node.silu)},
                  call.stream());
}

void interleave(const DeviceNode &node, OrtKernelContext *context) {
    const Call call{node, context};
    const Shape phases = call.shape(0);
    const auto [batch, rows, columns, all] = std::array{phases.size[0], phases.size[1], phases.size[2], phases.size[3]};
    if (phases.rank != 4 || is_empty(phases) || all % (4 * lanes_at_once) != 0 || rows < 2 || columns < 2)
        throw OperatorError(node.name + ": phases has shape " + phases.text() + ", [B, H + 1, W + 1, 4 C] is needed, with C "
                                                                             "a multiple of 16");
    const std::int64_t height = rows - 1, width = columns - 1, channels = all / 4;
    const Shape image{{batch, 2 * height, 2 * width, channels}, 4};
    const cuda::Kernel &kernel = call.kernel("interleave");
    kernel.launch({tiles(kernel, 4 * height * width, channels), batch},
                  {call.at(0), call.has(1) ? call.at(1, {{channels}, 1}) : node.op->shared->scratch.at(), call.out(0, image),
                   small(height), small(width), small(channels), std::int32_t(call.has(1))},
                  call.stream());
}

void interleave_pull(const DeviceNode &node, OrtKernelContext *context) {
    const Call call{node, context};
    const Shape image = call.shape(0);
    if (image.rank != 4 || image.size[1] % 2 != 0 || image.size[2] % 2 != 0)
        throw OperatorError(node.name + ": image has shape " + image.text() + ", [B, 2 H, 2 W, C] is needed");
    const std::int64_t height = image.size[1] / 2, width = image.size[2] / 2, channels = channels_of(image, node.name);
    const Shape phases{{image.size[0], height + 1, width + 1, 4 * channels}, 4};
    const cuda::Kernel &kernel = call.kernel("interleave_pull");
    kernel.launch({tiles(kernel, 4 * (height + 1) * (width + 1), channels), image.size[0]},
                  {call.at(0), call.out(0, phases), small(height), small(width), small(channels)}, call.stream());
}

// ------------------------------------------------------------ what ONNX Runtime asks

struct Description {
    const char *name;
    std::size_t required, inputs, outputs;
    void (*compute)(const DeviceNode &, OrtKernelContext *);
    std::initializer_list<std::size_t> float_inputs;  // float32 whatever the data are
    bool float_result = false;                        // as is the first output
};

const Description descriptions[] = {
    {"GroupNormNhwc", 3, 4, 3, group_norm, {1, 2}},
    {"AddGroupNormNhwc", 4, 5, 4, add_group_norm, {2, 3}},
    {"GroupNormPullNhwc", 6, 8, 1, group_norm_pull, {2, 3, 4, 5}},
    {"GroupNormPullPhases", 6, 8, 1, group_norm_pull_phases, {2, 3, 4, 5}},
    {"BiasResidual", 2, 3, 1, bias_residual, {1}},
    {"InterleaveNhwc", 1, 2, 1, interleave, {1}},
    {"InterleavePullNhwc", 1, 1, 1, interleave_pull, {}},
    {"AddLayerNorm", 4, 5, 2, add_layer_norm, {1, 2, 3}},
    {"LayerNormPull", 3, 4, 1, layer_norm_pull, {2}},
    {"GeluPull", 2, 2, 1, gelu_pull, {}},
    {"SoftmaxPull", 2, 2, 1, softmax_pull, {}},
    {"NarrowConv", 2, 3, 1, narrow_conv, {2}},
    {"GroupNormTaps", 4, 5, 3, group_norm_taps, {1, 2}, true},
    {"AddGroupNormTaps", 5, 6, 4, add_group_norm_taps, {2, 3}, true},
    {"SumTaps", 2, 2, 1, sum_taps, {0}},
};

struct Described : DeviceOperator {
    const Description *as;
};

const Described &self(const OrtCustomOp *op) { return *static_cast<const Described *>(op); }
const Description &description_of(const OrtCustomOp *op) { return *self(op).as; }

int input_type(const OrtCustomOp *op, std::size_t index) {
    const auto &known = description_of(op).float_inputs;
    const bool always = std::find(known.begin(), known.end(), index) != known.end();
    return static_cast<int>(always ? Type::float32 : self(op).type);
}

// Mean and rstd, outputs 1 and 2 of a GroupNorm, are float32.
int output_type(const OrtCustomOp *op, std::size_t index) {
    const bool statistic = description_of(op).outputs > 2 && (index == 1 || index == 2);
    if (index == 0 && description_of(op).float_result) return static_cast<int>(Type::float32);
    return static_cast<int>(statistic ? Type::float32 : self(op).type);
}

OrtStatus *create(const OrtCustomOp *op, const OrtApi *, const OrtKernelInfo *info, void **out) {
    const Api &api = api_of(op);
    return guarded(api, [&] {
        auto node = std::make_unique<DeviceNode>();
        node->op = &self(op);
        node->name = op->get_name(op);
        read_attribute(api, api.kernel_attribute_int64, info, "groups", node->groups);
        read_attribute(api, api.kernel_attribute_int64, info, "silu", node->silu);
        read_attribute(api, api.kernel_attribute_int64, info, "planes", node->planes);
        read_attribute(api, api.kernel_attribute_int64, info, "channels_first", node->channels_first);
        read_attribute(api, api.kernel_attribute_float, info, "epsilon", node->epsilon);
        read_attribute(api, api.kernel_attribute_float, info, "scale", node->scale);
        *out = node.release();
    });
}

OrtStatus *compute(void *opaque, OrtKernelContext *context) {
    const auto &node = *static_cast<const DeviceNode *>(opaque);
    return guarded(*node.op->api, [&] { description_of(node.op).compute(node, context); });
}

Described make(const Api &api, Shared &shared, const Description &of, Type type) {
    Described op{};
    op.version = api_version;
    op.api = &api, op.shared = &shared, op.type = type, op.as = &of;
    op.get_name = [](const OrtCustomOp *me) { return description_of(me).name; };
    op.get_execution_provider = [](const OrtCustomOp *me) {
        return self(me).shared->device.driver().hosted ? nullptr : "CUDAExecutionProvider";
    };
    op.get_input_count = [](const OrtCustomOp *me) { return description_of(me).inputs; };
    op.get_output_count = [](const OrtCustomOp *me) { return description_of(me).outputs; };
    op.get_input_type = input_type;
    op.get_output_type = output_type;
    op.get_input_characteristic = [](const OrtCustomOp *me, std::size_t i) { return i < description_of(me).required ? required : optional; };
    op.get_output_characteristic = [](const OrtCustomOp *, std::size_t i) { return i == 0 ? required : optional; };
    op.get_input_memory_type = [](const OrtCustomOp *, std::size_t) { return 0; };
    op.get_start_version = [](const OrtCustomOp *) { return 1; };
    op.get_end_version = op.get_start_version;
    op.create_kernel_v2 = create;
    op.kernel_compute_v2 = ::rlsd::ort::compute;
    op.kernel_destroy = [](void *node) { delete static_cast<DeviceNode *>(node); };
    return op;
}

}  // namespace

struct DeviceOperators::Implementation {
    Implementation(const Api &given, const cuda::Device &device, cuda::Kernels &kernels)
        : api(given), shared{device, kernels, cuda::Buffer(device, scratch_bytes)} {
        OrtCustomOpDomain *made = nullptr;
        api.check(api.create_custom_op_domain("rlsd", &made), "cannot create the domain");
        domain = {made, api.release_custom_op_domain};
        for (const Description &each : descriptions)
            for (const Type type : {Type::float16, Type::float32}) {
                operators.push_back(make(api, shared, each, type));
                api.check(api.custom_op_domain_add(made, &operators.back()), "cannot add an operator");
            }
    }

    const Api &api;
    Shared shared;
    std::deque<Described> operators;  // ONNX Runtime keeps their addresses
    std::unique_ptr<OrtCustomOpDomain, void (*)(OrtCustomOpDomain *)> domain{nullptr, nullptr};
};

DeviceOperators::DeviceOperators(const Api &api, const cuda::Device &device, cuda::Kernels &kernels)
    : implementation_(std::make_unique<Implementation>(api, device, kernels)) {}

DeviceOperators::~DeviceOperators() = default;

OrtCustomOpDomain *DeviceOperators::domain() const noexcept { return implementation_->domain.get(); }

}  // namespace rlsd::ort
