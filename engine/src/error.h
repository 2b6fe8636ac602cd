// The one exception that crosses the core: a status of rlsd.h and a sentence.
#pragma once

#include "../include/rlsd.h"

#include <sstream>
#include <stdexcept>
#include <string>

namespace rlsd {

struct Error : std::runtime_error {
    Error(rlsd_status status, const std::string &message) : std::runtime_error(message), status(status) {}
    rlsd_status status;
};

// "a", 3, "b" -> "a3b".
template <class... Parts> std::string text(const Parts &...parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// Throws INVALID_ARGUMENT unless `allowed`.
template <class... Parts> void require(bool allowed, const Parts &...parts) {
    if (!allowed) throw Error(RLSD_INVALID_ARGUMENT, text(parts...));
}

}  // namespace rlsd
