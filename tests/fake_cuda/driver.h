// The fake's state, and how the work of streams is queued, recorded and run. One mutex guards all of it; whoever waits
// for a stream runs its work, and gives the mutex back around callbacks.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernel.h"
#include "memory.h"

using Clock = std::chrono::steady_clock;
using Launch = void (*)(const char *line, const unsigned grid[3], const void *arguments, int count);
using Item = std::function<int()>; // one piece of a stream's work: returns an error code, is run with the mutex held

struct Capture {
    CUstream origin;
    int mode;
    std::thread::id thread;
    bool valid = true;
    std::vector<Item> items = {};
};

struct CUstream_st {
    long number;
    bool blocking; // waits for, and is waited for by, the null stream
    std::deque<Item> queue = {};
    bool busy = false; // an item is being run, by whichever thread
    std::shared_ptr<Capture> capture = {};
    size_t last_work = 0; // of the capture's items, where this stream's last one ends
    bool joined = true;   // nobody has yet to wait for what it recorded
};

struct Mark { // one record of an event
    CUstream stream;
    bool done = false;
    Clock::time_point time = {};
};

struct CUevent_st {
    long number;
    bool timed;
    std::shared_ptr<Mark> mark = {}; // the last record; in a capture instead:
    std::shared_ptr<Capture> capture = {};
    CUstream captured_in = nullptr;
    size_t position = 0;
};

struct CUgraph_st {
    long number;
    std::vector<Item> items;
};

struct CUgraphExec_st {
    long number;
    std::vector<Item> items;
};

struct CUfunc_st {
    std::shared_ptr<Kernel> kernel;
    int shared_limit = 49152; // more must be asked for
};

struct CUmod_st {
    long number;
    std::shared_ptr<Kernel> kernel;
    std::vector<std::unique_ptr<CUfunc_st>> functions = {};
};

struct CUctx_st {
    long retained = 0;
};

// Live objects of one kind, numbered and kept in order of creation.
template <class T> class Handles {
public:
    T *add(T object) {
        object.number = ++count_;
        return objects_.emplace_back(std::make_unique<T>(std::move(object))).get();
    }

    bool has(const T *object) const {
        return std::any_of(begin(), end(), [&](const auto &each) { return each.get() == object; });
    }

    void remove(const T *object) {
        std::erase_if(objects_, [&](const auto &each) { return each.get() == object; });
    }

    std::string name(const char *kind, const T *object) const {
        return std::string(kind) + (has(object) ? " " + std::to_string(object->number) : " ?");
    }

    std::string leaks(const char *kind) const {
        std::string text;
        for (const auto &each : *this)
            text += name(kind, each.get()) + "\n";
        return text;
    }

    auto begin() const { return objects_.begin(); }
    auto end() const { return objects_.end(); }

private:
    std::vector<std::unique_ptr<T>> objects_;
    long count_ = 0;
};

inline std::mutex mutex;
inline std::condition_variable_any changed;
inline thread_local int inside = 0; // callbacks that this thread is in
inline Launch on_launch = nullptr;

class Driver {
public:
    bool initialised = false;
    int major = 9, minor = 0;
    CUctx_st context;
    Memory memory;
    Handles<CUstream_st> streams;
    Handles<CUevent_st> events;
    Handles<CUgraph_st> graphs;
    Handles<CUgraphExec_st> execs;
    Handles<CUmod_st> modules;

    std::string name(CUstream stream) const { return stream == nullptr ? "stream 0" : streams.name("stream", stream); }

    bool known(CUstream stream) {
        if (stream == nullptr || streams.has(stream))
            return true;
        memory.fault("stream handle that does not exist");
        return false;
    }

