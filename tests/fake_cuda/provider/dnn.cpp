// A stand-in for libcudnn.so.9: its backend's descriptors are kept, one engine is found for every graph, and a plan that
// is executed is queued as what it would have computed: `cudnn conv x 1,4,64,64 strides ... w ... y ...`.
#include "work.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr int EXECUTION_FAILED = 5000;
constexpr size_t VERSION = 91900;

// Attributes and kinds of descriptors, by cudnn_graph.h's numbers.
enum Attribute {
    CONV_STRIDES = 103, CONV_POST_PADDING = 104, CONV_PRE_PADDING = 105, HEURISTIC_GRAPH = 201, HEURISTIC_RESULTS = 202,
    CONFIG_ENGINE = 300, CONFIG_SHARED_MEMORY = 304, PLAN_CONFIG = 401, PLAN_WORKSPACE = 402, CONV_DESCRIPTION = 702,
    CONV_W = 703, CONV_X = 704, CONV_Y = 705, GRAPH_OPERATIONS = 801, GRAPH_ENGINES = 802, TENSOR_SIZES = 902,
    TENSOR_STRIDES = 903, ENGINE_GRAPH = 1300, ENGINE_INDEX = 1301,
};
enum Kind { ENGINE = 2, CONVOLUTION = 10 };
enum Type { HANDLE = 0, TYPE_BOOLEAN = 2, INT64 = 3, DOUBLE = 5, POINTER = 6, DESCRIPTOR = 15, CHARACTER = 24 };

struct Descriptor {
    struct Value {
        int64_t count = 0;
        std::vector<char> bytes = {};
    };
    int kind;
    std::map<int, Value> values = {};

    Descriptor *link(int attribute, size_t index = 0) const {
        Descriptor *to = nullptr;
        auto found = values.find(attribute);
        if (found != values.end() && found->second.bytes.size() >= 8 * (index + 1))
            std::memcpy(&to, found->second.bytes.data() + 8 * index, 8);
        return to;
    }
    void set_link(int attribute, const Descriptor *to) {
        const auto *bytes = reinterpret_cast<const char *>(&to);
        values[attribute] = {1, std::vector<char>(bytes, bytes + 8)};
    }
    std::string numbers(int attribute) const {
        std::string text;
        auto found = values.find(attribute);
        for (int64_t i = 0; found != values.end() && i < found->second.count; ++i) {
            int64_t number = 0;
            std::memcpy(&number, found->second.bytes.data() + 8 * i, 8);
            text += (i > 0 ? "," : "") + std::to_string(number);
        }
        return text;
    }
};

size_t width(int type) {
    switch (type) {
    case HANDLE:
    case INT64:
    case DOUBLE:
    case POINTER:
    case DESCRIPTOR:
        return 8;
    case TYPE_BOOLEAN:
    case CHARACTER:
        return 1;
    default:
        return 4; // enumerations, floats, 32 bits
    }
}

template <class Number> int give(Number number, int64_t *count, void *to) {
    if (count != nullptr)
        *count = 1;
    if (to != nullptr)
        std::memcpy(to, &number, sizeof number);
    return 0;
}

// The caller has made the descriptors that it wants filled.
Descriptor *first_of(void *array, int64_t requested) {
    Descriptor *first = nullptr;
    if (array != nullptr && requested > 0)
        std::memcpy(&first, array, 8);
    return first;
}

std::string tensor(const Descriptor *of) {
    return of == nullptr ? " ?" : " " + of->numbers(TENSOR_SIZES) + " strides " + of->numbers(TENSOR_STRIDES);
}

std::string operation(const Descriptor &of) {
    if (of.kind != CONVOLUTION)
        return " operation " + std::to_string(of.kind);
    const Descriptor *how = of.link(CONV_DESCRIPTION);
    return " conv x" + tensor(of.link(CONV_X)) + " w" + tensor(of.link(CONV_W)) + " y" + tensor(of.link(CONV_Y)) +
           " stride " + how->numbers(CONV_STRIDES) + " padding " + how->numbers(CONV_PRE_PADDING) + ":" +
           how->numbers(CONV_POST_PADDING);
}

} // namespace

EXPORT size_t cudnnGetVersion() { return VERSION; }
EXPORT size_t cudnnGetCudartVersion() { return 13000; }
EXPORT const char *cudnnGetErrorString(int) { return "status of the stand-in"; }
EXPORT void cudnnGetLastErrorString(char *text, size_t size) {
    if (size > 0)
        *text = '\0';
}
EXPORT int cudnnCreate(Handle **handle) { return make(handle); }
EXPORT int cudnnDestroy(Handle *handle) { return unmake(handle); }
EXPORT int cudnnSetStream(Handle *handle, CUstream stream) { return put_on(handle, stream); }
EXPORT int cudnnGetStream(Handle *handle, CUstream *stream) {
    *stream = handle->stream;
    return 0;
}

