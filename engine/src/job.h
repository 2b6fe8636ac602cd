// One job: its parameters, its particles' state, and the coefficients of each of its steps.
#pragma once

#include "../include/rlsd.h"
#include "bundle.h"
#include "elementwise.h"
#include "repulsion.h"

#include <atomic>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace rlsd {

// The state of one variable of all particles: value and Adam's moments, [N, size] each.
struct Variable {
    std::vector<float> value, m, v;
    std::size_t size = 0;

    void allocate(std::size_t particles, std::size_t each);
    float *of(std::int64_t particle) { return value.data() + static_cast<std::size_t>(particle) * size; }
};

// The coefficients of one step k at its timestep t, computed in float64 and cast once.
struct Step {
    std::int64_t t;
    float signal, noise;       // sqrt(abar), sqrt(1 - abar)
    float score;               // lambda omega / M
    float repulsion;           // score * gamma * sqrt(1 - abar), 0 when repulsion is off
};

// Access to a caller's buffers, which on a GPU's engine may be memory of the device.
struct Memory {
    virtual ~Memory() = default;
    virtual void read(void *to, const void *from, std::size_t bytes) const { std::memcpy(to, from, bytes); }
    virtual void clear(void *at, std::size_t bytes) const { std::memset(at, 0, bytes); }
    virtual bool on_host(const void *) const { return true; }
};

enum class Trace : std::size_t { loss, bandwidth, diversity, count };

struct Job {
    // memory must outlive it.
    Job(Bundle &bundle, const Memory &memory, const rlsd_params &params, const rlsd_request &request);

    bool augmented() const { return params.variant == RLSD_AUGMENTED; }
    std::int32_t steps() const { return params.steps - 1; }
    bool stepping() const { return step < steps(); }  // else only the last decoder run is missing
    // The step whose data gradient this tick computes, -1 if none: an x ends its step in the tick after.
    std::int32_t data_step() const { return augmented() ? step - 1 : stepping() ? step : -1; }
    bool repelled() const { return stepping() && now.repulsion != 0; }
    bool in_features() const { return feature_repulsion; }
    bool done() const { return state == RLSD_DONE; }

    void begin();                       // becomes active, at its first step
    bool drawn() const { return !z.value.empty(); }
    void draw();                        // allocates its state here and draws the initial particles, unless it has some
    void allocate();
    Step at(std::int32_t k) const;      // the coefficients of step k
    void set_step() { now = at(step); }
    Adam adam(double rate, std::int32_t n) const;
    Crowd crowd() const;
    // Particles that repel each other: the job's, or with a gather those of all processes, of which its begin at `offset`.
    std::int64_t crowd_size() const { return gather == nullptr ? particles : all_particles; }
    std::int64_t offset() const { return gather == nullptr ? 0 : first_particle; }
    std::uint32_t address(std::int64_t particle) const { return static_cast<std::uint32_t>(first_particle + particle); }
    // Fills in the other processes' rows [crowd_size, dim]; a failure ends the job.
    void gather_rows(float *rows, std::int64_t dim);
    void mark_broken(std::int64_t particle);  // from any worker
    void fail(rlsd_status why, std::string_view message) noexcept;
    void doom(rlsd_status why, std::string what);  // fails at the end of the tick, whose work still needs the state
    void clear_outputs();
    std::size_t trace_count() const;    // values of the trace
    void finish();                      // the outputs are written: frees the state
    // Notes a number of step k, if the caller wants a trace; from any worker.
    void trace(Trace what, std::int32_t k, std::int64_t particle, double value) const;
    bool traces(Trace what) const { return out_trace != nullptr && static_cast<std::size_t>(what) < trace_width; }
    void trace_diversity(const float *latents) const;  // of the step at hand, [N, latent]
    std::int64_t steps_left() const { return done() ? 0 : std::int64_t(particles) * (steps() - step); }

    const Bundle *bundle;
    const Memory *memory;
    rlsd_params params;
    const OperatorInfo *op;
    std::vector<float> y, context;      // context is empty where the bundle takes none
    std::vector<std::vector<float>> op_params;  // in the order of op->params
    std::int32_t particles;
    std::uint64_t seed;
    std::uint32_t item;
    float *out, *out_latents, *out_trace;
    std::size_t trace_width = static_cast<std::size_t>(Trace::count);  // numbers of a step and particle
    std::int32_t first_particle, all_particles;
    rlsd_gather_fn gather;
    void *gather_user;

    Variable z, x;                      // on a GPU only while they come from a snapshot or go into one
    double loss_scale = 0;              // on a GPU: what the cotangent of D(z) carries through the decoder, in units of 1 / P
    std::vector<float> phi;             // [crowd_size, D] in the space where particles repel each other
    std::vector<float> repulsion;       // [N, D]
    std::int64_t repulsion_dim = 0;
    bool feature_repulsion = false;

    std::int32_t state = RLSD_QUEUED, step = 0;
    rlsd_status status = RLSD_OK, doomed_to = RLSD_OK;
    std::string message;
    Step now{};
    double started = 0, seconds = 0;
    bool again = false;                 // this step did not count: the next tick does it again
    bool seated = false;                // the backend has had a place for it
    bool dropped = false;               // its handle was released before it was done
    std::atomic<std::int64_t> broken{-1};  // the first particle that became non-finite in this tick
};

}  // namespace rlsd
