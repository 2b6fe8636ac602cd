// The operators of ONNX domain "rlsd", version 1, that the engine's graphs use:
//
//   GroupNorm(x, weight, bias; groups, epsilon = 1e-5, silu = 0) -> y [, mean] [, rstd]
//   GroupNormPull(cotangent, x, mean, rstd, weight, bias; groups, silu = 0) -> x_cotangent
//   Interleave(phases) -> image
//   InterleavePull(image) -> phases
//
// Shapes: x, y, cotangents [B, C, ...]; weight, bias [C]; mean, rstd [B, groups]; phases [B, 4 C, H + 1, W + 1],
// image [B, C, 2 H, 2 W]; all float32. What they compute is said in group_norm.h and interleave.h.
#include "../include/rlsd.h"
#include "group_norm.h"
#include "interleave.h"
#include "operator.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <string>

namespace rlsd::ort {
namespace {

// A node's attributes; what ONNX Runtime calls a kernel.
struct Kernel {
    const Api *api;
    std::int64_t groups = 0, silu = 0;
    float epsilon = 1e-5f;
};

GroupNormShape checked(const Shape &x, std::int64_t groups, const char *name) {
    if (x.rank < 2)
        throw OperatorError(std::string(name) + ": x has shape " + x.text() + ", at least [batch, channels] is needed");
    if (x.size[1] == 0 || x.size[1] % groups != 0)
        throw OperatorError(std::string(name) + ": " + std::to_string(groups) + " groups do not divide the " +
                            std::to_string(x.size[1]) + " channels of x");
    std::int64_t spatial = 1;
    for (std::size_t i = 2; i < x.rank; ++i) spatial *= x.size[i];
    return {x.size[0], x.size[1], spatial, groups};
}

void compute_group_norm(const Kernel &kernel, OrtKernelContext *context) {
    const Api &api = *kernel.api;
    const Input x = input(api, context, 0, "GroupNorm: x");
    const Input weight = input(api, context, 1, "GroupNorm: weight");
    const Input bias = input(api, context, 2, "GroupNorm: bias");
    const GroupNormShape shape = checked(x.shape, kernel.groups, "GroupNorm");
    const Shape per_channel{{shape.channels}, 1}, per_group{{shape.batch, shape.groups}, 2};
    expect(weight, per_channel, "GroupNorm: weight");
    expect(bias, per_channel, "GroupNorm: bias");
    float *y = output(api, context, 0, x.shape, "GroupNorm: y");
    float *mean = output(api, context, 1, per_group, "GroupNorm: mean");
    float *rstd = output(api, context, 2, per_group, "GroupNorm: rstd");
    group_norm(shape, x.data, weight.data, bias.data, kernel.epsilon, kernel.silu != 0, y, mean, rstd);
}

void compute_group_norm_pull(const Kernel &kernel, OrtKernelContext *context) {
    const Api &api = *kernel.api;
    const Input cotangent = input(api, context, 0, "GroupNormPull: cotangent");
    const Input x = input(api, context, 1, "GroupNormPull: x");
    const Input mean = input(api, context, 2, "GroupNormPull: mean");
    const Input rstd = input(api, context, 3, "GroupNormPull: rstd");
    const Input weight = input(api, context, 4, "GroupNormPull: weight");
    const Input bias = input(api, context, 5, "GroupNormPull: bias");
    const GroupNormShape shape = checked(x.shape, kernel.groups, "GroupNormPull");
    const Shape per_channel{{shape.channels}, 1}, per_group{{shape.batch, shape.groups}, 2};
    expect(cotangent, x.shape, "GroupNormPull: cotangent");
    expect(mean, per_group, "GroupNormPull: mean");
    expect(rstd, per_group, "GroupNormPull: rstd");
    expect(weight, per_channel, "GroupNormPull: weight");
    expect(bias, per_channel, "GroupNormPull: bias");
    float *out = output(api, context, 0, x.shape, "GroupNormPull: x_cotangent");
    group_norm_pull(shape, cotangent.data, x.data, mean.data, rstd.data, weight.data, bias.data, kernel.silu != 0, out);
}

Shape image_of(const Shape &phases) {
    const auto [batch, channels, height, width] =
        std::array{phases.size[0], phases.size[1], phases.size[2], phases.size[3]};
    if (phases.rank != 4 || channels % 4 != 0 || height < 2 || width < 2)
        throw OperatorError("Interleave: phases has shape " + phases.text() + ", [B, 4 C, H + 1, W + 1] is needed");
    return {{batch, channels / 4, 2 * (height - 1), 2 * (width - 1)}, 4};
}

Shape phases_of(const Shape &image) {
    const auto [batch, channels, height, width] =
        std::array{image.size[0], image.size[1], image.size[2], image.size[3]};
    if (image.rank != 4 || height < 2 || width < 2 || height % 2 != 0 || width % 2 != 0)
        throw OperatorError("InterleavePull: image has shape " + image.text() + ", [B, C, 2 H, 2 W] is needed");
    return {{batch, 4 * channels, height / 2 + 1, width / 2 + 1}, 4};
}

void compute_interleave(const Kernel &kernel, OrtKernelContext *context) {
    const Input phases = input(*kernel.api, context, 0, "Interleave: phases");
    const Shape image = image_of(phases.shape);
    float *out = output(*kernel.api, context, 0, image, "Interleave: image");
    interleave(phases.data, image.size[0] * image.size[1], image.size[2], image.size[3], out);
}

void compute_interleave_pull(const Kernel &kernel, OrtKernelContext *context) {
    const Input image = input(*kernel.api, context, 0, "InterleavePull: image");
    float *out = output(*kernel.api, context, 0, phases_of(image.shape), "InterleavePull: phases");
    interleave_pull(image.data, image.shape.size[0] * image.shape.size[1], image.shape.size[2], image.shape.size[3], out);
}

OrtStatus *create_kernel(const OrtCustomOp *op, const OrtApi *, const OrtKernelInfo *info, void **out) {
    const Api &api = api_of(op);
    return guarded(api, [&] {
        auto kernel = std::make_unique<Kernel>(Kernel{&api});
        const std::string name = op->get_name(op);
        if (name.starts_with("GroupNorm")) {
            api.check(api.kernel_attribute_int64(info, "groups", &kernel->groups), (name + ": groups").c_str());
            if (kernel->groups < 1)
                throw OperatorError(name + ": groups is " + std::to_string(kernel->groups) + ", at least 1 is needed");
        }
        read_attribute(api, api.kernel_attribute_int64, info, "silu", kernel->silu);
        read_attribute(api, api.kernel_attribute_float, info, "epsilon", kernel->epsilon);
        if (!(kernel->epsilon >= 0))
            throw OperatorError(name + ": epsilon is " + std::to_string(kernel->epsilon) + ", at least 0 is needed");
        *out = kernel.release();
    });
}

void destroy_kernel(void *kernel) { delete static_cast<Kernel *>(kernel); }

template <void (*compute)(const Kernel &, OrtKernelContext *)>
OrtStatus *run_kernel(void *opaque, OrtKernelContext *context) {
    const Kernel &kernel = *static_cast<const Kernel *>(opaque);
    return guarded(*kernel.api, [&] { compute(kernel, context); });
}

Shape same(const Shape &shape) { return shape; }

// Gives the first output the shape that follows from input `from`, if that is fully known. ONNX Runtime ignores
// (and would leak) a status returned from here.
template <std::size_t from, Shape (*follow)(const Shape &)>
OrtStatus *infer_shape(const OrtCustomOp *op, OrtShapeInferContext *context) {
    const Api &api = api_of(op);
    OrtStatus *status = guarded(api, [&] {
        OrtShapeInfo *info = nullptr;  // belongs to the context
        api.check(api.infer_input_shape(context, from, &info), "shape");
        const Shape shape = shape_of(api, info, "shape");
        const auto end = shape.size.begin() + static_cast<std::ptrdiff_t>(shape.rank);
        if (shape.rank < 2 || std::any_of(shape.size.begin(), end, [](std::int64_t n) { return n < 0; })) return;
        const Shape known = follow(shape);
        OrtShapeInfo *result = nullptr;
        api.check(api.create_shape_info(&result), "shape");
        const std::unique_ptr<OrtShapeInfo, void (*)(OrtShapeInfo *)> owner(result, api.release_shape_info);
        api.check(api.set_element_type(result, static_cast<int>(Type::float32)), "shape");
        api.check(api.set_dimensions(result, known.size.data(), known.rank), "shape");
        api.check(api.infer_set_output_shape(context, 0, result), "shape");
    });
    if (status != nullptr) api.release_status(status);
    return nullptr;
}

// The first output may take the place of the first input (x, or the cotangent) when ONNX Runtime
// needs that one no more: both computations allow it.
std::size_t may_inplace(int **input_index, int **output_index) {
    static int first[] = {0};
    *input_index = *output_index = first;
    return 1;
}

std::size_t may_not_inplace(int **input_index, int **output_index) {
    *input_index = *output_index = nullptr;
    return 0;
}

template <int count> std::size_t number(const OrtCustomOp *) { return count; }

struct Description {
    const char *(*name)(const OrtCustomOp *);
    std::size_t (*inputs)(const OrtCustomOp *);
    std::size_t (*outputs)(const OrtCustomOp *);
    OrtStatus *(*compute)(void *, OrtKernelContext *);
    OrtStatus *(*shape)(const OrtCustomOp *, OrtShapeInferContext *);
    std::size_t (*inplace)(int **, int **);
};

const Description operators[] = {
    {[](const OrtCustomOp *) { return "GroupNorm"; }, number<3>, number<3>, run_kernel<compute_group_norm>,
     infer_shape<0, same>, may_inplace},
    {[](const OrtCustomOp *) { return "GroupNormPull"; }, number<6>, number<1>, run_kernel<compute_group_norm_pull>,
     infer_shape<1, same>, may_inplace},
    {[](const OrtCustomOp *) { return "Interleave"; }, number<1>, number<1>, run_kernel<compute_interleave>,
     infer_shape<0, image_of>, may_not_inplace},
    {[](const OrtCustomOp *) { return "InterleavePull"; }, number<1>, number<1>, run_kernel<compute_interleave_pull>,
     infer_shape<0, phases_of>, may_not_inplace},
};

Operator make_operator(const Api &api, const Description &of) {
    Operator op{};
    op.version = api_version;
    op.api = &api;
    op.get_name = of.name;
    op.get_input_count = of.inputs;
    op.get_output_count = of.outputs;
    op.kernel_compute_v2 = of.compute;
    op.infer_output_shape = of.shape;
    op.get_execution_provider = [](const OrtCustomOp *) -> const char * { return nullptr; };  // the CPU's
    op.get_input_type = [](const OrtCustomOp *, std::size_t) { return static_cast<int>(Type::float32); };
    op.get_output_type = op.get_input_type;
    op.get_input_characteristic = [](const OrtCustomOp *, std::size_t) { return required; };
    op.get_output_characteristic = [](const OrtCustomOp *, std::size_t index) { return index == 0 ? required : optional; };
    op.get_input_memory_type = [](const OrtCustomOp *, std::size_t) { return 0; };
    op.get_start_version = [](const OrtCustomOp *) { return 1; };
    op.get_end_version = op.get_start_version;
    op.create_kernel_v2 = create_kernel;
    op.kernel_destroy = destroy_kernel;
    op.get_may_inplace = of.inplace;
    op.release_may_inplace = [](int *, int *) {};
    return op;
}

// The domain for one ONNX Runtime library. Sessions refer to it, so it is never destroyed.
struct Domain {
    explicit Domain(const OrtApi *table) : api(table) {
        OrtCustomOpDomain *made = nullptr;
        api.check(api.create_custom_op_domain("rlsd", &made), "cannot create the domain");
        domain = {made, api.release_custom_op_domain};
        for (std::size_t i = 0; i < std::size(operators); ++i) {
            made_operators[i] = make_operator(api, operators[i]);
            api.check(api.custom_op_domain_add(made, &made_operators[i]), "cannot add an operator");
        }
    }

