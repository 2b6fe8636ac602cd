// Named tensors in the device's memory, and graphs bound to them once.
#pragma once

#include "cuda.h"
#include "tensors.h"

#include <exception>
#include <map>
#include <string>
#include <vector>

namespace rlsd {

class DeviceTensors {
  public:
    explicit DeviceTensors(const cuda::Device &device) : device_(device) {}

    // The tensor's memory, zeroed when it is new. One that is there must have that type and as many elements: it is
    // what one graph writes and another reads.
    cuda::DevicePointer make(const std::string &name, ort::Type type, std::size_t count);
    cuda::DevicePointer at(const std::string &name) const;  // 0 where there is none

  private:
    struct Tensor {
        ort::Type type;
        std::size_t count;
        cuda::Buffer memory;
    };
    const cuda::Device &device_;
    std::map<std::string, Tensor> known_;
};

// A graph whose inputs and outputs are fixed memory of the device. Work is queued on the device's stream.
class DeviceGraph {
  public:
    // Outputs get memory of their own where they have none; an input without memory is an error. recorded: whether runs
    // are replayed from a CUDA graph, which pays where there are many.
    DeviceGraph(Bundle &bundle, const cuda::Device &device, const std::string &graph, std::int64_t batch,
                DeviceTensors &tensors, const Naming &naming, bool recorded = true);
    ~DeviceGraph();
    DeviceGraph(const DeviceGraph &) = delete;
    DeviceGraph &operator=(const DeviceGraph &) = delete;

    void enqueue();

    // The first runs, up to the recorded one, so that later ones only replay. Where the recording fails and a plain run
    // does not, all runs are plain from then on, and the bundle notes it.
    void warm_up();

    // Throws what went wrong in a run on the host (see Driver::hosted), once it has been waited for.
    void check();

  private:
    void bind(const ort::TensorInfo &info, cuda::DevicePointer memory);
    static void run_hosted(void *self) noexcept;

    void run(const ort::RunOptions &options);

    Bundle &bundle_;
    const cuda::Device &device_;
    const std::string graph_;
    const ort::Session *session_;
    ort::RunOptions first_, plain_, recorded_;
    bool replays_;
    std::vector<ort::Value> values_;
    std::vector<const char *> input_names_, output_names_;
    std::vector<const ort::OrtValue *> inputs_;
    std::vector<ort::OrtValue *> outputs_;
    std::exception_ptr failure_;
};

}  // namespace rlsd
