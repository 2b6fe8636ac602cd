// Particles on the CPU's cores: batches of lanes, spread over worker threads.
#pragma once

#include "backend.h"
#include "workers.h"

#include <list>
#include <map>

namespace rlsd {

class Host : public Backend {
  public:
    // cancelled: looked at between pieces of work.
    Host(Bundle &bundle, std::size_t threads, const std::atomic<bool> &cancelled);

    const Memory &memory() const override { return memory_; }
    std::string describe() override;
    void start(Job &job) override { job.draw(); }
    void pack(const Jobs &active) override;
    void tick(const Jobs &active) override;
    void drop() override { used_.clear(); }
    void prepare(const OperatorInfo &op) override;
    void evaluate(const std::string &graph, std::int64_t count, std::span<const rlsd_tensor> inputs,
                  std::span<const rlsd_tensor> outputs) override;
    std::int64_t largest() const override { return bundle_.batches().back(); }
    void stats(rlsd_stats &out) const override;

  private:
    void pack_operator(const OperatorInfo &op, std::vector<Lane> lanes);
    void use(const OperatorInfo &op, std::int64_t size, std::vector<Lane> lanes);
    void each(const std::vector<Batch *> &batches, void (Batch::*stage)());
    void repel(const Jobs &active);
    bool gather(Job &job);
    void collect();

    Memory memory_;
    Bundle &bundle_;
    const std::atomic<bool> &cancelled_;
    Workers workers_;
    std::vector<RepulsionScratch> scratch_;
    std::list<Batch> batches_;  // every batch ever made; `used_` are those of this packing
    std::map<std::int64_t, std::vector<Batch *>> spare_;  // by size, while packing
    std::vector<Batch *> used_, early_, late_;
    Times times_;
    double idle_ = 0, parallel_ = 0;
};

}  // namespace rlsd
