// What `rlsd tune` measured: the file tuning.txt in a bundle's folder, which is no part of the bundle.
#pragma once

#include "bundle.h"

namespace rlsd {

// Milliseconds of a tick by batch, for all batches of the bundle; empty if there is no such file, or if it is of another
// device or another bundle. Its lines: "rlsd-tuning 1", "device NAME", "bundle DIGEST", then "batch SIZE MILLISECONDS".
std::map<std::int64_t, double> read_tuning(const Bundle &bundle, const std::string &device);

}  // namespace rlsd
