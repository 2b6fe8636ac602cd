// Between OpenCV's frames (8 bits, BGR or grey, channels last) and the engine's images (float, channels first, -1 to 1).
#pragma once

#include "rlsd.hpp"

#include <opencv2/core.hpp>

// The bundle's image shape, and the border, black in all images that it knows, which frames do not have.
struct Shape {
    explicit Shape(const rlsd::Engine &engine);
    int channels, height, width;
    int left = 0, top = 0, right = 0, bottom = 0;
    size_t count() const { return static_cast<size_t>(channels) * height * width; }
};

std::vector<float> image_of(const cv::Mat &frame, const Shape &shape); // resized to fit
cv::Mat frame_of(const float *image, const Shape &shape);              // without the border
