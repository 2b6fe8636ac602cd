// A small problem on the bundle of tests/bundle_factory.py for the programs that break things: two jobs and their results.
#pragma once

#include "../c/check.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace small {

constexpr std::size_t pixels = 16, latents = 16;  // image 1 x 4 x 4, latent 4 x 2 x 2

// One job: what goes in, where it comes out. Must not move while the job is under way.
struct Case {
    std::vector<float> y, mask, out, out_latents, trace;
    rlsd_tensor tensor{};
    rlsd_params params{};
    rlsd_request request{};

    Case(std::uint32_t item, std::int32_t particles, std::int32_t steps, double gamma) : y(pixels), mask(pixels) {
        for (std::size_t i = 0; i < pixels; ++i) {
            mask[i] = i % 4 < 2 ? 1.0f : 0.0f;
            y[i] = mask[i] * static_cast<float>(std::sin(0.3 * double(i) + item));
        }
        const auto n = static_cast<std::size_t>(particles);
        out.resize(n * pixels), out_latents.resize(n * latents), trace.resize(static_cast<std::size_t>(steps - 1) * n * 2);
        CHECK(rlsd_params_init(&params, sizeof params) == RLSD_OK && rlsd_request_init(&request, sizeof request) == RLSD_OK);
        params.steps = steps, params.gamma = gamma, params.lr_x = params.lr_z = 0.05;
        tensor = {"mask", mask.data(), mask.size(), RLSD_FLOAT32};
        request.op = "inpainting";
        request.y = y.data(), request.y_count = y.size();
        request.params = &tensor, request.param_count = 1;
        request.particles = particles, request.seed = 7, request.item = item;
        request.out = out.data(), request.out_count = out.size();
        request.out_latents = out_latents.data(), request.out_latents_count = out_latents.size();
        request.out_trace = trace.data(), request.out_trace_count = trace.size();
    }
    Case(const Case &) = delete;
};

inline rlsd_engine_options options_for(const char *runtime, int threads) {
    rlsd_engine_options options;
    CHECK(rlsd_engine_options_init(&options, sizeof options) == RLSD_OK);
    options.onnxruntime = runtime;
    options.threads = threads;
    return options;
}

}  // namespace small
