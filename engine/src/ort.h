// The part of ONNX Runtime's C interface that the engine calls, and a thin C++ layer over it.
//
// No package that we can install ships ONNX Runtime's header, so its function table is declared
// here: a plain array of function pointers whose order is frozen (new versions only append).
// Each line of RLSD_ORT_ENTRIES gives a position in that array, our name for the entry, its
// return type and its arguments. ONNX Runtime pins the last position of each version itself (101 in
// version 1, 126 in 4, 275 in 17, 279 in 18), and opening any session calls nearly all of them.
//
// Errors are exceptions: OrtError, or NoRuntime (an OrtError) where no usable library was found.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace rlsd::ort {

// The version of the interface that we ask for: ONNX Runtime 1.20 and everything newer has it.
inline constexpr std::uint32_t api_version = 20;

// ONNX Runtime's own objects, opaque here.
struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtValue;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtTypeInfo;
struct OrtShapeInfo;  // their OrtTensorTypeAndShapeInfo
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtCudaOptions;  // their OrtCUDAProviderOptionsV2
struct OrtApi;  // the array of function pointers
struct OrtCustomOp;

// What OrtGetApiBase returns; also what ONNX Runtime hands to a library of custom operators.
struct OrtApiBase {
    const OrtApi *(*get_api)(std::uint32_t version);
    const char *(*get_version_string)();
};

// Element types, by their numbers in the ONNX format.
enum class Type : int { undefined = 0, float32 = 1, int32 = 6, int64 = 7, boolean = 9, float16 = 10, float64 = 11 };

const char *type_name(Type type) noexcept;

