// What tests may ask and tell the fake, and the frame around every call of the driver's interface.
#pragma once

#include <list>

#include "driver.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace control {

struct Failure {
    std::string function;
    long after;
    int result;
};

inline std::list<std::shared_ptr<std::string>> log;
inline std::map<std::string, long> counts;
inline std::list<Failure> failures;
inline long epoch = 0; // of resets: what a thread thinks is current ends with it

// The injected error of this call, if one is due.
inline int injected(const std::string &function) {
    int result = code::SUCCESS;
    for (Failure &each : failures)
        if (each.function == function && --each.after == 0)
            result = each.result;
    failures.remove_if([](const Failure &each) { return each.after <= 0; });
    return result;
}

// Text that stays readable until this thread asks again.
inline const char *keep(std::string text) {
    thread_local std::string kept;
    kept = std::move(text);
    return kept.c_str();
}

} // namespace control

// This thread's stack of contexts.
inline std::vector<CUcontext> &contexts() {
    thread_local std::vector<CUcontext> stack;
    thread_local long epoch = 0;
    if (epoch != control::epoch) {
        stack.clear();
        epoch = control::epoch;
    }
    return stack;
}

enum Needs { NOTHING = 0, READY = 1, CONTEXT = 2, NO_CAPTURE = 4 };

inline int refusal(int needs) {
    if (needs != NOTHING && !driver->initialised)
        return code::NOT_INITIALIZED;
    if ((needs & CONTEXT) != 0 && (contexts().empty() || contexts().back() == nullptr))
        return code::INVALID_CONTEXT;
    if ((needs & CONTEXT) != 0 && driver->context.retained == 0)
        return code::CONTEXT_IS_DESTROYED;
    return (needs & NO_CAPTURE) != 0 ? driver->unsafe_call() : code::SUCCESS;
}

// One call of the driver's interface: counted, written down, perhaps failed on purpose. `body` returns an error code
// and appends to its line what matters.
template <class Body> CUresult call(const char *function, int needs, Body body) {
    std::lock_guard<std::mutex> lock(mutex);
    ++control::counts[function];
    auto line = control::log.emplace_back(std::make_shared<std::string>(function));
    int result = control::injected(function);
    if (result == code::SUCCESS)
        result = refusal(needs);
    if (result == code::SUCCESS)
        result = body(*line);
    if (result != code::SUCCESS)
        *line += " -> " + std::to_string(result);
    return static_cast<CUresult>(result);
}

#ifndef FAKE_CUDA_FOR_PROVIDER // there networks are not run on the host: see provider/driver.cpp
EXPORT const int rlsd_fake_driver;
const int rlsd_fake_driver = 1;
#endif

// Everything as at first, but the launch callback stays. No other thread may be inside the fake.
EXPORT void fake_cuda_reset() {
    std::lock_guard<std::mutex> lock(mutex);
    delete driver;
    driver = new Driver;
    control::log.clear();
    control::counts.clear();
    control::failures.clear();
    ++control::epoch;
}

EXPORT void fake_cuda_set_memory(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    driver->memory.total = bytes;
}

// Larger allocations are neither poisoned nor kept after death: they take no memory until they are written.
EXPORT void fake_cuda_poison_up_to(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    driver->memory.poisoned = bytes;
}

EXPORT void fake_cuda_set_capability(int major, int minor) {
    std::lock_guard<std::mutex> lock(mutex);
    driver->major = major;
    driver->minor = minor;
}

// The nth call of that function from now on (1: the next) does nothing and returns this code.
EXPORT void fake_cuda_fail(const char *function, long nth, int result) {
    std::lock_guard<std::mutex> lock(mutex);
    control::failures.push_back({function, nth, result});
}

EXPORT long fake_cuda_count(const char *function) {
    std::lock_guard<std::mutex> lock(mutex);
    return control::counts[function];
}

EXPORT const char *fake_cuda_log() {
    std::lock_guard<std::mutex> lock(mutex);
    std::string text;
    for (const auto &line : control::log)
        text += *line + "\n";
    return control::keep(text);
}

EXPORT void fake_cuda_clear_log() {
    std::lock_guard<std::mutex> lock(mutex);
    control::log.clear();
}

// Faults so far, one a line, those included that only a look at the guards shows.
EXPORT const char *fake_cuda_faults() {
    std::lock_guard<std::mutex> lock(mutex);
    driver->memory.check_guards("now");
    return control::keep(driver->memory.faults);
}

EXPORT void fake_cuda_clear_faults() {
    std::lock_guard<std::mutex> lock(mutex);
    driver->memory.faults.clear();
}

// What has not been given back, one a line.
EXPORT const char *fake_cuda_live() {
    std::lock_guard<std::mutex> lock(mutex);
    return control::keep(driver->leaks());
}

// Bytes from here to the end of its allocation, 0 for what is not device memory.
EXPORT size_t fake_cuda_extent(CUdeviceptr pointer) {
    std::lock_guard<std::mutex> lock(mutex);
    return driver->memory.extent(pointer);
}

// Runs kernels: gets the kernel's line, the grid, and each argument's bytes in 8 of its own. Without it they do nothing.
EXPORT void fake_cuda_on_launch(Launch run) {
    std::lock_guard<std::mutex> lock(mutex);
    on_launch = run;
}
