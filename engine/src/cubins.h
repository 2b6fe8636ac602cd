// The compiled kernels of a bundle on one device: found by name, checked, launched.
#pragma once

#include "cuda.h"
#include "manifest.h"

#include <array>
#include <functional>
#include <initializer_list>
#include <map>
#include <span>

namespace rlsd::cuda {

// One run-time argument of a kernel.
struct Argument {
    Argument(DevicePointer value) : kind('p') { put(value); }
    Argument(std::int32_t value) : kind('i') { put(value); }
    Argument(float value) : kind('f') { put(value); }

    char kind;
    alignas(8) std::array<std::byte, 8> bits{};

  private:
    template <class T> void put(T value) { *reinterpret_cast<T *>(bits.data()) = value; }
};

struct Grid {
    std::int64_t x, y = 1, z = 1;
};

class Kernel {
  public:
    Kernel(const Device &device, const KernelInfo &info, std::span<const std::byte> cubin);
    ~Kernel();
    Kernel(const Kernel &) = delete;
    Kernel &operator=(const Kernel &) = delete;

    // A constant that was fixed when the kernel was compiled: a tile's size, at least 1.
    std::int64_t constant(const std::string &name) const;

    // Launches on the device's stream, or on `stream`. Arguments must be those of the kernel, in number and kind.
    void launch(Grid grid, std::initializer_list<Argument> arguments) const { launch(grid, arguments, device_.stream()); }
    void launch(Grid grid, std::initializer_list<Argument> arguments, StreamHandle *stream) const;

  private:
    const Device &device_;
    const KernelInfo &info_;
    ModuleHandle *module_ = nullptr;
    FunctionHandle *function_ = nullptr;
};

// All kernels that the device can run; each is loaded when it is first asked for.
class Kernels {
  public:
    using Files = std::function<std::span<const std::byte>(const std::string &)>;

    // manifest and what `files` gives must outlive it.
    Kernels(const Device &device, const Manifest &manifest, Files files);

    // Throws RLSD_BAD_BUNDLE where the bundle has none of that name for this device.
    const Kernel &get(const std::string &name);

    void load_all();  // so that `get` never loads

  private:
    const Device &device_;
    Files files_;
    std::map<std::string, const KernelInfo *> known_;  // the newest that this device runs
    std::map<std::string, Kernel> loaded_;
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace rlsd::cuda
