// The one exception that crosses the core: a status of rlsd.h and a sentence.
#pragma once

#include "../include/rlsd.h"

#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>

namespace rlsd {

struct Error : std::runtime_error {
    Error(rlsd_status status, const std::string &message) : std::runtime_error(message), status(status) {}
    rlsd_status status;
};

// "a", 3, "b" -> "a3b", whatever the process's locale puts between digits.
template <class... Parts> std::string text(const Parts &...parts) {
    std::ostringstream out;
    out.imbue(std::locale::classic());
    (out << ... << parts);
    return out.str();
}

// What a file or a library said, on one line: printable ASCII, not too much of it.
inline std::string one_line(std::string said) {
    constexpr std::size_t most = 400;
    if (said.size() > most) said.replace(most, std::string::npos, "...");
    for (char &c : said)
        if (c < ' ' || c > '~') c = c == '\n' ? ' ' : '?';
    return said;
}

// Whether a sentence of ONNX Runtime, CUDA or their libraries is about memory that was not to be had.
inline bool says_out_of_memory(const std::string &sentence) {
    for (const char *words : {"out of memory", "bad_alloc", "Failed to allocate memory", "CUDNN_STATUS_ALLOC_FAILED",
                              "CUBLAS_STATUS_ALLOC_FAILED"})
        if (sentence.find(words) != std::string::npos) return true;
    return false;
}

// Throws INVALID_ARGUMENT unless `allowed`.
template <class... Parts> void require(bool allowed, const Parts &...parts) {
    if (!allowed) throw Error(RLSD_INVALID_ARGUMENT, text(parts...));
}

}  // namespace rlsd
