// The C interface of rlsd.h over the core: checks of handles and sizes, and nothing is thrown across.
#include "../include/rlsd.h"
#include "engine.h"
#include "error.h"
#include "philox.h"
#include "processors.h"
#include "repulsion.h"
#include "snapshot.h"

#include <atomic>
#include <cfenv>
#include <cstring>
#include <exception>
#include <new>

#include <unistd.h>

struct rlsd_engine {
    rlsd::Engine core;
    const pid_t process = getpid();
    std::atomic<bool> busy{false};
};

struct rlsd_job {
    std::shared_ptr<rlsd::Job> core;
    rlsd_engine *engine;  // valid while the job is not done
};

namespace {

using rlsd::require;

// A thread's message ends before the program's static objects do, whose destructors may still call.
thread_local bool message_is_gone = false;

struct Message {
    std::string text;
    ~Message() { message_is_gone = true; }
};

thread_local Message last_error;

rlsd_status fail(rlsd_status status, const char *message) noexcept {
    if (message_is_gone) return status;
    try {
        last_error.text = message;
    } catch (...) {
        last_error.text.clear();
    }
    return status;
}

// What the caller's thread rounds, flushes to zero and traps is its own affair: the same numbers come out, and afterwards
// it does so again. (ONNX Runtime sets some of it, too.)
class PlainNumbers {
  public:
    PlainNumbers() { std::fegetenv(&before_), std::fesetenv(FE_DFL_ENV); }
    ~PlainNumbers() { std::fesetenv(&before_); }

  private:
    std::fenv_t before_;
};

template <class Body> rlsd_status guarded(const Body &body) {
    const PlainNumbers plain;
    try {
        body();
        return RLSD_OK;
    } catch (const rlsd::Error &error) {
        return fail(error.status, error.what());
    } catch (const rlsd::ort::NoRuntime &error) {
        return fail(RLSD_NO_RUNTIME, error.what());
    } catch (const rlsd::ort::OrtError &error) {
        return fail(rlsd::says_out_of_memory(error.what()) ? RLSD_OUT_OF_MEMORY : RLSD_RUNTIME_ERROR, error.what());
    } catch (const std::bad_alloc &) {
        return fail(RLSD_OUT_OF_MEMORY, "out of memory");
    } catch (const std::exception &error) {
        return fail(RLSD_INTERNAL, error.what());
    } catch (...) {
        if (!std::current_exception()) throw;  // none of C++: the thread ends within a callback, as Python's do at its exit
        return fail(RLSD_INTERNAL, "unknown exception");
    }
}

// A copy of the caller's struct, whose size may be that of an older version; missing fields keep their defaults.
template <class T> T taken(const T *given, const T &defaults, const char *what) {
    T copy = defaults;
    if (given == nullptr) return copy;
    require(given->size >= sizeof(size_t) && given->size <= 1 << 16 && given->size % alignof(T) == 0, what, " has size ",
            given->size, ": fill it with its _init function");  // a size that no version has would cut a pointer in two
    std::memcpy(&copy, given, std::min(given->size, sizeof(T)));
    copy.size = sizeof(T);
    return copy;
}

// Writes what fits into the caller's struct of `size` bytes.
template <class T> void give(T *out, size_t size, const T &values, const char *what) {
    require(out != nullptr, what, " is NULL");
    require(size >= sizeof(size_t) && size <= 1 << 16, what, " has size ", size, ": pass sizeof of your struct");
    std::memset(out, 0, size);
    std::memcpy(out, &values, std::min(size, sizeof(T)));
    out->size = size;
}

rlsd_params default_params() {
    rlsd_params p{};
    p.size = sizeof p;
    p.variant = RLSD_AUGMENTED;
    p.steps = 200;
    p.rho = 0.07, p.lambda = 0.15, p.lr_x = 0.4, p.lr_z = 0.8, p.gamma = 0, p.repulsion_until = 1;
    p.repulsion = RLSD_REPULSION_AUTO;
    p.guidance = 1, p.beta1 = 0.9, p.beta2 = 0.99, p.adam_eps = 4e-8;
    return p;
}

template <class T> T empty() {
    T value{};
    value.size = sizeof(T);
    return value;
}

// A child that a process forks has neither its threads nor its GPU: it would wait for them without end.
rlsd::Engine &usable(rlsd_engine *engine) {
    require(engine != nullptr, "engine is NULL");
    require(engine->process == getpid(), "the engine belongs to process ", engine->process, ", which forked this one, ", getpid(),
            ": open one here");
    return engine->core;
}

// A call that has the engine to itself. A second thread's, or a callback's, would find it in the middle of a step.
class Turn {
  public:
    explicit Turn(rlsd_engine *engine) : core_(usable(engine)), busy_(engine->busy) {
        require(!busy_.exchange(true), "the engine is at work: one thread at a time may call it, and none of its callbacks");
    }
    ~Turn() { busy_ = false; }
    Turn(const Turn &) = delete;
    rlsd::Engine *operator->() const { return &core_; }

