// Every function of rlsd.h on the bundle of tests/bundle_factory.py: the input chooses calls and their arguments, among
// them wrong ones. What the header does not forbid in words must neither crash nor leave an engine that does not work.
#include "rlsd.h"

#include <fuzzer/FuzzedDataProvider.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace {

using Input = FuzzedDataProvider;

void check(bool holds) {
    if (!holds) __builtin_trap();
}

// A status of the list, and a sentence with every error.
rlsd_status checked(rlsd_status status) {
    check(status >= RLSD_OK && status <= RLSD_NO_DEVICE && status != RLSD_INTERNAL);
    if (status != RLSD_OK) check(rlsd_last_error()[0] != '\0');
    return status;
}

float any_float(Input &in) {
    const float odd[] = {0, 1, -1, 1e-30f, 1e30f, NAN, INFINITY, -INFINITY};
    return in.ConsumeBool() ? in.PickValueInArray(odd) : in.ConsumeFloatingPointInRange(-2.0f, 2.0f);
}

double any_double(Input &in, double usual) {
    const double odd[] = {0, 1, -1, 1e-300, 1e300, 0.5, double(NAN), double(INFINITY)};
    return in.ConsumeIntegralInRange(0, 7) != 0 ? usual : in.PickValueInArray(odd);
}

// Mostly what is right.
template <class T> T near(Input &in, T right) {
    const T odd[] = {T(0), T(1), T(right + 1), T(right - 1), std::numeric_limits<T>::max(), std::numeric_limits<T>::min()};
    return in.ConsumeIntegralInRange(0, 7) != 0 ? right : in.PickValueInArray(odd);
}

const char *any_name(Input &in, const char *right) {
    const char *const odd[] = {nullptr, "", "x", "mask", "inpainting", "saturate", "a name that is rather long, to be sure"};
    return in.ConsumeIntegralInRange(0, 5) != 0 ? right : in.PickValueInArray(odd);
}

struct Submitted {
    std::vector<float> y, param, context, out, latents, trace;
    std::vector<char> snapshot;
    rlsd_tensor tensors[2];
    rlsd_job *job = nullptr;
};

rlsd_engine *opened() {
    rlsd_engine_options options;
    check(rlsd_engine_options_init(&options, sizeof options) == RLSD_OK);
    options.onnxruntime = RLSD_ONNXRUNTIME;
    options.threads = 1;
    options.max_particles = 4;
    rlsd_engine *engine = nullptr;
    check(rlsd_engine_open(RLSD_TINY, &options, &engine) == RLSD_OK);
    return engine;
}

int gather_rows(void *user, float *rows, std::int64_t first, std::int64_t count, std::int64_t total, std::int64_t dim) {
    for (std::int64_t i = 0; i < total * dim; ++i)
        if (i < first * dim || i >= (first + count) * dim) rows[i] = 0.25f;
    return user != nullptr;
}

class Calls {
  public:
    explicit Calls(Input &in) : in_(in) {}

    void run(rlsd_engine *&engine) {
        while (in_.remaining_bytes() > 0) {
            switch (in_.ConsumeIntegralInRange(0, 15)) {
            case 0: case 1: case 2: submit(engine); break;
            case 3: case 4: tick(engine); break;
            case 5: checked(rlsd_run(in_.ConsumeIntegralInRange(0, 9) != 0 ? engine : nullptr)); break;
            case 6: query(); break;
            case 7: release(); break;
            case 8: evaluate(engine); break;
            case 9: snapshot(); break;
            case 10: rlsd_cancel(in_.ConsumeBool() ? engine : nullptr); break;
            case 11: structs(engine); break;
            case 12: numbers(); break;
            case 13: open_badly(); break;
            case 14: check(rlsd_engine_describe(engine)[0] != '\0' && rlsd_engine_describe(nullptr)[0] == '\0'); break;
            default:
                if (in_.ConsumeIntegralInRange(0, 15) == 0) rlsd_engine_close(engine), engine = opened();
            }
        }
        for (const auto &each : all_) rlsd_job_release(each->job);
        const rlsd_status status = rlsd_tick(engine, nullptr);
        check(status == RLSD_OK || status == RLSD_CANCELLED);
    }

