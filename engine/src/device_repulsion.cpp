#include "device_repulsion.h"

#include <algorithm>

namespace rlsd {

using cuda::ceil_div;

// The constants of kernels/repulsion/launch.py.
struct DeviceRepulsion::Size {
    std::int64_t n, tile, columns, splits, rows, cut;
    const char *distances, *crowd;
};

const DeviceRepulsion::Size DeviceRepulsion::sizes[3] = {
    {4, 4, 128, 128, 4, 128, "repulsion_distances_4", "repulsion_crowd_4"},
    {16, 16, 32, 64, 8, 128, "repulsion_distances_16", "repulsion_crowd_16"},
    {64, 16, 32, 16, 4, 64, "repulsion_distances_16", "repulsion_crowd_64"},
};

namespace {

constexpr std::int64_t tile = 16, strip = 32, cut = 64;   // of large jobs
constexpr std::int64_t scratch = std::int64_t(1) << 28;   // bytes for the distances of a large job
constexpr std::int64_t alignment = 16;                    // the kernels read rows of 16 values at a time
constexpr std::int64_t idle = INT64_MIN;                  // step of a job that the kernels pass over
constexpr std::size_t most_jobs = 65535;                  // of one launch: a grid's third size

struct Split {
    std::int64_t count, length;
};

// At most so many splits of a row, each as long as a multiple of `columns`.
Split split(std::int64_t values, std::int64_t columns, std::int64_t most) {
    const std::int64_t length = ceil_div(ceil_div(values, most), columns) * columns;
    return {ceil_div(values, length), length};
}

// The launches below are laid out for kernels that were compiled with these constants.
void expect(cuda::Kernels &kernels, const char *name, std::initializer_list<std::pair<const char *, std::int64_t>> constants) {
    for (const auto &[constant, wanted] : constants)
        if (const std::int64_t found = kernels.get(name).constant(constant); found != wanted)
            throw Error(RLSD_BAD_BUNDLE, text("kernel '", name, "': ", constant, " is ", found, ", the engine launches it for ", wanted));
}

std::size_t floats(std::int64_t count) { return static_cast<std::size_t>(count) * sizeof(float); }
std::int32_t small_int(std::int64_t value) { return static_cast<std::int32_t>(value); }

}  // namespace

DeviceRepulsion::DeviceRepulsion(const cuda::Device &device, cuda::Kernels &kernels, std::int64_t values)
    : device_(device), kernels_(kernels), values_(values), stride_(ceil_div(values, alignment) * alignment) {}

void DeviceRepulsion::seat(const std::vector<Job *> &jobs) {
    device_.wait();  // nothing that is queued may still use the old arrays
    groups_.clear();
    first_row_.clear();
    for (cuda::Buffer *old : {&features_, &result_, &bandwidths_}) *old = cuda::Buffer();
    std::int64_t rows = 0, least = 0;
    for (const Size &size : sizes) {
        std::vector<Job *> alike;
        for (Job *job : jobs)
            if (job->crowd_size() > least && job->crowd_size() <= size.n) alike.push_back(job);
        for (Job *job : alike) first_row_[job] = small_int(rows), rows += job->crowd_size();
        for (std::size_t i = 0; i < alike.size(); i += most_jobs)
            groups_.push_back(make_group(&size, {alike.begin() + i, alike.begin() + std::min(i + most_jobs, alike.size())}));
        least = size.n;
    }
    for (Job *job : jobs) {
        if (job->crowd_size() <= least) continue;
        first_row_[job] = small_int(rows), rows += job->crowd_size();
        groups_.push_back(make_group(nullptr, {job}));
    }
    if (rows == 0) return;
    features_ = cuda::Buffer(device_, floats(rows * stride_));
    result_ = cuda::Buffer(device_, floats(rows * stride_));
    bandwidths_ = cuda::Buffer(device_, floats(rows));
    seen_bandwidths_.reset();
    if (std::any_of(jobs.begin(), jobs.end(), [](const Job *job) { return job->out_trace != nullptr; }))
        seen_bandwidths_ = std::make_unique<cuda::Pinned>(device_, bandwidths_.bytes());
    device_.fill(features_.at(), 0, features_.bytes());
    device_.fill(result_.at(), 0, result_.bytes());
}

std::int32_t DeviceRepulsion::row(const Job &job, std::int64_t particle) const {
    const auto found = first_row_.find(&job);
    return found == first_row_.end() ? -1 : found->second + small_int(job.offset() + particle);
}

DeviceRepulsion::Group DeviceRepulsion::make_group(const Size *size, std::vector<Job *> jobs) {
    Group group;
    group.size = size, group.jobs = std::move(jobs);
    std::vector<std::int32_t> offsets;
    std::vector<std::int64_t> seeds, items;
    for (const Job *job : group.jobs) {
        offsets.push_back(first_row_.at(job));
        seeds.push_back(static_cast<std::int64_t>(job->seed));
        items.push_back(job->item);
        group.largest = std::max<std::int64_t>(group.largest, job->crowd_size());
    }
    offsets.push_back(offsets.back() + group.jobs.back()->crowd_size());
    const auto given = [this](const auto &values) {
        cuda::Buffer buffer(device_, values.size() * sizeof values[0]);
        device_.upload(buffer.at(), values.data(), buffer.bytes());
        device_.wait();  // before the values go
        return buffer;
    };
    group.offsets = given(offsets), group.seeds = given(seeds), group.items = given(items);
    group.steps = cuda::Buffer(device_, group.jobs.size() * sizeof(std::int64_t));
    group.next_steps = std::make_unique<cuda::Pinned>(device_, group.steps.bytes());
    make_scratch(group);
    return group;
}

// What the kernels of a group write for each other.
void DeviceRepulsion::make_scratch(Group &group) const {
    const Size *size = group.size;
    if (size != nullptr) {
        const auto count = static_cast<std::int64_t>(group.jobs.size());
        expect(kernels_, size->distances, {{"T", size->tile}, {"BD", size->columns}});
        expect(kernels_, size->crowd,
               {{"BI", size->rows}, {"BN", size->n}, {"BS", size->splits}, {"T", size->tile}, {"BD", size->cut}});
        const std::int64_t tiles = size->n / size->tile, splits = split(stride_, size->columns, size->splits).count;
        group.partials = cuda::Buffer(device_, floats(count * splits * size->n * size->n));
        group.squares = cuda::Buffer(device_, floats(count * splits * tiles));
        group.weights = cuda::Buffer(device_, floats(ceil_div(stride_, size->cut) * count * size->n * size->n));
    } else {
        expect(kernels_, "repulsion_distances_16", {{"T", tile}});
        expect(kernels_, "repulsion_bandwidths", {{"T", tile}});
        expect(kernels_, "repulsion_gradient", {{"BI", strip}, {"BD", cut}});
        const std::int64_t tiles = ceil_div(group.largest, tile), width = tiles * tile;
        const std::int64_t splits = split(stride_, 512, std::max<std::int64_t>(1, 512 / (tiles * tiles))).count;
        const std::int64_t strips = std::max<std::int64_t>(1, scratch / std::int64_t(floats(splits * width * strip)));
        const std::int64_t rows = std::min(ceil_div(group.largest, strip), strips) * strip;
        group.partials = cuda::Buffer(device_, floats(splits * rows * width));
        group.squares = cuda::Buffer(device_, floats(splits * tiles));
        group.ties = cuda::Buffer(device_, floats(rows));
    }
}

void DeviceRepulsion::enqueue() {
    bool queued = false;
    for (Group &group : groups_) {
        const auto repelled = [](const Job *job) { return job->repelled(); };
        if (std::none_of(group.jobs.begin(), group.jobs.end(), repelled)) continue;
        auto *steps = group.next_steps->as<std::int64_t>();
        for (std::size_t i = 0; i < group.jobs.size(); ++i) steps[i] = repelled(group.jobs[i]) ? group.jobs[i]->step : idle;
        device_.upload(group.steps.at(), steps, group.steps.bytes());
        group.size != nullptr ? small(group) : large(group);
        queued = true;
    }
    if (queued && seen_bandwidths_) device_.download(seen_bandwidths_->as<float>(), bandwidths_.at(), bandwidths_.bytes());
}

// Two launches: distances, then bandwidths, weights and gradient.
void DeviceRepulsion::small(Group &g) {
    const Size &size = *g.size;
    const auto count = static_cast<std::int64_t>(g.jobs.size());
    const std::int64_t tiles = size.n / size.tile;
    const auto [splits, length] = split(stride_, size.columns, size.splits);
    const std::int32_t d = small_int(stride_), n = small_int(size.n);
    kernels_.get(size.distances)
        .launch({tiles * tiles, splits, count}, {features(), g.offsets.at(), g.partials.at(), g.squares.at(), d, d, 0, n, n,
                                                 small_int(tiles), small_int(length), 1});
    kernels_.get(size.crowd)
        .launch({ceil_div(stride_, size.cut), size.n / size.rows, count},
                {features(), g.offsets.at(), g.seeds.at(), g.items.at(), g.steps.at(), g.partials.at(), g.squares.at(),
                 g.weights.at(), result(), bandwidths_.at(), d, small_int(values_), d, small_int(splits), small_int(tiles)});
}

// Strip by strip: distances, bandwidths and weights, gradient.
void DeviceRepulsion::large(Group &g) {
    const std::int64_t tiles = ceil_div(g.largest, tile), width = tiles * tile;
    const auto [splits, length] = split(stride_, 512, std::max<std::int64_t>(1, 512 / (tiles * tiles)));
    const std::int64_t rows = std::int64_t(g.ties.bytes() / sizeof(float));
    const std::int32_t d = small_int(stride_), r = small_int(rows), w = small_int(width), s = small_int(splits);
    for (std::int64_t first = 0; first < g.largest; first += rows) {
        const std::int32_t f = small_int(first), all = rows >= g.largest;
        kernels_.get("repulsion_distances_16")
            .launch({ceil_div(std::min(rows, g.largest - first), tile) * tiles, splits, 1},
                    {features(), g.offsets.at(), g.partials.at(), g.squares.at(), d, d, f, r, w, small_int(tiles),
                     small_int(length), all});
        kernels_.get("repulsion_bandwidths")
            .launch({rows, 1}, {g.offsets.at(), g.partials.at(), g.squares.at(), bandwidths_.at(), g.ties.at(), f, r, w, s,
                                small_int(tiles)});
        kernels_.get("repulsion_gradient")
            .launch({ceil_div(stride_, cut), rows / strip, 1},
                    {features(), g.offsets.at(), g.seeds.at(), g.items.at(), g.steps.at(), g.partials.at(), bandwidths_.at(),
                     g.ties.at(), result(), d, small_int(values_), d, f, r, w, s});
    }
}

}  // namespace rlsd
