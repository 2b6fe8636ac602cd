#include "engine.h"

#include "error.h"
#include "gpu.h"
#include "host.h"
#include "processors.h"
#include "snapshot.h"

#include <algorithm>
#include <charconv>

namespace rlsd {
namespace {

constexpr std::int32_t default_max_particles = 256;

std::size_t threads_of(const rlsd_engine_options &options) {
    if (options.threads > 0) return static_cast<std::size_t>(options.threads);
    return usable_processors();
}

// The number in "cuda:0", -1 for "cpu"; checked against what the bundle was made for.
int ordinal_of(const char *device, const Manifest &manifest) {
    const std::string name = device != nullptr ? device : manifest.for_cuda() ? "cuda:0" : "cpu";
    int ordinal = -1;
    if (name.starts_with("cuda:")) {
        const char *end = name.data() + name.size();
        const auto [rest, error] = std::from_chars(name.data() + 5, end, ordinal);
        if (error != std::errc() || rest != end || ordinal < 0) ordinal = -1;
    }
    require(name == "cpu" || ordinal >= 0, "device is '", name, "', allowed is cpu, or cuda:0 and so on");
    require(manifest.for_cuda() == (ordinal >= 0), "device is '", name, "', but bundle '", manifest.name,
            "' was exported for '", manifest.target, "'");
    return ordinal;
}

constexpr const char *no_memory = "out of memory";  // short enough for a string to need none

void say(std::string &to, std::string_view sentence) noexcept {
    try {
        to = sentence;
    } catch (const std::bad_alloc &) {
        to = no_memory;
    }
}

template <class Work> Failure failure_of(const Work &work) {
    Failure failure;
    try {
        work();
    } catch (const std::bad_alloc &) {
        failure = {RLSD_OUT_OF_MEMORY, no_memory};
    } catch (const std::exception &error) {
        const auto *ours = dynamic_cast<const Error *>(&error);
        failure.status = ours != nullptr ? ours->status : RLSD_RUNTIME_ERROR;
        say(failure.message, error.what());
    } catch (...) {
        if (!std::current_exception()) throw;  // the thread ends within a callback
        failure = {RLSD_RUNTIME_ERROR, "unknown"};
    }
    return failure;
}

}  // namespace

Engine::Engine(const std::string &folder, const rlsd_engine_options &options)
    : options_(options), bundle_(std::make_unique<Bundle>(folder, ort::Runtime::open(options.onnxruntime))) {
    const int ordinal = ordinal_of(options.device, bundle_->manifest());
    if (ordinal < 0) backend_ = std::make_unique<Host>(*bundle_, threads_of(options), cancelled_);
    else backend_ = std::make_unique<Gpu>(*bundle_, ordinal, cancelled_);
    options_.onnxruntime = options_.device = nullptr;  // the caller's, no longer needed
    if (options_.max_particles == 0) options_.max_particles = default_max_particles;
    describe();
    if (options_.log != nullptr)
        options_.log(options_.user, RLSD_LOG_INFO,
                     text("bundle '", bundle_->manifest().name, "', ONNX Runtime ", bundle_->runtime().version()).c_str());
    largest_ = bundle_->batches().back();
    tell();
}

Engine::~Engine() { drop_all(RLSD_CANCELLED, "the engine was closed"); }

void Engine::describe() {
    for (const std::string &line : bundle_->manifest().lines) description_ += line + "\n";
    description_ += text("onnxruntime ", bundle_->runtime().version(), "\nmax_particles ", options_.max_particles, "\n",
                         backend_->describe());
}

// What makes it slower than it could be: a graph that is not recorded costs the host a launch for every node, in every
// step, and a smaller batch uses less of the device.
void Engine::tell() {
    const auto warn = [this](const std::string &sentence) {
        if (options_.log != nullptr) options_.log(options_.user, RLSD_LOG_WARNING, sentence.c_str());
    };
    for (const std::string &graph : bundle_->not_recorded())
        if (told_.insert(graph).second) warn(text("graph '", graph, "' cannot be recorded as a CUDA graph"));
    if (backend_->largest() < largest_) {
        largest_ = backend_->largest();
        warn(text("memory is short: batches have at most ", largest_, " of ", bundle_->batches().back(), " lanes"));
    }
}

std::shared_ptr<Job> Engine::submit(const rlsd_params &params, const rlsd_request &request) {
    auto job = std::make_shared<Job>(*bundle_, backend_->memory(), params, request);
    backend_->prepare(*job->op);
    queue_.push_back(job);
    return job;
}

Bytes Engine::snapshot(Job &job) {
    const bool fetched = job.state == RLSD_ACTIVE && !job.drawn();
    const auto forget = [fetched](Job *drawn) {
        if (fetched) drawn->z = Variable(), drawn->x = Variable();
    };
    const std::unique_ptr<Job, decltype(forget)> state(&job, forget);
    if (fetched) backend_->fetch(job);
    return snapshot_of(job);
}

std::int64_t Engine::left() const { return static_cast<std::int64_t>(queue_.size() + active_.size()); }

// Jobs start in the order of their submission, as many as may be in flight together.
void Engine::admit() {
    const auto over = [](const std::shared_ptr<Job> &job) { return job->done(); };  // released between ticks
    changed_ |= std::erase_if(active_, over) != 0;
    std::int64_t in_flight = 0;
    for (const auto &job : active_) in_flight += job->particles;
    while (!queue_.empty()) {
        const auto job = queue_.front();
        if (!job->dropped) {
            if (!active_.empty() && in_flight + job->particles > options_.max_particles) return;
            const Failure failure = failure_of([&] {
                job->begin();
                backend_->start(*job);
                job->started = now_seconds();
                active_.push_back(job);
            });
            if (failure.status == RLSD_OK) in_flight += job->particles, changed_ = true;
            else end(*job, failure);
        }
        queue_.pop_front();
    }
}

// A job that cannot be seated ends, the newest first: what is under way goes on.
void Engine::pack() {
    while (changed_ && !active_.empty()) {
        const Failure failure = failure_of([this] {
            backend_->pack(active_);
            tell();
        });
        if (failure.status == RLSD_OK) {
            for (const auto &job : active_) job->seated = true;
            changed_ = false;
        } else if (active_.back()->seated) {  // not even those that were seated before
            end_active(failure);
        } else {
            end(*active_.back(), failure);
            active_.pop_back();
            if (active_.empty()) backend_->drop();
        }
    }
}

void Engine::tick() {
    const double start = now_seconds();
    failed_ = RLSD_OK;
    admit();
    pack();
    const Failure failure = failure_of([this] {
        if (!active_.empty()) backend_->tick(active_);
        conclude();
    });
    if (failure.status != RLSD_OK) end_active(failure);  // a step that is left halfway cannot be done again
    ++ticks_;
    wall_ += now_seconds() - start;
    if (failed_ != RLSD_OK) throw Error(failed_, failure_);
}

void Engine::end(Job &job, const Failure &failure) noexcept {
    job.fail(failure.status, failure.message);
    job.seconds = job.started == 0 ? 0 : now_seconds() - job.started;
    ++jobs_done_;
    note(job);
}

void Engine::end_active(const Failure &failure) noexcept {
    for (const auto &job : active_)
        if (!job->done()) end(*job, failure);
    active_.clear();
    backend_->drop();
    changed_ = true;
}

// What the first job that fails in a tick failed of.
void Engine::note(const Job &job) noexcept {
    if (job.status == RLSD_OK || job.dropped || failed_ != RLSD_OK) return;
    failed_ = job.status;
    say(failure_, job.message);
}

// Ends what is done or failed, which a dropped job is; moves the others to their next step.
void Engine::conclude() {
    if (cancelled_.exchange(false)) {
        drop_all(RLSD_CANCELLED, "cancelled");
        failed_ = RLSD_CANCELLED;
        failure_ = "the run was cancelled";
        return;
    }
    for (const auto &job : active_) {
        if (job->doomed_to != RLSD_OK) job->fail(job->doomed_to, std::string(job->message));
        if (job->broken >= 0)
            job->fail(RLSD_NON_FINITE, text("item ", job->item, ", particle ", job->address(job->broken), ": the state became ",
                                            "NaN or infinite at step ", job->step, " of ", job->steps()));
        if (!job->done()) {
            if (job->again) {
                job->again = false;
            } else if (job->stepping()) {
                particle_steps_ += job->particles;
                ++job->step;
                job->set_step();
            } else {
                job->finish();
            }
        }
        if (job->done()) job->seconds = now_seconds() - job->started;
        note(*job);
    }
    const auto over = [this](const std::shared_ptr<Job> &job) {
        jobs_done_ += job->done();
        return job->done();
    };
    changed_ |= std::erase_if(active_, over) != 0;
    std::erase_if(queue_, [](const std::shared_ptr<Job> &job) { return job->dropped; });
}

void Engine::drop_all(rlsd_status why, const char *message) {
    for (auto &job : active_) job->fail(why, message);
    for (auto &job : queue_) job->fail(why, message);
    jobs_done_ += left();
    active_.clear();
    queue_.clear();
    backend_->drop();
    changed_ = true;
}

void Engine::run() {
    const double start = now_seconds();
    double told = start;
    const std::int64_t before = particle_steps_;
    rlsd_status first = RLSD_OK;
    std::string message;
    while (left() != 0) {
        try {
            tick();
        } catch (const Error &error) {
            if (error.status == RLSD_CANCELLED) throw;
            if (first == RLSD_OK) first = error.status, say(message, error.what());
        } catch (const std::bad_alloc &) {  // for the sentence
            if (first == RLSD_OK) first = RLSD_OUT_OF_MEMORY, say(message, no_memory);
        }
        if (left() != 0 && now_seconds() - told < options_.progress_interval) continue;
        told = now_seconds();
        if (report(start, before)) cancel();
    }
    if (cancelled_.exchange(false) && first == RLSD_OK) throw Error(RLSD_CANCELLED, "the run was cancelled");
    if (first != RLSD_OK) throw Error(first, message);
}

bool Engine::report(double start, std::int64_t before) const {
    if (options_.progress == nullptr) return false;
    rlsd_progress progress{};
    progress.size = sizeof progress;
    progress.jobs_queued = static_cast<std::int64_t>(queue_.size());
    progress.jobs_active = static_cast<std::int64_t>(active_.size());
    progress.jobs_done = jobs_done_;
    progress.particle_steps = particle_steps_ - before;
    for (const auto &job : active_) progress.particle_steps_left += job->steps_left();
    for (const auto &job : queue_) progress.particle_steps_left += job->steps_left();
    progress.seconds = now_seconds() - start;
    return options_.progress(options_.user, &progress) != 0;
}

void Engine::evaluate(const std::string &graph, std::int64_t count, std::span<const rlsd_tensor> inputs,
                      std::span<const rlsd_tensor> outputs) {
    require(bundle_->has(graph), "graph '", graph, "' is not in bundle '", bundle_->manifest().name, "'");
    require(count >= 1 && count <= 1 << 24, "count is ", count, ", allowed is 1 to ", 1 << 24);
    backend_->evaluate(graph, count, inputs, outputs);
}

void Engine::stats(rlsd_stats &out) const {
    backend_->stats(out);
    out.ticks = ticks_, out.particle_steps = particle_steps_, out.wall = wall_;
}

}  // namespace rlsd
