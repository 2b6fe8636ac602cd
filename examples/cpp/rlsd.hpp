// rlsd.h for C++17: handles that free themselves, exceptions instead of statuses. Copy it into your program.
#pragma once

#include <rlsd.h>

#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace rlsd {

// A call failed: what() is the library's sentence.
struct Error : std::runtime_error {
    Error(rlsd_status status, const char *sentence) : std::runtime_error(sentence), status(status) {}
    rlsd_status status;
};

inline void check(rlsd_status status) {
    if (status != RLSD_OK) throw Error(status, rlsd_last_error());
}

inline rlsd_engine_options options() {
    rlsd_engine_options filled;
    check(rlsd_engine_options_init(&filled, sizeof filled));
    return filled;
}

inline rlsd_params params() {
    rlsd_params filled;
    check(rlsd_params_init(&filled, sizeof filled));
    return filled;
}

inline rlsd_request request() {
    rlsd_request filled;
    check(rlsd_request_init(&filled, sizeof filled));
    return filled;
}

// A submitted job. Destroy it before the buffers that its request named: they are written until it is done.
class Job {
  public:
    explicit Job(rlsd_job *job) : handle(job) {}

    // state, step, steps, seconds and so on; throws when the job has ended badly.
    rlsd_job_info info() const {
        rlsd_job_info found{};
        found.size = sizeof found;
        check(rlsd_job_query(handle.get(), &found));
        if (found.status != RLSD_OK) throw Error(static_cast<rlsd_status>(found.status), found.message);
        return found;
    }

    bool done() const { return info().state == RLSD_DONE; }

  private:
    struct Release {
        void operator()(rlsd_job *job) const { rlsd_job_release(job); }
    };
    std::unique_ptr<rlsd_job, Release> handle;
};

// An opened bundle; for one thread at a time.
class Engine {
  public:
    explicit Engine(const std::string &bundle, const rlsd_engine_options &with = options()) {
        rlsd_engine *opened = nullptr;
        check(rlsd_engine_open(bundle.c_str(), &with, &opened));
        handle.reset(opened);
    }

    Job submit(const rlsd_params &params, const rlsd_request &request) {
        rlsd_job *job = nullptr;
        check(rlsd_submit(handle.get(), &params, &request, &job));
        return Job(job);
    }

    // One step of every particle in flight. A job that fails says so itself (Job::info), and the others go on.
    void tick() { rlsd_tick(handle.get(), nullptr); }

    // The numbers on the first line "KEY a b c" of what the engine says about its bundle; none without such a line.
    std::vector<size_t> numbers(const std::string &key) const {
        std::istringstream lines(rlsd_engine_describe(handle.get()));
        std::vector<size_t> found;
        for (std::string line; std::getline(lines, line);) {
            if (line.compare(0, key.size() + 1, key + ' ') != 0) continue;
            std::istringstream values(line.substr(key.size()));
            for (size_t value; values >> value;) found.push_back(value);
            break;
        }
        return found;
    }

  private:
    struct Close {
        void operator()(rlsd_engine *engine) const { rlsd_engine_close(engine); }
    };
    std::unique_ptr<rlsd_engine, Close> handle;
};

} // namespace rlsd
