#include "job.h"

#include "error.h"
#include "philox.h"
#include "snapshot.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace rlsd {
namespace {

constexpr std::int32_t most = 1000000;  // particles

void require_finite(const float *values, std::size_t count, const char *what) {
    for (std::size_t e = 0; e < count; ++e)
        require(std::isfinite(values[e]), what, " has a value that is not finite at element ", e);
}

void require_count(std::size_t count, std::int64_t wanted, const char *what) {
    require(count == static_cast<std::size_t>(wanted), what, " has ", count, " elements, ", wanted, " are needed");
}

// Reads a caller's array into `into`, checked.
void take(const Memory &memory, const float *data, std::size_t count, std::int64_t wanted, const std::string &what,
          std::vector<float> &into) {
    require(data != nullptr, what, " is NULL");
    require_count(count, wanted, what.c_str());
    into.resize(count);
    memory.read(into.data(), data, count * sizeof(float));
    require_finite(into.data(), count, what.c_str());
}

void in_range(double value, double low, double high, const char *what) {
    require(value >= low && value <= high, what, " is ", value, ", allowed is ", low, " to ", high);
}

void check_params(const Bundle &bundle, const rlsd_params &p, const rlsd_request &r) {
    const Manifest &m = bundle.manifest();
    require(p.variant == RLSD_AUGMENTED || p.variant == RLSD_NONAUGMENTED, "variant is ", p.variant,
            ", allowed is 1 (rlsd) or 2 (rlsd-nonaug)");
    require(p.steps >= 2 && p.steps <= m.timesteps, "steps is ", p.steps, ", allowed is 2 to ", m.timesteps);
    in_range(p.rho, 0, 1e6, "rho");
    in_range(p.lambda, 0, 1e6, "lambda");
    in_range(p.gamma, 0, 1e9, "gamma");
    in_range(p.lr_x, 1e-12, 1e3, "lr_x");
    in_range(p.lr_z, 1e-12, 1e3, "lr_z");
    in_range(p.repulsion_until, 0, 1, "repulsion_until");
    in_range(p.guidance, -1e3, 1e3, "guidance");
    in_range(p.beta1, 0, 1 - 1e-9, "beta1");
    in_range(p.beta2, 0, 1 - 1e-9, "beta2");
    in_range(p.adam_eps, 1e-30, 1, "adam_eps");
    require(p.repulsion >= RLSD_REPULSION_AUTO && p.repulsion <= RLSD_REPULSION_LATENT, "repulsion is ", p.repulsion,
            ", allowed is 0 (auto), 1 (features) or 2 (latent)");
    require(p.repulsion != RLSD_REPULSION_FEATURES || bundle.has("features"), "repulsion is 'features', but bundle '",
            m.name, "' has no feature extractor: allowed is 'latent'");
    require(p.guidance == 1 || r.context != nullptr, "guidance is ", p.guidance, ", which needs a context; without one 1 is allowed");
    require(r.particles >= 1 && r.particles <= most, "particles is ", r.particles, ", allowed is 1 to ", most);
    require(r.first_particle >= 0 && r.first_particle <= most, "first_particle is ", r.first_particle, ", allowed is 0 to ", most);
    require(r.all_particles >= 0 && r.all_particles <= most, "all_particles is ", r.all_particles, ", allowed is 0 to ", most);
    require(r.gather != nullptr || r.all_particles <= r.particles, "all_particles is ", r.all_particles,
            ", which needs a gather; without one 0 to particles, ", r.particles, ", is allowed");
    require(r.gather == nullptr || r.all_particles >= std::int64_t(r.first_particle) + r.particles, "all_particles is ",
            r.all_particles, ", allowed is ", std::int64_t(r.first_particle) + r.particles,
            " (first_particle + particles) or more");
}

}  // namespace

void Variable::allocate(std::size_t particles, std::size_t each) {
    size = each;
    value.assign(particles * each, 0);
    m.assign(particles * each, 0);
    v.assign(particles * each, 0);
}

