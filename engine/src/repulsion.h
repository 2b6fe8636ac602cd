// Repulsion among the particles of one job: the kernel's bandwidth per row, and its gradient.
#pragma once

#include <cstdint>
#include <vector>

namespace rlsd {

// The particles' features phi [n, d] and where their tie-breaking random numbers are addressed.
struct Crowd {
    const float *phi;
    std::int64_t n, d;
    std::uint64_t seed;
    std::uint32_t item, step;
    double scale = 1;  // root mean square norm of the features, 1 if that is 0: crowd_scale
};

double crowd_scale(const float *phi, std::int64_t n, std::int64_t d);

// Working memory for one row at a time.
struct RepulsionScratch {
    std::vector<double> distance, sorted, sum;
    std::vector<float> direction, other;
    std::vector<char> tied;
};

// g [d] = sum_j 2 k_ij (phi_i - phi_j) / h_i divided by sum_{j != i} k_ij; returns the bandwidth h_i.
// n = 1: g = 0 and bandwidth 0. The rule for coincident particles is in engine/reference.py.
double repulsion_row(const Crowd &crowd, std::int64_t i, float *g, RepulsionScratch &scratch);

}  // namespace rlsd
