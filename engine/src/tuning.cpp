#include "tuning.h"

#include <fstream>
#include <sstream>

namespace rlsd {

std::map<std::int64_t, double> read_tuning(const Bundle &bundle, const std::string &device) {
    std::map<std::int64_t, double> found;
    std::ifstream file(bundle.folder() + "/tuning.txt");
    std::string line;
    const auto next = [&](const std::string &wanted) { return std::getline(file, line) && line == wanted; };
    if (!next("rlsd-tuning 1") || !next("device " + device) || !next("bundle " + bundle.manifest().digest)) return {};
    while (std::getline(file, line)) {
        std::istringstream words(line);
        std::string key;
        std::int64_t size = 0;
        double milliseconds = 0;
        if (!(words >> key >> size >> milliseconds) || key != "batch" || !(milliseconds > 0)) return {};
        found[size] = milliseconds;
    }
    for (const std::int64_t batch : bundle.batches())
        if (found.count(batch) == 0) return {};
    return found;
}

}  // namespace rlsd