Job::Job(Bundle &from, const Memory &buffers, const rlsd_params &p, const rlsd_request &r)
    : bundle(&from), memory(&buffers), params(p), op(nullptr), particles(r.particles), seed(r.seed), item(r.item), out(r.out),
      out_latents(r.out_latents), out_trace(r.out_trace), first_particle(r.first_particle), all_particles(r.all_particles),
      gather(r.gather), gather_user(r.gather_user) {
    const Manifest &m = from.manifest();
    require(r.op != nullptr, "op is NULL");
    op = from.find_operator(r.op);
    if (op == nullptr) {
        std::string known;
        for (const auto &each : m.operators) known += (known.empty() ? "" : ", ") + each.name;
        require(false, "operator '", r.op, "' is not in bundle '", m.name, "': allowed is ", known);
    }
    check_params(from, p, r);
    require(r.params != nullptr || r.param_count == 0, "params is NULL, but param_count is ", r.param_count);
    take(*memory, r.y, r.y_count, count_of(op->measurement), "y", y);
    require(r.param_count == op->params.size(), "operator '", op->name, "' takes ", op->params.size(), " parameters, not ",
            r.param_count);
    for (const auto &[name, shape] : op->params) {
        const auto named = [&name = name](const rlsd_tensor &t) { return t.name != nullptr && name == t.name; };
        const auto *found = std::find_if(r.params, r.params + r.param_count, named);
        require(found != r.params + r.param_count, "operator '", op->name, "' needs parameter '", name, "'");
        require(found->dtype == RLSD_FLOAT32, "parameter '", name, "' has dtype ", found->dtype, ", allowed is 1 (float32)");
        op_params.emplace_back();
        take(*memory, static_cast<const float *>(found->data), found->count, count_of(shape),
             text("parameter '", name, "'"), op_params.back());
    }
    if (r.context != nullptr) {
        require(!m.context.empty(), "bundle '", m.name, "' takes no context");
        take(*memory, r.context, r.context_count, count_of(m.context), "context", context);
    } else {
        context = from.null_context();
    }
    require(out != nullptr, "out is NULL");
    require_count(r.out_count, particles * count_of(m.image), "out");
    if (out_latents != nullptr) require_count(r.out_latents_count, particles * count_of(m.latent), "out_latents");
    if (out_trace != nullptr) {
        constexpr auto before = static_cast<std::size_t>(Trace::diversity);  // which callers of older versions do not have
        if (r.out_trace_count == trace_count() / trace_width * before) trace_width = before;
        require_count(r.out_trace_count, static_cast<std::int64_t>(trace_count()), "out_trace");
        require(memory->on_host(out_trace), "out_trace is memory of a device, allowed is memory of the host");
    }
    feature_repulsion = p.repulsion != RLSD_REPULSION_LATENT && from.has("features");
    repulsion_dim = feature_repulsion ? m.feature_dim : count_of(m.latent);
    clear_outputs();
    require(r.snapshot != nullptr || r.snapshot_size == 0, "snapshot is NULL, but snapshot_size is ", r.snapshot_size);
    if (r.snapshot != nullptr) restore(*this, {static_cast<const std::byte *>(r.snapshot), r.snapshot_size});
}

void Job::clear_outputs() {
    const Manifest &m = bundle->manifest();
    const auto bytes = [this](const Shape &each) { return static_cast<std::size_t>(particles * count_of(each)) * sizeof(float); };
    memory->clear(out, bytes(m.image));
    if (out_latents != nullptr) memory->clear(out_latents, bytes(m.latent));
    if (out_trace != nullptr) memory->clear(out_trace, trace_count() * sizeof(float));
}

std::size_t Job::trace_count() const {
    return static_cast<std::size_t>(std::int64_t(steps()) * particles) * trace_width;
}

void Job::trace(Trace what, std::int32_t k, std::int64_t particle, double value) const {
    if (!traces(what)) return;
    const auto row = static_cast<std::size_t>(std::int64_t(k) * particles + particle);
    out_trace[row * trace_width + static_cast<std::size_t>(what)] = static_cast<float>(value);
}

// sum_j |z_i - z_j|^2 = N |z_i - mean|^2 + sum_j |z_j - mean|^2.
void Job::trace_diversity(const float *latents) const {
    if (!traces(Trace::diversity) || !stepping() || particles < 2) return;
    const auto n = static_cast<std::size_t>(particles);
    const auto size = static_cast<std::size_t>(count_of(bundle->manifest().latent));
    std::vector<double> away(n);
    for (std::size_t value = 0; value < size; ++value) {
        double mean = 0;
        for (std::size_t i = 0; i < n; ++i) mean += double(latents[i * size + value]) / double(n);
        for (std::size_t i = 0; i < n; ++i) {
            const double difference = double(latents[i * size + value]) - mean;
            away[i] += difference * difference;
        }
    }
    const double all = std::accumulate(away.begin(), away.end(), 0.0);
    for (std::int32_t i = 0; i < particles; ++i)
        trace(Trace::diversity, step, i,
              std::sqrt((double(n) * away[static_cast<std::size_t>(i)] + all) / (double(n - 1) * double(size))));
}