    const Api api;
    std::array<Operator, std::size(operators)> made_operators{};
    std::unique_ptr<OrtCustomOpDomain, void (*)(OrtCustomOpDomain *)> domain{nullptr, nullptr};
};

// A process may hold several ONNX Runtimes: the engine's own, and the Python package's.
const Domain &domain_for(const OrtApi *table) {
    static std::mutex mutex;
    static auto *domains = new std::map<const OrtApi *, std::unique_ptr<const Domain>>;  // reachable to the end
    const std::lock_guard lock(mutex);
    auto &domain = (*domains)[table];
    if (domain == nullptr) domain = std::make_unique<const Domain>(table);
    return *domain;
}

}  // namespace
}  // namespace rlsd::ort

void *RegisterCustomOps(void *options, const void *api_base) {
    using namespace rlsd::ort;
    const auto *base = static_cast<const OrtApiBase *>(api_base);
    // The first entry of every version's table makes a status; nothing else is sure to be there.
    const auto create_status = *reinterpret_cast<OrtStatus *(*const *)(int, const char *)>(base->get_api(1));
    try {
        const OrtApi *table = base->get_api(api_version);
        if (table == nullptr) throw OperatorError("ONNX Runtime is too old for the operators of rlsd: 1.20 is needed");
        const Domain &domain = domain_for(table);
        return domain.api.add_custom_op_domain(static_cast<OrtSessionOptions *>(options), domain.domain.get());
    } catch (const std::exception &error) {
        return create_status(invalid_argument, error.what());
    }
}
