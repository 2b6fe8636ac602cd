// Reconstructs a hidden part of every frame of a stream: a video file, numbered images ("in/%02d.png") or a camera.
//
//     rlsd_stream BUNDLE STREAM OUT X Y WIDTH HEIGHT [--particles N] [--steps K] [--in-flight FRAMES]
//
// X Y WIDTH HEIGHT: what is hidden, in pixels of the bundle's images without their border. Each frame is written to
// OUT/0000.png and so on, in order: what is seen of it, the mean of its reconstructions, then each of them.
#include "frames.hpp"

#include <opencv2/imgcodecs.hpp>
#include <opencv2/videoio.hpp>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <stdexcept>
#include <string>

namespace {

struct Options {
    std::string bundle, stream, out;
    cv::Rect hidden;
    int particles = 4, steps = 200, in_flight = 8;
};

// A frame on its way. The job is last, so that it ends before the buffer that it writes into.
struct Frame {
    std::vector<float> y, out;
    rlsd::Job job;
};

Options parsed(int count, char **words) {
    if (count < 8 || count % 2 != 0)
        throw std::invalid_argument("usage: rlsd_stream BUNDLE STREAM OUT X Y WIDTH HEIGHT "
                                    "[--particles N] [--steps K] [--in-flight FRAMES]");
    Options o{words[1], words[2], words[3],
              cv::Rect(std::stoi(words[4]), std::stoi(words[5]), std::stoi(words[6]), std::stoi(words[7]))};
    for (int i = 8; i < count; i += 2) {
        const std::string name = words[i];
        int *value = name == "--particles" ? &o.particles : name == "--steps" ? &o.steps : name == "--in-flight" ? &o.in_flight : nullptr;
        if (value == nullptr) throw std::invalid_argument("there is no option " + name);
        *value = std::stoi(words[i + 1]);
        if (*value < 1) throw std::invalid_argument(name + " is " + words[i + 1] + "; allowed is 1 and more");
    }
    return o;
}

// 1 where a frame is seen, 0 where it is hidden.
std::vector<float> mask_of(cv::Rect hidden, const Shape &shape) {
    const cv::Rect all(shape.left, shape.top, shape.width - shape.left - shape.right, shape.height - shape.top - shape.bottom);
    hidden += all.tl();
    if (hidden.empty() || (hidden & all) != hidden)
        throw std::invalid_argument("the hidden part does not lie in " + std::to_string(all.width) + " x " +
                                    std::to_string(all.height) + " pixels");
    std::vector<float> mask(shape.count(), 1.0f);
    for (int c = 0; c < shape.channels; ++c)
        cv::Mat(shape.height, shape.width, CV_32F, mask.data() + static_cast<size_t>(c) * shape.height * shape.width)(hidden) = 0;
    return mask;
}

Frame submitted(rlsd::Engine &engine, const cv::Mat &frame, uint32_t number, const std::vector<float> &mask,
                const Shape &shape, const Options &o) {
    std::vector<float> y = image_of(frame, shape), out(shape.count() * static_cast<size_t>(o.particles));
    for (size_t i = 0; i < y.size(); ++i) y[i] *= mask[i];
    rlsd_params params = rlsd::params();
    params.steps = o.steps;
    params.gamma = 5;
    params.rho = 0.1, params.lr_x = 0.1, params.lr_z = 0.05; // for priors of this size; the defaults are for Stable Diffusion
    const rlsd_tensor parameter{"mask", const_cast<float *>(mask.data()), mask.size(), RLSD_FLOAT32};
    rlsd_request request = rlsd::request();
    request.op = "inpainting";
    request.y = y.data(), request.y_count = y.size();
    request.params = &parameter, request.param_count = 1;
    request.particles = o.particles;
    request.item = number; // other random numbers for each frame
    request.out = out.data(), request.out_count = out.size();
    rlsd::Job job = engine.submit(params, request);
    return {std::move(y), std::move(out), std::move(job)}; // moving a vector leaves its numbers where they are
}

void write(const Frame &frame, uint32_t number, const Shape &shape, const Options &o) {
    std::vector<cv::Mat> pictures{frame_of(frame.y.data(), shape)};
    std::vector<float> mean(shape.count());
    for (size_t i = 0; i < frame.out.size(); ++i) mean[i % mean.size()] += frame.out[i] / static_cast<float>(o.particles);
    pictures.push_back(frame_of(mean.data(), shape));
    for (int p = 0; p < o.particles; ++p) pictures.push_back(frame_of(frame.out.data() + p * shape.count(), shape));
    cv::Mat strip;
    cv::hconcat(pictures, strip);
    char name[16];
    std::snprintf(name, sizeof name, "/%04u.png", number);
    if (!cv::imwrite(o.out + name, strip)) throw std::runtime_error("cannot write " + o.out + name);
}

// Between two ticks at most one frame is taken from the stream, so that those in flight are each at a step of their own;
// the engine packs the particles of all of them.
void run(const Options &o) {
    rlsd::Engine engine(o.bundle);
    const Shape shape(engine);
    const std::vector<float> mask = mask_of(o.hidden, shape);
    cv::VideoCapture stream(o.stream);
    if (!stream.isOpened()) throw std::runtime_error("cannot open the stream " + o.stream);
    std::deque<Frame> flight;
    uint32_t read = 0, written = 0;
    size_t most = 0;
    for (bool open = true; open || !flight.empty();) {
        cv::Mat frame;
        if (open && flight.size() < static_cast<size_t>(o.in_flight)) {
            open = stream.read(frame);
            if (open) flight.push_back(submitted(engine, frame, read++, mask, shape, o));
        }
        most = std::max(most, flight.size());
        engine.tick();
        for (; !flight.empty() && flight.front().job.done(); flight.pop_front()) write(flight.front(), written++, shape, o);
    }
    std::printf("%u frames, at most %zu at once\n", written, most);
}

} // namespace

int main(int count, char **words) {
    try {
        run(parsed(count, words));
        return 0;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "rlsd_stream: %s\n", error.what());
        return 1;
    }
}
