// The scheduler: admits jobs, has a backend run one tick after another, and ends what is done.
#pragma once

#include "backend.h"

#include <deque>
#include <set>

namespace rlsd {

// Why work was not done, RLSD_OK if it was.
struct Failure {
    rlsd_status status = RLSD_OK;
    std::string message;
};

class Engine {
  public:
    Engine(const std::string &folder, const rlsd_engine_options &options);
    ~Engine();

    std::shared_ptr<Job> submit(const rlsd_params &params, const rlsd_request &request);
    void tick();  // throws Error for the first job that failed, or RLSD_CANCELLED
    void run();
    Bytes snapshot(Job &job);  // between ticks
    void cancel() noexcept { cancelled_ = true; }
    std::int64_t left() const;
    void evaluate(const std::string &graph, std::int64_t count, std::span<const rlsd_tensor> inputs,
                  std::span<const rlsd_tensor> outputs);
    void stats(rlsd_stats &out) const;
    const std::string &description() const noexcept { return description_; }

  private:
    void describe();
    void tell();
    void admit();
    void pack();
    void conclude();
    void end(Job &job, const Failure &failure) noexcept;
    void end_active(const Failure &failure) noexcept;
    void note(const Job &job) noexcept;
    void drop_all(rlsd_status why, const char *message);
    bool report(double start, std::int64_t before) const;

    rlsd_engine_options options_;
    std::unique_ptr<Bundle> bundle_;
    std::atomic<bool> cancelled_{false};
    std::unique_ptr<Backend> backend_;
    std::string description_;
    std::set<std::string> told_;    // graphs of which the log has heard
    std::int64_t largest_ = 0;      // batch of which it has
    std::deque<std::shared_ptr<Job>> queue_;
    Jobs active_;
    bool changed_ = false;          // the set of active particles: pack again
    double wall_ = 0;
    std::int64_t ticks_ = 0, particle_steps_ = 0, jobs_done_ = 0;
    rlsd_status failed_ = RLSD_OK;  // of the tick
    std::string failure_;
};

}  // namespace rlsd
