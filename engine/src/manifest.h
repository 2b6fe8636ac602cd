// The manifest of a bundle: plain lines "key values...", read strictly.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace rlsd {

using Shape = std::vector<std::int64_t>;

std::int64_t count_of(const Shape &shape);
std::string shape_text(const Shape &shape);

struct OperatorInfo {
    std::string name;
    Shape measurement;
    std::vector<std::pair<std::string, Shape>> params;
};

struct FileInfo {
    std::uint64_t size;
    std::string sha256;
};

// A compiled kernel and what a launch needs to know; see kernels/aot.py.
struct KernelInfo {
    std::string name, file, entry;
    std::int64_t arch = 0, warps = 0, shared = 0;
    std::vector<std::pair<std::string, std::string>> arguments;  // name, Triton type; the last two are scratch pointers
    std::map<std::string, std::int64_t> constants;
};

struct Manifest {
    std::vector<std::string> lines;  // as they stand, without the last
    std::string name, target, precision;
    Shape latent, image, context;  // context is empty where the denoiser takes none
    std::int64_t timesteps = 0, steps_offset = 0, feature_dim = 0;
    std::string alphas_cumprod, null_context, weights;         // file names
    std::map<std::string, std::string> contexts;               // name -> file
    std::map<std::string, std::map<std::int64_t, std::string>> graphs;  // name -> batch -> file
    std::vector<OperatorInfo> operators;
    std::vector<KernelInfo> kernels;                   // of bundles for CUDA
    std::map<std::string, double> cotangent_scales;    // decoder, features: what their pull-backs expect
    std::map<std::string, FileInfo> files;
    std::string digest;  // that ends it

    bool for_cuda() const { return target == "cuda"; }
};

// Throws Error(RLSD_BAD_BUNDLE) with one sentence naming line and fault.
Manifest parse_manifest(std::string_view content);

}  // namespace rlsd