// clang-format off
#define RLSD_ORT_ENTRIES(X)                                                                                        \
    X(  0, create_status,              OrtStatus *,  (int code, const char *message))                              \
    X(  2, get_error_message,          const char *, (const OrtStatus *))                                          \
    X(  3, create_env,                 OrtStatus *,  (int log_level, const char *log_id, OrtEnv **))               \
    X(  8, create_session_from_array,  OrtStatus *,  (const OrtEnv *, const void *model, std::size_t bytes,        \
                                                      const OrtSessionOptions *, OrtSession **))                   \
    X(  9, run,                        OrtStatus *,  (OrtSession *, const OrtRunOptions *,                         \
                                                      const char *const *input_names, const OrtValue *const *inputs, \
                                                      std::size_t inputs_count, const char *const *output_names,   \
                                                      std::size_t outputs_count, OrtValue **outputs))              \
    X( 10, create_session_options,     OrtStatus *,  (OrtSessionOptions **))                                       \
    X( 13, set_execution_mode,         OrtStatus *,  (OrtSessionOptions *, int mode))                              \
    X( 22, set_session_log_level,      OrtStatus *,  (OrtSessionOptions *, int level))                             \
    X( 23, set_optimization_level,     OrtStatus *,  (OrtSessionOptions *, int level))                             \
    X( 24, set_intra_op_threads,       OrtStatus *,  (OrtSessionOptions *, int threads))                           \
    X( 25, set_inter_op_threads,       OrtStatus *,  (OrtSessionOptions *, int threads))                           \
    X( 26, create_custom_op_domain,    OrtStatus *,  (const char *domain, OrtCustomOpDomain **))                   \
    X( 27, custom_op_domain_add,       OrtStatus *,  (OrtCustomOpDomain *, const OrtCustomOp *))                   \
    X( 28, add_custom_op_domain,       OrtStatus *,  (OrtSessionOptions *, OrtCustomOpDomain *))                   \
    X( 30, session_input_count,        OrtStatus *,  (const OrtSession *, std::size_t *))                          \
    X( 31, session_output_count,       OrtStatus *,  (const OrtSession *, std::size_t *))                          \
    X( 33, session_input_type,         OrtStatus *,  (const OrtSession *, std::size_t index, OrtTypeInfo **))      \
    X( 34, session_output_type,        OrtStatus *,  (const OrtSession *, std::size_t index, OrtTypeInfo **))      \
    X( 36, session_input_name,         OrtStatus *,  (const OrtSession *, std::size_t index, OrtAllocator *, char **)) \
    X( 37, session_output_name,        OrtStatus *,  (const OrtSession *, std::size_t index, OrtAllocator *, char **)) \
    X( 39, create_run_options,         OrtStatus *,  (OrtRunOptions **))                                           \
    X( 49, create_tensor_over,         OrtStatus *,  (const OrtMemoryInfo *, void *data, std::size_t bytes,        \
                                                      const std::int64_t *shape, std::size_t rank, int type, OrtValue **)) \
    X( 51, tensor_data,                OrtStatus *,  (OrtValue *, void **))                                        \
    X( 55, as_tensor_info,             OrtStatus *,  (const OrtTypeInfo *, const OrtShapeInfo **))                 \
    X( 57, create_shape_info,          OrtStatus *,  (OrtShapeInfo **))                                            \
    X( 58, set_element_type,           OrtStatus *,  (OrtShapeInfo *, int type))                                   \
    X( 59, set_dimensions,             OrtStatus *,  (OrtShapeInfo *, const std::int64_t *, std::size_t rank))     \
    X( 60, get_element_type,           OrtStatus *,  (const OrtShapeInfo *, int *))                                \
    X( 61, get_rank,                   OrtStatus *,  (const OrtShapeInfo *, std::size_t *))                        \
    X( 62, get_dimensions,             OrtStatus *,  (const OrtShapeInfo *, std::int64_t *, std::size_t rank))     \
    X( 65, tensor_shape_info,          OrtStatus *,  (const OrtValue *, OrtShapeInfo **))                          \
    X( 68, create_memory_info,         OrtStatus *,  (const char *name, int allocator_type, int device, int memory_type, \
                                                      OrtMemoryInfo **))                                           \
    X( 69, create_cpu_memory_info,     OrtStatus *,  (int allocator_type, int memory_type, OrtMemoryInfo **))      \
    X( 76, allocator_free,             OrtStatus *,  (OrtAllocator *, void *))                                     \
    X( 78, default_allocator,          OrtStatus *,  (OrtAllocator **))                                            \
    X( 85, kernel_attribute_float,     OrtStatus *,  (const OrtKernelInfo *, const char *name, float *))           \
    X( 86, kernel_attribute_int64,     OrtStatus *,  (const OrtKernelInfo *, const char *name, std::int64_t *))    \
    X( 88, kernel_input_count,         OrtStatus *,  (const OrtKernelContext *, std::size_t *))                    \
    X( 90, kernel_input,               OrtStatus *,  (const OrtKernelContext *, std::size_t index, const OrtValue **)) \
    X( 91, kernel_output,              OrtStatus *,  (OrtKernelContext *, std::size_t index, const std::int64_t *shape, \
                                                      std::size_t rank, OrtValue **))                              \
    X( 92, release_env,                void,         (OrtEnv *))                                                   \
    X( 93, release_status,             void,         (OrtStatus *))                                                \
    X( 94, release_memory_info,        void,         (OrtMemoryInfo *))                                            \
    X( 95, release_session,            void,         (OrtSession *))                                               \
    X( 96, release_value,              void,         (OrtValue *))                                                 \
    X( 97, release_run_options,        void,         (OrtRunOptions *))                                            \
    X( 98, release_type_info,          void,         (OrtTypeInfo *))                                              \
    X( 99, release_shape_info,         void,         (OrtShapeInfo *))                                             \
    X(100, release_session_options,    void,         (OrtSessionOptions *))                                        \
    X(101, release_custom_op_domain,   void,         (OrtCustomOpDomain *))                                        \
    X(130, set_config,                 OrtStatus *,  (OrtSessionOptions *, const char *key, const char *value))    \
    X(150, add_initializer,            OrtStatus *,  (OrtSessionOptions *, const char *name, const OrtValue *))    \
    X(165, set_run_config,             OrtStatus *,  (OrtRunOptions *, const char *key, const char *value))        \
    X(193, compute_stream,             OrtStatus *,  (const OrtKernelContext *, void **))                          \
    X(204, append_cuda,                OrtStatus *,  (OrtSessionOptions *, const OrtCudaOptions *))                \
    X(205, create_cuda_options,        OrtStatus *,  (OrtCudaOptions **))                                          \
    X(206, set_cuda_options,           OrtStatus *,  (OrtCudaOptions *, const char *const *keys,                   \
                                                      const char *const *values, std::size_t count))               \
    X(208, release_cuda_options,       void,         (OrtCudaOptions *))                                           \
    X(268, infer_input_shape,          OrtStatus *,  (const OrtShapeInferContext *, std::size_t index, OrtShapeInfo **)) \
    X(270, infer_set_output_shape,     OrtStatus *,  (const OrtShapeInferContext *, std::size_t index, const OrtShapeInfo *)) \
    X(279, set_external_files,         OrtStatus *,  (OrtSessionOptions *, const char *const *names, char *const *data, \
                                                      const std::size_t *bytes, std::size_t count))
