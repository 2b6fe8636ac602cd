#include "tensors.h"

#include "error.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace rlsd {

constexpr std::size_t alignment = 64;

void Tensors::Free::operator()(float *memory) const { std::free(memory); }

float *Tensors::make(const std::string &name, std::size_t count) {
    auto &[known, memory] = known_[name];
    if (memory == nullptr) {
        if (count > machine_memory() / sizeof(float))
            throw Error(RLSD_OUT_OF_MEMORY,
                        one_line(text("tensor '", name, "' of ", count, " numbers is larger than the memory of this machine")));
        const std::size_t bytes = (std::max<std::size_t>(count, 1) * sizeof(float) + alignment - 1) / alignment * alignment;
        memory.reset(static_cast<float *>(std::aligned_alloc(alignment, bytes)));
        if (memory == nullptr) throw std::bad_alloc();
        std::memset(memory.get(), 0, bytes);
        known = count;
        bytes_ += bytes;
    }
    if (known != count)
        throw Error(RLSD_BAD_BUNDLE, one_line(text("tensor '", name, "' has ", known, " elements in one graph, and ", count,
                                                   " in another")));
    return memory.get();
}

float *Tensors::find(const std::string &name) const {
    const auto found = known_.find(name);
    return found == known_.end() ? nullptr : found->second.memory.get();
}

Naming named(std::map<std::string, std::string> known, std::string prefix) {
    return [known = std::move(known), prefix = std::move(prefix)](const std::string &name) {
        const auto found = known.find(name);
        return found == known.end() ? prefix + name : found->second;
    };
}

std::string own_prefix(const OperatorInfo &op) { return "operator." + op.name + "/"; }

Naming loss_names(const OperatorInfo &op) { return named({{"x", "x"}, {"loss", "loss"}, {"grad", "grad"}}, own_prefix(op)); }

BoundGraph::BoundGraph(Bundle &bundle, const std::string &graph, std::int64_t batch, Tensors &tensors,
                       const Naming &naming, std::int64_t *times)
    : session_(&bundle.session(graph, batch)) {
    const auto &runtime = bundle.runtime();
    for (const auto &info : session_->inputs()) {
        input_names_.push_back(info.name.c_str());
        if (info.name == "t" && times != nullptr) {
            values_.emplace_back(runtime, std::span(times, info.count()), info.shape);
        } else {
            const std::string name = naming(info.name);
            if (tensors.find(name) == nullptr)
                throw Error(RLSD_BAD_BUNDLE, text("graph '", graph, "': nothing provides its input '", info.name, "'"));
            values_.emplace_back(runtime, std::span(tensors.make(name, info.count()), info.count()), info.shape);
        }
        inputs_.push_back(values_.back().get());
    }
    for (const auto &info : session_->outputs()) {
        output_names_.push_back(info.name.c_str());
        float *memory = tensors.make(naming(info.name), info.count());
        values_.emplace_back(runtime, std::span(memory, info.count()), info.shape);
        outputs_.push_back(values_.back().get());
    }
}

void BoundGraph::run() { session_->run(input_names_, inputs_, output_names_, outputs_); }

}  // namespace rlsd
