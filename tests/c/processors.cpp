// The share of the processors that a control group has, in trees as the kernel shows them.
#include "../../engine/src/processors.cpp"

#include <cstdio>
#include <map>

namespace {

using Files = std::map<std::string, std::string>;

int failures = 0;

// A tree of these files below a folder of its own.
double share_of(const Files &files) {
    static int count = 0;
    const std::string root = "processors." + std::to_string(++count);
    std::filesystem::remove_all(root);
    for (const auto &[name, content] : files) {
        const std::filesystem::path file = root + "/" + name;
        std::filesystem::create_directories(file.parent_path());
        std::ofstream(file) << content;
    }
    const double found = rlsd::processor_share(root);
    std::filesystem::remove_all(root);
    return found;
}

void check(const char *what, double wanted, const Files &files) {
    const double found = share_of(files);
    if (found == wanted) return;
    ++failures;
    std::fprintf(stderr, "processors: %s: %g for %g\n", what, found, wanted);
}

}  // namespace

int main() {
    const double none = std::numeric_limits<double>::infinity();
    const std::string own = "proc/self/cgroup", second = "sys/fs/cgroup/", first = "sys/fs/cgroup/cpu/";
    check("no control groups", none, {});
    check("no limit", none, {{own, "0::/a\n"}, {second + "a/cpu.max", "max 100000\n"}});
    check("a container's own root", 2.5, {{own, "0::/\n"}, {second + "cpu.max", "250000 100000\n"}});
    check("a group of the host", 0.5, {{own, "0::/a/b c\n"}, {second + "a/b c/cpu.max", "50000 100000\n"}});
    check("the least of those above", 1.5,
          {{own, "0::/a/b\n"}, {second + "a/b/cpu.max", "max 100000\n"}, {second + "a/cpu.max", "75000 50000\n"},
           {second + "cpu.max", "400000 100000\n"}, {second + "a/c/cpu.max", "10000 100000\n"}});
    check("a root that is not the container's", 3, {{own, "0::/docker/1f\n"}, {second + "cpu.max", "300000 100000\n"}});
    check("version 1", 2,
          {{own, "9:name=systemd:/a\n3:cpuset:/a\n2:cpu,cpuacct:/a\n0::/\n"},
           {first + "a/cpu.cfs_quota_us", "200000\n"}, {first + "a/cpu.cfs_period_us", "100000\n"}});
    check("version 1 without a limit", none,
          {{own, "1:cpu:/\n"}, {first + "cpu.cfs_quota_us", "-1\n"}, {first + "cpu.cfs_period_us", "100000\n"}});
    check("not the processors' hierarchy", none,
          {{own, "3:cpuset:/a\n"}, {first + "a/cpu.cfs_quota_us", "200000\n"}, {first + "a/cpu.cfs_period_us", "100000\n"}});
    check("another hierarchy's path is none of version 2", none, {{own, "3:cpuset:/a\n"}, {second + "a/cpu.max", "50000 100000\n"}});
    check("both hierarchies mounted", 4,
          {{own, "1:cpu:/\n0::/a\n"}, {"sys/fs/cgroup/unified/a/cpu.max", "400000 100000\n"}, {first + "cpu.cfs_quota_us", "-1\n"}});
    for (const char *nonsense : {"", "0 0\n", "100000\n", "-5 100000\n", "100000 0\n", "x y\n"})
        check("nonsense", none, {{own, "0::/\n"}, {second + "cpu.max", nonsense}});
    const std::size_t all = std::max(1u, std::thread::hardware_concurrency());
    if (rlsd::usable_processors() < 1 || rlsd::usable_processors() > all) ++failures;

    cpu_set_t allowed, one;  // taskset, docker run --cpuset-cpus
    int lowest = 0;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return failures;  // more processors than fit
    while (!CPU_ISSET(lowest, &allowed)) ++lowest;
    CPU_ZERO(&one);
    CPU_SET(lowest, &one);
    if (sched_setaffinity(0, sizeof one, &one) != 0 || rlsd::usable_processors() != 1) {
        ++failures;
        std::fprintf(stderr, "processors: %zu for one that it may run on\n", rlsd::usable_processors());
    }
    return failures;
}
