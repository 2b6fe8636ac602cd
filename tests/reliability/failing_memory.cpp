// Lets the n-th allocation of the core fail, for one n after another, in every call of rlsd.h: each must return
// RLSD_OUT_OF_MEMORY with a message, lose no memory, and leave an engine that then gives the same results as ever.
//
//     failing_memory BUNDLE ONNXRUNTIME_LIBRARY [STRIDE]       every STRIDE-th allocation, default 1
//
// For a bundle of tests/hosted.py RLSD_LIBCUDA names the stand-in for the driver: nothing of it may be left over, either,
// and it must not see a fault. Its kernels do nothing here.
//
// The program holds the core itself with its own copy of the standard library, so that no allocation of ONNX Runtime
// comes through these operators: there a failure may be handled in any way.
#include "small_case.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <new>

namespace {

constexpr std::size_t ordinary = __STDCPP_DEFAULT_NEW_ALIGNMENT__;
std::atomic<bool> in_core{false};
std::atomic<long> countdown{-1};  // allocations of the core until one fails; below 0: none will
std::atomic<long> living{0}, failed{0};

bool fails_now() {
    if (!in_core || countdown < 0 || countdown.fetch_sub(1) != 0) return false;
    ++failed;
    return true;
}

void *allocate(std::size_t size, std::size_t alignment) {
    if (fails_now()) throw std::bad_alloc();
    const std::size_t rounded = (size + alignment) / alignment * alignment;
    void *memory = alignment > ordinary ? std::aligned_alloc(alignment, rounded) : std::malloc(rounded);
    if (memory == nullptr) throw std::bad_alloc();
    ++living;
    return memory;
}

void release(void *memory) {
    if (memory == nullptr) return;
    --living;
    std::free(memory);
}

}  // namespace

