// Random numbers that are addressed, not streamed: Philox4x32-10 (Salmon et al., SC 2011).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace rlsd {

// Streams other than the steps 0 .. 2^31 - 1.
inline constexpr std::uint32_t stream_initial_z = 0xFFFFFFFFu, stream_initial_x = 0xFFFFFFFEu;
inline constexpr std::uint32_t stream_tie_break = 0x80000000u;  // + step

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key);

// Standard normal numbers by Box and Muller; out[e] depends on (seed, item, particle, stream, e) alone.
void normal(std::uint64_t seed, std::uint32_t item, std::uint32_t particle, std::uint32_t stream, float *out,
            std::size_t count);

}  // namespace rlsd
