// rlsd_evaluate on a GPU: one graph on any number of samples, which are float32 on the host.
#include "gpu.h"

#include "half.h"

#include <algorithm>

namespace rlsd {

void Gpu::evaluate(const std::string &graph, std::int64_t count, std::span<const rlsd_tensor> inputs,
                   std::span<const rlsd_tensor> outputs) {
    const std::lock_guard turn(setting_up());
    const cuda::Inside inside(device_);
    const std::int64_t batch = batch_for(bundle_, count);
    const ort::Session &session = bundle_.session(graph, batch);
    check_names(graph, session, inputs, outputs);
    DeviceTensors tensors(device_);
    for (const auto &info : session.inputs()) tensors.make(info.name, info.type, info.count());
    DeviceGraph bound(bundle_, device_, graph, batch, tensors, [](const std::string &name) { return name; }, false);
    std::vector<std::uint16_t> halves;
    const auto move = [&](const ort::TensorInfo &info, const rlsd_tensor &caller, std::int64_t done, bool in) {
        const std::size_t each = info.count() / static_cast<std::size_t>(batch), first = static_cast<std::size_t>(done) * each;
        const std::size_t now = static_cast<std::size_t>(std::min(batch, count - done)) * each;
        if (info.type != ort::Type::float16) {
            const std::size_t width = ort::width_of(info.type);
            auto *data = static_cast<std::byte *>(caller.data) + first * width;
            in ? device_.upload(tensors.at(info.name), data, now * width)
               : device_.download(data, tensors.at(info.name), now * width);
            device_.wait();
        } else {
            auto *data = static_cast<float *>(caller.data) + first;
            halves.resize(now);
            if (in) std::transform(data, data + now, halves.begin(), to_half);
            in ? device_.upload(tensors.at(info.name), halves.data(), now * 2)
               : device_.download(halves.data(), tensors.at(info.name), now * 2);
            device_.wait();
            if (!in) std::transform(halves.begin(), halves.end(), data, from_half);
        }
    };
    const auto move_all = [&](const std::vector<ort::TensorInfo> &infos, std::span<const rlsd_tensor> callers,
                              std::int64_t done, bool in) {
        for (const auto &info : infos)
            if (const rlsd_tensor *caller = find_tensor(callers, info, batch, count, graph)) move(info, *caller, done, in);
    };
    for (std::int64_t done = 0; done < count; done += batch) {
        move_all(session.inputs(), inputs, done, true);
        bound.enqueue();
        device_.wait();
        bound.check();
        move_all(session.outputs(), outputs, done, false);
    }
}

}  // namespace rlsd