  private:
    Submitted *any() { return all_.empty() ? nullptr : all_[in_.ConsumeIntegralInRange<std::size_t>(0, all_.size() - 1)].get(); }

    rlsd_params any_params() {
        rlsd_params p;
        rlsd_params_init(&p, sizeof p);
        p.steps = near(in_, in_.ConsumeIntegralInRange(2, 6));
        p.variant = near(in_, in_.ConsumeIntegralInRange(1, 2)), p.repulsion = near(in_, in_.ConsumeIntegralInRange(0, 2));
        p.gamma = any_double(in_, in_.ConsumeBool() ? 2 : 0), p.rho = any_double(in_, p.rho);
        p.lambda = any_double(in_, p.lambda), p.guidance = any_double(in_, 1);
        p.lr_x = any_double(in_, 0.05), p.lr_z = any_double(in_, 0.05), p.repulsion_until = any_double(in_, 1);
        p.beta1 = any_double(in_, p.beta1), p.beta2 = any_double(in_, p.beta2), p.adam_eps = any_double(in_, p.adam_eps);
        p.size = near(in_, sizeof p);
        return p.size > sizeof p && p.size <= 1 << 16 ? (p.size = sizeof p, p) : p;
    }

    void submit(rlsd_engine *engine) {
        if (all_.size() >= 12) return;
        auto made = std::make_unique<Submitted>();
        Submitted &s = *made;
        const rlsd_params params = any_params();
        const bool saturate = in_.ConsumeBool();
        const auto n = in_.ConsumeIntegralInRange<std::size_t>(1, 5);
        s.y.assign(saturate ? 6 : 16, any_float(in_)), s.param.assign(saturate ? 1 : 16, any_float(in_));
        s.context.assign(6, any_float(in_)), s.out.resize(16 * n), s.latents.resize(16 * n);
        const auto steps = static_cast<std::size_t>(params.steps > 1 && params.steps < 1000 ? params.steps - 1 : 1);
        s.trace.resize(2 * steps * n);
        s.tensors[0] = {any_name(in_, saturate ? "gain" : "mask"), in_.ConsumeIntegralInRange(0, 9) != 0 ? s.param.data() : nullptr,
                        near(in_, s.param.size()), near(in_, int32_t(RLSD_FLOAT32))};
        s.tensors[1] = s.tensors[0];
        rlsd_request r;
        rlsd_request_init(&r, sizeof r);
        r.op = any_name(in_, saturate ? "saturate" : "inpainting");
        r.y = in_.ConsumeIntegralInRange(0, 9) != 0 ? s.y.data() : nullptr, r.y_count = near(in_, s.y.size());
        r.params = in_.ConsumeIntegralInRange(0, 9) != 0 ? s.tensors : nullptr;
        r.param_count = in_.ConsumeIntegralInRange(0, 9) != 0 ? 1 : in_.ConsumeIntegralInRange<std::size_t>(0, 2);
        if (in_.ConsumeBool()) r.context = s.context.data(), r.context_count = near(in_, s.context.size());
        r.particles = near(in_, static_cast<std::int32_t>(n)), r.seed = in_.ConsumeIntegral<std::uint64_t>();
        r.item = in_.ConsumeIntegral<std::uint32_t>();
        r.out = in_.ConsumeIntegralInRange(0, 9) != 0 ? s.out.data() : nullptr, r.out_count = near(in_, s.out.size());
        if (in_.ConsumeBool()) r.out_latents = s.latents.data(), r.out_latents_count = near(in_, s.latents.size());
        if (in_.ConsumeBool()) r.out_trace = s.trace.data(), r.out_trace_count = near(in_, s.trace.size());
        if (in_.ConsumeIntegralInRange(0, 3) == 0) {
            r.gather = gather_rows, r.gather_user = in_.ConsumeIntegralInRange(0, 3) == 0 ? this : nullptr;
            r.first_particle = near(in_, in_.ConsumeIntegralInRange(0, 3)), r.all_particles = near(in_, in_.ConsumeIntegralInRange(0, 9));
        }
        if (!kept_.empty() && in_.ConsumeBool()) {
            s.snapshot = kept_;
            if (in_.ConsumeBool()) s.snapshot[in_.ConsumeIntegralInRange<std::size_t>(0, kept_.size() - 1)] ^= 1;
            r.snapshot = s.snapshot.data();
            r.snapshot_size = in_.ConsumeBool() ? kept_.size() : in_.ConsumeIntegralInRange<std::size_t>(0, kept_.size());
        }
        if (in_.ConsumeIntegralInRange(0, 9) == 0) r.size = in_.ConsumeIntegralInRange<std::size_t>(0, sizeof r);
        const rlsd_status status = checked(rlsd_submit(in_.ConsumeIntegralInRange(0, 19) != 0 ? engine : nullptr, &params, &r, &s.job));
        check((status == RLSD_OK) == (s.job != nullptr));
        if (s.job != nullptr) all_.push_back(std::move(made));
    }

