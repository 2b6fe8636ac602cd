#include "workers.h"

namespace rlsd {

Workers::Workers(std::size_t threads) {
    for (std::size_t i = 1; i < threads; ++i) threads_.emplace_back([this, i] { serve(i); });
}

Workers::~Workers() {
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
    }
    start_.notify_all();
    for (auto &thread : threads_) thread.join();
}

void Workers::run(std::size_t count, const std::function<void(std::size_t, std::size_t)> &body) {
    if (count == 0) return;
    if (count == 1 || threads_.empty()) {
        for (std::size_t i = 0; i < count; ++i) body(i, 0);
        return;
    }
    {
        const std::lock_guard lock(mutex_);
        body_ = &body;
        count_ = count;
        next_ = 0;
        busy_ = threads_.size();
        ++round_;
    }
    start_.notify_all();
    work(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
}

void Workers::serve(std::size_t worker) {
    std::size_t seen = 0;
    for (;;) {
        {
            std::unique_lock lock(mutex_);
            start_.wait(lock, [&] { return stop_ || round_ != seen; });
            if (stop_) return;
            seen = round_;
        }
        work(worker);
        const std::lock_guard lock(mutex_);
        if (--busy_ == 0) done_.notify_one();
    }
}

void Workers::work(std::size_t worker) {
    for (std::size_t i = next_++; i < count_; i = next_++) (*body_)(i, worker);
}

}  // namespace rlsd
