// Many engines at once, each in a thread of its own, while other threads cancel them at random: every job that was not
// cancelled gives the bytes that it gives alone.
//
//     many_engines BUNDLE ONNXRUNTIME_LIBRARY [ENGINES [JOBS]]      default 4 engines and 120 jobs
#include "small_case.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <thread>

namespace {

constexpr int wave = 5;       // jobs submitted together
constexpr int cancellers = 2;

std::unique_ptr<small::Case> job_number(int i) {
    return std::make_unique<small::Case>(static_cast<std::uint32_t>(i), 1 + i % 3, 4 + i % 4, i % 2 == 0 ? 2.0 : 0.0);
}

rlsd_engine *opened(char **arguments, int threads) {
    const rlsd_engine_options options = small::options_for(arguments[2], threads);
    rlsd_engine *engine = nullptr;
    CHECK(rlsd_engine_open(arguments[1], &options, &engine) == RLSD_OK);
    return engine;
}

// Each job alone on one thread.
std::vector<std::vector<float>> alone(char **arguments, int jobs) {
    std::vector<std::vector<float>> results;
    rlsd_engine *engine = opened(arguments, 1);
    for (int i = 0; i < jobs; ++i) {
        const auto what = job_number(i);
        rlsd_job *job = nullptr;
        CHECK(rlsd_submit(engine, &what->params, &what->request, &job) == RLSD_OK && rlsd_run(engine) == RLSD_OK);
        rlsd_job_release(job);
        results.push_back(what->out);
    }
    rlsd_engine_close(engine);
    return results;
}

// One wave on an engine; the number of its jobs that were cancelled.
int run_wave(rlsd_engine *engine, const std::vector<int> &numbers, const std::vector<std::vector<float>> &wanted) {
    std::vector<std::unique_ptr<small::Case>> cases;
    std::vector<rlsd_job *> jobs(numbers.size());
    for (std::size_t i = 0; i < numbers.size(); ++i) {
        cases.push_back(job_number(numbers[i]));
        CHECK(rlsd_submit(engine, &cases[i]->params, &cases[i]->request, &jobs[i]) == RLSD_OK);
    }
    const rlsd_status status = rlsd_run(engine);
    CHECK(status == RLSD_OK || status == RLSD_CANCELLED);
    int cancelled = 0;
    for (std::size_t i = 0; i < numbers.size(); ++i) {
        rlsd_job_info info;
        info.size = sizeof info;
        CHECK(rlsd_job_query(jobs[i], &info) == RLSD_OK && info.state == RLSD_DONE);
        CHECK(info.status == RLSD_OK || info.status == RLSD_CANCELLED);
        cancelled += info.status == RLSD_CANCELLED;
        const auto number = static_cast<std::size_t>(numbers[i]);
        if (info.status == RLSD_OK) CHECK(cases[i]->out == wanted[number]);
        else CHECK(cases[i]->out == std::vector<float>(wanted[number].size()));
        rlsd_job_release(jobs[i]);
    }
    return cancelled;
}

}  // namespace

int main(int count, char **arguments) {
    if (count < 3) return std::fprintf(stderr, "usage: %s BUNDLE ONNXRUNTIME_LIBRARY [ENGINES [JOBS]]\n", arguments[0]), 2;
    const int engines = count > 3 ? std::atoi(arguments[3]) : 4, jobs = count > 4 ? std::atoi(arguments[4]) : 120;
    const auto start = std::chrono::steady_clock::now();
    const auto wanted = alone(arguments, jobs);
    const auto pause = 6 * (std::chrono::steady_clock::now() - start) / jobs;  // so that about half of the jobs get through
    std::vector<rlsd_engine *> all;
    for (int e = 0; e < engines; ++e) all.push_back(opened(arguments, 1 + e % 2));
    std::atomic<int> cancelled{0}, requests{0};
    std::atomic<bool> over{false};

    std::vector<std::thread> threads;
    for (int e = 0; e < engines; ++e)
        threads.emplace_back([&, e] {
            for (int first = e; first < jobs; first += wave * engines) {
                std::vector<int> numbers;
                for (int i = first; i < std::min(jobs, first + wave * engines); i += engines) numbers.push_back(i);
                cancelled += run_wave(all[static_cast<std::size_t>(e)], numbers, wanted);
            }
        });
    std::vector<std::thread> others;
    for (int c = 0; c < cancellers; ++c)
        others.emplace_back([&, c] {
            std::mt19937 random(static_cast<unsigned>(c));
            while (!over) {
                rlsd_cancel(all[random() % all.size()]);
                ++requests;
                std::this_thread::sleep_for(pause * (random() % 100) / 50);
            }
        });
    for (auto &thread : threads) thread.join();
    over = true;
    for (auto &thread : others) thread.join();
    for (rlsd_engine *engine : all) rlsd_engine_close(engine);
    std::printf("%d engines, %d jobs, %d requests to cancel: %d jobs cancelled, the other %d as alone\n", engines, jobs,
                requests.load(), cancelled.load(), jobs - cancelled);
    CHECK(cancelled > 0 && cancelled < jobs);
    return 0;
}
