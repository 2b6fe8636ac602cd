// B lanes on a GPU: the tensors that the graphs of one batch size read and write, and the step between the graphs.
#pragma once

#include "device_repulsion.h"
#include "device_tensors.h"
#include "lanes.h"

#include <array>
#include <memory>
#include <optional>
#include <thread>

namespace rlsd {

// The particles' state: [slots, values] float32 each, and what it was before the present tick.
struct DeviceState {
    cuda::Buffer z, m_z, v_z, x, m_x, v_x;

    std::array<cuda::Buffer *, 6> all() { return {&z, &m_z, &v_z, &x, &m_x, &v_x}; }
};

// What a job brings: its lanes' inputs that never change, on the device.
struct DeviceInputs {
    cuda::Buffer y;
    std::vector<cuda::Buffer> params;               // in the order of the operator's
    std::vector<cuda::Buffer> context, null_context;  // one, or the keys and values of every attention
};

struct DeviceLane : Lane {
    Places places;
    const DeviceInputs *inputs;
};

// Lanes that go through a seat together, and the page-locked memory that their tables and flags cross in.
struct Chunk {
    Chunk(const cuda::Device &device, const OperatorInfo &op, std::int64_t size);

    bool any(bool (*holds)(const Job &)) const;

    const OperatorInfo *op;  // of all lanes
    std::int64_t size;
    std::vector<DeviceLane> lanes;
    cuda::Pinned pinned;
    LaneWords *words;    // [size] each
    LaneReals *reals;
    std::int64_t *times;
    std::int32_t *flags;  // not 0: something was not finite
    float *losses;        // of the data, for those who want a trace
};

// Seconds of the device, by stage: an event at the end of each.
class DeviceClock {
  public:
    explicit DeviceClock(const cuda::Device &device) : device_(device) {}
    void start();
    void mark(double Times::*stage);
    void collect(Times &times);  // after the device was waited for

  private:
    const cuda::Device &device_;
    std::vector<std::unique_ptr<cuda::Event>> events_;
    std::vector<double Times::*> stages_;
};

class Seat {
  public:
    // Makes everything and runs every graph once, so that memory is short now or never.
    Seat(Bundle &bundle, const cuda::Device &device, cuda::Kernels &kernels, std::int64_t size);

    std::int64_t size() const noexcept { return size_; }

    // The same for an operator: before a chunk of its lanes comes here.
    void learn(const OperatorInfo &op);
    bool knows(const OperatorInfo &op) const { return losses_.count(&op) != 0; }

    // D(z) of the chunk's particles; features of those under repulsion there go to their rows of `seen`.
    void first(Chunk &chunk, const DeviceState &state, const DeviceRepulsion *seen, DeviceClock &clock);

    // The step itself, and the flags to the host. Decodes again where another chunk was here since `first`.
    void second(Chunk &chunk, const DeviceState &state, const DeviceRepulsion *seen, const DeviceRepulsion *latent,
                DeviceClock &clock);

    // After the last step of a lane's job: [image] float32.
    cuda::DevicePointer result(std::size_t lane) const;

    void forget() noexcept { primed_ = false; }    // the state was changed from outside
    void leave() noexcept { current_ = nullptr; }  // the chunk that is here goes
    void check();  // throws what went wrong in a graph

    // ONNX Runtime keeps recordings for each thread: another one that ticks first runs every graph, as when the seat was
    // made, and does what is under way here again.
    bool recorded_here() const { return recorder_ == std::this_thread::get_id(); }
    void warm_up();

  private:
    void bind();
    void load(const Chunk &chunk);
    void put(const std::string &name, std::size_t lane, const cuda::Buffer &from);
    void upload_tables(Chunk &chunk);
    void look(Chunk &chunk, const DeviceState &state, const DeviceRepulsion *seen, DeviceClock &clock);
    void gradient(const Chunk &chunk, const DeviceState &state);
    void step_x(const DeviceState &state, const DeviceRepulsion *seen);
    void step_z(const DeviceState &state, const DeviceRepulsion *latent);
    cuda::Grid tiles(const cuda::Kernel &kernel, std::int64_t values) const;
    cuda::DevicePointer at(const char *name) const { return tensors_.at(name); }

    Bundle &bundle_;
    const cuda::Device &device_;
    cuda::Kernels &kernels_;
    std::int64_t size_, latent_, image_;
    DeviceTensors tensors_;
    std::optional<DeviceGraph> denoiser_, null_denoiser_, decoder_, decoder_pull_, features_, features_pull_;
    std::map<const OperatorInfo *, DeviceGraph> losses_;
    std::vector<std::string> context_names_;  // what the denoiser takes beside z_t and t
    std::thread::id recorder_;                // who has recorded all graphs last
    const Chunk *current_ = nullptr;          // whose inputs lie here
    bool primed_ = false;                     // z, z_t, noise and x are those of the current chunk's next step
};

}  // namespace rlsd