void Job::begin() {
    state = RLSD_ACTIVE;
    set_step();
    if (out_trace != nullptr && step == 0)
        std::fill_n(out_trace, trace_count(), std::numeric_limits<float>::quiet_NaN());
}

void Job::allocate() {
    const Manifest &m = bundle->manifest();
    z.allocate(static_cast<std::size_t>(particles), static_cast<std::size_t>(count_of(m.latent)));
    if (augmented()) x.allocate(static_cast<std::size_t>(particles), static_cast<std::size_t>(count_of(m.image)));
}

void Job::draw() {
    const auto values = [this](std::int64_t rows) { return static_cast<std::size_t>(rows * repulsion_dim); };
    if (params.gamma > 0 && crowd_size() > 1) {
        if (feature_repulsion || gather != nullptr) phi.assign(values(crowd_size()), 0);
        repulsion.assign(values(particles), 0);
    }
    if (drawn()) return;
    allocate();
    for (std::int32_t i = 0; i < particles; ++i) {
        normal(seed, item, address(i), stream_initial_z, z.of(i), z.size);
        if (augmented()) normal(seed, item, address(i), stream_initial_x, x.of(i), x.size);
    }
}

Step Job::at(std::int32_t k) const {
    const std::int64_t total = bundle->manifest().timesteps, ratio = total / params.steps;
    const std::int64_t t = std::min((params.steps - 1 - k) * ratio + bundle->manifest().steps_offset, total - 1);
    const double abar = bundle->abar()[static_cast<std::size_t>(t)];
    const double score = params.lambda * std::sqrt((1 - abar) / abar) / double(count_of(bundle->manifest().latent));
    const bool repels = params.gamma > 0 && crowd_size() > 1 && k < params.repulsion_until * steps();
    return {t, static_cast<float>(std::sqrt(abar)), static_cast<float>(std::sqrt(1 - abar)), static_cast<float>(score),
            repels ? static_cast<float>(score * params.gamma * std::sqrt(1 - abar)) : 0.0f};
}

Adam Job::adam(double rate, std::int32_t n) const {
    return {static_cast<float>(params.beta1), static_cast<float>(params.beta2), static_cast<float>(rate),
            static_cast<float>(params.adam_eps), static_cast<float>(1 / (1 - std::pow(params.beta1, n))),
            static_cast<float>(1 / (1 - std::pow(params.beta2, n)))};
}

Crowd Job::crowd() const {
    const float *features = phi.empty() ? z.value.data() : phi.data();
    Crowd crowd{features, crowd_size(), repulsion_dim, seed, item, static_cast<std::uint32_t>(step)};
    crowd.scale = crowd_scale(features, crowd_size(), repulsion_dim);
    return crowd;
}

void Job::doom(rlsd_status why, std::string what) {
    if (doomed_to != RLSD_OK) return;
    doomed_to = why;
    message = std::move(what);
}

void Job::gather_rows(float *rows, std::int64_t dim) {
    if (gather(gather_user, rows, first_particle, particles, all_particles, dim) != 0)
        doom(RLSD_RUNTIME_ERROR, text("item ", item, ": the gather of other processes' particles failed at step ", step, " of ",
                                      steps()));
}

void Job::mark_broken(std::int64_t particle) {
    std::int64_t seen = broken;
    while ((seen < 0 || particle < seen) && !broken.compare_exchange_weak(seen, particle)) {
    }
}

void Job::fail(rlsd_status why, std::string_view what) noexcept {
    if (done()) return;
    clear_outputs();
    status = why;
    try {
        message = what;
    } catch (const std::bad_alloc &) {
        message = "out of memory";  // short enough to need none
    }
    finish();
}

void Job::finish() {
    state = RLSD_DONE;
    z = Variable(), x = Variable();  // moved into: their memory goes
    phi = std::vector<float>(), repulsion = std::vector<float>();
}

}  // namespace rlsd
