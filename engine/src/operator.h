// What every custom operator needs: shapes, inputs and outputs of a node, exceptions as statuses.
#pragma once

#include "ort.h"

#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

namespace rlsd::ort {

inline constexpr int invalid_argument = 2;  // ORT_INVALID_ARGUMENT
inline constexpr int required = 0, optional = 1;
inline constexpr std::size_t max_rank = 8;

struct OperatorError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Our view of OrtCustomOp: one per operator and ONNX Runtime library.
struct Operator : OrtCustomOp {
    const Api *api;
};

inline const Api &api_of(const OrtCustomOp *op) { return *static_cast<const Operator *>(op)->api; }

// Nothing may throw through ONNX Runtime: an exception becomes a status.
template <class Body> OrtStatus *guarded(const Api &api, const Body &body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const std::exception &error) {
        return api.create_status(invalid_argument, error.what());
    }
}

// An attribute that is absent keeps its default.
template <class T, class Entry>
void read_attribute(const Api &api, Entry entry, const OrtKernelInfo *info, const char *name, T &value) {
    T read{};
    if (OrtStatus *status = entry(info, name, &read)) api.release_status(status);
    else value = read;
}

struct Shape {
    std::array<std::int64_t, max_rank> size{};
    std::size_t rank = 0;

    std::string text() const {
        std::string out = "[";
        for (std::size_t i = 0; i < rank; ++i) out += (i == 0 ? "" : ", ") + std::to_string(size[i]);
        return out + "]";
    }
    bool operator==(const Shape &other) const noexcept { return rank == other.rank && size == other.size; }
};

inline Shape shape_of(const Api &api, const OrtShapeInfo *info, const char *what) {
    Shape shape;
    api.check(api.get_rank(info, &shape.rank), what);
    if (shape.rank > max_rank)
        throw OperatorError(std::string(what) + " has rank " + std::to_string(shape.rank) + ", at most 8 is allowed");
    api.check(api.get_dimensions(info, shape.size.data(), shape.rank), what);
    return shape;
}

struct Input {
    const float *data;
    Shape shape;
};

inline Input input(const Api &api, const OrtKernelContext *context, std::size_t index, const char *what) {
    const OrtValue *value = nullptr;
    OrtShapeInfo *info = nullptr;
    void *data = nullptr;
    api.check(api.kernel_input(context, index, &value), what);
    if (value == nullptr) throw OperatorError(std::string(what) + " is missing");
    api.check(api.tensor_shape_info(value, &info), what);
    const std::unique_ptr<OrtShapeInfo, void (*)(OrtShapeInfo *)> owner(info, api.release_shape_info);
    api.check(api.tensor_data(const_cast<OrtValue *>(value), &data), what);  // only read
    return {static_cast<const float *>(data), shape_of(api, info, what)};
}

// The memory of an output, null where the node does not have it.
inline float *output(const Api &api, OrtKernelContext *context, std::size_t index, const Shape &shape, const char *what) {
    OrtValue *value = nullptr;
    void *data = nullptr;
    api.check(api.kernel_output(context, index, shape.size.data(), shape.rank, &value), what);
    if (value == nullptr) return nullptr;
    api.check(api.tensor_data(value, &data), what);
    return static_cast<float *>(data);
}

inline void expect(const Input &tensor, const Shape &wanted, const char *what) {
    if (!(tensor.shape == wanted))
        throw OperatorError(std::string(what) + " has shape " + tensor.shape.text() + ", " + wanted.text() +
                            " is needed");
}

}  // namespace rlsd::ort
