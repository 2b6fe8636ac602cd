#include "workers.h"

#include "error.h"

#include <system_error>
#include <utility>

#include <signal.h>

namespace rlsd {
namespace {

// Threads started while one of these lives take no signal that is sent to the process: those are for the program's own
// threads, which may wait for them. Faults of a thread and the profiler's clock reach it.
class NoSignals {
  public:
    NoSignals() {
        sigset_t all;
        sigfillset(&all);
        for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT, SIGPROF}) sigdelset(&all, own);
        pthread_sigmask(SIG_BLOCK, &all, &before_);
    }
    ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

  private:
    sigset_t before_;
};

}  // namespace

Workers::Workers(std::size_t threads) {
    threads_.reserve(threads);
    try {
        const NoSignals while_they_start;
        for (std::size_t i = 1; i < threads; ++i) threads_.emplace_back([this, i] { serve(i); });
    } catch (const std::system_error &error) {
        const std::size_t started = count();
        stop();
        throw Error(RLSD_OUT_OF_MEMORY, text("threads is ", threads, ", but the system gives only ", started, ": ", error.what()));
    } catch (...) {  // no memory: those that run must end first
        stop();
        throw;
    }
}

Workers::~Workers() { stop(); }

void Workers::stop() {
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
    if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
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
    try {
        for (std::size_t i = next_++; i < count_; i = next_++) (*body_)(i, worker);
    } catch (...) {
        const std::lock_guard lock(mutex_);
        if (!thrown_) thrown_ = std::current_exception();
        next_ = count_;
    }
}

}  // namespace rlsd
