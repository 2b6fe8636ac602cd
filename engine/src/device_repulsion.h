// Repulsion on the device: the particles of all jobs that repel each other in one space, by the kernels of
// kernels/repulsion, which launch.py there launches in the same way.
#pragma once

#include "cubins.h"
#include "job.h"

#include <list>
#include <memory>

namespace rlsd {

class DeviceRepulsion {
  public:
    // values: of a particle in this space.
    DeviceRepulsion(const cuda::Device &device, cuda::Kernels &kernels, std::int64_t values);

    // Gives each particle of these jobs a row. They stay until the next call.
    void seat(const std::vector<Job *> &jobs);
    bool empty() const noexcept { return groups_.empty(); }
    std::int32_t row(const Job &job, std::int64_t particle) const;  // -1 for a job that has none

    std::int64_t stride() const noexcept { return stride_; }  // values of a row; those behind a particle's stay zero
    cuda::DevicePointer features() const { return features_.at(); }  // [rows, stride] float32: to be filled
    cuda::DevicePointer result() const { return result_.at(); }      // [rows, stride] float32: R

    // Queues the kernels for all jobs, at their present steps. Only if one of them is under repulsion.
    void enqueue();

    // h of the last `enqueue`, once the device was waited for; there for jobs that want a trace.
    float bandwidth(const Job &job, std::int64_t particle) const { return seen_bandwidths_->as<float>()[row(job, particle)]; }

  private:
    struct Size;
    // Jobs that go through the kernels together: those of similar size, so that none depends on another.
    struct Group {
        const Size *size;  // null: more than 64 particles, one job alone
        std::vector<Job *> jobs;
        std::int64_t largest = 0;
        cuda::Buffer offsets, seeds, items, steps, partials, squares, weights, ties;
        std::unique_ptr<cuda::Pinned> next_steps;
    };

    Group make_group(const Size *size, std::vector<Job *> jobs);
    void make_scratch(Group &group) const;
    void small(Group &group);
    void large(Group &group);

    static const Size sizes[3];
    const cuda::Device &device_;
    cuda::Kernels &kernels_;
    std::int64_t values_, stride_;
    std::map<const Job *, std::int32_t> first_row_;
    std::list<Group> groups_;
    cuda::Buffer features_, result_, bandwidths_;
    std::unique_ptr<cuda::Pinned> seen_bandwidths_;  // on the host; null where no job wants a trace
};

}  // namespace rlsd
