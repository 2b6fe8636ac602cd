#include "bundle.h"

#include "contract.h"
#include "error.h"
#include "sha256.h"

#include <cmath>
#include <cstring>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace rlsd {
namespace {

constexpr std::uint64_t largest_manifest = 1 << 20;

struct Descriptor {
    int number;
    ~Descriptor() {
        if (number >= 0) close(number);
    }
};

[[noreturn]] void bad(const std::string &file, const std::string &what) {
    throw Error(RLSD_BAD_BUNDLE, text("bundle file ", file, ": ", what));
}

}  // namespace

std::uint64_t machine_memory() {
    const long pages = sysconf(_SC_PHYS_PAGES), each = sysconf(_SC_PAGESIZE);
    return pages > 0 && each > 0 ? static_cast<std::uint64_t>(pages) * static_cast<std::uint64_t>(each) : UINT64_MAX;
}

Bytes read_file(const std::string &folder, const std::string &name, std::uint64_t limit) {
    const Descriptor file{open((folder + "/" + name).c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK)};
    struct stat facts {};
    if (file.number < 0) bad(name, text("cannot be opened in ", folder, ": ", std::strerror(errno)));
    if (fstat(file.number, &facts) != 0 || !S_ISREG(facts.st_mode)) bad(name, "is not a regular file");
    const auto size = static_cast<std::uint64_t>(facts.st_size);
    if (size > limit) bad(name, text("has ", size, " bytes, at most ", limit, " are allowed"));
    if (size > machine_memory()) bad(name, text("has ", size, " bytes, more than the memory of this machine"));
    Bytes bytes(size);
    std::size_t at = 0;
    while (at < size) {
        const ssize_t got = read(file.number, bytes.data() + at, size - at);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) bad(name, "cannot be read to its end");
        at += static_cast<std::size_t>(got);
    }
    return bytes;
}

Bundle::Bundle(const std::string &folder, std::shared_ptr<const ort::Runtime> runtime)
    : folder_(folder), runtime_(std::move(runtime)) {
    const Bytes lines = read_file(folder, "manifest.txt", largest_manifest);
    manifest_ = parse_manifest({reinterpret_cast<const char *>(lines.data()), lines.size()});
    for (const auto &[name, facts] : manifest_.files) {
        Bytes bytes = read_file(folder, name, facts.size);
        if (bytes.size() != facts.size) bad(name, text("has ", bytes.size(), " bytes, the manifest says ", facts.size));
        if (sha256_hex(bytes) != facts.sha256) bad(name, "was altered: its SHA-256 is not the manifest's");
        files_[name] = std::move(bytes);
    }
    abar_ = array<double>(manifest_.alphas_cumprod, static_cast<std::size_t>(manifest_.timesteps));
    for (const double value : abar_)
        if (!(value > 0 && value <= 1)) bad(manifest_.alphas_cumprod, "has a value that is not in (0, 1]");
    const auto context_size = static_cast<std::size_t>(count_of(manifest_.context));
    if (!manifest_.context.empty()) null_context_ = array<float>(manifest_.null_context, context_size);
    for (const auto &[name, file] : manifest_.contexts) array<float>(file, context_size);  // only checked here
    find_batches();
}

void Bundle::open_sessions() {
    for (const auto &[graph, by_batch] : manifest_.graphs)
        if (!graph.starts_with("operator.") && graph != "encoder")
            for (const std::int64_t batch : batches_) session(graph, batch);
}

void Bundle::close_sessions(std::int64_t batch) {
    const std::lock_guard lock(mutex_);
    std::erase_if(sessions_, [batch](const auto &made) { return made.first.second == batch; });
}

const Bytes &Bundle::bytes(const std::string &file) const {
    const auto found = files_.find(file);
    if (found == files_.end()) bad(file, "is named but has no 'file' line");
    return found->second;
}

template <class T> std::vector<T> Bundle::array(const std::string &file, std::size_t count) {
    const Bytes &raw = bytes(file);
    if (raw.size() != count * sizeof(T)) bad(file, text("has ", raw.size(), " bytes, ", count * sizeof(T), " are needed"));
    std::vector<T> values(count);
    std::memcpy(values.data(), raw.data(), raw.size());
    for (const T value : values)
        if (!std::isfinite(value)) bad(file, "has a value that is not finite");
    return values;
}

void Bundle::find_batches() {
    const auto &reference = manifest_.graphs.at("denoiser");
    for (const auto &[graph, by_batch] : manifest_.graphs)
        for (const auto &[batch, file] : reference)
            if (by_batch.count(batch) == 0 || by_batch.size() != reference.size())
                throw Error(RLSD_BAD_BUNDLE, text("graph '", graph, "' is not there for the batches of 'denoiser'"));
    for (const auto &[batch, file] : reference) batches_.push_back(batch);
    for (const auto &op : manifest_.operators)
        for (const char *kind : {".loss", ".forward"})
            if (!has("operator." + op.name + kind))
                throw Error(RLSD_BAD_BUNDLE, text("operator '", op.name, "' has no graph '", kind + 1, "'"));
    if (has("features") != (manifest_.feature_dim != 0) || has("features") != has("features_pull"))
        throw Error(RLSD_BAD_BUNDLE, "features, features_pull and feature_dim must be there together");
}

const OperatorInfo *Bundle::find_operator(const std::string &name) const {
    for (const auto &op : manifest_.operators)
        if (op.name == name) return &op;
    return nullptr;
}

// With a graph that ONNX Runtime cannot record as a CUDA graph (a node of it has no CUDA kernel), without recording.
std::unique_ptr<const ort::Session> Bundle::made_session(const Bytes &model, std::span<const ort::ExternalFile> external,
                                                         const std::string &graph) {
    if (placement_ == nullptr) return std::make_unique<const ort::Session>(runtime_, model, external, nullptr);
    ort::Placement placement = *placement_;
    placement.exact = graph.starts_with("operator.");
    try {
        return std::make_unique<const ort::Session>(runtime_, model, external, &placement);
    } catch (const ort::OrtError &error) {
        if (!placement.graphs || std::string(error.what()).find("graph capture") == std::string::npos) throw;
        placement.graphs = false;
        not_recorded_.insert(graph);
        return std::make_unique<const ort::Session>(runtime_, model, external, &placement);
    }
}

const ort::Session &Bundle::session(const std::string &graph, std::int64_t batch) {
    const std::lock_guard lock(mutex_);
    auto &made = sessions_[{graph, batch}];
    if (made != nullptr) return *made;
    const std::string &file = manifest_.graphs.at(graph).at(batch);
    const Bytes &model = bytes(file);
    std::vector<ort::ExternalFile> external;
    if (!manifest_.weights.empty()) external.push_back({manifest_.weights, bytes(manifest_.weights)});
    try {
        auto fresh = made_session(model, external, graph);
        check_contract(manifest_, graph, batch, *fresh);
        made = std::move(fresh);
    } catch (const ort::OrtError &error) {
        const rlsd_status status = says_out_of_memory(error.what()) ? RLSD_OUT_OF_MEMORY : RLSD_BAD_BUNDLE;
        throw Error(status, one_line(text("bundle file ", file, ": ONNX Runtime refuses it: ", error.what())));
    }
    return *made;
}

}  // namespace rlsd
