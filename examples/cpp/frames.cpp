#include "frames.hpp"

#include <opencv2/imgproc.hpp>

Shape::Shape(const rlsd::Engine &engine) {
    const auto image = engine.numbers("image"), border = engine.numbers("info image_padding");
    channels = static_cast<int>(image.at(0));
    height = static_cast<int>(image.at(1));
    width = static_cast<int>(image.at(2));
    if (border.size() == 4) {
        left = static_cast<int>(border[0]), top = static_cast<int>(border[1]);
        right = static_cast<int>(border[2]), bottom = static_cast<int>(border[3]);
    }
}

std::vector<float> image_of(const cv::Mat &frame, const Shape &shape) {
    cv::Mat colours = frame, fitted, scaled;
    if (shape.channels == 1 && frame.channels() == 3) cv::cvtColor(frame, colours, cv::COLOR_BGR2GRAY);
    if (shape.channels == 3) cv::cvtColor(frame, colours, frame.channels() == 1 ? cv::COLOR_GRAY2RGB : cv::COLOR_BGR2RGB);
    const cv::Size size(shape.width - shape.left - shape.right, shape.height - shape.top - shape.bottom);
    cv::resize(colours, fitted, size, 0, 0, cv::INTER_AREA);
    cv::copyMakeBorder(fitted, fitted, shape.top, shape.bottom, shape.left, shape.right, cv::BORDER_CONSTANT);
    fitted.convertTo(scaled, CV_32F, 1 / 127.5, -1);

    std::vector<float> image(shape.count());
    std::vector<cv::Mat> planes; // headers over the vector: split writes into it
    for (int c = 0; c < shape.channels; ++c)
        planes.emplace_back(shape.height, shape.width, CV_32F, image.data() + static_cast<size_t>(c) * shape.height * shape.width);
    cv::split(scaled, planes);
    return image;
}

cv::Mat frame_of(const float *image, const Shape &shape) {
    std::vector<cv::Mat> planes; // merge only reads them
    for (int c = 0; c < shape.channels; ++c)
        planes.emplace_back(shape.height, shape.width, CV_32F,
                            const_cast<float *>(image) + static_cast<size_t>(c) * shape.height * shape.width);
    cv::Mat merged, frame;
    cv::merge(planes, merged);
    merged.convertTo(frame, CV_8U, 127.5, 127.5);
    if (shape.channels == 3) cv::cvtColor(frame, frame, cv::COLOR_RGB2BGR);
    return frame(cv::Range(shape.top, shape.height - shape.bottom), cv::Range(shape.left, shape.width - shape.right)).clone();
}
