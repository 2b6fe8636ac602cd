// Which weights an ONNX model keeps in an external file: the few fields of its protobuf encoding that say so.
#pragma once

#include "ort.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace rlsd {

struct ExternalWeight {
    std::string name, file;
    ort::Type type = ort::Type::undefined;
    std::vector<std::int64_t> shape;
    std::uint64_t offset = 0, length = 0;  // bytes in the file
};

// Throws Error(RLSD_BAD_BUNDLE) where the bytes are not the encoding of a model.
std::vector<ExternalWeight> external_weights(std::span<const std::byte> model);

}  // namespace rlsd
