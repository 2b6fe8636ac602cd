// A fake cubin: the line that says all about a kernel's launch, as kernels/aot.py writes it.
#pragma once

#include <optional>
#include <sstream>
#include <string>
#include <vector>

struct Argument {
    std::string name, type;
    bool pointer() const { return type[0] == '*'; }
    size_t size() const { return pointer() || type.ends_with("64") ? 8 : 4; }
};

struct Kernel {
    std::string line, name, file, entry;
    int arch = 0;
    unsigned warps = 0, shared = 0;
    std::vector<Argument> arguments = {};
    bool loaded = true;

    bool scratch(size_t argument) const { return argument + 2 >= arguments.size(); }

    // Cubins run on the same major and no smaller minor version; from 9.0 on Triton compiles for one version alone.
    bool runs_on(int major, int minor) const {
        return arch / 10 == major && (arch >= 90 ? arch % 10 == minor : arch % 10 <= minor);
    }
};

inline bool read_argument(Kernel &kernel, const std::string &word) {
    size_t colon = word.find(':');
    if (colon == std::string::npos)
        return false;
    Argument argument{word.substr(0, colon), word.substr(colon + 1)};
    for (const char *type : {"i32", "u32", "fp32", "i64", "u64", "fp64"})
        if (argument.type == type || (argument.type.size() > 1 && argument.pointer())) {
            kernel.arguments.push_back(argument);
            return true;
        }
    return false;
}

// The image ends with the second line's newline; nothing behind it is read, since nobody says how long an image is.
inline std::optional<Kernel> parse_kernel(const char *image) {
    const std::string magic = "fake cubin\n";
    for (char expected : magic)
        if (*image++ != expected)
            return std::nullopt;
    Kernel kernel;
    for (; *image != '\n'; ++image) {
        if (*image == '\0')
            return std::nullopt;
        kernel.line += *image;
    }
    std::istringstream words(kernel.line);
    std::string word;
    words >> word >> kernel.name >> kernel.arch >> kernel.file >> kernel.entry >> kernel.warps >> kernel.shared;
    if (!words || word != "kernel" || kernel.warps == 0)
        return std::nullopt;
    while (words >> word && word.find('=') == std::string::npos)
        if (!read_argument(kernel, word))
            return std::nullopt;
    size_t count = kernel.arguments.size();
    if (count < 2 || kernel.arguments[count - 2].name != "global_scratch" ||
        kernel.arguments[count - 1].name != "profile_scratch")
        return std::nullopt;
    return kernel;
}
