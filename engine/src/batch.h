// B particles that go through the graphs together: the tensors that the graphs read and write, made once.
#pragma once

#include "job.h"
#include "tensors.h"

#include <optional>

namespace rlsd {

struct Lane {
    Job *job;
    std::int64_t particle;
};

// Seconds in each graph and numbers of samples that counted, as in rlsd_stats.
struct Times {
    double denoiser = 0, decoder = 0, decoder_pull = 0, features = 0, operators = 0, repulsion = 0, elementwise = 0;
    std::int64_t denoiser_runs = 0, decoder_runs = 0, decoder_pull_runs = 0;

    void add(const Times &other);
    double graphs() const { return denoiser + decoder + decoder_pull + features + operators; }
    void give(rlsd_stats &out) const;
    double busy() const { return graphs() + repulsion + elementwise; }
};

double now_seconds();

class Batch {
  public:
    Batch(Bundle &bundle, std::int64_t size);

    std::int64_t size() const { return size_; }
    std::size_t bytes() const { return tensors_.bytes(); }

    // Seats particles of jobs with this operator, and copies what never changes during a job: y, the operator's
    // parameters, the context.
    void seat(const OperatorInfo &op, std::vector<Lane> lanes);
    const std::vector<Lane> &lanes() const { return lanes_; }

    // Whether a lane is under repulsion: then `second` must come after the repulsion of its job.
    bool waits() const;
    void first();   // decode, step of x, noise, denoiser, features; results of lanes that are through
    void second();  // assembly of the cotangents, pull-back, step of z
    void both() { first(), second(); }

    Times times;        // since the engine took them last
    std::string error;  // the failure that ended this tick's work of the batch, if any

  private:
    float *lane(float *tensor, std::size_t lane, std::size_t size) const { return tensor + lane * size; }
    bool any(bool (*holds)(const Job &)) const;
    void bind();
    BoundGraph &loss_of(const OperatorInfo &op);
    void decode();
    void data_gradient();
    void step_x();
    void predict();
    void guide();
    void see();
    void emit();
    void assemble();
    void step_z();
    void timed(BoundGraph &graph, double &seconds);

    Bundle &bundle_;
    std::int64_t size_;
    std::size_t latent_, image_;
    std::vector<Lane> lanes_;
    Tensors tensors_;
    std::vector<std::int64_t> t_;
    std::optional<BoundGraph> denoiser_, null_denoiser_, decoder_, decoder_pull_, features_, features_pull_;
    std::map<const OperatorInfo *, BoundGraph> losses_;
    BoundGraph *measure_ = nullptr;  // of them, the one of the lanes' operator
    float *z_, *z_t_, *noise_, *eps_, *x_, *image_now_, *gradient_, *cotangent_, *z_cotangent_;
    double mark_ = 0;  // when the current element-wise work began
};

}  // namespace rlsd
