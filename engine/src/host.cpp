#include "host.h"

#include "error.h"

#include <algorithm>
#include <numeric>

namespace rlsd {
namespace {

constexpr std::int64_t rows_at_once = 16;  // of the kernel matrix, in one piece of parallel work

}  // namespace

Host::Host(Bundle &bundle, std::size_t threads, const std::atomic<bool> &cancelled)
    : bundle_(bundle), cancelled_(cancelled), workers_(threads), scratch_(workers_.count()) {
    bundle_.open_sessions();
}

std::string Host::describe() {
    std::size_t bytes = 0;
    if (!bundle_.manifest().operators.empty()) {
        Batch batch(bundle_, bundle_.batches().back());
        batch.seat(bundle_.manifest().operators[0], {});
        bytes = batch.bytes() / static_cast<std::size_t>(batch.size());
    }
    return text("device cpu\nthreads ", workers_.count(), "\nbytes_per_particle ", bytes, "\n");
}

void Host::prepare(const OperatorInfo &op) {
    for (const std::int64_t batch : bundle_.batches()) bundle_.session("operator." + op.name + ".loss", batch);
}

void Host::pack(const Jobs &active) {
    used_.clear();
    spare_.clear();
    for (Batch &batch : batches_) spare_[batch.size()].push_back(&batch);
    for (const OperatorInfo &op : bundle_.manifest().operators) {
        std::vector<Lane> lanes;
        for (const auto &job : active)
            if (job->op == &op)
                for (std::int64_t i = 0; i < job->particles; ++i) lanes.push_back({job.get(), i});
        pack_operator(op, std::move(lanes));
    }
}

// Large batches as long as every worker gets one, smaller ones for the rest.
void Host::pack_operator(const OperatorInfo &op, std::vector<Lane> lanes) {
    const auto workers = static_cast<std::int64_t>(workers_.count());
    auto next = lanes.begin();
    for (auto size = bundle_.batches().rbegin(); size != bundle_.batches().rend(); ++size) {
        const bool smallest = size + 1 == bundle_.batches().rend();
        while (next != lanes.end() && (smallest || lanes.end() - next >= *size * workers)) {
            for (std::int64_t worker = 0; worker < workers && next != lanes.end(); ++worker) {
                const auto end = next + std::min<std::ptrdiff_t>(*size, lanes.end() - next);
                use(op, *size, {next, end});
                next = end;
            }
        }
    }
}

void Host::use(const OperatorInfo &op, std::int64_t size, std::vector<Lane> lanes) {
    std::vector<Batch *> &spare = spare_[size];
    if (spare.empty()) spare.push_back(&batches_.emplace_back(bundle_, size));
    Batch *batch = spare.back();
    spare.pop_back();
    batch->seat(op, std::move(lanes));
    used_.push_back(batch);
}

void Host::each(const std::vector<Batch *> &batches, void (Batch::*stage)()) {
    const double start = now_seconds();
    workers_.run(batches.size(), [&](std::size_t i, std::size_t) {
        if (cancelled_ || !batches[i]->error.empty()) return;
        try {
            (batches[i]->*stage)();
        } catch (const std::bad_alloc &) {
            throw;
        } catch (const std::exception &error) {
            batches[i]->error = error.what();
        }
    });
    parallel_ += (now_seconds() - start) * double(workers_.count());
}

void Host::tick(const Jobs &active) {
    parallel_ = 0;
    early_.clear();
    late_.clear();
    for (Batch *batch : used_) (batch->waits() ? late_ : early_).push_back(batch);
    const double start = now_seconds();
    for (const auto &job : active) job->trace_diversity(job->z.value.data());
    times_.elementwise += now_seconds() - start;
    each(late_, &Batch::first);
    repel(active);
    each(late_, &Batch::second);
    each(early_, &Batch::both);
    collect();
}

// The particles of other processes; whether the job goes on. Features were put in place by the batches, latents are now.
bool Host::gather(Job &job) {
    if (!job.in_features())
        std::copy(job.z.value.begin(), job.z.value.end(),
                  job.phi.begin() + static_cast<std::ptrdiff_t>(job.offset() * job.repulsion_dim));
    job.gather_rows(job.phi.data(), job.repulsion_dim);
    if (!finite(job.phi.data(), job.phi.size()))
        job.doom(RLSD_NON_FINITE, text("item ", job.item, ": particles of another process are NaN or infinite at step ", job.step,
                                       " of ", job.steps()));
    return job.doomed_to == RLSD_OK;
}

// Each job's repulsion, in pieces of some rows; a row's sums run over the particles in order, whoever computes it.
void Host::repel(const Jobs &active) {
    struct Piece {
        Job *job;
        Crowd crowd;
        std::int64_t first, last;
    };
    const double start = now_seconds();
    std::vector<Piece> pieces;
    for (const auto &job : active) {
        if (!job->repelled() || job->broken >= 0 || cancelled_) continue;
        if (job->gather != nullptr && !gather(*job)) continue;
        const Crowd crowd = job->crowd();
        const std::int64_t n = job->particles;
        for (std::int64_t row = 0; row < n; row += rows_at_once)
            pieces.push_back({job.get(), crowd, row, std::min(n, row + rows_at_once)});
    }
    if (pieces.empty()) return;
    std::vector<double> spent(workers_.count());
    spent[0] = now_seconds() - start;
    workers_.run(pieces.size(), [&](std::size_t i, std::size_t worker) {
        if (cancelled_) return;
        const double begin = now_seconds();
        const Piece &piece = pieces[i];
        for (std::int64_t row = piece.first; row < piece.last; ++row) {
            float *g = &piece.job->repulsion[static_cast<std::size_t>(row * piece.crowd.d)];
            const double h = repulsion_row(piece.crowd, piece.job->offset() + row, g, scratch_[worker]);
            piece.job->trace(Trace::bandwidth, piece.job->step, row, h);
        }
        spent[worker] += now_seconds() - begin;
    });
    const double busy = std::accumulate(spent.begin(), spent.end(), 0.0);
    times_.repulsion += busy;
    parallel_ += (now_seconds() - start) * double(workers_.count()) - busy;
}

// Times of the batches, and failures to the jobs that sat in them.
void Host::collect() {
    Times tick;
    for (Batch *batch : used_) {
        tick.add(batch->times);
        batch->times = {};
        if (batch->error.empty()) continue;
        const rlsd_status status = says_out_of_memory(batch->error) ? RLSD_OUT_OF_MEMORY : RLSD_RUNTIME_ERROR;
        for (const Lane &lane : batch->lanes()) lane.job->fail(status, batch->error);
        batch->error.clear();
    }
    times_.add(tick);
    idle_ += std::max(0.0, parallel_ - tick.busy());
}

void Host::stats(rlsd_stats &out) const {
    times_.give(out);
    out.idle = idle_;
}

}  // namespace rlsd
