// A GPU's backend: who sits where. Slots of the state, inputs of jobs, batches, seats, and what to do when memory is short.
#include "gpu.h"

#include "half.h"
#include "philox.h"

#include <algorithm>

namespace rlsd {
namespace {

constexpr std::int64_t most_rows = 65520;  // of a grid, and a multiple of what keeps addresses aligned
constexpr double launch_share = 0.25;  // of a chunk's time that does not depend on its lanes, in lanes

}  // namespace

void Gpu::pack(const Jobs &active) {
    const std::lock_guard turn(setting_up());
    const cuda::Inside inside(device_, std::nothrow);
    device_.wait();
    try {
        seated_.clear();
        try {
            place(active, true);
        } catch (const std::exception &error) {  // seats, of jobs that are through perhaps, are made anew where they are needed
            if (!is_out_of_memory(error) || seats_.empty()) throw;
            device_.wait();
            seats_.clear();
            place(active, false);
        }
    } catch (const ort::OrtError &error) {
        throw Error(is_out_of_memory(error) ? RLSD_OUT_OF_MEMORY : RLSD_RUNTIME_ERROR, error.what());
    }
}

void Gpu::place(const Jobs &active, bool spare) {
    settle(active, spare);
    while (!seat_all(active)) {
    }
}

// Every active job has a place: rows of the state that follow each other, and its inputs on the device. spare: with
// rows for jobs to come, where there is memory.
void Gpu::settle(const Jobs &active, bool spare) {
    std::erase_if(guests_, [&](const auto &guest) {
        return std::none_of(active.begin(), active.end(), [&](const auto &job) { return job.get() == guest.first; });
    });
    if (guests_.empty() && !spare) state_ = DeviceState(), backup_ = DeviceState(), slots_ = 0;  // nothing to carry over
    std::map<std::int32_t, std::int64_t> taken;  // first slot -> particles
    for (const auto &[job, guest] : guests_) taken[guest.slot] = job->particles;
    for (const auto &job : active) {
        if (guests_.count(job.get()) != 0) continue;
        std::int64_t slot = 0;
        for (const auto &[first, particles] : taken) {
            if (first - slot >= job->particles) break;
            slot = first + particles;
        }
        if (slot + job->particles > slots_) grow(slot + job->particles, spare);
        if (job->loss_scale == 0) job->loss_scale = bundle_.manifest().cotangent_scales.at("decoder");
        Guest guest{job, static_cast<std::int32_t>(slot), inputs_of(*job), nullptr, 0};
        if (job->traces(Trace::diversity)) guest.latents = std::make_unique<cuda::Pinned>(device_, floats(job->particles * latent_));
        taken[guest.slot] = job->particles;
        const auto seated = guests_.emplace(job.get(), std::move(guest)).first;
        try {
            job->drawn() ? upload(*job, seated->second) : draw(*job, seated->second);
        } catch (...) {
            guests_.erase(seated);
            throw;
        }
    }
}

// To twice as many slots as there are, or what is needed. All or nothing: state and backup always have the same sizes.
void Gpu::grow(std::int64_t slots, bool spare) {
    const auto larger = [this](DeviceState &old, std::int64_t count) {
        DeviceState fresh;
        const auto from = old.all(), to = fresh.all();
        for (std::size_t i = 0; i < to.size(); ++i) {
            *to[i] = cuda::Buffer(device_, floats(count * (i < 3 ? latent_ : image_)));  // those of z come first
            device_.fill(to[i]->at(), 0, to[i]->bytes());
            if (slots_ != 0) device_.copy(to[i]->at(), from[i]->at(), from[i]->bytes());
        }
        return fresh;
    };
    const auto grow_to = [&](std::int64_t count) {
        DeviceState state = larger(state_, count), backup = larger(backup_, count);
        device_.wait();  // before the old ones go
        state_ = std::move(state), backup_ = std::move(backup), slots_ = count;
    };
    const std::int64_t doubled = spare ? std::max(slots, 2 * slots_) : slots;
    try {
        grow_to(doubled);
    } catch (const Error &error) {
        if (error.status != RLSD_OUT_OF_MEMORY || doubled == slots) throw;
        grow_to(slots);
    }
}

// The initial particles, by the kernel, in lanes of their own.
void Gpu::draw(Job &job, const Guest &guest) {
    const auto particles = static_cast<std::size_t>(job.particles);
    const cuda::Pinned table(device_, particles * sizeof(LaneWords));
    const cuda::Buffer words(device_, particles * sizeof(LaneWords));
    for (std::int32_t i = 0; i < job.particles; ++i) {
        LaneReals unused;
        fill_lane({&job, i}, {guest.slot + i, -1, -1}, table.as<LaneWords>()[i], unused);
    }
    device_.upload(words.at(), table.as<LaneWords>(), words.bytes());
    const cuda::Kernel &kernel = kernels_.get("start");
    const auto fill = [&](const cuda::Buffer &value, const cuda::Buffer &m, const cuda::Buffer &v, std::uint32_t stream,
                          std::int64_t size) {
        for (std::int64_t first = 0; first < job.particles; first += most_rows)
            kernel.launch({cuda::ceil_div(size, kernel.constant("BLOCK")), std::min(job.particles - first, most_rows)},
                          {words.at(static_cast<std::size_t>(first) * sizeof(LaneWords)), value.at(), m.at(), v.at(),
                           static_cast<std::int32_t>(stream), static_cast<std::int32_t>(size)});
    };
    fill(state_.z, state_.m_z, state_.v_z, stream_initial_z, latent_);
    if (job.augmented()) fill(state_.x, state_.m_x, state_.v_x, stream_initial_x, image_);
    device_.wait();  // before the table goes
}

// The state that a job brought from a snapshot.
void Gpu::upload(Job &job, const Guest &guest) {
    const auto put = [&](const cuda::Buffer &to, const std::vector<float> &from, std::int64_t each) {
        if (!from.empty()) device_.upload(to.at(floats(guest.slot * each)), from.data(), from.size() * sizeof(float));
    };
    put(state_.z, job.z.value, latent_), put(state_.m_z, job.z.m, latent_), put(state_.v_z, job.z.v, latent_);
    put(state_.x, job.x.value, image_), put(state_.m_x, job.x.m, image_), put(state_.v_x, job.x.v, image_);
    device_.wait();  // before the values go
    job.z = Variable(), job.x = Variable();
}

void Gpu::fetch(Job &job) {
    job.allocate();
    const std::int64_t slot = guests_.at(&job).slot;
    const cuda::Inside inside(device_);
    const auto get = [&](std::vector<float> &to, const cuda::Buffer &from, std::int64_t each) {
        if (!to.empty()) device_.download(to.data(), from.at(floats(slot * each)), to.size() * sizeof(float));
    };
    get(job.z.value, state_.z, latent_), get(job.z.m, state_.m_z, latent_), get(job.z.v, state_.v_z, latent_);
    get(job.x.value, state_.x, image_), get(job.x.m, state_.m_x, image_), get(job.x.v, state_.v_x, image_);
    device_.wait();
}

DeviceInputs Gpu::inputs_of(const Job &job) {
    const auto given = [this](const std::vector<float> &values) {
        cuda::Buffer buffer(device_, values.size() * sizeof(float));
        device_.upload(buffer.at(), values.data(), buffer.bytes());
        return buffer;
    };
    DeviceInputs inputs;
    inputs.y = given(job.y);
    for (const auto &param : job.op_params) inputs.params.push_back(given(param));
    if (!job.context.empty()) inputs.context = context_of(job.context);
    if (job.params.guidance != 1) inputs.null_context = context_of(bundle_.null_context());
    device_.wait();
    return inputs;
}

// What the denoiser takes for a context: itself in halves, or what the graph `context` makes of it; for one sample.
std::vector<cuda::Buffer> Gpu::context_of(const std::vector<float> &context) {
    const std::int64_t batch = bundle_.batches().front();
    std::vector<std::uint16_t> halves;
    for (std::int64_t i = 0; i < batch; ++i)
        std::transform(context.begin(), context.end(), std::back_inserter(halves), to_half);
    DeviceTensors tensors(device_);
    const auto given = tensors.make("context", ort::Type::float16, halves.size());
    device_.upload(given, halves.data(), halves.size() * sizeof(std::uint16_t));
    std::vector<cuda::Buffer> found;
    const auto keep = [&](const ort::TensorInfo &info) {
        if (tensors.at(info.name) == 0)
            throw Error(RLSD_BAD_BUNDLE, one_line(text("graph 'context' does not give '", info.name, "', which the denoiser takes")));
        tensors.make(info.name, info.type, info.count());  // the same type and size
        cuda::Buffer &buffer = found.emplace_back(device_, info.bytes() / static_cast<std::size_t>(batch));
        device_.copy(buffer.at(), tensors.at(info.name), buffer.bytes());
    };
    std::optional<DeviceGraph> graph;
    if (bundle_.has("context")) {
        graph.emplace(bundle_, device_, "context", batch, tensors, [](const std::string &name) { return name; }, false);
        graph->enqueue();
    }
    for (const auto &info : bundle_.session("denoiser", batch).inputs())
        if (info.name != "z_t" && info.name != "t") keep(info);
    device_.wait();
    if (graph) graph->check();
    return found;
}

// Of a tick in a batch of this size: as `rlsd tune` measured it, or in proportion to its lanes.
double Gpu::time_of(std::int64_t size) const {
    const auto found = tuned_.find(size);
    return found != tuned_.end() ? found->second : double(size) + launch_share;
}

// The batches for so many lanes: of all ways, one that takes the least time, if that of a batch grows with its size.
std::vector<std::int64_t> Gpu::sizes_for(std::int64_t lanes) const {
    std::vector<double> least{0};
    std::vector<std::int64_t> last{0};
    for (std::int64_t n = 1; n <= lanes; ++n) {
        least.push_back(0), last.push_back(0);
        for (const std::int64_t size : bundle_.batches()) {
            if (size > largest_) continue;
            const double time = time_of(size) + least[static_cast<std::size_t>(std::max<std::int64_t>(0, n - size))];
            if (last.back() == 0 || time < least.back()) least.back() = time, last.back() = size;
        }
    }
    std::vector<std::int64_t> sizes;
    for (std::int64_t n = lanes; n > 0; n -= sizes.back()) sizes.push_back(last[static_cast<std::size_t>(n)]);
    std::sort(sizes.rbegin(), sizes.rend());
    return sizes;
}

// False: the memory does not allow the largest batch, which is smaller now.
bool Gpu::seat_all(const Jobs &active) {
    seated_.clear();
    for (Seat &seat : seats_) seat.leave();
    std::vector<Job *> far, close;
    for (const auto &job : active)
        if (job->params.gamma > 0 && job->crowd_size() > 1) (job->in_features() ? far : close).push_back(job.get());
    near_->seat(close);
    if (seen_) seen_->seat(far);
    try {
        for (const OperatorInfo &op : bundle_.manifest().operators) {
            std::vector<Lane> lanes;
            for (const auto &job : active)
                if (job->op == &op)
                    for (std::int64_t i = 0; i < job->particles; ++i) lanes.push_back({job.get(), i});
            seat_operator(op, lanes);
        }
        return true;
    } catch (const std::exception &error) {
        seated_.clear();
        const auto &batches = bundle_.batches();
        const auto tried = std::find(batches.begin(), batches.end(), largest_);
        if (!is_out_of_memory(error) || tried == batches.begin()) throw;
        seats_.remove_if([this](const Seat &seat) { return seat.size() == largest_; });
        bundle_.close_sessions(largest_);
        largest_ = *(tried - 1);
        return false;
    }
}

void Gpu::seat_operator(const OperatorInfo &op, const std::vector<Lane> &lanes) {
    auto next = lanes.begin();
    for (const std::int64_t size : sizes_for(static_cast<std::int64_t>(lanes.size()))) {
        auto chunk = std::make_unique<Chunk>(device_, op, size);
        for (; next != lanes.end() && static_cast<std::int64_t>(chunk->lanes.size()) < size; ++next) {
            const Guest &guest = guests_.at(next->job);
            const Places places{guest.slot + static_cast<std::int32_t>(next->particle), near_->row(*next->job, next->particle),
                                seen_ ? seen_->row(*next->job, next->particle) : -1};
            chunk->lanes.push_back({*next, places, &guest.inputs});
        }
        const bool waits = chunk->any([](const Job &job) { return job.params.gamma > 0 && job.crowd_size() > 1; });
        Seat *seat = seat_for(op, size, waits);
        seated_.push_back({std::move(chunk), seat, waits});
    }
}

// Chunks that wait for the repulsion keep the decoder's activations meanwhile if there is memory for a seat each; else,
// and where nothing waits, they take turns. Of seats that are as free, one that knows the operator already.
Seat *Gpu::seat_for(const OperatorInfo &op, std::int64_t size, bool waits) {
    Seat *least = nullptr;
    std::ptrdiff_t guests = 0;
    for (Seat &seat : seats_) {
        if (seat.size() != size) continue;
        const auto here = std::count_if(seated_.begin(), seated_.end(), [&](const Seated &s) { return s.seat == &seat; });
        if (least == nullptr || here < guests || (here == guests && seat.knows(op) && !least->knows(op)))
            least = &seat, guests = here;
    }
    if (least == nullptr || (guests != 0 && waits)) {
        try {
            return new_seat(op, size);
        } catch (const std::exception &error) {
            if (least == nullptr || !is_out_of_memory(error)) throw;
        }
    }
    return with_room([&] { return least->learn(op), least; }, least);
}

Seat *Gpu::new_seat(const OperatorInfo &op, std::int64_t size) {
    return with_room([&] {
        Seat &seat = seats_.emplace_back(bundle_, device_, kernels_, size);
        try {
            seat.learn(op);
        } catch (...) {
            seats_.pop_back();
            throw;
        }
        return &seat;
    });
}

// Seats that nobody uses, but for `kept`, go where there is no memory.
template <class Make> Seat *Gpu::with_room(const Make &make, const Seat *kept) {
    try {
        return make();
    } catch (const std::exception &error) {
        if (!is_out_of_memory(error)) throw;
        const auto unused = [&](const Seat &seat) {
            return &seat != kept && std::none_of(seated_.begin(), seated_.end(), [&](const Seated &s) { return s.seat == &seat; });
        };
        if (std::none_of(seats_.begin(), seats_.end(), unused)) throw;
        seats_.remove_if(unused);
        return make();
    }
}

}  // namespace rlsd
