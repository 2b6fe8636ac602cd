// What each graph of a bundle must look like: names, types and shapes of its inputs and outputs.
#pragma once

#include "manifest.h"
#include "ort.h"

namespace rlsd {

// Throws Error(RLSD_BAD_BUNDLE) with one sentence.
void check_contract(const Manifest &manifest, const std::string &graph, std::int64_t batch, const ort::Session &session);

}  // namespace rlsd
