#include "batch.h"

#include "philox.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace rlsd {

double now_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void Times::add(const Times &o) {
    denoiser += o.denoiser, decoder += o.decoder, decoder_pull += o.decoder_pull, features += o.features;
    operators += o.operators, repulsion += o.repulsion, elementwise += o.elementwise;
    denoiser_runs += o.denoiser_runs, decoder_runs += o.decoder_runs, decoder_pull_runs += o.decoder_pull_runs;
}

void Times::give(rlsd_stats &out) const {
    out.denoiser_runs = denoiser_runs, out.decoder_runs = decoder_runs, out.decoder_pull_runs = decoder_pull_runs;
    out.denoiser = denoiser, out.decoder = decoder, out.decoder_pull = decoder_pull, out.features = features;
    out.operators = operators, out.repulsion = repulsion, out.elementwise = elementwise;
}

Batch::Batch(Bundle &bundle, std::int64_t size)
    : bundle_(bundle), size_(size), latent_(static_cast<std::size_t>(count_of(bundle.manifest().latent))),
      image_(static_cast<std::size_t>(count_of(bundle.manifest().image))), t_(static_cast<std::size_t>(size), 0) {
    const auto n = static_cast<std::size_t>(size);
    z_ = tensors_.make("z", n * latent_);
    z_t_ = tensors_.make("z_t", n * latent_);
    noise_ = tensors_.make("noise", n * latent_);
    x_ = tensors_.make("x", n * image_);
    gradient_ = tensors_.make("grad", n * image_);
    tensors_.make("loss", n);
    cotangent_ = tensors_.make("image.cotangent", n * image_);
    if (bundle.has("features")) tensors_.make("phi.cotangent", n * static_cast<std::size_t>(bundle.manifest().feature_dim));
    bind();
    eps_ = tensors_.find("eps");
    image_now_ = tensors_.find("image");
    z_cotangent_ = tensors_.find("z.cotangent");
}

void Batch::bind() {
    const auto context = static_cast<std::size_t>(count_of(bundle_.manifest().context)) * static_cast<std::size_t>(size_);
    if (!bundle_.manifest().context.empty()) {
        tensors_.make("context", context);
        float *null = tensors_.make("null_context", context);
        for (std::int64_t i = 0; i < size_; ++i)
            std::copy(bundle_.null_context().begin(), bundle_.null_context().end(),
                      null + static_cast<std::size_t>(i) * bundle_.null_context().size());
        null_denoiser_.emplace(bundle_, "denoiser", size_, tensors_,
                               named({{"context", "null_context"}, {"eps", "null_eps"}}, ""), t_.data());
    }
    denoiser_.emplace(bundle_, "denoiser", size_, tensors_, named({}, ""), t_.data());
    decoder_.emplace(bundle_, "decoder", size_, tensors_, named({{"z", "z"}, {"image", "image"}}, "decoder."));
    decoder_pull_.emplace(
        bundle_, "decoder_pull", size_, tensors_,
        named({{"cotangent", "image.cotangent"}, {"z", "z"}, {"z_cotangent", "z.cotangent"}}, "decoder."));
    if (bundle_.has("features")) {
        features_.emplace(bundle_, "features", size_, tensors_, named({{"image", "image"}, {"phi", "phi"}}, "features."));
        features_pull_.emplace(bundle_, "features_pull", size_, tensors_,
                               named({{"cotangent", "phi.cotangent"}, {"image", "image"}}, "features."));
    }
}

// Made when the operator is first seated here.
BoundGraph &Batch::loss_of(const OperatorInfo &op) {
    const auto found = losses_.find(&op);
    if (found != losses_.end()) return found->second;
    const auto make = [&](const std::string &name, const Shape &shape) {
        tensors_.make(own_prefix(op) + name, static_cast<std::size_t>(size_ * count_of(shape)));
    };
    make("y", op.measurement);
    for (const auto &[name, shape] : op.params) make(name, shape);
    return losses_.try_emplace(&op, bundle_, "operator." + op.name + ".loss", size_, tensors_, loss_names(op)).first->second;
}

