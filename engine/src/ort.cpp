#include "ort.h"

#include "../include/rlsd.h"

#include <dlfcn.h>

#include <cstdlib>
#include <memory>

namespace rlsd::ort {
namespace {

// ONNX Runtime's numbers for what we ask of it.
constexpr int log_warnings = 2;         // ORT_LOGGING_LEVEL_WARNING
constexpr int log_errors = 3;           // ORT_LOGGING_LEVEL_ERROR
constexpr int sequential_execution = 0; // ORT_SEQUENTIAL
constexpr int all_optimizations = 99;   // ORT_ENABLE_ALL
constexpr int no_optimizations = 0;     // ORT_DISABLE_ALL
constexpr int device_allocator = 0;     // OrtDeviceAllocator
constexpr int default_memory = 0;       // OrtMemTypeDefault
constexpr const char *nowhere = "/dev/null/rlsd";  // cannot exist

// A raw pointer of ONNX Runtime with the entry that releases it.
template <class T> using Owned = std::unique_ptr<T, void (*)(T *)>;

using GetApiBase = const OrtApiBase *();

// ONNX Runtime's warnings are no news to users, but they are to who debugs: where a weight is copied, say.
int log_level() { return std::getenv("RLSD_ONNXRUNTIME_WARNINGS") != nullptr ? log_warnings : log_errors; }

// The wheels of onnxruntime (1.32) carry capi/libonnxruntime.so.<version>, which exports
// OrtGetApiBase; their Python extension module does not. The soname is libonnxruntime.so.1.
void *load(const char *path) {
    constexpr int flags = RTLD_NOW | RTLD_LOCAL;
    if (path == nullptr || *path == '\0') path = std::getenv("RLSD_ONNXRUNTIME");
    if (path != nullptr && *path != '\0') {
        if (void *library = dlopen(path, flags)) return library;
        const char *why = dlerror();
        throw NoRuntime("cannot load ONNX Runtime: " + std::string(why != nullptr ? why : path));
    }
    for (const char *name : {"libonnxruntime.so.1", "libonnxruntime.so"})
        if (void *library = dlopen(name, flags)) return library;
    throw NoRuntime("cannot find ONNX Runtime: libonnxruntime.so.1 is not where the loader looks; give its path in "
                    "the options or in RLSD_ONNXRUNTIME");
}

// The library stays loaded for the life of the process: it has threads, thread-local state and
// the custom operators' domain, none of which survive unloading.
const OrtApiBase *api_base(void *library) {
    auto *entry = reinterpret_cast<GetApiBase *>(dlsym(library, "OrtGetApiBase"));
    const OrtApiBase *base = entry != nullptr ? entry() : nullptr;
    if (base == nullptr) throw NoRuntime("the library given as ONNX Runtime is not one: it has no OrtGetApiBase");
    return base;
}

// An older library answers null, after a line on stderr that we cannot prevent.
const OrtApi *api_table(const OrtApiBase *base) {
    const OrtApi *table = base->get_api(api_version);
    if (table == nullptr)
        throw NoRuntime("ONNX Runtime " + std::string(base->get_version_string()) +
                        " is too old: version 1." + std::to_string(api_version) + " or newer is needed");
    return table;
}

// Official builds of ONNX Runtime from 1.29 on report their use (sessions, hashes of models, errors, the device) to their
// maker, and keep an identifier below ~/.cache, unless this is set when the process's environment is made. What the user
// has set holds.
void report_nothing() { setenv("ORT_DISABLE_TELEMETRY", "1", 0); }

void append_cuda(const Api &api, OrtSessionOptions *options, const Placement &placement) {
    constexpr const char *doing = "cannot use ONNX Runtime's CUDA provider (is onnxruntime-gpu installed?)";
    OrtCudaOptions *raw = nullptr;
    api.check(api.create_cuda_options(&raw), doing);
    const Owned<OrtCudaOptions> owner(raw, api.release_cuda_options);
    const std::string ordinal = std::to_string(placement.ordinal);
    const std::string stream = std::to_string(reinterpret_cast<std::uintptr_t>(placement.stream));
    const std::pair<const char *, const char *> settings[] = {
        {"device_id", ordinal.c_str()},
        {"has_user_compute_stream", "1"},  // without it the next one is ignored
        {"user_compute_stream", stream.c_str()},
        {"enable_cuda_graph", placement.graphs ? "1" : "0"},
        {"arena_extend_strategy", "kSameAsRequested"},  // doubling would waste the memory of particles
        {"cudnn_conv_algo_search", "EXHAUSTIVE"},       // the better of cuDNN's two heuristics; nothing is timed
        {"cudnn_conv_use_max_workspace", "1"},
        {"use_tf32", placement.exact ? "0" : "1"},
    };
    std::vector<const char *> keys, values;
    for (const auto &[key, value] : settings) keys.push_back(key), values.push_back(value);
    api.check(api.set_cuda_options(raw, keys.data(), values.data(), keys.size()), doing);
    api.check(api.append_cuda(options, raw), doing);
}

void place(const Runtime &runtime, OrtSessionOptions *options, const Placement &placement,
           std::span<const std::byte> model) {
    const Api &api = runtime.api();
    if (placement.provider) append_cuda(api, options, placement);
    api.check(api.add_custom_op_domain(options, placement.operators), "cannot register custom operators");
    if (!placement.weights) return;
    for (const auto &[name, value] : placement.weights(model))
        api.check(api.add_initializer(options, name.c_str(), value), "cannot share a weight");
}

Owned<OrtSessionOptions> session_options(const Runtime &runtime, std::span<const ExternalFile> external,
                                         const Placement *placement, std::span<const std::byte> model) {
    const Api &api = runtime.api();
    constexpr const char *doing = "cannot set session options";
    OrtSessionOptions *raw = nullptr;
    api.check(api.create_session_options(&raw), doing);
    Owned<OrtSessionOptions> options(raw, api.release_session_options);
    api.check(api.set_session_log_level(raw, log_level()), doing);
    api.check(api.set_intra_op_threads(raw, 1), doing);
    api.check(api.set_inter_op_threads(raw, 1), doing);
    api.check(api.set_execution_mode(raw, sequential_execution), doing);
    // ONNX Runtime's optimizer may transpose a weight under its old name, without looking whether it is a shared one. The
    // graphs for GPUs are fused already.
    api.check(api.set_optimization_level(raw, placement != nullptr ? no_optimizations : all_optimizations), doing);
    // Before 1.30 this fusion loses a LayerNormalization's mean and deviation, without a word: what decoder and features
    // keep for their pull-backs would never be written.
    api.check(api.set_config(raw, "optimization.disable_specified_optimizers", "SkipLayerNormFusion"), doing);
    api.check(api.set_config(raw, "session.intra_op.allow_spinning", "0"), doing);
    api.check(api.set_config(raw, "session.inter_op.allow_spinning", "0"), doing);
    // A model that names a file which `external` lacks must not reach the file system (by default
    // ONNX Runtime would look in the working directory).
    api.check(api.set_config(raw, "session.model_external_initializers_file_folder_path", nowhere), doing);
    if (placement != nullptr) place(runtime, raw, *placement, model);
    else api.check(static_cast<OrtStatus *>(RegisterCustomOps(raw, runtime.base())), "cannot register custom operators");

    std::vector<const char *> names;
    std::vector<char *> data;
    std::vector<std::size_t> bytes;
    for (const ExternalFile &file : external) {
        names.push_back(file.name.c_str());
        // ONNX Runtime takes a pointer to mutable bytes but only reads them.
        data.push_back(const_cast<char *>(reinterpret_cast<const char *>(file.bytes.data())));
        bytes.push_back(file.bytes.size());
    }
    if (external.empty()) return options;
    // Read where they lie, not copied for every session: they outlive it. (Older versions do not know the key, and copy.)
    api.check(api.set_config(raw, "session.use_external_initializer_file_buffers_directly", "1"), doing);
    api.check(api.set_external_files(raw, names.data(), data.data(), bytes.data(), names.size()),
              "cannot hand over external weights");
    return options;
}

void read_shape(const Api &api, const OrtShapeInfo *info, Type &type, std::vector<std::int64_t> &shape) {
    int element = 0;
    std::size_t rank = 0;
    api.check(api.get_element_type(info, &element), "cannot read an element type");
    api.check(api.get_rank(info, &rank), "cannot read a shape");
    shape.resize(rank);
    if (rank != 0) api.check(api.get_dimensions(info, shape.data(), rank), "cannot read a shape");
    type = static_cast<Type>(element);
}

using CountEntry = OrtStatus *(*)(const OrtSession *, std::size_t *);
using TypeEntry = OrtStatus *(*)(const OrtSession *, std::size_t, OrtTypeInfo **);
using NameEntry = OrtStatus *(*)(const OrtSession *, std::size_t, OrtAllocator *, char **);

TensorInfo read_tensor(const Api &api, const OrtSession *session, std::size_t index, TypeEntry type_of,
                       NameEntry name_of) {
    constexpr const char *doing = "cannot read a graph's inputs and outputs";
    TensorInfo tensor;
    OrtAllocator *allocator = nullptr;
    char *name = nullptr;
    api.check(api.default_allocator(&allocator), doing);
    api.check(name_of(session, index, allocator, &name), doing);
    const auto give_back = [&](char *memory) {
        if (OrtStatus *status = api.allocator_free(allocator, memory)) api.release_status(status);
    };
    tensor.name = std::unique_ptr<char, decltype(give_back)>(name, give_back).get();

    OrtTypeInfo *raw = nullptr;
    api.check(type_of(session, index, &raw), doing);
    const Owned<OrtTypeInfo> owner(raw, api.release_type_info);
    const OrtShapeInfo *info = nullptr;  // belongs to raw
    api.check(api.as_tensor_info(raw, &info), doing);
    if (info == nullptr) throw OrtError("graph value " + tensor.name + " is not a tensor");
    read_shape(api, info, tensor.type, tensor.shape);
    return tensor;
}

std::vector<TensorInfo> read_tensors(const Api &api, const OrtSession *session, CountEntry count_of, TypeEntry type_of,
                                     NameEntry name_of) {
    std::size_t count = 0;
    api.check(count_of(session, &count), "cannot count a graph's inputs and outputs");
    std::vector<TensorInfo> tensors;
    for (std::size_t i = 0; i < count; ++i) tensors.push_back(read_tensor(api, session, i, type_of, name_of));
    return tensors;
}

}  // namespace

std::size_t width_of(Type type) noexcept {
    switch (type) {
    case Type::int64:
    case Type::float64: return 8;
    case Type::float32:
    case Type::int32: return 4;
    case Type::float16: return 2;
    case Type::boolean: return 1;
    case Type::undefined: break;
    }
    return 0;
}

const char *type_name(Type type) noexcept {
    switch (type) {
    case Type::float32: return "float32";
    case Type::int32: return "int32";
    case Type::int64: return "int64";
    case Type::boolean: return "bool";
    case Type::float16: return "float16";
    case Type::float64: return "float64";
    case Type::undefined: break;
    }
    return "of another type";
}

Api::Api(const OrtApi *table) noexcept {
    const auto *entries = reinterpret_cast<void *const *>(table);
#define RLSD_ORT_READ(index, name, result, arguments) name = reinterpret_cast<decltype(name)>(entries[index]);
    RLSD_ORT_ENTRIES(RLSD_ORT_READ)
#undef RLSD_ORT_READ
}

void Api::check(OrtStatus *status, const char *doing) const {
    if (status == nullptr) return;
    const Owned<OrtStatus> owner(status, release_status);
    throw OrtError(std::string(doing) + ": " + get_error_message(status));
}

std::shared_ptr<const Runtime> Runtime::open(const char *path) {
    const OrtApiBase *base = api_base(load(path));
    report_nothing();
    return std::shared_ptr<const Runtime>(new Runtime(base, api_table(base)));
}

Runtime::Runtime(const OrtApiBase *base, const OrtApi *table)
    : base_(base), api_(table), version_(base->get_version_string()) {
    api_.check(api_.create_env(log_level(), "rlsd", &env_), "cannot start ONNX Runtime");
    OrtStatus *status = api_.create_cpu_memory_info(device_allocator, default_memory, &cpu_);
    if (status != nullptr) api_.release_env(env_);
    api_.check(status, "cannot describe CPU memory");
}

Runtime::~Runtime() {
    for (const auto &[ordinal, memory] : cuda_) api_.release_memory_info(memory);
    api_.release_memory_info(cpu_);
    api_.release_env(env_);
}

const OrtMemoryInfo *Runtime::cuda(int ordinal) const {
    OrtMemoryInfo *&memory = cuda_[ordinal];
    if (memory == nullptr)
        api_.check(api_.create_memory_info("Cuda", device_allocator, ordinal, default_memory, &memory),
                   "cannot describe the device's memory");
    return memory;
}

RunOptions::RunOptions(const Runtime &runtime, int graph, const std::string &shrinks) : api_(runtime.api()) {
    constexpr const char *doing = "cannot set run options";
    api_.check(api_.create_run_options(&options_), doing);
    Owned<OrtRunOptions> owner(options_, api_.release_run_options);
    api_.check(api_.set_run_config(options_, "gpu_graph_id", std::to_string(graph).c_str()), doing);
    api_.check(api_.set_run_config(options_, "disable_synchronize_execution_providers", "1"), doing);
    if (!shrinks.empty())
        api_.check(api_.set_run_config(options_, "memory.enable_memory_arena_shrinkage", shrinks.c_str()), doing);
    owner.release();
}

RunOptions::~RunOptions() { api_.release_run_options(options_); }

Value::Value(const Runtime &runtime, void *data, std::size_t bytes, std::span<const std::int64_t> shape, Type type,
             const OrtMemoryInfo *where)
    : api_(&runtime.api()) {
    api_->check(api_->create_tensor_over(where != nullptr ? where : runtime.cpu(), data, bytes, shape.data(), shape.size(),
                                         static_cast<int>(type), &value_),
                "cannot make a tensor");
}

Value::Value(const Runtime &runtime, std::span<float> data, std::span<const std::int64_t> shape)
    : Value(runtime, data.data(), data.size_bytes(), shape, Type::float32) {}

Value::Value(const Runtime &runtime, std::span<std::int64_t> data, std::span<const std::int64_t> shape)
    : Value(runtime, data.data(), data.size_bytes(), shape, Type::int64) {}

Value::~Value() {
    if (value_ != nullptr) api_->release_value(value_);
}

std::size_t TensorInfo::count() const noexcept {
    std::size_t count = 1;
    for (const std::int64_t size : shape) count *= size > 0 ? static_cast<std::size_t>(size) : 0;
    return count;
}

std::size_t TensorInfo::bytes() const noexcept { return count() * width_of(type); }

Session::Session(std::shared_ptr<const Runtime> runtime, std::span<const std::byte> model,
                 std::span<const ExternalFile> external, const Placement *placement)
    : runtime_(std::move(runtime)) {
    const Api &api = runtime_->api();
    const auto options = session_options(*runtime_, external, placement, model);
    OrtSession *raw = nullptr;
    api.check(api.create_session_from_array(runtime_->env(), model.data(), model.size(), options.get(), &raw),
              "cannot load a graph");
    Owned<OrtSession> session(raw, api.release_session);
    inputs_ = read_tensors(api, raw, api.session_input_count, api.session_input_type, api.session_input_name);
    outputs_ = read_tensors(api, raw, api.session_output_count, api.session_output_type, api.session_output_name);
    session_ = session.release();
}

Session::~Session() { runtime_->api().release_session(session_); }

void Session::run(std::span<const char *const> input_names, std::span<const OrtValue *const> inputs,
                  std::span<const char *const> output_names, std::span<OrtValue *> outputs,
                  const RunOptions *options) const {
    const Api &api = runtime_->api();
    api.check(api.run(session_, options != nullptr ? options->get() : nullptr, input_names.data(), inputs.data(), inputs.size(), output_names.data(),
                      outputs.size(), outputs.data()),
              "a graph failed");
    has_run_ = true;
}

}  // namespace rlsd::ort
