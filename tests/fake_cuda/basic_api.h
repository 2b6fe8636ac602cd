// Initialisation, the device, contexts, errors.
#pragma once

#include "control.h"

EXPORT CUresult cuInit(unsigned int flags) {
    return call("cuInit", NOTHING, [&](std::string &) {
        driver->initialised = driver->initialised || flags == 0;
        return flags == 0 ? code::SUCCESS : code::INVALID_VALUE;
    });
}

EXPORT CUresult cuDriverGetVersion(int *version) {
    return call("cuDriverGetVersion", NOTHING, [&](std::string &) {
        *version = 13000;
        return code::SUCCESS;
    });
}

EXPORT CUresult cuDeviceGetCount(int *count) {
    return call("cuDeviceGetCount", READY, [&](std::string &) {
        *count = 1;
        return code::SUCCESS;
    });
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    return call("cuDeviceGet", READY, [&](std::string &line) {
        line += " " + std::to_string(ordinal);
        *device = 0;
        return ordinal == 0 ? code::SUCCESS : code::INVALID_DEVICE;
    });
}

EXPORT CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    return call("cuDeviceGetName", READY, [&](std::string &) {
        if (length < 1 || device != 0)
            return device != 0 ? code::INVALID_DEVICE : code::INVALID_VALUE;
        std::string text = "Fake GPU";
        name[text.copy(name, static_cast<size_t>(length - 1))] = '\0';
        return code::SUCCESS;
    });
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    return call("cuDeviceTotalMem_v2", READY, [&](std::string &) {
        *bytes = driver->memory.total;
        return device == 0 ? code::SUCCESS : code::INVALID_DEVICE;
    });
}

// Shared memory that a block may ask for: 227, 163 or 99 KiB.
inline int largest_shared() {
    int capability = 10 * driver->major + driver->minor;
    if (capability == 80 || capability == 87)
        return 166912;
    return driver->major == 8 || driver->major == 12 ? 101376 : 232448;
}

inline int device_attribute(int attribute) {
    switch (attribute) {
    case 1: // threads of a block
    case 2: // and along x
    case 3: // and along y
        return 1024;
    case 4: // along z
        return 64;
    case 5: // blocks of a grid along x
        return 2147483647;
    case 6: // along y
    case 7: // along z
        return 65535;
    case 8: // shared memory of a block without asking
        return 49152;
    case 10: // warp size
        return 32;
    case 16: // multiprocessors
        return 132;
    case 38: // L2 cache
        return 50 << 20;
    case 39: // threads of a multiprocessor
        return 2048;
    case 40: // asynchronous engines
        return 3;
    case 41: // unified addressing
        return 1;
    case 75:
        return driver->major;
    case 76:
        return driver->minor;
    case 97:
        return largest_shared();
    default:
        return 0;
    }
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return call("cuDeviceGetAttribute", READY, [&](std::string &line) {
        line += " " + std::to_string(attribute);
        if (device != 0)
            return code::INVALID_DEVICE;
        *value = device_attribute(attribute);
        return attribute > 0 && attribute < 200 ? code::SUCCESS : code::INVALID_VALUE;
    });
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return call("cuDevicePrimaryCtxRetain", READY, [&](std::string &) {
        if (device != 0)
            return code::INVALID_DEVICE;
        ++driver->context.retained;
        *context = &driver->context;
        return code::SUCCESS;
    });
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    return call("cuDevicePrimaryCtxRelease_v2", READY, [&](std::string &) {
        if (device != 0 || driver->context.retained == 0)
            return device != 0 ? code::INVALID_DEVICE : code::INVALID_CONTEXT;
        --driver->context.retained;
        return code::SUCCESS;
    });
}

inline bool usable(CUcontext context) {
    return context == &driver->context && driver->context.retained > 0;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    return call("cuCtxGetCurrent", READY, [&](std::string &) {
        *context = contexts().empty() ? nullptr : contexts().back();
        return code::SUCCESS;
    });
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    return call("cuCtxSetCurrent", READY, [&](std::string &line) {
        line += context == nullptr ? " none" : " context";
        if (context != nullptr && !usable(context))
            return code::INVALID_CONTEXT;
        if (!contexts().empty())
            contexts().pop_back();
        if (context != nullptr)
            contexts().push_back(context);
        return code::SUCCESS;
    });
}

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
    return call("cuCtxPushCurrent_v2", READY, [&](std::string &) {
        if (!usable(context))
            return code::INVALID_CONTEXT;
        contexts().push_back(context);
        return code::SUCCESS;
    });
}

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    return call("cuCtxPopCurrent_v2", READY, [&](std::string &) {
        if (contexts().empty())
            return code::INVALID_CONTEXT;
        if (context != nullptr)
            *context = contexts().back();
        contexts().pop_back();
        return code::SUCCESS;
    });
}

EXPORT CUresult cuCtxSynchronize() {
    return call("cuCtxSynchronize", READY | CONTEXT, [&](std::string &) {
        if (inside > 0)
            return driver->not_permitted("cuCtxSynchronize");
        if (driver->spoil([](const Capture &) { return true; }))
            return code::CAPTURE_UNSUPPORTED;
        return driver->drain_all();
    });
}

inline int error_text(int error, const char **text, const char *ErrorText::*part) {
    *text = nullptr;
    for (const ErrorText &each : ERRORS)
        if (each.value == error)
            *text = each.*part;
    return *text != nullptr ? code::SUCCESS : code::INVALID_VALUE;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **text) {
    return call("cuGetErrorName", NOTHING, [&](std::string &) { return error_text(error, text, &ErrorText::name); });
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    return call("cuGetErrorString", NOTHING, [&](std::string &) { return error_text(error, text, &ErrorText::text); });
}