// clang-format on

// The entries above as typed function pointers, read out of ONNX Runtime's table.
struct Api {
#define RLSD_ORT_FIELD(index, name, result, arguments) result(*name) arguments;
    RLSD_ORT_ENTRIES(RLSD_ORT_FIELD)
#undef RLSD_ORT_FIELD

    explicit Api(const OrtApi *table) noexcept;

    // Throws OrtError("<doing>: <ONNX Runtime's message>") unless status is null; releases status.
    void check(OrtStatus *status, const char *doing) const;
};

struct OrtError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct NoRuntime : OrtError {
    using OrtError::OrtError;
};

// A custom operator as ONNX Runtime sees it: the fields up to the interface version in `version`.
struct OrtCustomOp {
    std::uint32_t version;
    void *(*create_kernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
    const char *(*get_name)(const OrtCustomOp *);
    const char *(*get_execution_provider)(const OrtCustomOp *);
    int (*get_input_type)(const OrtCustomOp *, std::size_t index);
    std::size_t (*get_input_count)(const OrtCustomOp *);
    int (*get_output_type)(const OrtCustomOp *, std::size_t index);
    std::size_t (*get_output_count)(const OrtCustomOp *);
    void (*kernel_compute)(void *kernel, OrtKernelContext *);
    void (*kernel_destroy)(void *kernel);
    int (*get_input_characteristic)(const OrtCustomOp *, std::size_t index);
    int (*get_output_characteristic)(const OrtCustomOp *, std::size_t index);
    int (*get_input_memory_type)(const OrtCustomOp *, std::size_t index);
    int (*get_variadic_input_min_arity)(const OrtCustomOp *);
    int (*get_variadic_input_homogeneity)(const OrtCustomOp *);
    int (*get_variadic_output_min_arity)(const OrtCustomOp *);
    int (*get_variadic_output_homogeneity)(const OrtCustomOp *);
    OrtStatus *(*create_kernel_v2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **kernel);
    OrtStatus *(*kernel_compute_v2)(void *kernel, OrtKernelContext *);
    OrtStatus *(*infer_output_shape)(const OrtCustomOp *, OrtShapeInferContext *);
    int (*get_start_version)(const OrtCustomOp *);
    int (*get_end_version)(const OrtCustomOp *);
    std::size_t (*get_may_inplace)(int **input_index, int **output_index);
    void (*release_may_inplace)(int *input_index, int *output_index);
    std::size_t (*get_alias_map)(int **input_index, int **output_index);
    void (*release_alias_map)(int *input_index, int *output_index);
};

// A loaded ONNX Runtime library and its environment. Share it: sessions keep it alive.
class Runtime {
  public:
    // path: the library's file; null: $RLSD_ONNXRUNTIME, then the loader's search for
    // libonnxruntime.so. Throws NoRuntime when it cannot be loaded or is too old.
    static std::shared_ptr<const Runtime> open(const char *path);

    ~Runtime();
    Runtime(const Runtime &) = delete;
    Runtime &operator=(const Runtime &) = delete;

    const Api &api() const noexcept { return api_; }
    const OrtApiBase *base() const noexcept { return base_; }
    const OrtEnv *env() const noexcept { return env_; }
    const OrtMemoryInfo *cpu() const noexcept { return cpu_; }
    const OrtMemoryInfo *cuda(int ordinal) const;  // made at the first call; for one thread at a time
    const std::string &version() const noexcept { return version_; }  // such as "1.32.0"

  private:
    explicit Runtime(const OrtApiBase *base, const OrtApi *table);

