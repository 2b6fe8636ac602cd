// A verified bundle: its manifest, its small arrays, and its graphs as ONNX Runtime sessions.
#pragma once

#include "manifest.h"
#include "ort.h"

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace rlsd {

using Bytes = std::vector<std::byte>;

// Reads a regular file of at most `limit` bytes; never through a symbolic link. Throws Error(RLSD_BAD_BUNDLE).
Bytes read_file(const std::string &folder, const std::string &name, std::uint64_t limit);

// Bytes; what needs more would have the system end the process.
std::uint64_t machine_memory();

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

    // The bytes of one of its files; throws where it has none of that name.
    const Bytes &bytes(const std::string &file) const;

    // Where sessions run that are made from now on; null, the default: on the CPU. The bundle keeps the pointer.
    void place(const ort::Placement *placement) { placement_ = placement; }

    // Makes the sessions of all graphs but the operators' and the encoder's, so that errors show at once.
    void open_sessions();

    // Graphs that are not recorded as CUDA graphs although that was asked for.
    const std::set<std::string> &not_recorded() const noexcept { return not_recorded_; }
    void note_not_recorded(const std::string &graph) { not_recorded_.insert(graph); }

    // Where the bundle lies.
    const std::string &folder() const noexcept { return folder_; }

    // Frees the sessions of a batch; nothing may be bound to them any more.
    void close_sessions(std::int64_t batch);

    // The session of a graph for one batch; made at the first call and checked against its contract. Thread-safe.
    const ort::Session &session(const std::string &graph, std::int64_t batch);

  private:
    template <class T> std::vector<T> array(const std::string &file, std::size_t count);
    void find_batches();
    std::unique_ptr<const ort::Session> made_session(const Bytes &model, std::span<const ort::ExternalFile> external,
                                                     const std::string &graph);

    std::string folder_;
    Manifest manifest_;
    std::shared_ptr<const ort::Runtime> runtime_;
    std::map<std::string, Bytes> files_;
    std::vector<double> abar_;
    std::vector<float> null_context_;
    std::vector<std::int64_t> batches_;
    const ort::Placement *placement_ = nullptr;
    std::set<std::string> not_recorded_;
    std::mutex mutex_;
    std::map<std::pair<std::string, std::int64_t>, std::unique_ptr<const ort::Session>> sessions_;
};

}  // namespace rlsd
