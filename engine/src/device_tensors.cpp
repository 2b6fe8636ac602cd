#include "device_tensors.h"

#include <atomic>

namespace rlsd {
namespace {

// A session may serve several sets of tensors, each with its own CUDA graph, told apart by a number. ONNX Runtime's
// number for a run that is not recorded is -1.
std::atomic<int> last_number{0};
constexpr int not_recorded = -1;

}  // namespace

cuda::DevicePointer DeviceTensors::make(const std::string &name, ort::Type type, std::size_t count) {
    const auto found = known_.find(name);
    if (found != known_.end()) {
        if (found->second.type != type || found->second.count != count)
            throw Error(RLSD_BAD_BUNDLE, text("tensor '", name, "' is ", ort::type_name(found->second.type), " of ",
                                              found->second.count, " elements in one graph, and ", ort::type_name(type),
                                              " of ", count, " in another"));
        return found->second.memory.at();
    }
    const std::size_t bytes = count * ort::width_of(type);
    cuda::Buffer memory(device_, bytes);
    device_.fill(memory.at(), 0, bytes);
    return known_.emplace(name, Tensor{type, count, std::move(memory)}).first->second.memory.at();
}

cuda::DevicePointer DeviceTensors::at(const std::string &name) const {
    const auto found = known_.find(name);
    return found == known_.end() ? 0 : found->second.memory.at();
}

DeviceGraph::DeviceGraph(Bundle &bundle, const cuda::Device &device, const std::string &graph, std::int64_t batch,
                         DeviceTensors &tensors, const Naming &naming, bool recorded)
    : bundle_(bundle), device_(device), graph_(graph), session_(&bundle.session(graph, batch)),
      first_(bundle.runtime(), not_recorded, text("gpu:", device.ordinal())), plain_(bundle.runtime(), not_recorded),
      recorded_(bundle.runtime(), recorded ? ++last_number : not_recorded),
      replays_(recorded && !device.driver().hosted) {
    for (const auto &info : session_->inputs()) {
        const std::string name = naming(info.name);
        if (tensors.at(name) == 0)
            throw Error(RLSD_BAD_BUNDLE, text("graph '", graph, "': nothing provides its input '", info.name, "'"));
        bind(info, tensors.make(name, info.type, info.count()));
        input_names_.push_back(info.name.c_str());
        inputs_.push_back(values_.back().get());
    }
    for (const auto &info : session_->outputs()) {
        bind(info, tensors.make(naming(info.name), info.type, info.count()));
        output_names_.push_back(info.name.c_str());
        outputs_.push_back(values_.back().get());
    }
}

// A host function that is still queued would find nothing here.
DeviceGraph::~DeviceGraph() {
    if (device_.driver().hosted) device_.driver().stream_wait(device_.stream());
}

void DeviceGraph::bind(const ort::TensorInfo &info, cuda::DevicePointer memory) {
    const ort::Runtime &runtime = session_->runtime();
    const ort::OrtMemoryInfo *where = device_.driver().hosted ? runtime.cpu() : runtime.cuda(device_.ordinal());
    values_.emplace_back(runtime, reinterpret_cast<void *>(memory), info.bytes(), info.shape, info.type, where);
}

void DeviceGraph::enqueue() {
    ++device_.launches;
    if (device_.driver().hosted)
        device_.check(device_.driver().launch_host(device_.stream(), run_hosted, this), "cannot queue a graph");
    else run(replays_ ? recorded_ : plain_);
}

// In a session's first run ONNX Runtime takes a piece of memory for every value, and in the later ones a block in which
// all have their places. The pieces go at the end of the first: once a run is recorded nothing may be given back.
void DeviceGraph::run(const ort::RunOptions &options) {
    const bool first = !session_->has_run();
    session_->run(input_names_, inputs_, output_names_, outputs_, first ? &first_ : &options);
}

// Before it records a run ONNX Runtime makes two itself; two more leave its memory as it has to be, since a recorded run
// that allocates fails.
void DeviceGraph::warm_up() {
    if (replays_)
        for (int i = 0; i < 2; ++i) run(plain_);
    try {
        enqueue();
    } catch (const ort::OrtError &) {
        if (!replays_) throw;
        device_.leave_capture();
        replays_ = false;
        bundle_.note_not_recorded(graph_);
        run(plain_);
    }
}

// A host function must neither throw nor call the driver.
void DeviceGraph::run_hosted(void *self) noexcept {
    auto &graph = *static_cast<DeviceGraph *>(self);
    try {
        graph.session_->run(graph.input_names_, graph.inputs_, graph.output_names_, graph.outputs_);
    } catch (...) {
        graph.failure_ = std::current_exception();
    }
}

void DeviceGraph::check() {
    if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
}

}  // namespace rlsd
