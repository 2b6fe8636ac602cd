// How many processors this process may keep busy: those that it may run on, but no more than its control group's share
// of their time, rounded up (docker run --cpus, a limit of Kubernetes).
#pragma once

#include <cstddef>
#include <string>

namespace rlsd {

std::size_t usable_processors();

// The share of the process whose /proc and /sys lie below `root`, in processors; infinity where none is set. The least of
// its control group's and of those above it; version 2, or 1, mounted where systemd and containers have them.
double processor_share(const std::string &root = "");

}  // namespace rlsd