  private:
    rlsd::Engine &core_;
    std::atomic<bool> &busy_;
};

}  // namespace

const char *rlsd_last_error(void) { return message_is_gone ? "" : last_error.text.c_str(); }
const char *rlsd_version(void) { return RLSD_VERSION; }

int32_t rlsd_usable_processors(void) {
    int32_t found = 1;
    guarded([&] { found = static_cast<int32_t>(rlsd::usable_processors()); });
    return found;
}

rlsd_status rlsd_engine_options_init(rlsd_engine_options *options, size_t size) {
    return guarded([&] { give(options, size, empty<rlsd_engine_options>(), "options"); });
}

rlsd_status rlsd_params_init(rlsd_params *params, size_t size) {
    return guarded([&] { give(params, size, default_params(), "params"); });
}

rlsd_status rlsd_request_init(rlsd_request *request, size_t size) {
    return guarded([&] {
        auto defaults = empty<rlsd_request>();
        defaults.particles = 1;
        give(request, size, defaults, "request");
    });
}

rlsd_status rlsd_engine_open(const char *bundle, const rlsd_engine_options *options, rlsd_engine **out) {
    return guarded([&] {
        require(out != nullptr, "out is NULL");
        *out = nullptr;
        require(bundle != nullptr, "bundle is NULL");
        const auto given = taken(options, empty<rlsd_engine_options>(), "options");
        require(given.threads >= 0 && given.threads <= 1024, "threads is ", given.threads, ", allowed is 0 to 1024");
        require(given.max_particles >= 0, "max_particles is ", given.max_particles, ", allowed is 0 or more");
        require(given.progress_interval >= 0, "progress_interval is ", given.progress_interval, ", allowed is 0 or more");
        *out = new rlsd_engine{{bundle, given}};
    });
}

void rlsd_engine_close(rlsd_engine *engine) {
    if (engine != nullptr && engine->process == getpid() && !engine->busy) delete engine;
}

const char *rlsd_engine_describe(const rlsd_engine *engine) {
    return engine == nullptr ? "" : engine->core.description().c_str();
}

rlsd_status rlsd_submit(rlsd_engine *engine, const rlsd_params *params, const rlsd_request *request, rlsd_job **out) {
    return guarded([&] {
        require(out != nullptr, "out is NULL");
        *out = nullptr;
        const Turn core(engine);
        require(request != nullptr, "request is NULL");
        auto job = std::make_unique<rlsd_job>();
        job->core = core->submit(taken(params, default_params(), "params"),
                                 taken(request, empty<rlsd_request>(), "request"));
        job->engine = engine;
        *out = job.release();
    });
}

rlsd_status rlsd_job_snapshot(const rlsd_job *job, void *out, size_t capacity, size_t *size) {
    if (size != nullptr) *size = 0;
    return guarded([&] {
        require(job != nullptr, "job is NULL");
        require(size != nullptr, "size is NULL");
        require(!job->core->done(), "the job is done: there is nothing to go on with");
        const Turn core(job->engine);
        const std::size_t wanted = rlsd::snapshot_size(*job->core);
        *size = wanted;
        if (out == nullptr) return;
        require(capacity >= wanted, "capacity is ", capacity, ", ", wanted, " bytes are needed");
        std::memcpy(out, core->snapshot(*job->core).data(), wanted);
    });
}