EXPORT int cudnnBackendCreateDescriptor(int kind, Descriptor **descriptor) {
    *descriptor = new Descriptor{kind};
    return 0;
}
// They name each other, and are not freed.
EXPORT int cudnnBackendDestroyDescriptor(Descriptor *) { return 0; }
EXPORT int cudnnBackendFinalize(Descriptor *) { return 0; }
EXPORT int cudnnBackendSetAttribute(Descriptor *descriptor, int attribute, int type, int64_t count, const void *from) {
    const auto *bytes = static_cast<const char *>(from);
    descriptor->values[attribute] = {count, std::vector<char>(bytes, bytes + size_t(count) * width(type))};
    return 0;
}
EXPORT int cudnnBackendGetAttribute(Descriptor *descriptor, int attribute, int type, int64_t requested, int64_t *count,
                                    void *to) {
    switch (attribute) {
    case HEURISTIC_RESULTS: // one configuration, of one engine, of the graph that was asked about
        if (Descriptor *configuration = first_of(to, requested)) {
            auto *engine = new Descriptor{ENGINE};
            engine->set_link(ENGINE_GRAPH, descriptor->link(HEURISTIC_GRAPH));
            configuration->set_link(CONFIG_ENGINE, engine);
        }
        return give(0, count, nullptr);
    case CONFIG_ENGINE:
        if (Descriptor *engine = first_of(to, requested))
            *engine = *descriptor->link(CONFIG_ENGINE);
        return give(0, count, nullptr);
    case CONFIG_SHARED_MEMORY:
        return give(int32_t(1024), count, to);
    case GRAPH_ENGINES:
        return give(int64_t(1), count, to);
    case ENGINE_INDEX:
    case PLAN_WORKSPACE:
        return give(int64_t(0), count, to);
    default:
        break;
    }
    const Descriptor::Value &value = descriptor->values[attribute];
    if (count != nullptr)
        *count = value.count;
    if (to != nullptr)
        std::memcpy(to, value.bytes.data(), std::min(size_t(requested) * width(type), value.bytes.size()));
    return 0;
}
EXPORT int cudnnBackendExecute(Handle *handle, const Descriptor *plan, const Descriptor *) {
    const Descriptor *graph = plan->link(PLAN_CONFIG)->link(CONFIG_ENGINE)->link(ENGINE_GRAPH);
    std::string line = "cudnn";
    for (size_t i = 0; const Descriptor *each = graph->link(GRAPH_OPERATIONS, i); ++i)
        line += operation(*each);
    return fake_cuda_work(handle->stream, line.c_str()) == 0 ? 0 : EXECUTION_FAILED;
}

// ------------------------------------------------------------ the interface of old

#define MADE(name)                                                                                                     \
    EXPORT int cudnnCreate##name(void **object) {                                                                      \
        *object = std::calloc(1, 256);                                                                                 \
        return 0;                                                                                                      \
    }                                                                                                                  \
    EXPORT int cudnnDestroy##name(void *object) {                                                                      \
        std::free(object);                                                                                             \
        return 0;                                                                                                      \
    }
MADE(ActivationDescriptor)
MADE(ConvolutionDescriptor)
MADE(FilterDescriptor)
MADE(PoolingDescriptor)
MADE(ReduceTensorDescriptor)
MADE(TensorDescriptor)

#define DONE(name)                                                                                                     \
    EXPORT int name() { return 0; }
DONE(cudnnDeriveBNTensorDescriptor)
DONE(cudnnSetActivationDescriptor)
DONE(cudnnSetConvolutionGroupCount)
DONE(cudnnSetConvolutionMathType)
DONE(cudnnSetConvolutionNdDescriptor)
DONE(cudnnSetFilterNdDescriptor)
DONE(cudnnSetPoolingNdDescriptor)
DONE(cudnnSetReduceTensorDescriptor)
DONE(cudnnSetTensorNdDescriptor)

#define QUEUED(name)                                                                                                   \
    EXPORT int name(Handle *handle) { return fake_cuda_work(handle->stream, #name) == 0 ? 0 : EXECUTION_FAILED; }
QUEUED(cudnnActivationForward)
QUEUED(cudnnAddTensor)
QUEUED(cudnnBatchNormalizationForwardTraining)
QUEUED(cudnnPoolingForward)
QUEUED(cudnnReduceTensor)
QUEUED(cudnnSoftmaxForward)

EXPORT int cudnnGetReductionIndicesSize(Handle *, void *, void *, void *, size_t *bytes) {
    *bytes = 0;
    return 0;
}
EXPORT int cudnnGetReductionWorkspaceSize(Handle *, void *, void *, void *, size_t *bytes) {
    *bytes = 0;
    return 0;
}
