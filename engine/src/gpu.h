// Particles on one GPU: state in its memory, seats that chunks of lanes go through, all on one stream.
#pragma once

#include "backend.h"
#include "device_ops.h"
#include "seat.h"

#include <deque>
#include <list>
#include <mutex>
#include <optional>

namespace rlsd {

// Whether it says that memory is spent: ours, or one of ONNX Runtime's, which has no status of its own for it.
bool is_out_of_memory(const std::exception &error);

inline std::size_t floats(std::int64_t count) { return static_cast<std::size_t>(count) * sizeof(float); }

// Callers' buffers, on the host or on the device.
class DeviceMemory : public Memory {
  public:
    explicit DeviceMemory(const cuda::Device &device) : device_(device) {}
    void read(void *to, const void *from, std::size_t bytes) const override;
    void clear(void *at, std::size_t bytes) const override;  // never throws: it is how failures end
    bool on_host(const void *at) const override;
    void give(void *to, cuda::DevicePointer from, std::size_t bytes) const;  // queued

  private:
    const cuda::Device &device_;
};

// Engines of a process set up one at a time. ONNX Runtime records its runs in CUDA's global mode: what allocates, frees or
// waits for the whole device meanwhile, in whatever thread, fails and spoils the recording.
std::mutex &setting_up();

class Gpu : public Backend {
  public:
    Gpu(Bundle &bundle, int ordinal, const std::atomic<bool> &cancelled);
    ~Gpu() override;

    const Memory &memory() const override { return memory_; }
    std::string describe() override;
    void start(Job &) override {}  // draws when it is packed
    void pack(const Jobs &active) override;
    void tick(const Jobs &active) override;
    void drop() override;
    void fetch(Job &job) override;
    void prepare(const OperatorInfo &op) override;
    void evaluate(const std::string &graph, std::int64_t count, std::span<const rlsd_tensor> inputs,
                  std::span<const rlsd_tensor> outputs) override;
    std::int64_t largest() const override { return largest_; }
    void stats(rlsd_stats &out) const override;

  private:
    // What the device holds for a job.
    struct Guest {
        std::shared_ptr<Job> job;  // so that no other comes to lie at its address
        std::int32_t slot;      // its particles' rows of the state begin here
        DeviceInputs inputs;
        std::unique_ptr<cuda::Pinned> latents;  // as the step finds them, for a trace of their diversity
        int redone = 0;
    };
    struct Seated {
        std::unique_ptr<Chunk> chunk;
        Seat *seat;
        bool waits;  // a job of it repels its particles, in some step
    };

    void upload_weights();
    std::map<std::string, const ort::OrtValue *> weights_of(std::span<const std::byte> model);
    void place(const Jobs &active, bool spare);
    void settle(const Jobs &active, bool spare);
    void grow(std::int64_t slots, bool spare);
    void draw(Job &job, const Guest &guest);
    void upload(Job &job, const Guest &guest);
    void gather(const Jobs &active);
    DeviceInputs inputs_of(const Job &job);
    std::vector<cuda::Buffer> context_of(const std::vector<float> &context);
    bool seat_all(const Jobs &active);
    void seat_operator(const OperatorInfo &op, const std::vector<Lane> &lanes);
    Seat *seat_for(const OperatorInfo &op, std::int64_t size, bool waits);
    Seat *new_seat(const OperatorInfo &op, std::int64_t size);
    template <class Make> Seat *with_room(const Make &make, const Seat *kept = nullptr);
    double time_of(std::int64_t size) const;
    std::vector<std::int64_t> sizes_for(std::int64_t lanes) const;
    void warm_up();
    void back_up();
    void restore(const Guest &guest, std::int64_t particles);
    void give_results(Seated &s);
    void trace(const Jobs &active);
    void look_at_flags();
    void fail_all(const Jobs &active, const Error &error);

    std::unique_lock<std::mutex> turn_{setting_up()};  // first: for all that the other members make, and free
    Bundle &bundle_;
    const std::atomic<bool> &cancelled_;
    cuda::Device device_;
    std::optional<cuda::Inside> inside_{std::in_place, device_};  // while the others are made, and freed
    DeviceMemory memory_;
    cuda::Kernels kernels_;
    ort::DeviceOperators operators_;
    cuda::Buffer weights_;
    std::deque<ort::Value> shared_;       // views of weights_, which sessions refer to
    ort::Placement placement_;
    struct Placed {  // its sessions go before what they refer to
        Bundle &bundle;
        ~Placed();
    } placed_{bundle_};
    std::int64_t latent_, image_, slots_ = 0;
    DeviceState state_, backup_;
    std::map<const Job *, Guest> guests_;
    std::unique_ptr<DeviceRepulsion> seen_, near_;  // among features, among latents
    std::list<Seat> seats_;
    std::vector<Seated> seated_;
    std::map<std::int64_t, double> tuned_;  // batch -> milliseconds of a tick; of all batches, or empty
    std::int64_t largest_;                // batch that the memory was found to allow
    DeviceClock clock_;
    Times times_;
    std::int64_t redone_ = 0;
};

}  // namespace rlsd