rlsd_status rlsd_tick(rlsd_engine *engine, int64_t *left) {
    const rlsd_status status = guarded([&] { Turn(engine)->tick(); });
    if (left != nullptr) *left = engine == nullptr ? 0 : engine->core.left();
    return status;
}

rlsd_status rlsd_run(rlsd_engine *engine) {
    return guarded([&] { Turn(engine)->run(); });
}

void rlsd_cancel(rlsd_engine *engine) {
    if (engine != nullptr) engine->core.cancel();
}

rlsd_status rlsd_job_query(const rlsd_job *job, rlsd_job_info *info) {
    return guarded([&] {
        require(job != nullptr, "job is NULL");
        require(info != nullptr, "info is NULL");
        const rlsd::Job &core = *job->core;
        auto facts = empty<rlsd_job_info>();
        facts.state = core.state, facts.status = core.status;
        facts.step = core.step, facts.steps = core.steps();
        facts.seconds = core.done() ? core.seconds : core.started == 0 ? 0 : rlsd::now_seconds() - core.started;
        facts.message = core.done() ? core.message.c_str() : "";  // which stays where it is from then on
        give(info, info->size, facts, "info");
    });
}

void rlsd_job_release(rlsd_job *job) {
    if (job == nullptr) return;
    // In a forked child the job is its parent's still, and so may be the memory of its outputs.
    if (job->core->done() || job->engine->process == getpid()) {
        job->core->dropped = true;
        job->core->fail(RLSD_CANCELLED, "released");
    }
    delete job;
}

rlsd_status rlsd_evaluate(rlsd_engine *engine, const char *graph, int64_t count, const rlsd_tensor *inputs,
                          size_t input_count, const rlsd_tensor *outputs, size_t output_count) {
    return guarded([&] {
        const Turn core(engine);
        require(graph != nullptr, "graph is NULL");
        require(inputs != nullptr || input_count == 0, "inputs is NULL");
        require(outputs != nullptr || output_count == 0, "outputs is NULL");
        core->evaluate(graph, count, {inputs, input_count}, {outputs, output_count});
    });
}

void rlsd_normal(uint64_t seed, uint32_t item, uint32_t particle, uint32_t stream, float *out, size_t count) {
    const PlainNumbers plain;
    rlsd::normal(seed, item, particle, stream, out, count);
}

rlsd_status rlsd_repulsion_gradient(const float *phi, int64_t n, int64_t d, uint64_t seed, uint32_t item, uint32_t step,
                                    float *g, float *bandwidth) {
    return guarded([&] {
        require(n >= 1 && n <= 1 << 24, "n is ", n, ", allowed is 1 to ", 1 << 24);
        require(d >= 1 && d <= 1 << 28, "d is ", d, ", allowed is 1 to ", 1 << 28);
        require(phi != nullptr, "phi is NULL");
        require(g != nullptr, "g is NULL");
        rlsd::Crowd crowd{phi, n, d, seed, item, step};
        crowd.scale = rlsd::crowd_scale(phi, n, d);
        rlsd::RepulsionScratch scratch;
        for (int64_t i = 0; i < n; ++i) {
            const double h = rlsd::repulsion_row(crowd, i, g + i * d, scratch);
            if (bandwidth != nullptr) bandwidth[i] = static_cast<float>(h);
        }
    });
}

rlsd_status rlsd_engine_stats(const rlsd_engine *engine, rlsd_stats *stats) {
    return guarded([&] {
        require(engine != nullptr, "engine is NULL");
        require(stats != nullptr, "stats is NULL");
        auto facts = empty<rlsd_stats>();
        engine->core.stats(facts);
        give(stats, stats->size, facts, "stats");
    });
}
