#include "processors.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>

#include <sched.h>

namespace rlsd {
namespace {

namespace fs = std::filesystem;

constexpr double no_limit = std::numeric_limits<double>::infinity();

// Where the hierarchies are mounted that control the processors; version 2 names no controller.
constexpr struct {
    const char *controller, *at;
} mounts[] = {
    {"", "sys/fs/cgroup"}, {"", "sys/fs/cgroup/unified"}, {"cpu", "sys/fs/cgroup/cpu"}, {"cpu", "sys/fs/cgroup/cpu,cpuacct"}};

// Whether a list such as "cpu,cpuacct" has that name; the empty list has the empty one.
bool names(const std::string &list, const std::string &wanted) {
    if (list.empty()) return wanted.empty();
    std::istringstream words(list);
    for (std::string word; std::getline(words, word, ',');)
        if (word == wanted) return true;
    return false;
}

std::ifstream opened(const fs::path &file) {
    std::ifstream stream(file);
    stream.imbue(std::locale::classic());
    return stream;
}

// Of microseconds and the period that they are for; "max" or -1 is no limit.
double share_in(const fs::path &group) {
    double quota = 0, period = 0;
    std::ifstream both = opened(group / "cpu.max"), alone = opened(group / "cpu.cfs_quota_us");
    if (!(both >> quota >> period) && !(alone >> quota && opened(group / "cpu.cfs_period_us") >> period)) return no_limit;
    return quota > 0 && period > 0 ? quota / period : no_limit;
}

}  // namespace

double processor_share(const std::string &root) {
    const fs::path top = root + "/";
    std::ifstream lines = opened(top / "proc/self/cgroup");
    double least = no_limit;
    std::string number, controllers, path;
    while (std::getline(lines, number, ':') && std::getline(lines, controllers, ':') && std::getline(lines, path))
        for (const auto &mount : mounts) {
            if (!names(controllers, mount.controller)) continue;
            // A container may see its own group as the mount's root, so that only that is there.
            for (fs::path group = fs::path(path).relative_path();; group = group.parent_path()) {
                least = std::min(least, share_in(top / mount.at / group));
                if (group.empty()) break;
            }
        }
    return least;
}

std::size_t usable_processors() {
    cpu_set_t allowed[8];  // 8,192 processors; glibc's answer to hardware_concurrency() is all that are there
    std::size_t all = std::max(1u, std::thread::hardware_concurrency());
    if (sched_getaffinity(0, sizeof allowed, allowed) == 0)
        all = static_cast<std::size_t>(CPU_COUNT_S(sizeof allowed, allowed));
    const double share = processor_share();
    return share < static_cast<double>(all) ? static_cast<std::size_t>(std::ceil(share)) : all;
}

}  // namespace rlsd