void *operator new(std::size_t size) { return allocate(size, ordinary); }
void *operator new[](std::size_t size) { return allocate(size, ordinary); }
void *operator new(std::size_t size, std::align_val_t alignment) { return allocate(size, std::size_t(alignment)); }
void *operator new(std::size_t size, const std::nothrow_t &) noexcept {
    try {
        return allocate(size, ordinary);
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}
void operator delete(void *memory) noexcept { release(memory); }
void operator delete[](void *memory) noexcept { release(memory); }
void operator delete(void *memory, std::size_t) noexcept { release(memory); }
void operator delete[](void *memory, std::size_t) noexcept { release(memory); }
void operator delete(void *memory, std::align_val_t) noexcept { release(memory); }
void operator delete(void *memory, std::size_t, std::align_val_t) noexcept { release(memory); }
void operator delete(void *memory, const std::nothrow_t &) noexcept { release(memory); }

extern "C" void *__real_aligned_alloc(std::size_t alignment, std::size_t size);
extern "C" void *__wrap_aligned_alloc(std::size_t alignment, std::size_t size) {
    return fails_now() ? nullptr : __real_aligned_alloc(alignment, size);
}

namespace {

struct Setting {
    const char *bundle, *runtime;
};

struct Results {
    std::vector<float> first, second, shared;
    bool operator==(const Results &) const = default;
};

template <class Call> rlsd_status inside(const Call &call) {
    in_core = true;
    const rlsd_status status = call();
    in_core = false;
    return status;
}

bool speaks_of_memory() {
    for (const char *words : {"memory", "bad_alloc", "bad allocation"})
        if (std::strstr(rlsd_last_error(), words) != nullptr) return true;
    return false;
}

// A call that may meet the failure; then it must say so, and succeed when `again` has been done and it is called once more.
template <class Call, class Again> void robust(const Call &call, const Again &again) {
    const long before = failed;
    const rlsd_status status = inside(call);
    if (status == RLSD_OK) return;
    CHECK(failed != before);
    CHECK(status == RLSD_OUT_OF_MEMORY || ((status == RLSD_RUNTIME_ERROR || status == RLSD_BAD_BUNDLE) && speaks_of_memory()));
    again();
    CHECK(inside(call) == RLSD_OK);
}

void nothing() {}

// What other processes would fill in; counts its calls. It is the caller's code, and allocates nothing.
int share(void *calls, float *rows, std::int64_t first, std::int64_t count, std::int64_t total, std::int64_t dim) {
    for (std::int64_t i = 0; i < total * dim; ++i)
        if (i < first * dim || i >= (first + count) * dim) rows[i] = 0.1f * static_cast<float>(i % 7);
    ++*static_cast<long *>(calls);
    return 0;
}

int refuse(void *, float *, std::int64_t, std::int64_t, std::int64_t, std::int64_t) { return 1; }

// One engine with two jobs, and a third whose particles are the second and third of four.
struct Scene {
    const Setting &setting;
    small::Case a{1, 3, 5, 2.0}, b{2, 2, 4, 0.0}, c{3, 2, 4, 2.0};
    rlsd_engine *engine = nullptr;
    rlsd_job *job_a = nullptr, *job_b = nullptr, *job_c = nullptr;
    long gathered = 0;

    explicit Scene(const Setting &given) : setting(given) {
        c.request.first_particle = 1, c.request.all_particles = 4;
        c.request.gather = share, c.request.gather_user = &gathered;
    }

    void open() {
        const rlsd_engine_options options = small::options_for(setting.runtime, 2);
        robust([&] { return rlsd_engine_open(setting.bundle, &options, &engine); }, [&] { CHECK(engine == nullptr); });
    }

    void submit(small::Case &what, rlsd_job *&job) {
        robust([&] { return rlsd_submit(engine, &what.params, &what.request, &job); }, [&] { CHECK(job == nullptr); });
    }

    void submit_all() { submit(a, job_a), submit(b, job_b), submit(c, job_c); }

    // After a tick that failed: it has ended a job, and those that it has not go on.
    void start_again() {
        const int ended = start_again(a, job_a) + start_again(b, job_b) + start_again(c, job_c);
        CHECK(ended > 0);
    }

    bool start_again(small::Case &what, rlsd_job *&job) {
        rlsd_job_info info;
        info.size = sizeof info;
        CHECK(rlsd_job_query(job, &info) == RLSD_OK);
        if (info.state != RLSD_DONE || info.status == RLSD_OK) return false;
        for (const float value : what.out) CHECK(value == 0);
        rlsd_job_release(job);
        submit(what, job);
        return true;
    }

    // Goes on from a snapshot of the first job, to the same end.
    void resume(std::vector<char> &snapshot, const Results &results) {
        small::Case rest(1, 3, 5, 2.0);
        rlsd_job *job = nullptr;
        rest.request.snapshot = snapshot.data(), rest.request.snapshot_size = snapshot.size();
        submit(rest, job);
        robust([&] { return rlsd_run(engine); }, [&] { rlsd_job_release(job), submit(rest, job); });
        CHECK(rest.out == results.first);
        rlsd_job_release(job);
    }

    // A gather that fails ends its job, whether or not there is memory for the sentence, which may be cut short.
    void fail_to_gather() {
        c.request.gather = refuse;
        submit(c, job_c);
        robust(
            [&] {
                const rlsd_status status = rlsd_run(engine);
                return status == RLSD_RUNTIME_ERROR ? RLSD_OK : status;
            },
            [&] { rlsd_job_release(job_c), submit(c, job_c); });
        rlsd_job_info info;
        info.size = sizeof info;
        CHECK(rlsd_job_query(job_c, &info) == RLSD_OK && info.status == RLSD_RUNTIME_ERROR);
        rlsd_job_release(job_c);
        c.request.gather = share;
    }

    void release() { rlsd_job_release(job_a), rlsd_job_release(job_b), rlsd_job_release(job_c); }

    void close() {
        submit_all();  // dropped with the engine
        inside([&] { return rlsd_engine_close(engine), RLSD_OK; });
        release();
    }
};

void use_tools(Scene &scene) {
    std::vector<float> x(5 * small::pixels, 0.5f), masks(5 * small::pixels, 1.0f), y(5 * small::pixels), g(5 * small::pixels);
    const rlsd_tensor in[] = {{"x", x.data(), x.size(), RLSD_FLOAT32}, {"mask", masks.data(), masks.size(), RLSD_FLOAT32}};
    const rlsd_tensor out[] = {{"y", y.data(), y.size(), RLSD_FLOAT32}};
    robust([&] { return rlsd_evaluate(scene.engine, "operator.inpainting.forward", 5, in, 2, out, 1); }, nothing);
    CHECK(y == x);
    robust([&] { return rlsd_repulsion_gradient(x.data(), 5, small::pixels, 1, 2, 3, g.data(), nullptr); }, nothing);
    rlsd_stats stats;
    stats.size = sizeof stats;
    robust([&] { return rlsd_engine_stats(scene.engine, &stats); }, nothing);
    rlsd_request wrong = scene.b.request;
    ++wrong.y_count;
    robust(
        [&] {  // an error whose sentence cannot be made is still an error
            rlsd_job *none = nullptr;
            const rlsd_status status = rlsd_submit(scene.engine, &scene.b.params, &wrong, &none);
            CHECK(status != RLSD_OK && none == nullptr);
            return status == RLSD_INVALID_ARGUMENT ? RLSD_OK : status;
        },
        nothing);
}

// Every call once.
Results scenario(const Setting &setting) {
    Scene scene{setting};
    scene.open();
    scene.submit_all();
    robust([&] { return rlsd_tick(scene.engine, nullptr); }, [&] { scene.start_again(); });
    std::size_t size = 0;
    robust([&] { return rlsd_job_snapshot(scene.job_a, nullptr, 0, &size); }, nothing);
    std::vector<char> snapshot(size);
    robust([&] { return rlsd_job_snapshot(scene.job_a, snapshot.data(), snapshot.size(), &size); }, nothing);
    use_tools(scene);
    robust([&] { return rlsd_run(scene.engine); }, [&] { scene.start_again(); });
    const Results results{scene.a.out, scene.b.out, scene.c.out};
    CHECK(scene.gathered > 1);
    scene.release();
    scene.resume(snapshot, results);
    scene.fail_to_gather();
    scene.close();
    return results;
}

// What the stand-in for the driver has seen, if there is one: tests/fake_cuda/control.h.
void check_driver() {
    const char *const path = std::getenv("RLSD_LIBCUDA");
    if (path == nullptr) return;
    static void *const library = dlopen(path, RTLD_NOW);
    CHECK(library != nullptr);
    for (const char *what : {"fake_cuda_live", "fake_cuda_faults"}) {
        const auto tell = reinterpret_cast<const char *(*)()>(dlsym(library, what));
        CHECK(tell != nullptr);
        const char *const found = tell();
        if (*found != '\0') std::fprintf(stderr, "%s: %s\n", what, found);
        CHECK(*found == '\0');
    }
    reinterpret_cast<void (*)()>(dlsym(library, "fake_cuda_clear_log"))();
}

// The scenario with allocation n failing; false where it makes no such allocation.
bool disturbed(const Setting &setting, long n, const Results &wanted) {
    const long alive = living, failures = failed;
    countdown = n;
    CHECK(scenario(setting) == wanted);
    countdown = -1;
    if (n % 100 == 0) std::fprintf(stderr, "%ld\r", n);
    if (living != alive) std::fprintf(stderr, "allocation %ld: %ld blocks are lost\n", n, living - alive);
    CHECK(living == alive);
    check_driver();
    return failed != failures;
}

}  // namespace

int main(int count, char **arguments) {
    if (count < 3) return std::fprintf(stderr, "usage: %s BUNDLE ONNXRUNTIME_LIBRARY [STRIDE]\n", arguments[0]), 2;
    const Setting setting{arguments[1], arguments[2]};
    const long stride = count > 3 ? std::atol(arguments[3]) : 1;
    const Results wanted = scenario(setting);  // the first run also makes what lasts: ONNX Runtime's operators, tables
    CHECK(scenario(setting) == wanted);
    long n = 0;
    while (disturbed(setting, n, wanted)) n += stride;
    std::printf("%ld failed allocations of %ld: clean errors, the same results after them, no block lost\n", failed.load(), n);
    return failed > 0 ? 0 : 1;
}
