// The worker threads: every index once, and what a body throws is thrown once, by the run that it belongs to.
#include "../../engine/src/workers.cpp"

#include <cstdio>
#include <new>
#include <vector>

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

}  // namespace

int main() {
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
