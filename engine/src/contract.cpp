#include "contract.h"

#include "error.h"

#include <algorithm>
#include <map>

namespace rlsd {
namespace {

struct Wanted {
    std::map<std::string, Shape> inputs, outputs;  // per sample
    bool more_inputs = false, more_outputs = false;  // kept activations, whose shapes are the graph's own affair
};

std::map<std::string, Shape> with_params(const OperatorInfo &op, std::map<std::string, Shape> inputs) {
    for (const auto &[name, shape] : op.params) inputs[name] = shape;
    return inputs;
}

Wanted wanted(const Manifest &m, const std::string &graph) {
    if (graph == "denoiser") {
        Wanted w{{{"z_t", m.latent}, {"t", {}}}, {{"eps", m.latent}}};
        if (m.graphs.count("context") != 0) w.more_inputs = true;  // keys and values, which that graph gives
        else if (!m.context.empty()) w.inputs["context"] = m.context;
        return w;
    }
    if (graph == "context") return {{{"context", m.context}}, {}, false, true};
    if (graph == "decoder") return {{{"z", m.latent}}, {{"image", m.image}}, false, true};
    if (graph == "encoder") return {{{"image", m.image}}, {{"z", m.latent}}};
    if (graph == "decoder_pull") return {{{"cotangent", m.image}, {"z", m.latent}}, {{"z_cotangent", m.latent}}, true};
    if (graph == "features") return {{{"image", m.image}}, {{"phi", {m.feature_dim}}}, false, true};
    if (graph == "features_pull")
        return {{{"cotangent", {m.feature_dim}}, {"image", m.image}}, {{"image_cotangent", m.image}}, true};
    for (const auto &op : m.operators) {
        if (graph == "operator." + op.name + ".loss")
            return {with_params(op, {{"x", m.image}, {"y", op.measurement}}), {{"loss", {}}, {"grad", m.image}}};
        if (graph == "operator." + op.name + ".forward")
            return {with_params(op, {{"x", m.image}}), {{"y", op.measurement}}};
    }
    throw Error(RLSD_BAD_BUNDLE, text("graph '", graph, "' is not known to this engine"));
}

// The networks of a bundle for CUDA compute in halves, forward operators never.
bool in_halves(const Manifest &m, const std::string &graph) { return m.for_cuda() && !graph.starts_with("operator."); }

void check_one(const Manifest &m, const std::string &graph, std::int64_t batch, const ort::TensorInfo &found,
               const Shape &per_sample) {
    Shape shape{batch};
    shape.insert(shape.end(), per_sample.begin(), per_sample.end());
    const auto real = in_halves(m, graph) ? ort::Type::float16 : ort::Type::float32;
    const auto type = found.name == "t" ? ort::Type::int64 : real;
    if (found.type != type || found.shape != shape)
        throw Error(RLSD_BAD_BUNDLE, text("graph '", graph, "': '", found.name, "' is ", ort::type_name(found.type), " ",
                                          shape_text(found.shape), ", ", ort::type_name(type), " ", shape_text(shape),
                                          " is needed"));
}

}  // namespace

void check_contract(const Manifest &manifest, const std::string &graph, std::int64_t batch, const ort::Session &session) {
    const Wanted want = wanted(manifest, graph);
    const auto check_all = [&](const std::vector<ort::TensorInfo> &found, const std::map<std::string, Shape> &known,
                               bool more) {
        for (const auto &tensor : found) {
            const auto it = known.find(tensor.name);
            if (it != known.end()) check_one(manifest, graph, batch, tensor, it->second);
            else if (!more) throw Error(RLSD_BAD_BUNDLE, text("graph '", graph, "': '", one_line(tensor.name), "' is not known"));
            else if ((tensor.type != ort::Type::float32 && !(tensor.type == ort::Type::float16 && in_halves(manifest, graph))) ||
                     tensor.count() == 0)
                throw Error(RLSD_BAD_BUNDLE, text("graph '", graph, "': '", one_line(tensor.name), "' must be ",
                                                  in_halves(manifest, graph) ? "float16 or " : "", "float32 of fixed shape"));
        }
    };
    check_all(session.inputs(), want.inputs, want.more_inputs);
    check_all(session.outputs(), want.outputs, want.more_outputs);
    for (const auto &tensor : session.outputs())  // or a graph would write what it should read
        if (want.inputs.count(tensor.name) != 0)
            throw Error(RLSD_BAD_BUNDLE, text("graph '", graph, "': its input '", tensor.name, "' is an output"));
    for (const auto &[name, shape] : want.outputs) {
        const auto same = [&name = name](const ort::TensorInfo &tensor) { return tensor.name == name; };
        if (std::none_of(session.outputs().begin(), session.outputs().end(), same))
            throw Error(RLSD_BAD_BUNDLE, text("graph '", graph, "' has no output '", name, "'"));
    }
}

}  // namespace rlsd
