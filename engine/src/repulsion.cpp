#include "repulsion.h"

#include "philox.h"

#include <algorithm>
#include <cmath>

namespace rlsd {
namespace {

constexpr double floor_share = 1e-2;  // eta: smallest root bandwidth, as a share of the features' scale
constexpr double tie_share = 1e-6;    // closer than that share of the scale, particles count as coincident
constexpr std::int64_t lanes = 16, block = 1024;

// Squared distance by direct differences: the Gram form loses all digits of particles that are close together.
double squared_distance(const float *a, const float *b, std::int64_t d) {
    double total = 0;
    for (std::int64_t start = 0; start < d; start += block) {
        const std::int64_t end = std::min(d, start + block), whole = start + (end - start) / lanes * lanes;
        float sum[lanes] = {};
        for (std::int64_t at = start; at < whole; at += lanes)
            for (std::int64_t l = 0; l < lanes; ++l) {
                const float difference = a[at + l] - b[at + l];
                sum[l] += difference * difference;
            }
        for (std::int64_t at = whole; at < end; ++at) sum[0] += (a[at] - b[at]) * (a[at] - b[at]);
        for (const float part : sum) total += double(part);
    }
    return total;
}

// The direction from coincident particle j to i: antisymmetric, of length eta * scale.
void tie_direction(const Crowd &c, std::int64_t i, std::int64_t j, RepulsionScratch &s) {
    const auto size = static_cast<std::size_t>(c.d);
    s.direction.resize(size);
    s.other.resize(size);
    const std::uint32_t stream = stream_tie_break + c.step;
    normal(c.seed, c.item, static_cast<std::uint32_t>(i), stream, s.direction.data(), size);
    normal(c.seed, c.item, static_cast<std::uint32_t>(j), stream, s.other.data(), size);
    double square = 0;
    for (std::size_t e = 0; e < size; ++e) {
        s.direction[e] -= s.other[e];
        square += double(s.direction[e]) * double(s.direction[e]);
    }
    const double length = floor_share * c.scale / std::sqrt(std::max(square, 1e-300));
    for (float &value : s.direction) value = static_cast<float>(value * length);
}

void measure(const Crowd &c, std::int64_t i, RepulsionScratch &s) {
    s.distance.assign(static_cast<std::size_t>(c.n), 0);
    s.tied.assign(static_cast<std::size_t>(c.n), 0);
    for (std::int64_t j = 0; j < c.n; ++j) {
        if (j == i) continue;
        const auto at = static_cast<std::size_t>(j);
        s.distance[at] = std::sqrt(squared_distance(c.phi + i * c.d, c.phi + j * c.d, c.d));
        s.tied[at] = s.distance[at] < tie_share * c.scale;
        if (s.tied[at]) s.distance[at] = floor_share * c.scale;
    }
}

double bandwidth(const Crowd &c, std::int64_t i, RepulsionScratch &s) {
    s.sorted.clear();
    for (std::int64_t j = 0; j < c.n; ++j)
        if (j != i) s.sorted.push_back(s.distance[static_cast<std::size_t>(j)]);
    const auto middle = s.sorted.begin() + (c.n - 2) / 2;  // the lower middle, as torch.median
    std::nth_element(s.sorted.begin(), middle, s.sorted.end());
    const double least = floor_share * c.scale;
    return std::max(*middle * *middle / std::log(std::max<double>(double(c.n - 1), 2)), least * least);
}

}  // namespace

double crowd_scale(const float *phi, std::int64_t n, std::int64_t d) {
    double square = 0;
    for (std::int64_t e = 0; e < n * d; ++e) square += double(phi[e]) * double(phi[e]);
    const double scale = std::sqrt(square / double(n));
    return scale == 0 ? 1 : scale;
}

double repulsion_row(const Crowd &c, std::int64_t i, float *g, RepulsionScratch &s) {
    std::fill_n(g, c.d, 0.0f);
    if (c.n < 2) return 0;
    measure(c, i, s);
    const double h = bandwidth(c, i, s);
    s.sum.assign(static_cast<std::size_t>(c.d), 0);
    double weights = 0;
    for (std::int64_t j = 0; j < c.n; ++j) {
        if (j == i) continue;
        const auto at = static_cast<std::size_t>(j);
        const double k = std::exp(-s.distance[at] * s.distance[at] / h);
        weights += k;
        if (s.tied[at]) {
            tie_direction(c, i, j, s);
            for (std::size_t e = 0; e < s.sum.size(); ++e) s.sum[e] += k * double(s.direction[e]);
        } else {
            const float *a = c.phi + i * c.d, *b = c.phi + j * c.d;
            for (std::size_t e = 0; e < s.sum.size(); ++e) s.sum[e] += k * double(a[e] - b[e]);
        }
    }
    if (!(weights > 0)) return h;
    for (std::size_t e = 0; e < s.sum.size(); ++e) g[e] = static_cast<float>(2 * s.sum[e] / (h * weights));
    return h;
}

}  // namespace rlsd
