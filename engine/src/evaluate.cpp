// rlsd_evaluate: one graph of the bundle on any number of samples.
#include "error.h"
#include "host.h"

#include <algorithm>
#include <cstring>

namespace rlsd {
namespace {

std::size_t width(int dtype) { return dtype == RLSD_INT64 ? 8 : 4; }

}  // namespace

const rlsd_tensor *find_tensor(std::span<const rlsd_tensor> tensors, const ort::TensorInfo &info, std::int64_t batch,
                               std::int64_t count, const std::string &graph) {
    const auto named = [&](const rlsd_tensor &t) { return t.name != nullptr && info.name == t.name; };
    const auto found = std::find_if(tensors.begin(), tensors.end(), named);
    if (found == tensors.end()) return nullptr;
    const auto wanted = static_cast<std::int64_t>(info.count()) / batch * count;
    const int dtype = info.type == ort::Type::int64 ? RLSD_INT64 : RLSD_FLOAT32;
    require(found->data != nullptr, "graph '", graph, "': '", info.name, "' has no data");
    require(found->dtype == dtype, "graph '", graph, "': '", info.name, "' has dtype ", found->dtype, ", ", dtype,
            " is needed");
    require(found->count == static_cast<std::size_t>(wanted), "graph '", graph, "': '", info.name, "' has ", found->count,
            " elements, ", wanted, " are needed for ", count, " samples");
    return &*found;
}

std::int64_t batch_for(const Bundle &bundle, std::int64_t count) {
    const auto &batches = bundle.batches();
    const auto enough = std::find_if(batches.begin(), batches.end(), [&](std::int64_t b) { return b >= count; });
    return enough == batches.end() ? batches.back() : *enough;
}

void check_names(const std::string &graph, const ort::Session &session, std::span<const rlsd_tensor> inputs,
                 std::span<const rlsd_tensor> outputs) {
    const auto among = [](std::span<const rlsd_tensor> given, const std::string &name) {
        return std::any_of(given.begin(), given.end(), [&](const rlsd_tensor &t) { return t.name != nullptr && name == t.name; });
    };
    for (const auto &info : session.inputs())
        require(among(inputs, info.name), "graph '", graph, "' needs input '", info.name, "'");
    for (const rlsd_tensor &output : outputs) {
        const auto same = [&](const ort::TensorInfo &info) { return output.name != nullptr && info.name == output.name; };
        require(std::any_of(session.outputs().begin(), session.outputs().end(), same), "graph '", graph,
                "' has no output '", output.name == nullptr ? "" : output.name, "'");
    }
}

namespace {

struct Side {
    std::vector<std::vector<std::int64_t>> memory;  // int64 for its alignment; holds either type
    std::vector<ort::Value> values;
    std::vector<const rlsd_tensor *> callers;       // null where the caller has none
    std::vector<const char *> names;
};

Side make_side(const Bundle &bundle, const std::vector<ort::TensorInfo> &infos, std::span<const rlsd_tensor> tensors,
               std::int64_t batch, std::int64_t count, const std::string &graph) {
    Side side;
    for (const auto &info : infos) {
        auto &memory = side.memory.emplace_back(info.count());
        side.values.emplace_back(bundle.runtime(), memory.data(), info.bytes(), info.shape, info.type);
        side.callers.push_back(find_tensor(tensors, info, batch, count, graph));
        side.names.push_back(info.name.c_str());
    }
    return side;
}

}  // namespace

void Host::evaluate(const std::string &graph, std::int64_t count, std::span<const rlsd_tensor> inputs,
                    std::span<const rlsd_tensor> outputs) {
    const std::int64_t batch = batch_for(bundle_, count);
    const ort::Session &session = bundle_.session(graph, batch);
    check_names(graph, session, inputs, outputs);
    Side in = make_side(bundle_, session.inputs(), inputs, batch, count, graph);
    Side out = make_side(bundle_, session.outputs(), outputs, batch, count, graph);
    std::vector<const ort::OrtValue *> from;
    std::vector<ort::OrtValue *> to;
    for (const auto &value : in.values) from.push_back(value.get());
    for (const auto &value : out.values) to.push_back(value.get());
    const auto move = [&](const Side &side, std::int64_t done, std::int64_t now, bool into_graph) {
        for (std::size_t i = 0; i < side.callers.size(); ++i) {
            const rlsd_tensor *caller = side.callers[i];
            if (caller == nullptr) continue;
            const std::size_t each = caller->count / static_cast<std::size_t>(count) * width(caller->dtype);
            char *theirs = static_cast<char *>(caller->data) + static_cast<std::size_t>(done) * each;
            void *ours = const_cast<std::int64_t *>(side.memory[i].data());
            const std::size_t bytes = static_cast<std::size_t>(now) * each;
            into_graph ? std::memcpy(ours, theirs, bytes) : std::memcpy(theirs, ours, bytes);
        }
    };
    for (std::int64_t done = 0; done < count; done += batch) {
        const std::int64_t now = std::min(batch, count - done);
        move(in, done, now, true);
        session.run(in.names, from, out.names, to);
        move(out, done, now, false);
    }
}

}  // namespace rlsd
