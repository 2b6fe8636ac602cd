// SHA-256 against the examples of FIPS 180-4, and its two ways against each other on blocks of random bytes.
#include "../../engine/src/sha256.cpp"

#include <cstdio>
#include <random>
#include <string_view>
#include <vector>

namespace {

int failures = 0;

void check(bool holds, const char *what) {
    if (!holds) ++failures, std::fprintf(stderr, "sha256: %s\n", what);
}

std::string hex(std::string_view text) { return rlsd::sha256_hex(std::as_bytes(std::span(text.data(), text.size()))); }

}  // namespace

int main() {
    check(hex("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "nothing");
    check(hex("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "abc");
    check(hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1", "two blocks");
    check(hex(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0", "long");
#if defined(__x86_64__)
    if (!rlsd::has_instructions()) return std::puts("sha256: this processor has one way only"), failures;
    std::mt19937 random(1);
    for (std::size_t blocks = 0; blocks < 40; ++blocks) {
        std::vector<unsigned char> bytes(64 * blocks + 1);
        for (unsigned char &each : bytes) each = static_cast<unsigned char>(random());
        rlsd::State plain, other;
        for (std::size_t i = 0; i < 8; ++i) plain[i] = other[i] = static_cast<std::uint32_t>(random());
        rlsd::absorb_plainly(plain, bytes.data() + 1, blocks);
        rlsd::absorb_by_instructions(other, bytes.data() + 1, blocks);
        check(plain == other, "the processor's instructions differ from plain code");
    }
#endif
    return failures;
}
