// Streams and events.
#pragma once

#include "control.h"

EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned int flags) {
    return call("cuStreamCreate", READY | CONTEXT, [&](std::string &line) {
        if (flags > 1)
            return code::INVALID_VALUE;
        *stream = driver->streams.add({.number = 0, .blocking = flags == 0});
        line += " " + driver->name(*stream) + (flags == 0 ? "" : " non-blocking");
        return code::SUCCESS;
    });
}

// The work of a stream that a call names, which may not be done inside a callback or beside a capture of that stream.
inline int named_stream(std::string &line, CUstream stream) {
    line += " " + driver->name(stream);
    if (!driver->known(stream))
        return code::INVALID_HANDLE;
    if (stream != nullptr && inside > 0)
        return driver->not_permitted(driver->name(stream));
    if (stream == nullptr || stream->capture == nullptr)
        return code::SUCCESS;
    stream->capture->valid = false;
    return code::CAPTURE_UNSUPPORTED;
}

EXPORT CUresult cuStreamDestroy_v2(CUstream stream) {
    return call("cuStreamDestroy_v2", READY | CONTEXT, [&](std::string &line) {
        int result = stream == nullptr ? code::INVALID_HANDLE : named_stream(line, stream);
        if (result != code::SUCCESS)
            return result;
        result = driver->drain(stream);
        driver->streams.remove(stream);
        return result;
    });
}

EXPORT CUresult cuStreamSynchronize(CUstream stream) {
    return call("cuStreamSynchronize", READY | CONTEXT, [&](std::string &line) {
        int result = named_stream(line, stream);
        return result != code::SUCCESS ? result : driver->drain(stream);
    });
}

EXPORT CUresult cuStreamQuery(CUstream stream) {
    return call("cuStreamQuery", READY | CONTEXT, [&](std::string &line) {
        int result = named_stream(line, stream);
        if (result != code::SUCCESS || stream == nullptr)
            return result;
        result = stream->busy ? code::SUCCESS : driver->step(stream);
        bool rest = stream->busy || !stream->queue.empty();
        return result != code::SUCCESS ? result : rest ? code::NOT_READY : code::SUCCESS;
    });
}

EXPORT CUresult cuEventCreate(CUevent *event, unsigned int flags) {
    return call("cuEventCreate", READY | CONTEXT, [&](std::string &line) {
        *event = driver->events.add({.number = 0, .timed = (flags & 2) == 0});
        line += " " + driver->events.name("event", *event);
        return code::SUCCESS;
    });
}

inline int named_event(std::string &line, CUevent event) {
    line += " " + driver->events.name("event", event);
    if (driver->events.has(event))
        return code::SUCCESS;
    driver->memory.fault("event handle that does not exist");
    return code::INVALID_HANDLE;
}

EXPORT CUresult cuEventDestroy_v2(CUevent event) {
    return call("cuEventDestroy_v2", READY | CONTEXT, [&](std::string &line) {
        int result = named_event(line, event);
        driver->events.remove(event);
        return result;
    });
}

inline Item record_item(std::shared_ptr<Mark> mark) {
    return [mark] {
        mark->done = true;
        mark->time = Clock::now();
        return code::SUCCESS;
    };
}

EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
    return call("cuEventRecord", READY | CONTEXT, [&](std::string &line) {
        int result = named_event(line, event);
        line += " " + driver->name(stream);
        if (result != code::SUCCESS || !driver->known(stream))
            return code::INVALID_HANDLE;
        bool captured = stream != nullptr && stream->capture != nullptr;
        if (captured && !stream->capture->valid)
            return code::CAPTURE_INVALIDATED;
        auto mark = captured ? nullptr : std::make_shared<Mark>(Mark{stream});
        result = captured ? code::SUCCESS : driver->submit(stream, record_item(mark));
        if (result != code::SUCCESS)
            return result;
        event->mark = mark;
        event->capture = captured ? stream->capture : nullptr;
        event->captured_in = stream;
        event->position = captured ? stream->last_work : 0;
        return code::SUCCESS;
    });
}

// A wait for a captured event draws the stream into the capture, and joins the other stream's work.
inline int captured_wait(CUstream stream, CUevent event) {
    const auto &capture = event->capture;
    if (stream == nullptr)
        return code::CAPTURE_IMPLICIT;
    if (!driver->streams.has(event->captured_in) || event->captured_in->capture != capture)
        return code::CAPTURED_EVENT;
    if (stream->capture == nullptr)
        stream->capture = capture;
    if (stream->capture != capture) {
        stream->capture->valid = capture->valid = false;
        return code::CAPTURE_MERGE;
    }
    if (event->position >= event->captured_in->last_work)
        event->captured_in->joined = true;
    stream->joined = stream == capture->origin;
    return capture->valid ? code::SUCCESS : code::CAPTURE_INVALIDATED;
}

EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int) {
    return call("cuStreamWaitEvent", READY | CONTEXT, [&](std::string &line) {
        line += " " + driver->name(stream);
        if (named_event(line, event) != code::SUCCESS || !driver->known(stream))
            return code::INVALID_HANDLE;
        if (event->capture != nullptr)
            return captured_wait(stream, event);
        if (event->mark == nullptr)
            return code::SUCCESS;
        if (stream != nullptr && stream->capture != nullptr) {
            stream->capture->valid = false;
            return code::CAPTURE_ISOLATION;
        }
        return driver->submit(stream, [mark = event->mark] { return driver->wait_for(*mark); });
    });
}

// The event's last record, where it may be waited for.
inline int finished(std::string &line, CUevent event, bool wait) {
    int result = named_event(line, event);
    if (result != code::SUCCESS)
        return result;
    if (event->capture != nullptr)
        return code::CAPTURED_EVENT;
    std::shared_ptr<Mark> mark = event->mark;
    if (mark == nullptr || mark->done)
        return code::SUCCESS;
    if (wait)
        return driver->wait_for(*mark);
    if (inside > 0)
        return driver->not_permitted("cuEventQuery");
    result = mark->stream->busy ? code::SUCCESS : driver->step(mark->stream);
    return result != code::SUCCESS ? result : mark->done ? code::SUCCESS : code::NOT_READY;
}

EXPORT CUresult cuEventSynchronize(CUevent event) {
    return call("cuEventSynchronize", READY | CONTEXT | NO_CAPTURE,
                [&](std::string &line) { return finished(line, event, true); });
}

EXPORT CUresult cuEventQuery(CUevent event) {
    return call("cuEventQuery", READY | CONTEXT | NO_CAPTURE,
                [&](std::string &line) { return finished(line, event, false); });
}

EXPORT CUresult cuEventElapsedTime(float *milliseconds, CUevent first, CUevent second) {
    return call("cuEventElapsedTime", READY | CONTEXT, [&](std::string &line) {
        for (CUevent event : {first, second}) {
            if (named_event(line, event) != code::SUCCESS || !event->timed || event->mark == nullptr)
                return code::INVALID_HANDLE;
            if (!event->mark->done)
                return code::NOT_READY;
        }
        *milliseconds = std::chrono::duration<float, std::milli>(second->mark->time - first->mark->time).count();
        return code::SUCCESS;
    });
}
