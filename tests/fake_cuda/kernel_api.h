// Modules, kernels and host functions.
#pragma once

#include "basic_api.h"

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    return call("cuModuleLoadData", READY | CONTEXT | NO_CAPTURE, [&](std::string &line) {
        std::optional<Kernel> kernel = image == nullptr ? std::nullopt : parse_kernel(static_cast<const char *>(image));
        if (!kernel)
            return code::INVALID_IMAGE;
        line += " " + kernel->name;
        if (!kernel->runs_on(driver->major, driver->minor))
            return code::NO_BINARY_FOR_GPU;
        *module = driver->modules.add({.number = 0, .kernel = std::make_shared<Kernel>(*kernel)});
        return code::SUCCESS;
    });
}

inline int named_module(std::string &line, CUmodule module) {
    line += " " + driver->modules.name("module", module);
    if (driver->modules.has(module))
        return code::SUCCESS;
    driver->memory.fault("module handle that does not exist");
    return code::INVALID_HANDLE;
}

EXPORT CUresult cuModuleUnload(CUmodule module) {
    return call("cuModuleUnload", READY | CONTEXT | NO_CAPTURE, [&](std::string &line) {
        int result = named_module(line, module);
        if (result == code::SUCCESS)
            module->kernel->loaded = false;
        driver->modules.remove(module);
        return result;
    });
}

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    return call("cuModuleGetFunction", READY | CONTEXT, [&](std::string &line) {
        int result = named_module(line, module);
        line += std::string(" ") + name;
        if (result != code::SUCCESS || module->kernel->entry != name)
            return result != code::SUCCESS ? result : code::NOT_FOUND;
        if (module->functions.empty())
            module->functions.push_back(std::make_unique<CUfunc_st>(CUfunc_st{module->kernel}));
        *function = module->functions.front().get();
        return code::SUCCESS;
    });
}

inline bool known(CUfunction function) {
    for (const auto &module : driver->modules)
        for (const auto &each : module->functions)
            if (each.get() == function)
                return true;
    driver->memory.fault("function handle that does not exist");
    return false;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return call("cuFuncSetAttribute", READY | CONTEXT, [&](std::string &line) {
        if (!known(function))
            return code::INVALID_HANDLE;
        line += " " + function->kernel->name + " " + std::to_string(attribute) + " = " + std::to_string(value);
        if (attribute == 8 && (value < 0 || value > largest_shared()))
            return code::INVALID_VALUE;
        if (attribute == 8) // the most dynamic shared memory
            function->shared_limit = value;
        return code::SUCCESS;
    });
}

struct Grid {
    unsigned blocks[3];
};

// What is wrong with the shape of a launch, "" if nothing.
inline std::string wrong_shape(const CUfunc_st &function, Grid grid, Grid block, unsigned shared) {
    const Kernel &kernel = *function.kernel;
    auto [x, y, z] = grid.blocks;
    if (x == 0 || y == 0 || z == 0 || x > 2147483647 || y > 65535 || z > 65535)
        return "the grid is out of range";
    if (block.blocks[0] != 32 * kernel.warps || block.blocks[1] != 1 || block.blocks[2] != 1)
        return "the block is not " + std::to_string(32 * kernel.warps) + ",1,1";
    if (shared != kernel.shared)
        return std::to_string(shared) + " bytes of shared memory, not " + std::to_string(kernel.shared);
    if (shared > static_cast<unsigned>(function.shared_limit))
        return "more shared memory than cuFuncSetAttribute asked for";
    return "";
}

// What is wrong with the pointers, "" if nothing.
inline std::string wrong_pointers(const Kernel &kernel, const std::vector<uint64_t> &values) {
    for (size_t i = 0; i < values.size(); ++i) {
        const std::string &name = kernel.arguments[i].name;
        if (kernel.scratch(i) && values[i] != 0)
            return name + " is not null";
        if (kernel.scratch(i) || !kernel.arguments[i].pointer())
            continue;
        const Allocation *found = driver->memory.find(values[i]);
        // Networks that run as host functions have their own host memory, of which nothing is known.
        if (inside > 0 && found == nullptr && driver->memory.is_foreign(values[i]))
            continue;
        if (found == nullptr || !found->device)
            return name + " is " + driver->memory.describe(values[i]) + ", not device memory";
        if (values[i] % 16 != 0)
            return name + " is " + driver->memory.describe(values[i]) + ", not aligned to 16 bytes";
    }
    return "";
}

inline Item launch_item(std::shared_ptr<Kernel> kernel, Grid grid, std::vector<uint64_t> values) {
    return [=] {
        std::string wrong = kernel->loaded ? wrong_pointers(*kernel, values) : "its module is unloaded";
        if (!wrong.empty()) {
            driver->memory.fault("run of " + kernel->name + ": " + wrong);
            return code::ILLEGAL_ADDRESS;
        }
        Launch run = on_launch;
        return run == nullptr ? code::SUCCESS : driver->call_out("run of " + kernel->name, [&] {
            run(kernel->line.c_str(), grid.blocks, values.data(), static_cast<int>(values.size()));
        });
    };
}

inline std::vector<uint64_t> packed(const Kernel &kernel, void **parameters) {
    std::vector<uint64_t> values(kernel.arguments.size(), 0);
    for (size_t i = 0; i < values.size(); ++i)
        std::memcpy(&values[i], parameters[i], kernel.arguments[i].size());
    return values;
}

inline int launch(std::string &line, CUfunction function, Grid grid, Grid block, unsigned shared, CUstream stream,
                  void **parameters) {
    if (!known(function) || !driver->known(stream))
        return code::INVALID_HANDLE;
    const Kernel &kernel = *function->kernel;
    auto [x, y, z] = grid.blocks;
    line += " " + kernel.name + " grid " + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + " " +
            driver->name(stream);
    std::string wrong = parameters == nullptr ? "no parameters" : wrong_shape(*function, grid, block, shared);
    std::vector<uint64_t> values = parameters == nullptr ? std::vector<uint64_t>() : packed(kernel, parameters);
    if (wrong.empty())
        wrong = wrong_pointers(kernel, values);
    if (!wrong.empty()) {
        driver->memory.fault(line + ": " + wrong);
        return code::INVALID_VALUE;
    }
    return driver->submit(stream, launch_item(function->kernel, grid, std::move(values)));
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                               unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int shared,
                               CUstream stream, void **parameters, void **extra) {
    return call("cuLaunchKernel", READY | CONTEXT, [&](std::string &line) {
        if (extra != nullptr)
            return code::INVALID_VALUE;
        return launch(line, function, {{grid_x, grid_y, grid_z}}, {{block_x, block_y, block_z}}, shared, stream,
                      parameters);
    });
}

EXPORT CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void *data) {
    return call("cuLaunchHostFunc", READY | CONTEXT, [&](std::string &line) {
        line += " " + driver->name(stream);
        if (!driver->known(stream) || function == nullptr)
            return function == nullptr ? code::INVALID_VALUE : code::INVALID_HANDLE;
        return driver->submit(stream, [=] { return driver->call_out("host function", [=] { function(data); }); });
    });
}
