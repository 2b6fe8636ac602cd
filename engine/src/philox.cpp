#include "philox.h"

#include <cmath>
#include <numbers>

namespace rlsd {

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> c, std::array<std::uint32_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
        c = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<std::uint32_t>(b),
             static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<std::uint32_t>(a)};
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return c;
}

void normal(std::uint64_t seed, std::uint32_t item, std::uint32_t particle, std::uint32_t stream, float *out,
            std::size_t count) {
    const std::array<std::uint32_t, 2> key{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
    for (std::size_t e = 0; e < count; e += 4) {
        const auto bits = philox({static_cast<std::uint32_t>(e / 4), stream, particle, item}, key);
        float four[4];
        for (int pair = 0; pair < 2; ++pair) {
            const double u = (bits[2 * pair] + 0.5) * 0x1p-32, v = (bits[2 * pair + 1] + 0.5) * 0x1p-32;
            const double radius = std::sqrt(-2 * std::log(u)), angle = 2 * std::numbers::pi * v;
            four[2 * pair] = static_cast<float>(radius * std::cos(angle));
            four[2 * pair + 1] = static_cast<float>(radius * std::sin(angle));
        }
        for (std::size_t i = 0; i < 4 && e + i < count; ++i) out[e + i] = four[i];
    }
}

}  // namespace rlsd
