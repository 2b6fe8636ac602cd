// A few threads that run one loop at a time together with the caller.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace rlsd {

class Workers {
  public:
    explicit Workers(std::size_t threads);
    ~Workers();

    std::size_t count() const noexcept { return threads_.size() + 1; }

    // Calls body(index, worker) for each index below count, in any order, and returns when all are done.
    // Throws what the first body threw that did, once all are done or given up.
    void run(std::size_t count, const std::function<void(std::size_t index, std::size_t worker)> &body);

  private:
    void stop();
    void serve(std::size_t worker);
    void work(std::size_t worker);

    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable start_, done_;
    const std::function<void(std::size_t, std::size_t)> *body_ = nullptr;
    std::atomic<std::size_t> next_{0};
    std::size_t count_ = 0, round_ = 0, busy_ = 0;
    std::exception_ptr thrown_;
    bool stop_ = false;
};

}  // namespace rlsd