    void tick(rlsd_engine *engine) {
        std::int64_t left = -1;
        checked(rlsd_tick(engine, in_.ConsumeBool() ? &left : nullptr));
        check(left >= -1 && left <= std::int64_t(all_.size()));
    }

    void query() {
        Submitted *s = any();
        alignas(rlsd_job_info) char memory[4 * sizeof(rlsd_job_info)];
        auto *info = reinterpret_cast<rlsd_job_info *>(memory);
        info->size = in_.ConsumeIntegralInRange<std::size_t>(0, sizeof memory);
        checked(rlsd_job_query(s == nullptr ? nullptr : s->job, in_.ConsumeBool() ? info : nullptr));
    }

    void release() {
        Submitted *s = any();
        if (s == nullptr) return rlsd_job_release(nullptr);
        rlsd_job_release(std::exchange(s->job, nullptr));
    }

    void snapshot() {
        Submitted *s = any();
        std::size_t size = 0;
        if (checked(rlsd_job_snapshot(s == nullptr ? nullptr : s->job, nullptr, 0, in_.ConsumeIntegralInRange(0, 9) != 0 ? &size : nullptr)) != RLSD_OK)
            return;
        std::vector<char> bytes(size);
        const std::size_t capacity = in_.ConsumeBool() ? size : in_.ConsumeIntegralInRange<std::size_t>(0, size);
        const rlsd_status status = checked(rlsd_job_snapshot(s->job, bytes.data(), capacity, &size));
        check((status == RLSD_OK) == (capacity == size));
        if (status == RLSD_OK) kept_ = bytes;
    }

    void evaluate(rlsd_engine *engine) {
        const char *const graphs[] = {"denoiser", "decoder", "decoder_pull", "features", "features_pull", "operator.saturate.loss", "nothing"};
        const char *const names[] = {"z", "z_t", "t", "context", "image", "cotangent", "hidden", "pixels", "x", "y", "gain", "phi", "eps", nullptr};
        const std::int64_t count = near(in_, in_.ConsumeIntegralInRange<std::int64_t>(1, 4));
        std::vector<double> memory[6];
        rlsd_tensor tensors[6];
        for (int i = 0; i < 6; ++i) {
            const std::size_t sizes[] = {16, 12, 6, 5, 1};
            const std::size_t right = in_.PickValueInArray(sizes) * std::size_t(count > 0 && count < 9 ? count : 1);
            memory[i].assign(right, 0.5);
            tensors[i] = {in_.PickValueInArray(names), in_.ConsumeIntegralInRange(0, 9) != 0 ? memory[i].data() : nullptr, right,
                          in_.ConsumeIntegralInRange(0, 3)};
            if (tensors[i].name != nullptr && std::strcmp(tensors[i].name, "t") == 0)
                for (double &each : memory[i]) std::memset(&each, 0, sizeof each);  // a timestep that the table has
        }
        checked(rlsd_evaluate(engine, in_.ConsumeIntegralInRange(0, 9) != 0 ? in_.PickValueInArray(graphs) : nullptr, count,
                              tensors, in_.ConsumeIntegralInRange<std::size_t>(0, 4), tensors + 4, in_.ConsumeIntegralInRange<std::size_t>(0, 2)));
    }

