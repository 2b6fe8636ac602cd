#include "tuning.h"

#include "error.h"

#include <sstream>

namespace rlsd {
namespace {

constexpr std::uint64_t largest = 1 << 16;  // bytes

// "" where no such file is, or none that may be read.
std::string read_text(const std::string &folder) {
    try {
        const Bytes bytes = read_file(folder, "tuning.txt", largest);
        return {reinterpret_cast<const char *>(bytes.data()), bytes.size()};
    } catch (const Error &) {
        return {};
    }
}

}  // namespace

std::map<std::int64_t, double> read_tuning(const Bundle &bundle, const std::string &device) {
    std::map<std::int64_t, double> found;
    std::istringstream file(read_text(bundle.folder()));
    std::string line;
    const auto next = [&](const std::string &wanted) { return std::getline(file, line) && line == wanted; };
    if (!next("rlsd-tuning 1") || !next("device " + device) || !next("bundle " + bundle.manifest().digest)) return {};
    while (std::getline(file, line)) {
        std::istringstream words(line);
        words.imbue(std::locale::classic());
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