void Batch::seat(const OperatorInfo &op, std::vector<Lane> lanes) {
    measure_ = &loss_of(op);
    lanes_ = std::move(lanes);
    const std::string own = own_prefix(op);
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
        const Job &job = *lanes_[i].job;
        const auto put = [&](const std::string &name, const std::vector<float> &from) {
            std::copy(from.begin(), from.end(), lane(tensors_.find(name), i, from.size()));
        };
        put(own + "y", job.y);
        for (std::size_t p = 0; p < op.params.size(); ++p) put(own + op.params[p].first, job.op_params[p]);
        if (!job.context.empty()) put("context", job.context);
    }
}

bool Batch::any(bool (*holds)(const Job &)) const {
    return std::any_of(lanes_.begin(), lanes_.end(), [&](const Lane &lane) { return holds(*lane.job); });
}

bool Batch::waits() const {
    return any([](const Job &job) { return job.repelled(); });
}

void Batch::timed(BoundGraph &graph, double &seconds) {
    const double start = now_seconds();
    times.elementwise += start - mark_;
    graph.run();
    mark_ = now_seconds();
    seconds += mark_ - start;
}

void Batch::first() {
    mark_ = now_seconds();
    decode();
    data_gradient();
    step_x();
    if (any([](const Job &job) { return job.stepping(); })) predict();
    see();
    emit();
    times.elementwise += now_seconds() - mark_;
}

// D(z) of every lane.
void Batch::decode() {
    for (std::size_t i = 0; i < lanes_.size(); ++i)
        std::memcpy(lane(z_, i, latent_), lanes_[i].job->z.of(lanes_[i].particle), latent_ * sizeof(float));
    timed(*decoder_, times.decoder);
    times.decoder_runs += static_cast<std::int64_t>(lanes_.size());
    for (std::size_t i = 0; i < lanes_.size(); ++i)
        if (!finite(lane(image_now_, i, image_), image_)) lanes_[i].job->mark_broken(lanes_[i].particle);
}

// The operator's gradient: at x of the step before (augmented), or at D(z) of this one.
void Batch::data_gradient() {
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
        Job &job = *lanes_[i].job;
        const float *at = job.augmented() ? job.x.of(lanes_[i].particle) : lane(image_now_, i, image_);
        std::memcpy(lane(x_, i, image_), at, image_ * sizeof(float));
    }
    if (!any([](const Job &job) { return job.data_step() >= 0; })) return;
    timed(*measure_, times.operators);
    const float *loss = tensors_.find("loss");
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
        const Job &job = *lanes_[i].job;
        if (job.data_step() >= 0) job.trace(Trace::loss, job.data_step(), lanes_[i].particle, double(loss[i]));
    }
}

// Ends the step before: x moves along its data gradient and towards D(z).
void Batch::step_x() {
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
        Job &job = *lanes_[i].job;
        if (!job.augmented() || job.step == 0) continue;
        const float weight = static_cast<float>(job.params.rho / double(image_));
        float *g = lane(gradient_, i, image_), *x = job.x.of(lanes_[i].particle);
        add(weight, x, g, image_);
        add(-weight, lane(image_now_, i, image_), g, image_);
        const auto offset = static_cast<std::size_t>(lanes_[i].particle) * image_;
        if (!adam_step(job.adam(job.params.lr_x, job.step), g, &job.x.m[offset], &job.x.v[offset], x, image_))
            job.mark_broken(lanes_[i].particle);
        std::memcpy(lane(x_, i, image_), x, image_ * sizeof(float));
    }
}

// n = eps_theta(z_t, t, context) - eps, left in eps_.
void Batch::predict() {
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
        const Job &job = *lanes_[i].job;
        if (!job.stepping()) continue;
        float *noise = lane(noise_, i, latent_);
        normal(job.seed, job.item, job.address(lanes_[i].particle), static_cast<std::uint32_t>(job.step), noise, latent_);
        combine(job.now.signal, lane(z_, i, latent_), job.now.noise, noise, lane(z_t_, i, latent_), latent_);
        t_[i] = job.now.t;
        ++times.denoiser_runs;
    }
    timed(*denoiser_, times.denoiser);
    if (any([](const Job &job) { return job.params.guidance != 1; })) guide();
    for (std::size_t i = 0; i < lanes_.size(); ++i) add(-1, lane(noise_, i, latent_), lane(eps_, i, latent_), latent_);
}

