// What runs the particles of the active jobs: the CPU's cores (host.h) or one GPU (gpu.h).
#pragma once

#include "batch.h"

#include <atomic>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace rlsd {

using Jobs = std::vector<std::shared_ptr<Job>>;

class Backend {
  public:
    virtual ~Backend() = default;

    // How it reaches the callers' buffers; lives as long as the backend.
    virtual const Memory &memory() const = 0;

    // Lines "key value" for rlsd_engine_describe.
    virtual std::string describe() = 0;

    // A job becomes active: its state comes into being.
    virtual void start(Job &job) = 0;

    // The set of active jobs changed: seats their particles. An Error leaves nothing seated.
    virtual void pack(const Jobs &active) = 0;

    // One step of every particle, results of jobs that are through included. Failures go to the jobs they concern.
    virtual void tick(const Jobs &active) = 0;

    // Forgets all particles; the next tick follows a `pack`.
    virtual void drop() = 0;

    // Copies an active job's state into its z and x, where the backend keeps it elsewhere.
    virtual void fetch(Job &) {}

    // Called when a graph is about to be needed for the first time, so that errors show early.
    virtual void prepare(const OperatorInfo &op) = 0;

    virtual void evaluate(const std::string &graph, std::int64_t count, std::span<const rlsd_tensor> inputs,
                          std::span<const rlsd_tensor> outputs) = 0;

    // The largest batch that there turned out to be memory for; the bundle's largest where nothing was short.
    virtual std::int64_t largest() const = 0;

    // Adds what this engine spent since it was opened.
    virtual void stats(rlsd_stats &out) const = 0;
};

// The caller's tensor for an input or output of a graph, checked against what the graph wants for `count` samples;
// null where there is none of that name.
const rlsd_tensor *find_tensor(std::span<const rlsd_tensor> tensors, const ort::TensorInfo &info, std::int64_t batch,
                               std::int64_t count, const std::string &graph);

// The batch of the bundle for an evaluation of so many samples: the smallest that holds them, else the largest.
std::int64_t batch_for(const Bundle &bundle, std::int64_t count);

// Throws unless all inputs are given and all wanted outputs exist.
void check_names(const std::string &graph, const ort::Session &session, std::span<const rlsd_tensor> inputs,
                 std::span<const rlsd_tensor> outputs);

}  // namespace rlsd
