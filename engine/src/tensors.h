// Named float32 tensors in aligned memory, and graphs bound to them once.
#pragma once

#include "bundle.h"

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace rlsd {

class Tensors {
  public:
    // The tensor's memory, zeroed when it is new; of at least `count` elements.
    float *make(const std::string &name, std::size_t count);
    float *find(const std::string &name) const;  // null where there is none
    std::size_t bytes() const noexcept { return bytes_; }

  private:
    struct Free {
        void operator()(float *memory) const;
    };
    std::map<std::string, std::unique_ptr<float, Free>> memory_;
    std::size_t bytes_ = 0;
};

// A graph whose inputs and outputs are fixed memory: run() allocates nothing.
class BoundGraph {
  public:
    // Gives the tensor that stands for an input or output of the graph.
    using Naming = std::function<std::string(const std::string &)>;

    // Outputs get memory of their own when they have none yet; an input without memory is an error.
    // times: int64 memory for the input `t`, if the graph has one.
    BoundGraph(Bundle &bundle, const std::string &graph, std::int64_t batch, Tensors &tensors, const Naming &naming,
               std::int64_t *times = nullptr);

    void run();

  private:
    const ort::Session *session_;
    std::vector<ort::Value> values_;
    std::vector<const char *> input_names_, output_names_;
    std::vector<const ort::OrtValue *> inputs_;
    std::vector<ort::OrtValue *> outputs_;
};

}  // namespace rlsd
