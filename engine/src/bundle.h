// A verified bundle: its manifest, its small arrays, and its graphs as ONNX Runtime sessions.
#pragma once

#include "manifest.h"
#include "ort.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace rlsd {

using Bytes = std::vector<std::byte>;

// Reads a regular file of at most `limit` bytes; never through a symbolic link. Throws Error(RLSD_BAD_BUNDLE).
Bytes read_file(const std::string &folder, const std::string &name, std::uint64_t limit);

class Bundle {
  public:
    Bundle(const std::string &folder, std::shared_ptr<const ort::Runtime> runtime);

    const Manifest &manifest() const noexcept { return manifest_; }
    const ort::Runtime &runtime() const noexcept { return *runtime_; }
    const std::vector<double> &abar() const noexcept { return abar_; }
    const std::vector<float> &null_context() const noexcept { return null_context_; }
    const OperatorInfo *find_operator(const std::string &name) const;

    // The batches that all graphs exist for, ascending.
    const std::vector<std::int64_t> &batches() const noexcept { return batches_; }
    bool has(const std::string &graph) const { return manifest_.graphs.count(graph) != 0; }

    // The session of a graph for one batch; made at the first call and checked against its contract. Thread-safe.
    const ort::Session &session(const std::string &graph, std::int64_t batch);

  private:
    template <class T> std::vector<T> array(const std::string &file, std::size_t count);
    void find_batches();

    Manifest manifest_;
    std::shared_ptr<const ort::Runtime> runtime_;
    std::map<std::string, Bytes> files_;
    std::vector<double> abar_;
    std::vector<float> null_context_;
    std::vector<std::int64_t> batches_;
    std::mutex mutex_;
    std::map<std::pair<std::string, std::int64_t>, std::unique_ptr<const ort::Session>> sessions_;
};

}  // namespace rlsd
