#include "onnx_weights.h"

#include "error.h"

#include <charconv>

namespace rlsd {
namespace {

// Field numbers of onnx.proto.
constexpr std::uint64_t model_graph = 7, graph_initializer = 5;
constexpr std::uint64_t tensor_dims = 1, tensor_type = 2, tensor_name = 8, tensor_external = 13, tensor_location = 14;
constexpr std::uint64_t entry_key = 1, entry_value = 2;
constexpr std::uint64_t external_location = 1;  // TensorProto.EXTERNAL

using Bytes = std::span<const std::byte>;

// Walks over the fields of one protobuf message.
class Fields {
  public:
    explicit Fields(Bytes message) : rest_(message) {}

    std::uint64_t number = 0, value = 0;  // of the current field; value where it is a plain number
    Bytes content;                        // where it is a message, string or packed list

    bool next() {
        if (rest_.empty()) return false;
        const std::uint64_t tag = varint(rest_);
        number = tag >> 3;
        content = {};
        switch (tag & 7) {
        case 0: value = varint(rest_); break;
        case 1: take(8); break;
        case 2: content = take(varint(rest_)); break;
        case 5: take(4); break;
        default: throw Error(RLSD_BAD_BUNDLE, "a model is not in ONNX's encoding");
        }
        return true;
    }

    std::string string() const { return {reinterpret_cast<const char *>(content.data()), content.size()}; }

    static std::uint64_t varint(Bytes &from) {
        std::uint64_t result = 0;
        for (unsigned shift = 0; shift < 64 && !from.empty(); shift += 7) {
            const auto byte = static_cast<std::uint64_t>(from.front());
            from = from.subspan(1);
            result |= (byte & 0x7F) << shift;
            if (byte < 0x80) return result;
        }
        throw Error(RLSD_BAD_BUNDLE, "a model is cut off or not in ONNX's encoding");
    }

  private:
    Bytes take(std::uint64_t count) {
        if (count > rest_.size()) throw Error(RLSD_BAD_BUNDLE, "a model is cut off");
        const Bytes taken = rest_.first(count);
        rest_ = rest_.subspan(count);
        return taken;
    }

    Bytes rest_;
};

std::uint64_t number_in(const std::string &digits) {
    std::uint64_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || end != digits.data() + digits.size())
        throw Error(RLSD_BAD_BUNDLE, text("a model says that its weights lie at '", digits.substr(0, 64), "'"));
    return value;
}

void read_entry(Bytes message, ExternalWeight &weight) {
    std::string key, value;
    for (Fields field(message); field.next();) {
        if (field.number == entry_key) key = field.string();
        if (field.number == entry_value) value = field.string();
    }
    if (key == "location") weight.file = value;
    if (key == "offset") weight.offset = number_in(value);
    if (key == "length") weight.length = number_in(value);
}

// The tensor, if it is external.
bool read_tensor(Bytes message, ExternalWeight &weight) {
    bool external = false;
    for (Fields field(message); field.next();) {
        if (field.number == tensor_name) weight.name = field.string();
        if (field.number == tensor_type) weight.type = static_cast<ort::Type>(field.value);
        if (field.number == tensor_location) external = field.value == external_location;
        if (field.number == tensor_external) read_entry(field.content, weight);
        if (field.number != tensor_dims) continue;
        Bytes packed = field.content;
        if (packed.empty()) weight.shape.push_back(static_cast<std::int64_t>(field.value));
        while (!packed.empty()) weight.shape.push_back(static_cast<std::int64_t>(Fields::varint(packed)));
    }
    return external;
}

}  // namespace

std::vector<ExternalWeight> external_weights(std::span<const std::byte> model) {
    std::vector<ExternalWeight> found;
    for (Fields field(model); field.next();) {
        if (field.number != model_graph) continue;
        for (Fields inner(field.content); inner.next();) {
            ExternalWeight weight;
            if (inner.number == graph_initializer && read_tensor(inner.content, weight)) found.push_back(std::move(weight));
        }
    }
    return found;
}

}  // namespace rlsd