    // Queue or record one piece of work; on the null stream, run it.
    int submit(CUstream stream, Item item) {
        if (stream == nullptr)
            return run_null(item);
        if (inside > 0)
            return not_permitted(name(stream));
        if (stream->capture == nullptr) {
            stream->queue.push_back(std::move(item));
            return code::SUCCESS;
        }
        if (!stream->capture->valid)
            return code::CAPTURE_INVALIDATED;
        stream->capture->items.push_back(std::move(item));
        stream->last_work = stream->capture->items.size();
        stream->joined = stream == stream->capture->origin;
        return code::SUCCESS;
    }

    // Run all that is queued, and give the first error. The null stream's are the blocking streams'.
    int drain(CUstream stream) {
        if (stream == nullptr)
            return inside > 0 ? code::SUCCESS : drain_all(false);
        int first = code::SUCCESS;
        while (idle(stream), !stream->queue.empty())
            keep_first(first, step(stream));
        return first;
    }

    int drain_all(bool also_non_blocking = true) {
        int first = code::SUCCESS;
        for (size_t i = 0; i < count(streams); ++i) { // a callback may create streams
            CUstream stream = std::next(streams.begin(), static_cast<long>(i))->get();
            if (stream->blocking || also_non_blocking)
                keep_first(first, drain(stream));
        }
        return first;
    }

    // Run the oldest queued item, if there is one.
    int step(CUstream stream) {
        idle(stream);
        if (stream->queue.empty())
            return code::SUCCESS;
        Item item = std::move(stream->queue.front());
        stream->queue.pop_front();
        stream->busy = true;
        int result = item();
        stream->busy = false;
        changed.notify_all();
        return result;
    }

    int wait_for(const Mark &mark) {
        if (!mark.done && inside > 0)
            return not_permitted("a wait for " + name(mark.stream));
        int first = code::SUCCESS;
        while (!mark.done && (idle(mark.stream), !mark.stream->queue.empty()))
            keep_first(first, step(mark.stream));
        return first;
    }

    // Call out without the mutex, then look for damage.
    template <class Call> int call_out(const std::string &what, Call call) {
        mutex.unlock();
        ++inside;
        call();
        --inside;
        mutex.lock();
        return memory.check_guards(what) ? code::SUCCESS : code::ILLEGAL_ADDRESS;
    }

    int not_permitted(const std::string &what) {
        memory.fault(what + " inside a callback, where only stream 0 may be used");
        return code::NOT_PERMITTED;
    }

    // What may not happen beside a capture of the modes global or, in the same thread, thread-local.
    int unsafe_call() {
        return spoil([](const Capture &each) {
            return each.mode == 0 || (each.mode == 1 && each.thread == std::this_thread::get_id());
        }) ? code::CAPTURE_UNSUPPORTED : code::SUCCESS;
    }

    // Invalidate the captures for which this holds; whether there are any.
    template <class Condition> bool spoil(Condition condition) {
        bool found = false;
        for (const auto &stream : streams)
            if (stream->capture != nullptr && condition(*stream->capture)) {
                stream->capture->valid = false;
                found = true;
            }
        return found;
    }

    std::string leaks() const {
        std::string text = memory.leaks() + streams.leaks("stream") + events.leaks("event") + graphs.leaks("graph") +
                           execs.leaks("graph exec");
        for (const auto &each : modules)
            text += modules.name("module", each.get()) + " " + each->kernel->name + "\n";
        if (context.retained > 0)
            text += "context retained " + std::to_string(context.retained) + " times\n";
        return text;
    }

private:
    static void keep_first(int &first, int result) { first = first == code::SUCCESS ? result : first; }

    template <class T> static size_t count(const Handles<T> &handles) {
        return static_cast<size_t>(std::distance(handles.begin(), handles.end()));
    }

    static void idle(CUstream stream) {
        while (stream->busy)
            changed.wait(mutex);
    }

    int run_null(const Item &item) {
        if (spoil([](const Capture &each) { return each.origin->blocking; }))
            return code::CAPTURE_IMPLICIT;
        int first = drain(nullptr);
        keep_first(first, item());
        return first;
    }
};

inline Driver *driver = new Driver;
