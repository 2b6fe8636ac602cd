// The manifest's parser: the input is a whole manifest where it begins like one, else the lines of one that is sealed.
#include "error.h"
#include "manifest.h"
#include "sha256.h"

#include <span>
#include <string>

namespace {

// A manifest that is taken must be of one piece; one that is refused must say why.
void parse(const std::string &content) {
    try {
        const rlsd::Manifest m = rlsd::parse_manifest(content);
        if (m.name.empty() || m.latent.size() != 3 || m.image.size() != 3 || rlsd::count_of(m.image) < 1) __builtin_trap();
    } catch (const rlsd::Error &error) {
        const std::string said = error.what();
        if (error.status != RLSD_BAD_BUNDLE || said.empty()) __builtin_trap();
        for (const char c : said)
            if (c < ' ' || c > '~') __builtin_trap();
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    const std::string input(reinterpret_cast<const char *>(data), size);
    if (input.starts_with("rlsd")) return parse(input), 0;
    const std::string lines = "rlsd-bundle 1\n" + input + (input.ends_with('\n') ? "" : "\n");
    parse(lines + "end " + rlsd::sha256_hex(std::as_bytes(std::span(lines))) + "\n");
    return 0;
}
