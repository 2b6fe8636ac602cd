#include "sha256.h"

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace rlsd {
namespace {

constexpr std::array<std::uint32_t, 64> round_constants = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

using State = std::array<std::uint32_t, 8>;

void absorb_block(State &state, const unsigned char *block) {
    std::uint32_t w[64];
    for (int i = 0; i < 16; ++i)
        w[i] = std::uint32_t(block[4 * i]) << 24 | std::uint32_t(block[4 * i + 1]) << 16 |
               std::uint32_t(block[4 * i + 2]) << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; ++i) {
        const std::uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ (a >> 3)) + w[i - 7] +
               (std::rotr(b, 17) ^ std::rotr(b, 19) ^ (b >> 10));
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (int i = 0; i < 64; ++i) {
        const std::uint32_t sum1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
        const std::uint32_t one = h + sum1 + ((e & f) ^ (~e & g)) + round_constants[static_cast<std::size_t>(i)] + w[i];
        const std::uint32_t sum0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
        const std::uint32_t two = sum0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + two;
    }
    const State mixed{a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < 8; ++i) state[i] += mixed[i];
}

void absorb_plainly(State &state, const unsigned char *bytes, std::size_t blocks) {
    for (std::size_t i = 0; i < blocks; ++i) absorb_block(state, bytes + 64 * i);
}

#if defined(__x86_64__)

// CPUID leaf 7, EBX bit 29: the SHA extensions. Every processor that has them has SSE4.1.
bool has_instructions() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b >> 29 & 1) != 0;
}

// The same with the processor's instructions, which keep the state as the words a b e f and c d g h, highest first, do
// two rounds each, and make four words of the schedule of the sixteen before them.
__attribute__((target("sha,sse4.1"))) void absorb_by_instructions(State &state, const unsigned char *bytes,
                                                                  std::size_t blocks) {
    const auto load = [](const void *from) { return _mm_loadu_si128(static_cast<const __m128i *>(from)); };
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    const auto words = [](unsigned highest, unsigned second, unsigned third, unsigned lowest) {
        return _mm_set_epi32(int(highest), int(second), int(third), int(lowest));
    };
    __m128i abef = words(state[0], state[1], state[4], state[5]), cdgh = words(state[2], state[3], state[6], state[7]);
    for (; blocks != 0; --blocks, bytes += 64) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
        for (std::size_t i = 0; i < 16; ++i) {
            __m128i &now = w[i % 4];
            if (i < 4) {
                now = _mm_shuffle_epi8(load(bytes + 16 * i), big_endian);
            } else {
                const __m128i last = w[(i + 3) % 4];
                const __m128i seven_before = _mm_alignr_epi8(last, w[(i + 2) % 4], 4);
                now = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(now, w[(i + 1) % 4]), seven_before), last);
            }
            const __m128i sum = _mm_add_epi32(now, load(&round_constants[4 * i]));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    std::uint32_t halves[2][4];
    _mm_storeu_si128(reinterpret_cast<__m128i *>(halves[0]), abef);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(halves[1]), cdgh);
    for (std::size_t i = 0; i < 2; ++i) {
        state[2 * i] = halves[i][3], state[2 * i + 1] = halves[i][2];
        state[2 * i + 4] = halves[i][1], state[2 * i + 5] = halves[i][0];
    }
}

void absorb(State &state, const unsigned char *bytes, std::size_t blocks) {
    static const auto way = has_instructions() ? absorb_by_instructions : absorb_plainly;
    way(state, bytes, blocks);
}

#else

constexpr auto absorb = absorb_plainly;

#endif

}  // namespace

std::string sha256_hex(std::span<const std::byte> data) {
    State state{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const auto *bytes = reinterpret_cast<const unsigned char *>(data.data());
    const std::size_t whole = data.size() / 64 * 64, rest = data.size() - whole;
    absorb(state, bytes, whole / 64);
    unsigned char tail[128] = {};
    if (rest != 0) std::memcpy(tail, bytes + whole, rest);
    tail[rest] = 0x80;
    const std::size_t end = rest < 56 ? 64 : 128;
    const std::uint64_t bits = std::uint64_t(data.size()) * 8;
    for (std::size_t i = 0; i < 8; ++i) tail[end - 1 - i] = static_cast<unsigned char>(bits >> (8 * i));
    absorb(state, tail, end / 64);
    std::string hex;
    for (const std::uint32_t word : state)
        for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
    return hex;
}

}  // namespace rlsd
