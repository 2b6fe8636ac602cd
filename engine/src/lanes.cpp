#include "lanes.h"

#include <algorithm>

namespace rlsd {
namespace {

enum Mode : std::uint32_t { augmented = 1, move_z = 2, gradient = 4, pulled = 8 };

}  // namespace

void fill_lane(const Lane &lane, Places places, LaneWords &words, LaneReals &reals) {
    const Job &job = *lane.job;
    const auto step = static_cast<std::uint32_t>(job.step);
    words = {places.slot, static_cast<std::uint32_t>(job.seed), static_cast<std::uint32_t>(job.seed >> 32), job.item,
             job.address(lane.particle), step, places.repulsion_row, places.feature_row, 0};
    // As on the CPU, x moves in the tick after the latent's step: not in the first, and once more at the end.
    if (job.augmented()) words.mode |= augmented;
    if (job.stepping()) words.mode |= move_z;
    if (job.data_step() >= 0) words.mode |= gradient;
    if (job.repelled() && job.in_features()) words.mode |= pulled;

    const Step next = job.at(std::min(job.step + 1, job.steps()));
    const Adam z = job.adam(job.params.lr_z, job.step + 1), x = job.adam(job.params.lr_x, std::max(job.step, 1));
    const double pixels = double(count_of(job.bundle->manifest().image)), scale = job.loss_scale * pixels;
    reals = {job.now.signal, job.now.noise, next.signal, next.noise, job.now.score, job.now.repulsion,
             static_cast<float>(job.params.guidance), static_cast<float>(1 / scale),
             static_cast<float>(job.params.rho / pixels),
             static_cast<float>(job.augmented() ? job.loss_scale : scale),
             z.beta1, z.beta2, z.epsilon, z.rate, z.correction1, z.correction2, x.rate, x.correction1, x.correction2};
}

}  // namespace rlsd
