#include "cubins.h"

namespace rlsd::cuda {
namespace {

constexpr int dynamic_shared = 8;                 // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr std::int64_t shared_by_default = 49152;  // more has to be asked for
constexpr std::size_t most_arguments = 32;

char kind_of(const std::string &type) { return type.starts_with('*') ? 'p' : type == "fp32" ? 'f' : type == "i32" ? 'i' : '?'; }

}  // namespace

Kernel::Kernel(const Device &device, const KernelInfo &info, std::span<const std::byte> cubin)
    : device_(device), info_(info) {
    const std::string doing = text("cannot load kernel ", info.name);
    device.check(device.driver().module_load(&module_, cubin.data()), doing.c_str());
    try {
        device.check(device.driver().module_function(&function_, module_, info.entry.c_str()), doing.c_str());
        if (info.shared > shared_by_default)
            device.check(device.driver().function_attribute(function_, dynamic_shared, static_cast<int>(info.shared)),
                         doing.c_str());
    } catch (...) {
        device.driver().module_unload(module_);
        throw;
    }
}

Kernel::~Kernel() { device_.driver().module_unload(module_); }

std::int64_t Kernel::constant(const std::string &name) const {
    const auto found = info_.constants.find(name);
    if (found == info_.constants.end())
        throw Error(RLSD_BAD_BUNDLE, text("kernel '", info_.name, "' has no constant '", name, "'"));
    if (found->second < 1)
        throw Error(RLSD_BAD_BUNDLE, text("kernel '", info_.name, "': ", name, " is ", found->second, ", at least 1 is needed"));
    return found->second;
}

void Kernel::launch(Grid grid, std::initializer_list<Argument> given, StreamHandle *stream) const {
    static const Argument scratch(DevicePointer(0));  // Triton's two, which our kernels do not use
    const auto wrong = [&] { return Error(RLSD_BAD_BUNDLE, text("kernel '", info_.name, "' takes other arguments than the engine gives")); };
    if (info_.arguments.size() != given.size() + 2 || info_.arguments.size() > most_arguments) throw wrong();
    void *pointers[most_arguments];
    std::size_t i = 0;
    for (const Argument &argument : given) {
        if (kind_of(info_.arguments[i].second) != argument.kind) throw wrong();
        pointers[i++] = const_cast<std::byte *>(argument.bits.data());  // the driver only reads
    }
    pointers[i] = pointers[i + 1] = const_cast<std::byte *>(scratch.bits.data());
    ++device_.launches;
    device_.check(device_.driver().launch(function_, static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                                          static_cast<unsigned>(grid.z), static_cast<unsigned>(32 * info_.warps), 1, 1,
                                          static_cast<unsigned>(info_.shared), stream, pointers, nullptr),
                  text("cannot launch kernel ", info_.name).c_str());
}

// A cubin runs on devices of its own major version that are not older than it; from 9.0 on, where Triton compiles for
// one device's own instructions (sm_90a), on that one alone.
Kernels::Kernels(const Device &device, const Manifest &manifest, Files files) : device_(device), files_(std::move(files)) {
    const std::int64_t here = device.capability();
    const auto runs = [&](std::int64_t arch) { return arch == here || (arch < 90 && arch / 10 == here / 10 && arch < here); };
    for (const KernelInfo &info : manifest.kernels) {
        auto &best = known_[info.name];
        if (runs(info.arch) && (best == nullptr || best->arch < info.arch)) best = &info;
    }
}

const Kernel &Kernels::get(const std::string &name) {
    const auto loaded = loaded_.find(name);
    if (loaded != loaded_.end()) return loaded->second;
    const auto known = known_.find(name);
    if (known == known_.end()) throw Error(RLSD_BAD_BUNDLE, text("the bundle has no kernel '", name, "'"));
    if (known->second == nullptr)
        throw Error(RLSD_BAD_BUNDLE, text("the bundle's kernels do not run on ", device_.name(), " (sm_", device_.capability(),
                                          "): export it with --arch ", device_.capability()));
    return loaded_.try_emplace(name, device_, *known->second, files_(known->second->file)).first->second;
}

void Kernels::load_all() {
    for (const auto &[name, info] : known_)
        if (info != nullptr) get(name);
}

}  // namespace rlsd::cuda
