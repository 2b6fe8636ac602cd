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
    // The tensor's memory, zeroed when it is new. One that is there must have as many elements: it is what one graph
    // writes and another reads.
    float *make(const std::string &name, std::size_t count);
    float *find(const std::string &name) const;  // null where there is none
    std::size_t bytes() const noexcept { return bytes_; }

  private:
    struct Free {
        void operator()(float *memory) const;
    };
    struct Tensor {
        std::size_t count = 0;
        std::unique_ptr<float, Free> memory;
    };
    std::map<std::string, Tensor> known_;
    std::size_t bytes_ = 0;
};

// Gives the tensor that stands for an input or output of a graph.
using Naming = std::function<std::string(const std::string &)>;

// What is not in `known` gets the prefix.
Naming named(std::map<std::string, std::string> known, std::string prefix);

// Of the graph that measures an operator: x, loss and grad are those of all operators, y and the parameters its own.
std::string own_prefix(const OperatorInfo &op);
Naming loss_names(const OperatorInfo &op);

// A graph whose inputs and outputs are fixed memory: run() allocates nothing.
class BoundGraph {
  public:
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