    void structs(rlsd_engine *engine) {
        alignas(16) static char memory[1 << 16];
        const std::size_t sizes[] = {0, 1, 7, 8, 12, sizeof(rlsd_params), sizeof(rlsd_request), sizeof(rlsd_stats), sizeof memory, SIZE_MAX};
        const std::size_t size = in_.PickValueInArray(sizes);
        void *at = in_.ConsumeIntegralInRange(0, 9) != 0 ? memory : nullptr;
        checked(rlsd_params_init(static_cast<rlsd_params *>(at), size));
        checked(rlsd_request_init(static_cast<rlsd_request *>(at), size));
        checked(rlsd_engine_options_init(static_cast<rlsd_engine_options *>(at), size));
        if (at != nullptr) static_cast<rlsd_stats *>(at)->size = size;
        checked(rlsd_engine_stats(in_.ConsumeBool() ? engine : nullptr, static_cast<rlsd_stats *>(at)));
        check(std::strcmp(rlsd_version(), RLSD_VERSION) == 0);
    }

    void numbers() {
        float phi[64], g[64], h[8];
        for (float &value : phi) value = any_float(in_);
        const std::int64_t n = near(in_, in_.ConsumeIntegralInRange<std::int64_t>(1, 8)), d = near(in_, in_.ConsumeIntegralInRange<std::int64_t>(1, 8));
        const bool fits = n <= 8 && d <= 8;
        const bool refused = n < 1 || d < 1 || n > 1 << 24 || d > 1 << 28;
        if (fits || refused)
            checked(rlsd_repulsion_gradient(in_.ConsumeBool() ? phi : nullptr, n, d, 1, 2, 3, g, in_.ConsumeBool() ? h : nullptr));
        rlsd_normal(in_.ConsumeIntegral<std::uint64_t>(), 1, 2, in_.ConsumeIntegral<std::uint32_t>(), g, in_.ConsumeIntegralInRange(0, 64));
    }

    void open_badly() {
        rlsd_engine_options options;
        rlsd_engine_options_init(&options, sizeof options);
        const std::string text = in_.ConsumeRandomLengthString(20);
        options.onnxruntime = in_.ConsumeBool() ? RLSD_ONNXRUNTIME : "/nonexistent";
        options.device = in_.ConsumeBool() ? text.c_str() : nullptr;
        options.threads = in_.ConsumeBool() ? -1 : 1, options.max_particles = near(in_, 0);
        options.size = near(in_, sizeof options);
        if (options.size > sizeof options && options.size <= 1 << 16) options.size = sizeof options;
        rlsd_engine *engine = reinterpret_cast<rlsd_engine *>(this);
        const char *const bundles[] = {nullptr, "", "/nonexistent", "/dev/null", "/dev"};
        check(checked(rlsd_engine_open(in_.PickValueInArray(bundles), &options, &engine)) != RLSD_OK && engine == nullptr);
    }

    Input &in_;
    std::vector<std::unique_ptr<Submitted>> all_;
    std::vector<char> kept_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    static rlsd_engine *engine = opened();
    Input in(data, size);
    Calls(in).run(engine);
    return 0;
}
