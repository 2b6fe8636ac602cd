#include "manifest.h"

#include "error.h"
#include "sha256.h"

#include <algorithm>
#include <charconv>
#include <functional>

namespace rlsd {
namespace {

constexpr std::int64_t largest = std::int64_t(1) << 32;  // elements of one tensor
using Words = std::vector<std::string>;

[[noreturn]] void bad(std::size_t line, const std::string &what) {
    throw Error(RLSD_BAD_BUNDLE, one_line(text("manifest line ", line, ": ", what)));
}

Words split(std::string_view line, std::size_t number) {
    Words words;
    for (std::size_t start = 0;;) {
        const std::size_t space = line.find(' ', start);
        words.emplace_back(line.substr(start, space - start));
        if (words.back().empty()) bad(number, "words must be separated by single spaces");
        if (space == std::string_view::npos) return words;
        start = space + 1;
    }
}

std::int64_t integer(const std::string &word, std::size_t line, std::int64_t low, std::int64_t high) {
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
    if (error != std::errc() || end != word.data() + word.size() || value < low || value > high)
        bad(line, text("'", word, "' is not a whole number from ", low, " to ", high));
    return value;
}

const std::string &plain_name(const std::string &word, std::size_t line) {
    const auto allowed = [](char c) {
        return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_' || c == '-' || c == '.';
    };
    if (word.empty() || word.size() > 128 || word[0] == '.' || !std::all_of(word.begin(), word.end(), allowed))
        bad(line, text("'", word.substr(0, 128), "' is not a plain name"));
    return word;
}

Shape shape_from(const Words &words, std::size_t first, std::size_t line) {
    Shape shape;
    std::int64_t count = 1;
    for (std::size_t i = first; i < words.size(); ++i) {
        shape.push_back(integer(words[i], line, 1, largest));
        if (shape.back() > largest / count) bad(line, "the shape has too many elements");
        count *= shape.back();
    }
    if (shape.empty() || shape.size() > 6) bad(line, "a shape has 1 to 6 dimensions");
    return shape;
}

OperatorInfo &operator_of(Manifest &m, const std::string &name, std::size_t line) {
    for (auto &op : m.operators)
        if (op.name == name) return op;
    bad(line, text("operator '", name, "' has not been declared"));
}

void exactly(const Words &words, std::size_t count, std::size_t line) {
    if (words.size() != count) bad(line, text("'", words[0], "' takes ", count - 1, " values, not ", words.size() - 1));
}

using Rule = std::function<void(Manifest &, const Words &, std::size_t)>;

Rule one(std::string Manifest::*field) {
    return [field](Manifest &m, const Words &w, std::size_t line) {
        exactly(w, 2, line);
        if (!(m.*field).empty()) bad(line, text("'", w[0], "' stands twice"));
        m.*field = plain_name(w[1], line);
    };
}

Rule number(std::int64_t Manifest::*field, std::int64_t low, std::int64_t high) {
    return [=](Manifest &m, const Words &w, std::size_t line) {
        exactly(w, 2, line);
        if (m.*field != 0) bad(line, text("'", w[0], "' stands twice"));
        m.*field = integer(w[1], line, low, high);
    };
}

Rule shape(Shape Manifest::*field) {
    return [field](Manifest &m, const Words &w, std::size_t line) {
        if (!(m.*field).empty()) bad(line, text("'", w[0], "' stands twice"));
        m.*field = shape_from(w, 1, line);
    };
}

void read_graph(Manifest &m, const Words &w, std::size_t line) {
    exactly(w, 4, line);
    const std::int64_t batch = integer(w[2], line, 1, 1024);
    if (!m.graphs[plain_name(w[1], line)].emplace(batch, plain_name(w[3], line)).second)
        bad(line, text("graph '", w[1], "' for batch ", batch, " stands twice"));
}

void read_operator(Manifest &m, const Words &w, std::size_t line) {
    if (w.size() < 3) bad(line, "'operator' takes a name and a shape");
    for (const auto &op : m.operators)
        if (op.name == w[1]) bad(line, text("operator '", w[1], "' stands twice"));
    m.operators.push_back({plain_name(w[1], line), shape_from(w, 2, line), {}});
}

void read_operator_param(Manifest &m, const Words &w, std::size_t line) {
    if (w.size() < 4) bad(line, "'operator_param' takes an operator, a name and a shape");
    auto &op = operator_of(m, w[1], line);
    for (const char *taken : {"x", "y", "t", "loss", "grad"})
        if (w[2] == taken) bad(line, text("a parameter cannot be called '", w[2], "': the graphs use that name"));
    for (const auto &param : op.params)
        if (param.first == w[2]) bad(line, text("parameter '", w[2], "' of operator '", w[1], "' stands twice"));
    op.params.emplace_back(plain_name(w[2], line), shape_from(w, 3, line));
}

// kernel NAME ARCH FILE ENTRY WARPS SHARED name:type ... CONSTANT=value ...
void read_kernel(Manifest &m, const Words &w, std::size_t line) {
    if (w.size() < 9) bad(line, "'kernel' takes a name, an architecture, a file, an entry, warps, bytes and arguments");
    KernelInfo kernel;
    kernel.name = plain_name(w[1], line), kernel.file = plain_name(w[3], line), kernel.entry = plain_name(w[4], line);
    kernel.arch = integer(w[2], line, 10, 9999);
    kernel.warps = integer(w[5], line, 1, 32);
    kernel.shared = integer(w[6], line, 0, 1 << 20);
    for (std::size_t i = 7; i < w.size(); ++i) {
        const std::size_t colon = w[i].find(':'), equal = w[i].find('=');
        if (colon != std::string::npos) kernel.arguments.emplace_back(w[i].substr(0, colon), w[i].substr(colon + 1));
        else if (equal != std::string::npos)
            kernel.constants[w[i].substr(0, equal)] = integer(w[i].substr(equal + 1), line, -largest, largest);
        else bad(line, text("'", w[i].substr(0, 64), "' is neither name:type nor NAME=value"));
    }
    for (const auto &other : m.kernels)
        if (other.name == kernel.name && other.arch == kernel.arch) bad(line, text("kernel '", w[1], "' stands twice"));
    m.kernels.push_back(std::move(kernel));
}

void read_scale(Manifest &m, const Words &w, std::size_t line) {
    exactly(w, 3, line);
    double value = 0;
    const auto [end, error] = std::from_chars(w[2].data(), w[2].data() + w[2].size(), value);
    if (error != std::errc() || end != w[2].data() + w[2].size() || !(value > 0 && value < 1e30))
        bad(line, text("'", w[2].substr(0, 64), "' is not a positive number"));
    if (!m.cotangent_scales.emplace(plain_name(w[1], line), value).second)
        bad(line, text("the scale of '", w[1], "' stands twice"));
}

void read_file(Manifest &m, const Words &w, std::size_t line) {
    exactly(w, 4, line);
    const auto hex = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
    if (w[3].size() != 64 || !std::all_of(w[3].begin(), w[3].end(), hex)) bad(line, "a SHA-256 has 64 hexadecimal digits");
    const auto size = static_cast<std::uint64_t>(integer(w[2], line, 0, std::int64_t(1) << 40));
    if (!m.files.emplace(plain_name(w[1], line), FileInfo{size, w[3]}).second)
        bad(line, text("file '", w[1], "' stands twice"));
}

const std::map<std::string, Rule> &rules() {
    static const std::map<std::string, Rule> all = {
        {"name", one(&Manifest::name)},
        {"target",
         [](Manifest &m, const Words &w, std::size_t line) {
             one(&Manifest::target)(m, w, line);
             if (m.target != "cpu" && m.target != "cuda")  // at once: others may have lines of their own
                 throw Error(RLSD_BAD_BUNDLE, text("the bundle is for target '", m.target,
                                                   "'; this engine runs targets 'cpu' and 'cuda'"));
         }},
        {"kernel", read_kernel},
        {"cotangent_scale", read_scale},
        {"precision", one(&Manifest::precision)},
        {"latent", shape(&Manifest::latent)},
        {"image", shape(&Manifest::image)},
        {"context", shape(&Manifest::context)},
        {"timesteps", number(&Manifest::timesteps, 2, 1000000)},
        {"steps_offset", number(&Manifest::steps_offset, 0, 1000000)},
        {"feature_dim", number(&Manifest::feature_dim, 1, 1 << 24)},
        {"alphas_cumprod", one(&Manifest::alphas_cumprod)},
        {"null_context", one(&Manifest::null_context)},
        {"weights", one(&Manifest::weights)},
        {"graph", read_graph},
        {"operator", read_operator},
        {"operator_param", read_operator_param},
        {"file", read_file},
        {"producer", [](Manifest &, const Words &, std::size_t) {}},
        {"named_context",
         [](Manifest &m, const Words &w, std::size_t line) {
             exactly(w, 3, line);
             if (!m.contexts.emplace(plain_name(w[1], line), plain_name(w[2], line)).second)
                 bad(line, text("context '", w[1], "' stands twice"));
         }},
    };
    return all;
}

void check_whole(const Manifest &m) {
    const auto need = [](bool there, const char *what) {
        if (!there) throw Error(RLSD_BAD_BUNDLE, text("the manifest has no line '", what, "'"));
    };
    need(!m.name.empty(), "name");
    need(m.latent.size() == 3, "latent C H W");
    need(m.image.size() == 3, "image C H W");
    need(m.timesteps != 0, "timesteps");
    need(!m.alphas_cumprod.empty(), "alphas_cumprod");
    need(m.context.empty() == m.null_context.empty(), m.context.empty() ? "context" : "null_context");
    need(!m.context.empty() || m.graphs.count("context") == 0, "context");
    for (const char *graph : {"denoiser", "decoder", "decoder_pull"}) need(m.graphs.count(graph) != 0, graph);
    need(!m.target.empty(), "target");
    if (m.for_cuda()) {
        need(m.cotangent_scales.count("decoder") != 0, "cotangent_scale decoder");
        need(m.graphs.count("features") == m.cotangent_scales.count("features"), "cotangent_scale features");
    }
}

}  // namespace

std::int64_t count_of(const Shape &shape) {
    std::int64_t count = 1;
    for (const std::int64_t n : shape) count *= n;
    return count;
}

std::string shape_text(const Shape &shape) {
    std::string out;
    for (const std::int64_t n : shape) {
        if (!out.empty()) out += 'x';
        out += std::to_string(n);
    }
    return out;
}

Manifest parse_manifest(std::string_view content) {
    Manifest m;
    std::size_t number = 0, at = 0;
    while (at < content.size()) {
        const std::size_t end = content.find('\n', at);
        if (end == std::string_view::npos) bad(number + 1, "the last line is cut off");
        const std::string_view line = content.substr(at, end - at);
        ++number;
        if (number == 1) {
            if (line != "rlsd-bundle 1")
                bad(1, text("'", line.substr(0, 64), "' is not 'rlsd-bundle 1', the format this engine reads"));
        } else if (line.starts_with("end ")) {
            const std::string digest = sha256_hex(std::as_bytes(std::span(content.data(), at)));
            if (line.substr(4) != digest) bad(number, "the manifest was altered: its SHA-256 differs");
            if (end + 1 != content.size()) bad(number, "something stands behind the end");
            check_whole(m);
            m.digest = digest;
            return m;
        } else if (!line.starts_with("check") && !line.starts_with("info")) {
            const Words words = split(line, number);
            const auto rule = rules().find(words[0]);
            if (rule == rules().end()) bad(number, text("key '", words[0].substr(0, 64), "' is not known"));
            rule->second(m, words, number);
        }
        m.lines.emplace_back(line);
        at = end + 1;
    }
    throw Error(RLSD_BAD_BUNDLE, "the manifest is cut off: its 'end' line is missing");
}

}  // namespace rlsd