// Classifier-free guidance: eps(null) + s (eps(context) - eps(null)).
void Batch::guide() {
    timed(*null_denoiser_, times.denoiser);
    const float *null = tensors_.find("null_eps");
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
        const float s = static_cast<float>(lanes_[i].job->params.guidance);
        if (s == 1 || !lanes_[i].job->stepping()) continue;
        float *eps = lane(eps_, i, latent_);
        combine(s, eps, 1 - s, null + i * latent_, eps, latent_);
        ++times.denoiser_runs;
    }
}

// phi(D(z)) of the lanes whose jobs repel each other there, handed to the jobs.
void Batch::see() {
    if (!any([](const Job &job) { return job.repelled() && job.in_features(); })) return;
    timed(*features_, times.features);
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
        Job &job = *lanes_[i].job;
        if (!job.repelled() || !job.in_features()) continue;
        const auto size = static_cast<std::size_t>(job.repulsion_dim);
        const float *phi = lane(tensors_.find("phi"), i, size);
        if (!finite(phi, size)) job.mark_broken(lanes_[i].particle);
        std::memcpy(&job.phi[static_cast<std::size_t>(job.offset() + lanes_[i].particle) * size], phi, size * sizeof(float));
    }
}

// The results of lanes whose last step is done: x, or D(z) where there is no x.
void Batch::emit() {
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
        Job &job = *lanes_[i].job;
        if (job.stepping()) continue;
        const auto particle = static_cast<std::size_t>(lanes_[i].particle);
        const float *result = job.augmented() ? job.x.of(lanes_[i].particle) : lane(image_now_, i, image_);
        std::memcpy(job.out + particle * image_, result, image_ * sizeof(float));
        if (job.out_latents != nullptr)
            std::memcpy(job.out_latents + particle * latent_, lane(z_, i, latent_), latent_ * sizeof(float));
    }
}

void Batch::second() {
    if (!any([](const Job &job) { return job.stepping(); })) return;
    mark_ = now_seconds();
    assemble();
    timed(*decoder_pull_, times.decoder_pull);
    step_z();
    times.elementwise += now_seconds() - mark_;
}

// The cotangent of D(z): coupling or data term, plus the repulsion pulled back through the features.
void Batch::assemble() {
    const bool pulled = any([](const Job &job) { return job.repelled() && job.in_features(); });
    if (pulled) {
        const auto size = static_cast<std::size_t>(bundle_.manifest().feature_dim);
        for (std::size_t i = 0; i < lanes_.size(); ++i) {
            const Job &job = *lanes_[i].job;
            if (!job.repelled() || !job.in_features()) continue;  // what is pulled back for it is not looked at
            const float *r = &job.repulsion[static_cast<std::size_t>(lanes_[i].particle) * size];
            combine(-job.now.repulsion, r, 0, r, lane(tensors_.find("phi.cotangent"), i, size), size);
        }
        timed(*features_pull_, times.features);
    }
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
        const float share = 1 / static_cast<float>(image_);
        float *cotangent = lane(cotangent_, i, image_);
        if (lanes_[i].job->augmented())
            combine(share, lane(image_now_, i, image_), -share, lane(x_, i, image_), cotangent, image_);
        else std::memcpy(cotangent, lane(gradient_, i, image_), image_ * sizeof(float));
        if (pulled && lanes_[i].job->repelled() && lanes_[i].job->in_features())
            add(1, lane(tensors_.find("features.image_cotangent"), i, image_), cotangent, image_);
    }
}

void Batch::step_z() {
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
        Job &job = *lanes_[i].job;
        if (!job.stepping()) continue;
        ++times.decoder_pull_runs;
        float *g = lane(z_cotangent_, i, latent_);
        const auto offset = static_cast<std::size_t>(lanes_[i].particle) * latent_;
        add(job.now.score, lane(eps_, i, latent_), g, latent_);
        if (job.repelled() && !job.in_features()) add(-job.now.repulsion, &job.repulsion[offset], g, latent_);
        float *z = job.z.of(lanes_[i].particle);
        if (!adam_step(job.adam(job.params.lr_z, job.step + 1), g, &job.z.m[offset], &job.z.v[offset], z, latent_))
            job.mark_broken(lanes_[i].particle);
    }
}

}  // namespace rlsd
