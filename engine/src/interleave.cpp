#include "interleave.h"

namespace rlsd {
namespace {

// Row r of the image is row (r + 1) / 2 of the two planes (left and right phase) of its row phase.
struct Rows {
    std::int64_t odd_plane, even_plane, row;
};

Rows rows_of(std::int64_t plane, std::int64_t r) {
    const std::int64_t phase = (r + 1) & 1;
    return {plane * 4 + phase * 2, plane * 4 + phase * 2 + 1, (r + 1) >> 1};
}

}  // namespace

void interleave(const float *phases, std::int64_t planes, std::int64_t height, std::int64_t width, float *image) {
    const std::int64_t half = width / 2 + 1, size = (height / 2 + 1) * half;
    for (std::int64_t plane = 0; plane < planes; ++plane) {
        for (std::int64_t r = 0; r < height; ++r) {
            const Rows from = rows_of(plane, r);
            const float *even = phases + from.even_plane * size + from.row * half;
            const float *odd = phases + from.odd_plane * size + from.row * half + 1;
            float *out = image + (plane * height + r) * width;
            for (std::int64_t j = 0; j < width / 2; ++j) {
                out[2 * j] = even[j];
                out[2 * j + 1] = odd[j];
            }
        }
    }
}

void interleave_pull(const float *image, std::int64_t planes, std::int64_t height, std::int64_t width, float *phases) {
    const std::int64_t half = width / 2 + 1, rows = height / 2 + 1, size = rows * half;
    for (std::int64_t plane = 0; plane < planes; ++plane) {
        for (std::int64_t r = -1; r <= height; ++r) {
            const Rows to = rows_of(plane, r);
            float *even = phases + to.even_plane * size + to.row * half;
            float *odd = phases + to.odd_plane * size + to.row * half;
            const bool inside = r >= 0 && r < height;
            const float *in = image + (plane * height + (inside ? r : 0)) * width;
            for (std::int64_t j = 0; j < width / 2; ++j) {
                even[j] = inside ? in[2 * j] : 0.0f;
                odd[j + 1] = inside ? in[2 * j + 1] : 0.0f;
            }
            even[half - 1] = odd[0] = 0.0f;
        }
    }
}

}  // namespace rlsd
