// SHA-256 (FIPS 180-4).
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace rlsd {

std::string sha256_hex(std::span<const std::byte> data);

}  // namespace rlsd