    const OrtApiBase *base_;
    Api api_;
    std::string version_;
    OrtEnv *env_ = nullptr;
    OrtMemoryInfo *cpu_ = nullptr;
    mutable std::map<int, OrtMemoryInfo *> cuda_;
};

// One tensor of ONNX Runtime over the caller's memory. Must not outlive its Runtime.
class Value {
  public:
    // The memory must outlive it; of the kind `where`, by default the CPU's. bytes must fit the shape.
    Value(const Runtime &runtime, void *data, std::size_t bytes, std::span<const std::int64_t> shape, Type type,
          const OrtMemoryInfo *where = nullptr);
    Value(const Runtime &runtime, std::span<float> data, std::span<const std::int64_t> shape);
    Value(const Runtime &runtime, std::span<std::int64_t> data, std::span<const std::int64_t> shape);
    Value(Value &&other) noexcept : value_(std::exchange(other.value_, nullptr)), api_(other.api_) {}
    Value &operator=(Value &&) = delete;
    ~Value();

    OrtValue *get() const noexcept { return value_; }

  private:
    OrtValue *value_ = nullptr;
    const Api *api_;
};

// One input or output of a graph. A dimension without a fixed size is -1.
struct TensorInfo {
    std::string name;
    Type type = Type::undefined;
    std::vector<std::int64_t> shape;

    std::size_t count() const noexcept;  // number of elements; 0 where a dimension is not fixed
    std::size_t bytes() const noexcept;
};

std::size_t width_of(Type type) noexcept;  // bytes of an element

// External data that a model names: its file name in the model, and the bytes.
struct ExternalFile {
    std::string name;
    std::span<const std::byte> bytes;
};

// Where a session runs if not on the CPU: on a GPU through ONNX Runtime's CUDA provider, and on the caller's stream.
struct Placement {
    bool provider = true;  // false: on the CPU all the same, with these operators and weights (for tests)
    int ordinal = 0;
    void *stream = nullptr;
    bool graphs = true;    // each run is recorded as a CUDA graph, by its number in RunOptions, and then replayed
    bool exact = false;    // float32 products as such: by default ONNX Runtime rounds their factors to TF32
    OrtCustomOpDomain *operators = nullptr;
    // Which initializers of a model lie in the device's memory already, by name; may be empty.
    std::function<std::map<std::string, const OrtValue *>(std::span<const std::byte> model)> weights;
};

// Options of one kind of run on a GPU: the number of its CUDA graph, and no wait at its end. shrinks: a device as gpu:0,
// whose memory the session gives back at the end of the run where it holds no value.
class RunOptions {
  public:
    RunOptions(const Runtime &runtime, int graph, const std::string &shrinks = "");
    RunOptions(const RunOptions &) = delete;
    RunOptions &operator=(const RunOptions &) = delete;
    ~RunOptions();
    const OrtRunOptions *get() const noexcept { return options_; }

  private:
    const Api &api_;
    OrtRunOptions *options_ = nullptr;
};

// One loaded graph. run() may be called by several threads at once.
class Session {
  public:
    // Loads a model from memory: one thread, sequential, all graph optimisations, and the operators
    // of domain "rlsd". A file that the model names must be among `external`; the file system is not
    // searched. The model's bytes may go afterwards. The external files' bytes are read where they lie:
    // keep them as long as the session.
    Session(std::shared_ptr<const Runtime> runtime, std::span<const std::byte> model,
            std::span<const ExternalFile> external = {}, const Placement *placement = nullptr);
    ~Session();
    Session(const Session &) = delete;
    Session &operator=(const Session &) = delete;

    const std::vector<TensorInfo> &inputs() const noexcept { return inputs_; }
    const std::vector<TensorInfo> &outputs() const noexcept { return outputs_; }
    const Runtime &runtime() const noexcept { return *runtime_; }

    // Runs the graph. Names and values go by position, as many of the ones as of the others; outputs that are not named
    // are not computed, the others are written in place. Allocates nothing of its own. Notes a run that went well.
    void run(std::span<const char *const> input_names, std::span<const OrtValue *const> inputs,
             std::span<const char *const> output_names, std::span<OrtValue *> outputs,
             const RunOptions *options = nullptr) const;
    bool has_run() const noexcept { return has_run_; }

  private:
    std::shared_ptr<const Runtime> runtime_;
    OrtSession *session_ = nullptr;
    mutable std::atomic<bool> has_run_ = false;
    std::vector<TensorInfo> inputs_, outputs_;
};

}  // namespace rlsd::ort
