#include "snapshot.h"

#include "error.h"
#include "job.h"
#include "sha256.h"

#include <cstring>

namespace rlsd {
namespace {

constexpr std::size_t digest_size = 64;

struct Head {
    char magic[8];
    std::uint32_t version;
    std::int32_t step;
    double loss_scale;
    std::uint8_t has_state, has_trace, zeros[6];
    char identity[digest_size];
};
static_assert(sizeof(Head) == 96, "no padding: its bytes are the format");

constexpr char magic[8] = {'r', 'l', 's', 'd', 's', 'n', 'a', 'p'};
constexpr std::uint32_t version = 1;

// Everything that a job's results depend on, in front of each other, as bytes.
struct Description {
    std::vector<std::byte> bytes;

    template <class T> void value(const T &v) { raw(&v, sizeof v); }
    void words(const std::string &s) { value(s.size()), raw(s.data(), s.size()); }
    void numbers(const std::vector<float> &v) { value(v.size()), raw(v.data(), v.size() * sizeof(float)); }
    void raw(const void *from, std::size_t size) {
        const auto *first = static_cast<const std::byte *>(from);
        bytes.insert(bytes.end(), first, first + size);
    }
};

std::string identity_of(const Job &job) {
    Description d;
    for (const std::string &line : job.bundle->manifest().lines) d.words(line);  // has the digest of every file
    const rlsd_params &p = job.params;
    d.value(p.variant), d.value(p.steps), d.value(p.rho), d.value(p.lambda), d.value(p.lr_x), d.value(p.lr_z);
    d.value(p.gamma), d.value(p.repulsion_until), d.value(p.repulsion), d.value(p.guidance);
    d.value(p.beta1), d.value(p.beta2), d.value(p.adam_eps);
    d.words(job.op->name), d.numbers(job.y), d.numbers(job.context);
    for (const auto &param : job.op_params) d.numbers(param);
    d.value(job.particles), d.value(job.seed), d.value(job.item);
    d.value(job.address(0)), d.value(job.crowd_size());
    return sha256_hex(d.bytes);
}

template <class Job, class Visit> void each_array(Job &job, const Visit &visit) {
    for (auto *variable : {&job.z, &job.x})
        for (auto *array : {&variable->value, &variable->m, &variable->v}) visit(array->data(), array->size());
}

std::size_t state_values(const Job &job) {
    const Manifest &m = job.bundle->manifest();
    const std::int64_t values = count_of(m.latent) + (job.augmented() ? count_of(m.image) : 0);
    return static_cast<std::size_t>(3 * job.particles * values);
}

bool has_state(const Job &job) { return job.drawn() || job.state == RLSD_ACTIVE; }

std::size_t size_with(const Job &job, bool state, bool trace) {
    const std::size_t values = (state ? state_values(job) : 0) + (trace ? job.trace_count() : 0);
    return sizeof(Head) + values * sizeof(float) + digest_size;
}

}  // namespace

std::size_t snapshot_size(const Job &job) { return size_with(job, has_state(job), job.out_trace != nullptr); }

std::vector<std::byte> snapshot_of(const Job &job) {
    std::vector<std::byte> bytes(snapshot_size(job));
    std::byte *at = bytes.data();
    const auto put = [&at](const void *from, std::size_t size) {
        if (size != 0) std::memcpy(at, from, size);
        at += size;
    };
    Head head{};
    std::memcpy(head.magic, magic, sizeof magic);
    head.version = version, head.step = job.step, head.loss_scale = job.loss_scale;
    head.has_state = job.drawn(), head.has_trace = job.out_trace != nullptr;
    std::memcpy(head.identity, identity_of(job).data(), digest_size);
    put(&head, sizeof head);
    each_array(job, [&](const float *values, std::size_t count) { put(values, count * sizeof(float)); });
    if (head.has_trace) put(job.out_trace, job.trace_count() * sizeof(float));
    put(sha256_hex({bytes.data(), at}).data(), digest_size);
    return bytes;
}

void restore(Job &job, std::span<const std::byte> snapshot) {
    Head head;
    require(snapshot.size() >= sizeof head + digest_size, "snapshot has ", snapshot.size(), " bytes, at least ",
            sizeof head + digest_size, " are needed");
    std::memcpy(&head, snapshot.data(), sizeof head);
    require(std::memcmp(head.magic, magic, sizeof magic) == 0, "snapshot is not one of this library");
    require(head.version == version, "snapshot has format ", head.version, ", allowed is ", version);
    const std::span body = snapshot.first(snapshot.size() - digest_size);
    require(std::memcmp(sha256_hex(body).data(), snapshot.data() + body.size(), digest_size) == 0,
            "snapshot is damaged: its checksum differs");
    require(std::memcmp(head.identity, identity_of(job).data(), digest_size) == 0,
            "snapshot is of another bundle, request or parameters");
    require(snapshot.size() == size_with(job, head.has_state != 0, head.has_trace != 0) && head.step >= 0 &&
                head.step <= job.steps(),
            "snapshot has ", snapshot.size(), " bytes and step ", head.step, ", which do not fit the job");
    require(job.out_trace == nullptr || head.has_trace != 0 || head.step == 0, "snapshot has no trace, but out_trace is given");
    if (head.has_state == 0) return;
    job.step = head.step, job.loss_scale = head.loss_scale;
    job.allocate();
    const std::byte *at = snapshot.data() + sizeof head;
    const auto take = [&at](float *to, std::size_t count) {
        std::memcpy(to, at, count * sizeof(float));
        at += count * sizeof(float);
    };
    each_array(job, [&](float *values, std::size_t count) {
        if (count != 0) take(values, count);
    });
    if (job.out_trace != nullptr && head.has_trace != 0) take(job.out_trace, job.trace_count());
}

}  // namespace rlsd
