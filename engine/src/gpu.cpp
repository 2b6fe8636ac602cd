#include "gpu.h"

#include "onnx_weights.h"
#include "tuning.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>

namespace rlsd {
namespace {

constexpr std::int64_t aligned = 16;    // what sizes the kernels were promised to be multiples of
constexpr double lower = 1.0 / 16;      // what a loss scale is multiplied with when a half has overflowed
constexpr int redone_at_most = 4;       // in a job

// 0 where there is none: what a bundle says in a line of `info` is only shown.
std::size_t number_after(const std::string &line, std::size_t space) {
    std::size_t number = 0;
    std::from_chars(line.data() + space + 1, line.data() + line.size(), number);
    return number;
}

}  // namespace

bool is_out_of_memory(const std::exception &error) {
    const auto *ours = dynamic_cast<const Error *>(&error);
    if (ours != nullptr) return ours->status == RLSD_OUT_OF_MEMORY;
    return says_out_of_memory(error.what());
}

std::mutex &setting_up() {
    static std::mutex mutex;
    return mutex;
}

// What the caller queued before on streams of its own has to be done.
void DeviceMemory::read(void *to, const void *from, std::size_t bytes) const {
    const cuda::Inside inside(device_);
    if (cuda::where_is(device_.driver(), from) == cuda::Where::host) {
        Memory::read(to, from, bytes);
        return;
    }
    const std::lock_guard turn(setting_up());
    device_.check(device_.driver().context_wait(), "the device failed");
    device_.download(to, reinterpret_cast<cuda::DevicePointer>(from), bytes);
    device_.wait();
}

void DeviceMemory::clear(void *at, std::size_t bytes) const {
    const cuda::Driver &driver = device_.driver();
    const cuda::Inside inside(device_, std::nothrow);
    driver.stream_wait(device_.stream());  // after a failure results may be on their way to it, and then the caller frees it
    const cuda::Where where = cuda::where_is(driver, at);
    if (where == cuda::Where::host) Memory::clear(at, bytes);
    if (where == cuda::Where::device &&
        driver.fill_bytes(reinterpret_cast<cuda::DevicePointer>(at), 0, bytes, device_.stream()) == cuda::success)
        driver.stream_wait(device_.stream());
}

bool DeviceMemory::on_host(const void *at) const {
    const cuda::Inside inside(device_);
    return cuda::where_is(device_.driver(), at) == cuda::Where::host;
}

void DeviceMemory::give(void *to, cuda::DevicePointer from, std::size_t bytes) const {
    if (cuda::where_is(device_.driver(), to) == cuda::Where::device) device_.copy(reinterpret_cast<cuda::DevicePointer>(to), from, bytes);
    else device_.download(to, from, bytes);
}

Gpu::Gpu(Bundle &bundle, int ordinal, const std::atomic<bool> &cancelled)
    : bundle_(bundle), cancelled_(cancelled), device_(ordinal), memory_(device_),
      kernels_(device_, bundle.manifest(), [&bundle](const std::string &file) { return std::span(bundle.bytes(file)); }),
      operators_(bundle.runtime().api(), device_, kernels_), latent_(count_of(bundle.manifest().latent)),
      image_(count_of(bundle.manifest().image)), largest_(bundle.batches().back()), clock_(device_) {
    for (const std::int64_t values : {latent_, image_})
        if (values % aligned != 0 || values > INT32_MAX)
            throw Error(RLSD_BAD_BUNDLE, text("bundle '", bundle.manifest().name, "' has latents or images of ", values,
                                              " values: on a GPU they must be multiples of 16, and less than 2^31"));
    tuned_ = read_tuning(bundle, device_.name());
    near_ = std::make_unique<DeviceRepulsion>(device_, kernels_, latent_);
    if (bundle.has("features")) seen_ = std::make_unique<DeviceRepulsion>(device_, kernels_, bundle.manifest().feature_dim);
    placement_.provider = !device_.driver().hosted;
    placement_.graphs = std::getenv("RLSD_NO_CUDA_GRAPHS") == nullptr;  // for debugging
    placement_.ordinal = ordinal;
    placement_.stream = device_.stream();
    placement_.operators = operators_.domain();
    placement_.weights = [this](std::span<const std::byte> model) { return weights_of(model); };
    upload_weights();
    bundle_.place(&placement_);
    for (const auto &[graph, by_batch] : bundle_.manifest().graphs)  // so that what is wrong with them shows at once
        if (!graph.starts_with("operator.")) bundle_.session(graph, bundle_.batches().front());
    kernels_.load_all();  // later another engine might be recording
    inside_.reset();
    turn_.unlock();
}

Gpu::~Gpu() {
    turn_.lock();
    inside_.emplace(device_, std::nothrow);
    device_.driver().stream_wait(device_.stream());  // where the device is lost all that follows fails as quietly
}

Gpu::Placed::~Placed() {
    for (const std::int64_t batch : bundle.batches()) bundle.close_sessions(batch);
    bundle.place(nullptr);
}

// The weights of all graphs lie in one file, each once: so they do in the device's memory, for the sessions of all
// batches.
void Gpu::upload_weights() {
    const std::string &file = bundle_.manifest().weights;
    if (file.empty()) return;
    const Bytes &bytes = bundle_.bytes(file);
    weights_ = cuda::Buffer(device_, bytes.size());
    device_.upload(weights_.at(), bytes.data(), bytes.size());
    device_.wait();
}

std::map<std::string, const ort::OrtValue *> Gpu::weights_of(std::span<const std::byte> model) {
    std::map<std::string, const ort::OrtValue *> found;
    const ort::Runtime &runtime = bundle_.runtime();
    for (const ExternalWeight &weight : external_weights(model)) {
        const bool real = weight.type == ort::Type::float16 || weight.type == ort::Type::float32;
        if (!real || weight.file != bundle_.manifest().weights) continue;  // shapes and indices are read on the host
        if (weight.offset > weights_.bytes() || weight.length > weights_.bytes() - weight.offset)
            throw Error(RLSD_BAD_BUNDLE, text("weight '", weight.name, "' lies beyond the end of ", weight.file));
        shared_.emplace_back(runtime, reinterpret_cast<void *>(weights_.at(weight.offset)), weight.length, weight.shape,
                             weight.type, device_.driver().hosted ? runtime.cpu() : runtime.cuda(device_.ordinal()));
        found[weight.name] = shared_.back().get();
    }
    return found;
}

std::string Gpu::describe() {
    std::size_t kept = 0;
    const std::string batch = std::to_string(bundle_.batches().front()) + " ";
    for (const std::string &line : bundle_.manifest().lines)
        for (const char *graph : {"decoder ", "features "})
            if (line.starts_with("info kept " + (graph + batch)))
                kept += number_after(line, line.rfind(' ')) / static_cast<std::size_t>(bundle_.batches().front());
    std::string lines = text("device ", device_.name(), "\ncapability ", device_.capability(), "\nbytes_per_particle ", kept, "\n");
    for (const auto &[batch, time] : tuned_) lines += text("tuned ", batch, " ", time, "\n");
    return lines;
}

void Gpu::prepare(const OperatorInfo &op) {
    const std::lock_guard turn(setting_up());
    const cuda::Inside inside(device_);
    bundle_.session("operator." + op.name + ".loss", bundle_.batches().front());
}

void Gpu::drop() {
    const std::lock_guard turn(setting_up());
    const cuda::Inside inside(device_, std::nothrow);
    seated_.clear();
    guests_.clear();
    for (Seat &seat : seats_) seat.leave();
}

void Gpu::stats(rlsd_stats &out) const {
    times_.give(out);
    out.launches = device_.launches, out.synchronisations = device_.synchronisations, out.redone = redone_;
    out.not_recorded = std::ssize(bundle_.not_recorded());
}

void Gpu::warm_up() {
    for (Seated &s : seated_) {
        if (s.seat->recorded_here()) continue;
        const std::lock_guard turn(setting_up());
        s.seat->warm_up();
    }
}

void Gpu::tick(const Jobs &active) {
    if (seated_.empty()) return;
    const cuda::Inside inside(device_, std::nothrow);
    try {
        warm_up();
        clock_.start();
        back_up();
        for (const auto &[job, guest] : guests_)
            if (guest.latents != nullptr)
                device_.download(guest.latents->as<float>(), state_.z.at(floats(guest.slot * latent_)), floats(job->particles * latent_));
        for (Seated &s : seated_)
            if (s.waits && !cancelled_) s.seat->first(*s.chunk, state_, seen_.get(), clock_);
        for (const auto &job : active)  // latents are seen as they are
            if (job->repelled() && !job->in_features())
                device_.copy(near_->features() + floats(near_->row(*job, 0) * near_->stride()),
                             state_.z.at(floats(guests_.at(job.get()).slot * latent_)), floats(job->particles * latent_));
        gather(active);
        near_->enqueue();
        if (seen_) seen_->enqueue();
        clock_.mark(&Times::repulsion);
        for (Seated &s : seated_) {
            if (cancelled_) break;
            if (!s.waits) s.seat->first(*s.chunk, state_, seen_.get(), clock_);
            s.seat->second(*s.chunk, state_, seen_.get(), near_.get(), clock_);
            give_results(s);
        }
        device_.wait();
        clock_.collect(times_);
        for (Seat &seat : seats_) seat.check();
        if (cancelled_) return;
        trace(active);
        look_at_flags();
    } catch (const Error &error) {
        fail_all(active, error);
    } catch (const ort::OrtError &error) {
        fail_all(active, Error(is_out_of_memory(error) ? RLSD_OUT_OF_MEMORY : RLSD_RUNTIME_ERROR, error.what()));
    }
}

// The particles of other processes, into the rows beside the job's own.
void Gpu::gather(const Jobs &active) {
    for (const auto &job : active) {
        if (job->gather == nullptr || !job->repelled() || cancelled_) continue;
        const DeviceRepulsion &space = job->in_features() ? *seen_ : *near_;
        device_.wait();
        job->gather_rows(reinterpret_cast<float *>(space.features() + floats(space.row(*job, -job->offset()) * space.stride())),
                         space.stride());
    }
}

// The device's state is of no use after an error: all jobs end, and the next ones begin anew.
void Gpu::fail_all(const Jobs &active, const Error &error) {
    for (const auto &job : active) job->fail(error.status, error.what());
    const std::lock_guard turn(setting_up());
    seated_.clear();
    guests_.clear();
    seats_.clear();
}

void Gpu::back_up() {
    const auto from = state_.all(), to = backup_.all();
    for (std::size_t i = 0; i < from.size(); ++i) device_.copy(to[i]->at(), from[i]->at(), from[i]->bytes());
}

void Gpu::restore(const Guest &guest, std::int64_t particles) {
    const auto from = backup_.all(), to = state_.all();
    for (std::size_t i = 0; i < from.size(); ++i) {
        const std::size_t row = from[i]->bytes() / static_cast<std::size_t>(slots_);
        const std::size_t first = static_cast<std::size_t>(guest.slot) * row;
        device_.copy(to[i]->at(first), from[i]->at(first), static_cast<std::size_t>(particles) * row);
    }
}

// To the callers' buffers, from the lanes whose job is through.
void Gpu::give_results(Seated &s) {
    for (std::size_t i = 0; i < s.chunk->lanes.size(); ++i) {
        const DeviceLane &lane = s.chunk->lanes[i];
        Job &job = *lane.job;
        times_.decoder_runs += 1;
        times_.denoiser_runs += job.stepping() ? (job.params.guidance == 1 ? 1 : 2) : 0;
        times_.decoder_pull_runs += job.stepping();
        if (job.stepping() || job.done()) continue;
        memory_.give(job.out + lane.particle * image_, s.seat->result(i), floats(image_));
        if (job.out_latents != nullptr)
            memory_.give(job.out_latents + lane.particle * latent_, state_.z.at(floats(lane.places.slot * latent_)),
                         floats(latent_));
    }
}

// What came back for the jobs' traces. A step that is done again overwrites what it left here.
void Gpu::trace(const Jobs &active) {
    for (const Seated &s : seated_)
        for (std::size_t i = 0; i < s.chunk->lanes.size(); ++i) {
            const DeviceLane &lane = s.chunk->lanes[i];
            const std::int32_t k = lane.job->data_step();
            if (!lane.job->done() && k >= 0) lane.job->trace(Trace::loss, k, lane.particle, double(s.chunk->losses[i]));
        }
    for (const auto &[job, guest] : guests_)
        if (!job->done() && guest.latents != nullptr) job->trace_diversity(guest.latents->as<float>());
    for (const auto &job : active) {
        if (job->done() || job->out_trace == nullptr || !job->repelled()) continue;
        const DeviceRepulsion &space = job->in_features() ? *seen_ : *near_;
        for (std::int64_t i = 0; i < job->particles; ++i)
            job->trace(Trace::bandwidth, job->step, i, double(space.bandwidth(*job, i)));
    }
}

// A job in which a number is not finite does its step again, from the state before it, with its cotangents scaled down:
// it is they who overflow halves first. If that does not help, it has failed.
void Gpu::look_at_flags() {
    std::map<Job *, std::int64_t> spoilt;  // -> the first particle
    for (const Seated &s : seated_)
        for (std::size_t i = 0; i < s.chunk->lanes.size(); ++i)
            if (s.chunk->flags[i] != 0) {
                const auto [at, fresh] = spoilt.emplace(s.chunk->lanes[i].job, s.chunk->lanes[i].particle);
                if (!fresh) at->second = std::min(at->second, s.chunk->lanes[i].particle);
            }
    for (const auto &[job, particle] : spoilt) {
        Guest &guest = guests_.at(job);
        if (job->done()) continue;
        if (job->gather != nullptr || ++guest.redone > redone_at_most) {  // the other processes would go on
            job->mark_broken(particle);
            continue;
        }
        job->loss_scale *= lower;
        restore(guest, job->particles);
        job->again = true;
        redone_ += job->particles;
        for (Seated &s : seated_)
            for (const DeviceLane &lane : s.chunk->lanes)
                if (lane.job == job) s.seat->forget();
    }
}

}  // namespace rlsd
