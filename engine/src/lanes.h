// The tables of per-lane numbers that the step kernels read; kernels/step/lanes.py documents the columns.
#pragma once

#include "batch.h"

namespace rlsd {

struct LaneWords {
    std::int32_t slot;
    std::uint32_t seed_low, seed_high, item, particle, step;
    std::int32_t repulsion_row, feature_row;
    std::uint32_t mode;
};

struct LaneReals {
    float signal, noise, next_signal, next_noise, score, repulsion, guidance, unscale, rho, cotangent;
    float beta1, beta2, epsilon;
    float rate_z, correction1_z, correction2_z, rate_x, correction1_x, correction2_x;
};

static_assert(sizeof(LaneWords) == 9 * 4 && sizeof(LaneReals) == 19 * 4);

// Where a lane's particle lives on the device; -1 for none.
struct Places {
    std::int32_t slot, repulsion_row, feature_row;
};

inline constexpr LaneWords empty_lane{-1, 0, 0, 0, 0, 0, -1, -1, 0};

void fill_lane(const Lane &lane, Places places, LaneWords &words, LaneReals &reals);

}  // namespace rlsd
