#include "group_norm.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define RLSD_INLINE [[gnu::always_inline]] static inline

// Vectors never cross a function that is not inlined, so their calling convention is moot.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace rlsd {
namespace {

// float32 sums run over at most this many elements and are then added up in float64.
constexpr std::int64_t block = 1024;

// One group of one sample: `channels` rows of `spatial` elements.
struct Group {
    std::int64_t channels, spatial;
    const float *weight, *bias;
};

struct Moments {
    double count = 0, mean = 0, squares = 0;  // squares: sum of squared deviations from the mean
};

// What the pull-back of one group sums up, of g = cotangent * act'(u).
struct PullSums {
    double g = 0, g_deviation = 0;  // sums of weight * g and of weight * g * (x - mean)
};

// The compiler's vectors keep the order of the sums fixed and need no intrinsics. They must be as
// wide as the processor's registers: the compiler takes wider ones through memory.
template <int size> struct Vectors;
#define RLSD_VECTORS(size)                                                \
    template <> struct Vectors<size> {                                    \
        using Vec = float __attribute__((vector_size(size * 4)));         \
        using Bits = std::uint32_t __attribute__((vector_size(size * 4))); \
    };
RLSD_VECTORS(4)
RLSD_VECTORS(8)
RLSD_VECTORS(16)

// Everything, for vectors of `lanes` elements.
template <int lanes> struct Kernels {
    using Vec = typename Vectors<lanes>::Vec;
    using Bits = typename Vectors<lanes>::Bits;

    // A full vector; or the last `count` elements of a row, the rest zero.
    RLSD_INLINE Vec load(const float *from) {
        Vec v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }

    RLSD_INLINE Vec load(const float *from, std::int64_t count) {
        Vec v{};
        std::memcpy(&v, from, static_cast<std::size_t>(count) * sizeof(float));
        return v;
    }

    RLSD_INLINE void store(float *to, const Vec &v) { std::memcpy(to, &v, sizeof v); }

    RLSD_INLINE void store(float *to, const Vec &v, std::int64_t count) {
        std::memcpy(to, &v, static_cast<std::size_t>(count) * sizeof(float));
    }

    RLSD_INLINE double total(const Vec &v) {
        double sum = 0;
        for (int i = 0; i < lanes / 2; ++i) sum += double(v[i] + v[i + lanes / 2]);
        return sum;
    }

    // exp(x) for -87 <= x <= 87, relative error 1e-7; NaN stays NaN. x = n ln 2 + r, |r| <= ln 2 / 2;
    // exp(r) by a polynomial fitted for the least relative error (4e-9); 2^n through the exponent.
    RLSD_INLINE Vec exp_in_range(const Vec &x) {
        constexpr float to_integer = 0x1.8p23f;  // adding it leaves round(n) in the low bits
        const Vec shifted = x * 0x1.715476p0f + to_integer;
        const Vec n = shifted - to_integer;
        const Vec r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts, the first exact times n
        Vec p = r * 0x1.6b6e1ap-10f + 0x1.122fc2p-7f;
        p = p * r + 0x1.555688p-5f;
        p = p * r + 0x1.5554a4p-3f;
        p = p * r + 0.5f;
        p = p * (r * r) + r + 1.0f;
        const Bits scale = (__builtin_bit_cast(Bits, shifted) << 23) + 0x3f800000u;
        return p * __builtin_bit_cast(Vec, scale);
    }

    // exp(-u), u clamped to where neither it nor the sigmoid leaves the normal numbers. The
    // comparisons are written so that NaN passes through.
    RLSD_INLINE Vec exp_of_minus(const Vec &u) {
        const Vec top = Vec{} + 87.0f;
        Vec x = -u;
        x = x > top ? top : x;
        x = x < -top ? -top : x;
        return exp_in_range(x);
    }

    // 1 / (1 + e) with e = exp(-u); exactly 0 below -87.
    RLSD_INLINE Vec sigmoid(const Vec &u, const Vec &e) {
        const Vec s = 1.0f / (1.0f + e);
        return u < -87.0f ? Vec{} : s;
    }

    template <bool silu> RLSD_INLINE Vec activation(const Vec &u) {
        if constexpr (silu) return u * sigmoid(u, exp_of_minus(u));
        else return u;
    }

    // The derivative of SiLU, s (1 + u (1 - s)), with 1 - s = e s: no cancellation for large u.
    RLSD_INLINE Vec silu_slope(const Vec &u) {
        const Vec e = exp_of_minus(u);
        const Vec s = sigmoid(u, e);
        return s * (1.0f + u * (e * s));
    }

    RLSD_INLINE double sum(const float *x, std::int64_t count) {
        Vec a{}, b{}, c{}, d{};
        std::int64_t i = 0;
        for (; i + 4 * lanes <= count; i += 4 * lanes) {
            a += load(x + i);
            b += load(x + i + lanes);
            c += load(x + i + 2 * lanes);
            d += load(x + i + 3 * lanes);
        }
        for (; i + lanes <= count; i += lanes) a += load(x + i);
        if (i < count) b += load(x + i, count - i);
        return total((a + b) + (c + d));
    }

    // Mean and squared deviations of at most `block` elements, in two passes (they stay in the nearest
    // cache): the second, around the first's rounded mean, also finds what that mean has missed.
    RLSD_INLINE Moments block_moments(const float *x, std::int64_t count) {
        const double n = static_cast<double>(count);
        const float center = static_cast<float>(sum(x, count) / n);
        Vec squares_a{}, squares_b{}, missed_a{}, missed_b{};
        std::int64_t i = 0;
        for (; i + 2 * lanes <= count; i += 2 * lanes) {
            const Vec a = load(x + i) - center, b = load(x + i + lanes) - center;
            squares_a += a * a;
            squares_b += b * b;
            missed_a += a;
            missed_b += b;
        }
        double squares = total(squares_a) + total(squares_b), missed = total(missed_a) + total(missed_b);
        for (; i < count; ++i) {
            const double deviation = double(x[i] - center);
            squares += deviation * deviation;
            missed += deviation;
        }
        squares -= missed * missed / n;
        return {n, double(center) + missed / n, squares < 0 ? 0 : squares};  // rounding below 0; NaN stays
    }

    // The blocks' moments merged (Chan, Golub and LeVeque's update), in float64.
    RLSD_INLINE Moments moments(const float *x, std::int64_t count) {
        Moments all;
        for (std::int64_t start = 0; start < count; start += block) {
            const Moments one = block_moments(x + start, count - start < block ? count - start : block);
            const double step = one.mean - all.mean, share = one.count / (all.count + one.count);
            all.squares += one.squares + step * step * all.count * share;
            all.mean += step * share;
            all.count += one.count;
        }
        return all;
    }

    template <bool silu>
    RLSD_INLINE void normalize_row(const float *x, std::int64_t count, float center, float scale, float shift,
                                   float *y) {
        std::int64_t i = 0;
        for (; i + lanes <= count; i += lanes)
            store(y + i, activation<silu>((load(x + i) - center) * scale + shift));
        if (i < count) store(y + i, activation<silu>((load(x + i, count - i) - center) * scale + shift), count - i);
    }

    template <bool silu>
    RLSD_INLINE void normalize(const Group &group, const float *x, float epsilon, float *y, float &mean, float &rstd) {
        const Moments m = moments(x, group.channels * group.spatial);
        const double reciprocal = 1.0 / std::sqrt(m.squares / m.count + double(epsilon));
        mean = static_cast<float>(m.mean);
        rstd = static_cast<float>(reciprocal);
        const double slip = m.mean - double(mean);  // what float32 lost of the mean goes into the shift
        for (std::int64_t c = 0; c < group.channels; ++c) {
            const double scale = reciprocal * double(group.weight[c]);
            const double shift = double(group.bias[c]) - slip * scale;
            normalize_row<silu>(x + c * group.spatial, group.spatial, mean, static_cast<float>(scale),
                                static_cast<float>(shift), y + c * group.spatial);
        }
    }

    template <bool silu>
    RLSD_INLINE Vec pulled(const Vec &cotangent, const Vec &deviation, float scale, float bias) {
        if constexpr (silu) return cotangent * silu_slope(deviation * scale + bias);
        else return cotangent;
    }

    // Writes g of a row of at most `block` elements and adds its sums.
    template <bool silu>
    RLSD_INLINE void pull_row(const float *cotangent, const float *x, std::int64_t count, float mean, float scale,
                              float bias, double weight, float *g, PullSums &sums) {
        Vec plain{}, weighted{};
        std::int64_t i = 0;
        for (; i + lanes <= count; i += lanes) {
            const Vec deviation = load(x + i) - mean;
            const Vec v = pulled<silu>(load(cotangent + i), deviation, scale, bias);
            store(g + i, v);
            plain += v;
            weighted += v * deviation;
        }
        if (i < count) {  // the cotangent's padding is zero, so the sums do not see it
            const Vec deviation = load(x + i, count - i) - mean;
            const Vec v = pulled<silu>(load(cotangent + i, count - i), deviation, scale, bias);
            store(g + i, v, count - i);
            plain += v;
            weighted += v * deviation;
        }
        sums.g += weight * total(plain);
        sums.g_deviation += weight * total(weighted);
    }

    // x_cotangent = a g + b (x - mean) + c, in place of g.
    RLSD_INLINE void combine_row(const float *x, std::int64_t count, float mean, float a, float b, float c, float *g) {
        std::int64_t i = 0;
        for (; i + lanes <= count; i += lanes) store(g + i, load(g + i) * a + ((load(x + i) - mean) * b + c));
        if (i < count)
            store(g + i, load(g + i, count - i) * a + ((load(x + i, count - i) - mean) * b + c), count - i);
    }

    template <bool silu>
    RLSD_INLINE void pull(const Group &group, const float *cotangent, const float *x, float mean, float rstd,
                          float *out) {
        PullSums sums;
        for (std::int64_t c = 0; c < group.channels; ++c) {
            const float weight = group.weight[c];
            for (std::int64_t s = 0; s < group.spatial; s += block) {
                const std::int64_t at = c * group.spatial + s;
                const std::int64_t size = group.spatial - s < block ? group.spatial - s : block;
                pull_row<silu>(cotangent + at, x + at, size, mean, weight * rstd, group.bias[c], weight, out + at, sums);
            }
        }
        const double r = rstd, n = static_cast<double>(group.channels * group.spatial);
        const float b = static_cast<float>(-r * r * r * sums.g_deviation / n);
        const float shift = static_cast<float>(-r * sums.g / n);
        for (std::int64_t c = 0; c < group.channels; ++c)
            combine_row(x + c * group.spatial, group.spatial, mean, group.weight[c] * rstd, b, shift,
                        out + c * group.spatial);
    }

    RLSD_INLINE void normalize_all(const GroupNormShape &shape, const float *x, const float *weight, const float *bias,
                                   float epsilon, bool silu, float *y, float *mean, float *rstd) {
        const std::int64_t channels = shape.channels / shape.groups, stride = channels * shape.spatial;
        for (std::int64_t i = 0; i < shape.batch * shape.groups; ++i) {
            const std::int64_t at = i * stride, first = i % shape.groups * channels;
            const Group group{channels, shape.spatial, weight + first, bias + first};
            float m, r;
            if (silu) normalize<true>(group, x + at, epsilon, y + at, m, r);
            else normalize<false>(group, x + at, epsilon, y + at, m, r);
            if (mean != nullptr) mean[i] = m;
            if (rstd != nullptr) rstd[i] = r;
        }
    }

    RLSD_INLINE void pull_all(const GroupNormShape &shape, const float *cotangent, const float *x, const float *mean,
                              const float *rstd, const float *weight, const float *bias, bool silu, float *out) {
        const std::int64_t channels = shape.channels / shape.groups, stride = channels * shape.spatial;
        for (std::int64_t i = 0; i < shape.batch * shape.groups; ++i) {
            const std::int64_t at = i * stride, first = i % shape.groups * channels;
            const Group group{channels, shape.spatial, weight + first, bias + first};
            if (silu) pull<true>(group, cotangent + at, x + at, mean[i], rstd[i], out + at);
            else pull<false>(group, cotangent + at, x + at, mean[i], rstd[i], out + at);
        }
    }
};

struct Entries {
    decltype(&group_norm) forward;
    decltype(&group_norm_pull) pull;
};

// One build of both for one kind of processor.
#define RLSD_BUILD(name, lanes, target)                                                                            \
    target void forward_##name(const GroupNormShape &shape, const float *x, const float *weight, const float *bias, \
                               float epsilon, bool silu, float *y, float *mean, float *rstd) noexcept {            \
        Kernels<lanes>::normalize_all(shape, x, weight, bias, epsilon, silu, y, mean, rstd);                       \
    }                                                                                                              \
    target void pull_##name(const GroupNormShape &shape, const float *cotangent, const float *x, const float *mean, \
                            const float *rstd, const float *weight, const float *bias, bool silu,                  \
                            float *out) noexcept {                                                                 \
        Kernels<lanes>::pull_all(shape, cotangent, x, mean, rstd, weight, bias, silu, out);                        \
    }

