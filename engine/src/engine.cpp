#include "engine.h"

#include "error.h"

#include <algorithm>
#include <numeric>

namespace rlsd {
namespace {

constexpr std::int32_t default_max_particles = 256;
constexpr std::int64_t rows_at_once = 16;  // of the kernel matrix, in one piece of parallel work

std::size_t threads_of(const rlsd_engine_options &options) {
    if (options.threads > 0) return static_cast<std::size_t>(options.threads);
    return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

Engine::Engine(const std::string &folder, const rlsd_engine_options &options)
    : options_(options), bundle_(std::make_unique<Bundle>(folder, ort::Runtime::open(options.onnxruntime))),
      workers_(threads_of(options)), scratch_(workers_.count()) {
    options_.onnxruntime = options_.device = nullptr;  // the caller's, no longer needed
    if (options_.max_particles == 0) options_.max_particles = default_max_particles;
    describe();
    if (options_.log != nullptr)
        options_.log(options_.user, RLSD_LOG_INFO,
                     text("bundle '", bundle_->manifest().name, "', ONNX Runtime ", bundle_->runtime().version(), ", ",
                          workers_.count(), " threads").c_str());
}

Engine::~Engine() { drop_all(RLSD_CANCELLED, "the engine was closed"); }

void Engine::describe() {
    for (const std::string &line : bundle_->manifest().lines) description_ += line + "\n";
    std::size_t bytes = 0;
    if (!bundle_->manifest().operators.empty())
        bytes = Batch(*bundle_, bundle_->manifest().operators[0], bundle_->batches().back()).bytes() /
                static_cast<std::size_t>(bundle_->batches().back());
    description_ += text("onnxruntime ", bundle_->runtime().version(), "\nthreads ", workers_.count(),
                         "\nmax_particles ", options_.max_particles, "\nbytes_per_particle ", bytes, "\n");
}

std::shared_ptr<Job> Engine::submit(const rlsd_params &params, const rlsd_request &request) {
    auto job = std::make_shared<Job>(*bundle_, params, request);
    for (const std::int64_t batch : bundle_->batches()) bundle_->session("operator." + job->op->name + ".loss", batch);
    queue_.push_back(job);
    return job;
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
            job->start();
            job->started = now_seconds();
            in_flight += job->particles;
            active_.push_back(job);
            changed_ = true;
        }
        queue_.pop_front();
    }
}

void Engine::pack() {
    if (!changed_) return;
    used_.clear();
    for (const OperatorInfo &op : bundle_->manifest().operators) {
        std::vector<Lane> lanes;
        for (const auto &job : active_)
            if (job->op == &op)
                for (std::int64_t i = 0; i < job->particles; ++i) lanes.push_back({job.get(), i});
        pack_operator(op, std::move(lanes));
    }
    changed_ = false;
}

// Large batches as long as every worker gets one, smaller ones for the rest.
void Engine::pack_operator(const OperatorInfo &op, std::vector<Lane> lanes) {
    const auto workers = static_cast<std::int64_t>(workers_.count());
    auto next = lanes.begin();
    for (auto size = bundle_->batches().rbegin(); size != bundle_->batches().rend(); ++size) {
        const bool smallest = size + 1 == bundle_->batches().rend();
        while (next != lanes.end() && (smallest || lanes.end() - next >= *size * workers)) {
            for (std::int64_t worker = 0; worker < workers && next != lanes.end(); ++worker) {
                const auto end = next + std::min<std::ptrdiff_t>(*size, lanes.end() - next);
                use(op, *size, {next, end});
                next = end;
            }
        }
    }
}

void Engine::use(const OperatorInfo &op, std::int64_t size, std::vector<Lane> lanes) {
    Batch *free = nullptr;
    for (Batch &batch : batches_)
        if (&batch.op() == &op && batch.size() == size && std::find(used_.begin(), used_.end(), &batch) == used_.end())
            free = &batch;
    if (free == nullptr) free = &batches_.emplace_back(*bundle_, op, size);
    free->seat(std::move(lanes));
    used_.push_back(free);
}

void Engine::each(const std::vector<Batch *> &batches, void (Batch::*stage)()) {
    const double start = now_seconds();
    workers_.run(batches.size(), [&](std::size_t i, std::size_t) {
        if (cancelled_ || !batches[i]->error.empty()) return;
        try {
            (batches[i]->*stage)();
        } catch (const std::exception &error) {
            batches[i]->error = error.what();
        }
    });
    parallel_ += (now_seconds() - start) * double(workers_.count());
}

void Engine::tick() {
    const double start = now_seconds();
    failed_ = RLSD_OK;
    parallel_ = 0;
    try {
        admit();
        pack();
    } catch (const std::bad_alloc &) {
        drop_all(RLSD_OUT_OF_MEMORY, "out of memory");
        throw;
    }
    early_.clear();
    late_.clear();
    for (Batch *batch : used_) (batch->waits() ? late_ : early_).push_back(batch);
    each(late_, &Batch::first);
    repel();
    each(late_, &Batch::second);
    each(early_, &Batch::both);
    collect();
    conclude();
    ++ticks_;
    wall_ += now_seconds() - start;
    if (failed_ != RLSD_OK) throw Error(failed_, failure_);
}

// Each job's repulsion, in pieces of some rows; a row's sums run over the particles in order, whoever computes it.
void Engine::repel() {
    struct Piece {
        Job *job;
        Crowd crowd;
        std::int64_t first, last;
    };
    const double start = now_seconds();
    std::vector<Piece> pieces;
    for (const auto &job : active_) {
        if (!job->repelled() || job->broken >= 0) continue;
        const Crowd crowd = job->crowd();
        for (std::int64_t row = 0; row < crowd.n; row += rows_at_once)
            pieces.push_back({job.get(), crowd, row, std::min(crowd.n, row + rows_at_once)});
    }
    if (pieces.empty()) return;
    std::vector<double> spent(workers_.count());
    spent[0] = now_seconds() - start;
    workers_.run(pieces.size(), [&](std::size_t i, std::size_t worker) {
        if (cancelled_) return;
        const double begin = now_seconds();
        const Piece &piece = pieces[i];
        for (std::int64_t row = piece.first; row < piece.last; ++row)
            repulsion_row(piece.crowd, row, &piece.job->repulsion[static_cast<std::size_t>(row * piece.crowd.d)],
                          scratch_[worker]);
        spent[worker] += now_seconds() - begin;
    });
    const double busy = std::accumulate(spent.begin(), spent.end(), 0.0);
    times_.repulsion += busy;
    parallel_ += (now_seconds() - start) * double(workers_.count()) - busy;
}

// Times of the batches, and failures to the jobs that sat in them.
void Engine::collect() {
    Times tick;
    for (Batch *batch : used_) {
        tick.add(batch->times);
        batch->times = {};
        if (batch->error.empty()) continue;
        for (const Lane &lane : batch->lanes()) lane.job->fail(RLSD_RUNTIME_ERROR, batch->error);
        batch->error.clear();
    }
    times_.add(tick);
    idle_ += std::max(0.0, parallel_ - tick.busy());
}

// Ends what is done, failed or dropped; moves the others to their next step.
void Engine::conclude() {
    if (cancelled_.exchange(false)) {
        drop_all(RLSD_CANCELLED, "cancelled");
        failed_ = RLSD_CANCELLED;
        failure_ = "the run was cancelled";
        return;
    }
    for (const auto &job : active_) {
        if (job->broken >= 0)
            job->fail(RLSD_NON_FINITE, text("item ", job->item, ", particle ", job->broken.load(), ": the state became ",
                                            "NaN or infinite at step ", job->step, " of ", job->steps()));
        if (!job->done()) {
            if (job->stepping()) {
                particle_steps_ += job->particles;
                ++job->step;
                job->set_step();
            } else {
                job->finish();
            }
        }
        if (job->done()) job->seconds = now_seconds() - job->started;
        if (job->status != RLSD_OK && failed_ == RLSD_OK && !job->dropped) {
            failed_ = job->status;
            failure_ = job->message;
        }
    }
    const auto over = [this](const std::shared_ptr<Job> &job) {
        jobs_done_ += job->done();
        return job->done() || job->dropped;
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
    used_.clear();
    changed_ = true;
}

void Engine::run() {
    const double start = now_seconds();
    const std::int64_t before = particle_steps_;
    rlsd_status first = RLSD_OK;
    std::string message;
    while (left() != 0) {
        try {
            tick();
        } catch (const Error &error) {
            if (error.status == RLSD_CANCELLED) throw;
            if (first == RLSD_OK) first = error.status, message = error.what();
        }
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

void Engine::stats(rlsd_stats &out) const {
    out.ticks = ticks_, out.particle_steps = particle_steps_;
    out.denoiser_runs = times_.denoiser_runs, out.decoder_runs = times_.decoder_runs;
    out.decoder_pull_runs = times_.decoder_pull_runs;
    out.denoiser = times_.denoiser, out.decoder = times_.decoder, out.decoder_pull = times_.decoder_pull;
    out.features = times_.features, out.operators = times_.operators;
    out.repulsion = times_.repulsion, out.elementwise = times_.elementwise, out.idle = idle_, out.wall = wall_;
}

}  // namespace rlsd
