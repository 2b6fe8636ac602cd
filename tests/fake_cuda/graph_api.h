// Captures and graphs.
#pragma once

#include "control.h"

EXPORT CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
    return call("cuStreamBeginCapture_v2", READY | CONTEXT, [&](std::string &line) {
        line += " " + driver->name(stream) + " mode " + std::to_string(mode);
        if (!driver->known(stream))
            return code::INVALID_HANDLE;
        if (stream == nullptr || mode < 0 || mode > 2)
            return stream == nullptr ? code::CAPTURE_UNSUPPORTED : code::INVALID_VALUE;
        if (stream->capture != nullptr)
            return code::ILLEGAL_STATE;
        stream->capture = std::make_shared<Capture>(Capture{stream, mode, std::this_thread::get_id()});
        stream->last_work = 0;
        stream->joined = true;
        return code::SUCCESS;
    });
}

// All streams leave the capture; whether each one's work had been waited for.
inline bool leave(const std::shared_ptr<Capture> &capture) {
    bool joined = true;
    for (const auto &each : driver->streams)
        if (each->capture == capture) {
            joined = joined && each->joined;
            each->capture = nullptr;
            each->last_work = 0;
        }
    return joined;
}

EXPORT CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    return call("cuStreamEndCapture", READY | CONTEXT, [&](std::string &line) {
        line += " " + driver->name(stream);
        *graph = nullptr;
        if (!driver->known(stream))
            return code::INVALID_HANDLE;
        if (stream == nullptr || stream->capture == nullptr)
            return code::ILLEGAL_STATE;
        std::shared_ptr<Capture> capture = stream->capture;
        if (capture->origin != stream) {
            capture->valid = false;
            return code::CAPTURE_UNMATCHED;
        }
        if (capture->mode != 2 && capture->thread != std::this_thread::get_id())
            return code::CAPTURE_WRONG_THREAD;
        bool joined = leave(capture);
        if (!capture->valid || !joined)
            return capture->valid ? code::CAPTURE_UNJOINED : code::CAPTURE_INVALIDATED;
        *graph = driver->graphs.add({0, capture->items});
        line += " " + driver->graphs.name("graph", *graph) + " of " + std::to_string(capture->items.size()) + " items";
        return code::SUCCESS;
    });
}

EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    return call("cuStreamIsCapturing", READY | CONTEXT, [&](std::string &line) {
        line += " " + driver->name(stream);
        if (!driver->known(stream))
            return code::INVALID_HANDLE;
        bool captured = stream != nullptr && stream->capture != nullptr;
        *status = static_cast<CUstreamCaptureStatus>(captured ? (stream->capture->valid ? 1 : 2) : 0);
        return code::SUCCESS;
    });
}

// A graph or executable graph that a call names.
template <class T> int named_graph(std::string &line, const Handles<T> &handles, const char *kind, T *graph) {
    line += " " + handles.name(kind, graph);
    if (handles.has(graph))
        return code::SUCCESS;
    driver->memory.fault(std::string(kind) + " handle that does not exist");
    return code::INVALID_HANDLE;
}

EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec *exec, CUgraph graph, unsigned long long) {
    return call("cuGraphInstantiateWithFlags", READY | CONTEXT, [&](std::string &line) {
        int result = named_graph(line, driver->graphs, "graph", graph);
        if (result != code::SUCCESS)
            return result;
        *exec = driver->execs.add({0, graph->items});
        line += " to " + driver->execs.name("graph exec", *exec);
        return code::SUCCESS;
    });
}

EXPORT CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
    return call("cuGraphLaunch", READY | CONTEXT, [&](std::string &line) {
        int result = named_graph(line, driver->execs, "graph exec", exec);
        line += " " + driver->name(stream);
        if (result != code::SUCCESS || !driver->known(stream))
            return code::INVALID_HANDLE;
        std::vector<Item> items = exec->items;
        for (const Item &item : items)
            if (result == code::SUCCESS)
                result = driver->submit(stream, item);
        return result;
    });
}

EXPORT CUresult cuGraphExecDestroy(CUgraphExec exec) {
    return call("cuGraphExecDestroy", READY | CONTEXT, [&](std::string &line) {
        int result = named_graph(line, driver->execs, "graph exec", exec);
        driver->execs.remove(exec);
        return result;
    });
}

EXPORT CUresult cuGraphDestroy(CUgraph graph) {
    return call("cuGraphDestroy", READY | CONTEXT, [&](std::string &line) {
        int result = named_graph(line, driver->graphs, "graph", graph);
        driver->graphs.remove(graph);
        return result;
    });
}