RLSD_BUILD(any, 4, )

#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
RLSD_BUILD(avx2, 8, __attribute__((target("arch=x86-64-v3"))))
RLSD_BUILD(avx512, 16, __attribute__((target("arch=x86-64-v4"))))

Entries choose() noexcept {
    if (__builtin_cpu_supports("x86-64-v4")) return {forward_avx512, pull_avx512};
    if (__builtin_cpu_supports("x86-64-v3")) return {forward_avx2, pull_avx2};
    return {forward_any, pull_any};
}
#else
Entries choose() noexcept { return {forward_any, pull_any}; }
#endif

const Entries &entries() noexcept {
    static const Entries chosen = choose();
    return chosen;
}

}  // namespace

void group_norm(const GroupNormShape &shape, const float *x, const float *weight, const float *bias, float epsilon,
                bool silu, float *y, float *mean, float *rstd) noexcept {
    entries().forward(shape, x, weight, bias, epsilon, silu, y, mean, rstd);
}

void group_norm_pull(const GroupNormShape &shape, const float *cotangent, const float *x, const float *mean,
                     const float *rstd, const float *weight, const float *bias, bool silu,
                     float *x_cotangent) noexcept {
    entries().pull(shape, cotangent, x, mean, rstd, weight, bias, silu, x_cotangent);
}

}  // namespace rlsd
