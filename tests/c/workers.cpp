// The worker threads: every index once, and what a body throws is thrown once, by the run that it belongs to. They take no
// signals of the process, and where there are no more of them the sentence says so.
#include "../../engine/src/workers.cpp"

#include <csignal>
#include <cstdio>
#include <new>
#include <vector>

#include <sys/resource.h>

namespace {

int failures = 0;

void check(bool holds, const char *what) {
    if (!holds) ++failures, std::fprintf(stderr, "workers: %s\n", what);
}

bool throws(rlsd::Workers &workers, std::size_t failing) {
    try {
        workers.run(100, [failing](std::size_t i, std::size_t) {
            if (i == failing) throw std::bad_alloc();
        });
    } catch (const std::bad_alloc &) {
        return true;
    }
    return false;
}

void check_signals() {
    rlsd::Workers workers(2);
    sigset_t mask, theirs;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    check(!sigismember(&mask, SIGTERM), "the caller's mask is as it was");
    std::atomic<int> there{0};
    bool blocked = false, profiled = false;
    workers.run(2, [&](std::size_t, std::size_t worker) {
        for (++there; there < 2;) std::this_thread::yield();  // one index each
        if (worker == 0) return;
        pthread_sigmask(SIG_SETMASK, nullptr, &theirs);
        blocked = sigismember(&theirs, SIGTERM) && sigismember(&theirs, SIGINT) && sigismember(&theirs, SIGALRM);
        profiled = !sigismember(&theirs, SIGPROF) && !sigismember(&theirs, SIGSEGV);
    });
    check(blocked, "a worker takes no signals");
    check(profiled, "but its own");
}

void check_no_more() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return;  // whose own memory the limit would be for, too
#endif
    rlimit before{};
    getrlimit(RLIMIT_AS, &before);
    const rlimit little{rlim_t(1) << 30, before.rlim_max};
    setrlimit(RLIMIT_AS, &little);
    rlimit now{};
    getrlimit(RLIMIT_AS, &now);
    if (now.rlim_cur != little.rlim_cur) return;  // an emulated processor
    std::string said;
    try {
        rlsd::Workers workers(1024);  // with stacks of some MiB
    } catch (const rlsd::Error &error) {
        if (error.status == RLSD_OUT_OF_MEMORY) said = error.what();
    }
    setrlimit(RLIMIT_AS, &before);
    check(said.starts_with("threads is 1024, but the system gives only "), said.c_str());
}

}  // namespace

int main() {
    check_signals();
    check_no_more();
    for (const std::size_t threads : {1, 2, 5}) {
        rlsd::Workers workers(threads);
        check(workers.count() == threads, "so many threads, the caller's among them");
        std::vector<int> seen(1000);
        for (int round = 0; round < 20; ++round) {
            workers.run(seen.size(), [&](std::size_t i, std::size_t worker) { seen[i] += worker < threads ? 1 : 1000; });
            check(throws(workers, 7), "the caller is told");
            check(!throws(workers, 100), "and not again in the next run");
        }
        for (const int times : seen) check(times == 20, "each index once a run");
    }
    return failures;
}
