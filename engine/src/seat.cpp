#include "seat.h"

#include <algorithm>

namespace rlsd {

using cuda::DevicePointer;
using ort::Type;

namespace {

std::size_t count(std::int64_t lanes, std::int64_t each) { return static_cast<std::size_t>(lanes * each); }

// What phi's cotangents are scaled to. Lower where a step of a job among them was done again: for all of them, by a power
// of two, which changes no half but those that become subnormal.
double feature_level(const Chunk &chunk, const Manifest &manifest) {
    double lowered = 1;
    for (const DeviceLane &lane : chunk.lanes)
        if (lane.job->repelled() && lane.job->in_features())
            lowered = std::min(lowered, lane.job->loss_scale / manifest.cotangent_scales.at("decoder"));
    return manifest.cotangent_scales.at("features") * lowered;
}

// Parts of a chunk's page-locked memory.
struct Layout {
    explicit Layout(std::int64_t size) : n(static_cast<std::size_t>(size)) {}
    std::size_t n;
    std::size_t times() const { return 0; }
    std::size_t words() const { return n * sizeof(std::int64_t); }
    std::size_t reals() const { return words() + n * sizeof(LaneWords); }
    std::size_t flags() const { return reals() + n * sizeof(LaneReals); }
    std::size_t losses() const { return flags() + n * sizeof(std::int32_t); }
    std::size_t bytes() const { return losses() + n * sizeof(float); }
};

}  // namespace

Chunk::Chunk(const cuda::Device &device, const OperatorInfo &measured, std::int64_t lanes_at_most)
    : op(&measured), size(lanes_at_most), pinned(device, Layout(size).bytes()), words(pinned.as<LaneWords>(Layout(size).words())),
      reals(pinned.as<LaneReals>(Layout(size).reals())), times(pinned.as<std::int64_t>(Layout(size).times())),
      flags(pinned.as<std::int32_t>(Layout(size).flags())), losses(pinned.as<float>(Layout(size).losses())) {}

bool Chunk::any(bool (*holds)(const Job &)) const {
    return std::any_of(lanes.begin(), lanes.end(), [&](const DeviceLane &lane) { return holds(*lane.job); });
}

void DeviceClock::start() {
    stages_.clear();
    mark(nullptr);
}

void DeviceClock::mark(double Times::*stage) {
    if (stages_.size() == events_.size()) events_.push_back(std::make_unique<cuda::Event>(device_));
    events_[stages_.size()]->record();
    stages_.push_back(stage);
}

void DeviceClock::collect(Times &times) {
    for (std::size_t i = 1; i < stages_.size(); ++i) times.*stages_[i] += events_[i - 1]->seconds_until(*events_[i]);
    stages_.clear();
}

Seat::Seat(Bundle &bundle, const cuda::Device &device, cuda::Kernels &kernels, std::int64_t size)
    : bundle_(bundle), device_(device), kernels_(kernels), size_(size),
      latent_(count_of(bundle.manifest().latent)), image_(count_of(bundle.manifest().image)), tensors_(device) {
    const auto n = static_cast<std::size_t>(size);
    tensors_.make("words", Type::int32, n * sizeof(LaneWords) / 4);
    tensors_.make("reals", Type::float32, n * sizeof(LaneReals) / 4);
    tensors_.make("flags", Type::int32, n);
    tensors_.make("image_scale", Type::float32, n);
    tensors_.make("t", Type::int64, n);
    tensors_.make("noise", Type::float32, count(size, latent_));
    for (const char *name : {"z", "z_t"}) tensors_.make(name, Type::float16, count(size, latent_));
    tensors_.make("image.cotangent", Type::float16, count(size, image_));
    for (const char *name : {"x", "grad"}) tensors_.make(name, Type::float32, count(size, image_));
    tensors_.make("loss", Type::float32, n);
    if (bundle.has("features")) tensors_.make("phi.cotangent", Type::float16, count(size, bundle.manifest().feature_dim));
    bind();
    warm_up();
}

void Seat::warm_up() {
    for (auto *graph : {&decoder_, &denoiser_, &null_denoiser_, &decoder_pull_, &features_, &features_pull_})
        if (graph->has_value()) (*graph)->warm_up();
    for (auto &[op, graph] : losses_) graph.warm_up();
    device_.wait();
    check();
    recorder_ = std::this_thread::get_id();
    leave();
    forget();
}

void Seat::learn(const OperatorInfo &op) {
    if (knows(op)) return;
    const std::string own = own_prefix(op);
    tensors_.make(own + "y", Type::float32, count(size_, count_of(op.measurement)));
    for (const auto &[name, shape] : op.params) tensors_.make(own + name, Type::float32, count(size_, count_of(shape)));
    const auto made = losses_.try_emplace(&op, bundle_, device_, "operator." + op.name + ".loss", size_, tensors_, loss_names(op)).first;
    try {
        made->second.warm_up();
        device_.wait();
        made->second.check();
        if (!recorded_here()) recorder_ = {};
    } catch (...) {
        losses_.erase(made);
        throw;
    }
}

void Seat::bind() {
    const auto graph = [&](std::optional<DeviceGraph> &to, const std::string &name, const Naming &naming) {
        to.emplace(bundle_, device_, name, size_, tensors_, naming);
    };
    const std::map<std::string, std::string> denoised{{"z_t", "z_t"}, {"t", "t"}, {"eps", "eps"}};
    for (const auto &info : bundle_.session("denoiser", size_).inputs())
        if (denoised.count(info.name) == 0) {
            context_names_.push_back(info.name);
            tensors_.make(info.name, info.type, info.count());
            tensors_.make("null." + info.name, info.type, info.count());
        }
    graph(denoiser_, "denoiser", named({}, ""));
    if (!context_names_.empty())
        null_denoiser_.emplace(bundle_, device_, "denoiser", size_, tensors_,
                               named({{"z_t", "z_t"}, {"t", "t"}, {"eps", "null_eps"}}, "null."));
    graph(decoder_, "decoder", named({{"z", "z"}, {"image", "image"}}, "decoder."));
    graph(decoder_pull_, "decoder_pull",
          named({{"cotangent", "image.cotangent"}, {"z", "z"}, {"z_cotangent", "z.cotangent"}}, "decoder."));
    if (bundle_.has("features")) {
        graph(features_, "features", named({{"image", "image"}, {"phi", "phi"}}, "features."));
        graph(features_pull_, "features_pull", named({{"cotangent", "phi.cotangent"}, {"image", "image"}}, "features."));
    }
}

void Seat::check() {
    for (auto *graph : {&denoiser_, &null_denoiser_, &decoder_, &decoder_pull_, &features_, &features_pull_})
        if (graph->has_value()) (*graph)->check();
    for (auto &[op, loss] : losses_) loss.check();
}

void Seat::put(const std::string &name, std::size_t lane, const cuda::Buffer &from) {
    device_.copy(tensors_.at(name) + lane * from.bytes(), from.at(), from.bytes());
}

// What never changes during a job: y, the operator's parameters, the context.
void Seat::load(const Chunk &chunk) {
    const std::string own = own_prefix(*chunk.op);
    for (std::size_t i = 0; i < chunk.lanes.size(); ++i) {
        const DeviceInputs &inputs = *chunk.lanes[i].inputs;
        put(own + "y", i, inputs.y);
        for (std::size_t p = 0; p < inputs.params.size(); ++p) put(own + chunk.op->params[p].first, i, inputs.params[p]);
        for (std::size_t c = 0; c < context_names_.size(); ++c) put(context_names_[c], i, inputs.context[c]);
        if (chunk.lanes[i].job->params.guidance == 1) continue;
        for (std::size_t c = 0; c < context_names_.size(); ++c) put("null." + context_names_[c], i, inputs.null_context[c]);
    }
    current_ = &chunk;
    primed_ = false;
}

void Seat::upload_tables(Chunk &chunk) {
    for (std::size_t i = 0; i < static_cast<std::size_t>(size_); ++i) {
        // Written once, and to the same bytes where chunks take turns: an earlier copy of them may still be queued.
        LaneWords words = empty_lane;
        LaneReals reals = {};
        const DeviceLane *lane = i < chunk.lanes.size() ? &chunk.lanes[i] : nullptr;
        if (lane != nullptr) fill_lane(*lane, lane->places, words, reals);
        chunk.words[i] = words, chunk.reals[i] = reals, chunk.times[i] = lane != nullptr ? lane->job->now.t : 0;
    }
    const auto n = static_cast<std::size_t>(size_);
    device_.upload(at("words"), chunk.words, n * sizeof(LaneWords));
    device_.upload(at("reals"), chunk.reals, n * sizeof(LaneReals));
    device_.upload(at("t"), chunk.times, n * sizeof(std::int64_t));
}

cuda::Grid Seat::tiles(const cuda::Kernel &kernel, std::int64_t values) const {
    return {cuda::ceil_div(values, kernel.constant("BLOCK")), size_};
}

void Seat::first(Chunk &chunk, const DeviceState &state, const DeviceRepulsion *seen, DeviceClock &clock) {
    if (current_ != &chunk) load(chunk);
    upload_tables(chunk);
    device_.fill(at("flags"), 0, static_cast<std::size_t>(size_) * sizeof(std::int32_t));
    look(chunk, state, seen, clock);
}

void Seat::look(Chunk &chunk, const DeviceState &state, const DeviceRepulsion *seen, DeviceClock &clock) {
    if (!primed_) {
        const cuda::Kernel &kernel = kernels_.get("noise_zt_fp16_nchw");
        kernel.launch(tiles(kernel, latent_), {at("words"), at("reals"), state.z.at(), at("noise"), at("z_t"), at("z"),
                                               std::int32_t(latent_)});
    }
    clock.mark(&Times::elementwise);
    decoder_->enqueue();
    clock.mark(&Times::decoder);
    if (!chunk.any([](const Job &job) { return job.repelled() && job.in_features(); })) return;
    features_->enqueue();
    const cuda::Kernel &kernel = kernels_.get("gather_features_fp16");
    const auto d = static_cast<std::int32_t>(bundle_.manifest().feature_dim), stride = static_cast<std::int32_t>(seen->stride());
    kernel.launch(tiles(kernel, stride), {at("words"), at("phi"), seen->features(), d, stride});
    clock.mark(&Times::features);
}

void Seat::second(Chunk &chunk, const DeviceState &state, const DeviceRepulsion *seen, const DeviceRepulsion *latent,
                  DeviceClock &clock) {
    if (current_ != &chunk) first(chunk, state, seen, clock);
    gradient(chunk, state);
    clock.mark(&Times::operators);
    const bool moves = chunk.any([](const Job &job) { return job.stepping(); });
    const bool pulled = chunk.any([](const Job &job) { return job.repelled() && job.in_features(); });
    if (pulled) {
        const double level = feature_level(chunk, bundle_.manifest());
        kernels_.get("spread_repulsion_fp16")
            .launch({1, size_}, {at("words"), at("reals"), seen->result(), at("phi.cotangent"), at("image_scale"),
                                 static_cast<std::int32_t>(bundle_.manifest().feature_dim),
                                 static_cast<std::int32_t>(seen->stride()), static_cast<float>(level)});
        features_pull_->enqueue();
        clock.mark(&Times::features);
    }
    if (moves) {
        denoiser_->enqueue();
        if (chunk.any([](const Job &job) { return job.params.guidance != 1; })) null_denoiser_->enqueue();
        clock.mark(&Times::denoiser);
    }
    step_x(state, pulled ? seen : nullptr);
    clock.mark(&Times::elementwise);
    if (moves) {
        decoder_pull_->enqueue();
        clock.mark(&Times::decoder_pull);
        step_z(state, latent);
    }
    device_.download(chunk.flags, at("flags"), static_cast<std::size_t>(size_) * sizeof(std::int32_t));
    clock.mark(&Times::elementwise);
    primed_ = true;
}

// The operator's gradient, at x, or at D(z) of lanes that have no x.
void Seat::gradient(const Chunk &chunk, const DeviceState &state) {
    if (!primed_ || chunk.any([](const Job &job) { return !job.augmented(); })) {
        const cuda::Kernel &kernel = kernels_.get("operator_input_fp16_nchw");
        kernel.launch(tiles(kernel, image_), {at("words"), state.x.at(), at("image"), at("x"), std::int32_t(image_)});
    }
    if (!chunk.any([](const Job &job) { return job.data_step() >= 0; })) return;
    losses_.at(chunk.op).enqueue();
    if (chunk.any([](const Job &job) { return job.out_trace != nullptr; }))
        device_.download(chunk.losses, at("loss"), static_cast<std::size_t>(size_) * sizeof(float));
}

void Seat::step_x(const DeviceState &state, const DeviceRepulsion *seen) {
    const cuda::Kernel &kernel = kernels_.get("step_x_fp16_nchw");
    const DevicePointer cotangent = seen != nullptr ? at("features.image_cotangent") : at("image");  // any will do
    kernel.launch(tiles(kernel, image_),
                  {at("words"), at("reals"), state.x.at(), state.m_x.at(), state.v_x.at(), at("grad"), at("image"), cotangent,
                   at("image_scale"), at("x"), at("image.cotangent"), at("flags"), std::int32_t(image_)});
}

void Seat::step_z(const DeviceState &state, const DeviceRepulsion *latent) {
    const cuda::Kernel &kernel = kernels_.get("step_z_fp16_nchw");
    const DevicePointer null = null_denoiser_ ? at("null_eps") : at("eps");
    const DevicePointer repulsion = latent != nullptr && !latent->empty() ? latent->result() : at("noise");
    kernel.launch(tiles(kernel, latent_),
                  {at("words"), at("reals"), state.z.at(), state.m_z.at(), state.v_z.at(), at("noise"), at("eps"), null,
                   at("z.cotangent"), repulsion, at("z_t"), at("z"), at("flags"), std::int32_t(latent_)});
}

DevicePointer Seat::result(std::size_t lane) const { return tensors_.at("x") + lane * count(1, image_) * sizeof(float); }

}  // namespace rlsd
