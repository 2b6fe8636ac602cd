// The loader of bundles up to the sessions: the input is the manifest's lines up to a byte 0, then files f0, f1, ..., each
// after its length in two bytes; what is left is tuning.txt. The files get their lines and the manifest its seal, so that what is read is not stopped by a digest.
#include "bundle.h"
#include "error.h"
#include "sha256.h"
#include "tuning.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string_view>
#include <unistd.h>

namespace {

const std::string &folder() {
    static const std::string &made = *new std::string([] {  // outlives all statics, as it is used at the end
        char name[] = "/dev/shm/rlsd-fuzz-XXXXXX";
        if (mkdtemp(name) == nullptr) std::abort();
        std::atexit([] { std::filesystem::remove_all(folder()); });
        return std::string(name);
    }());
    return made;
}

void write(const std::string &name, std::string_view content) {
    std::ofstream(folder() + "/" + name, std::ios::binary | std::ios::trunc) << content;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    std::string_view rest(reinterpret_cast<const char *>(data), size);
    const auto next = [&rest](std::size_t length, std::size_t separator) {
        const std::string_view part = rest.substr(0, length);
        rest.remove_prefix(std::min(rest.size(), part.size() + separator));
        return part;
    };
    std::string lines = "rlsd-bundle 1\n" + std::string(next(rest.find('\0'), 1));
    if (!lines.ends_with('\n')) lines += '\n';
    for (int i = 0; i < 8 && rest.size() > 2; ++i) {
        const std::string name{'f', char('0' + i)};
        const std::string_view length = next(2, 0);
        const std::string_view content = next(std::size_t(std::uint8_t(length[0])) << 8 | std::uint8_t(length[1]), 0);
        write(name, content);
        lines += "file " + name + " " + std::to_string(content.size()) + " " + rlsd::sha256_hex(std::as_bytes(std::span(content))) + "\n";
    }
    write("tuning.txt", rest);
    write("manifest.txt", lines + "end " + rlsd::sha256_hex(std::as_bytes(std::span(lines))) + "\n");
    try {
        rlsd::Bundle bundle(folder(), nullptr);
        if (bundle.batches().empty() || bundle.abar().empty()) __builtin_trap();
        rlsd::read_tuning(bundle, "a device");
    } catch (const rlsd::Error &error) {
        if (error.status != RLSD_BAD_BUNDLE) __builtin_trap();
    }
    return 0;
}
