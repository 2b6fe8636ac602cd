/* What the program around the library may do to a thread or a process without an effect on the results: another
 * rounding, flushing to zero and traps; a fork whose child lets go of its parent's job; a thread that ends within a
 * callback; calls from callbacks and from other threads while one is under way; calls while the program ends. And
 * memory that is enough for the library, but not for ONNX Runtime, is no fault of the bundle.
 *
 *     surroundings BUNDLE ONNXRUNTIME_LIBRARY
 */
#define _GNU_SOURCE
#include "check.h"

#include <fenv.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

enum { PARTICLES = 5, STEPS = 4, PIXELS = 32 * 32, ALL = PARTICLES * PIXELS };

static const char *bundle, *library;
static float measured[PIXELS], mask[PIXELS];

static rlsd_engine *open_engine(rlsd_progress_fn progress) {
    rlsd_engine *engine = NULL;
    rlsd_engine_options options;
    CHECK(rlsd_engine_options_init(&options, sizeof options) == RLSD_OK);
    options.onnxruntime = library;
    options.threads = 2;
    options.progress = progress;
    CHECK(rlsd_engine_open(bundle, &options, &engine) == RLSD_OK);
    return engine;
}

static rlsd_job *submit(rlsd_engine *engine, float *out, rlsd_gather_fn gather) {
    const rlsd_tensor parameter = {.name = "mask", .data = mask, .count = PIXELS, .dtype = RLSD_FLOAT32};
    rlsd_params params;
    rlsd_request request;
    rlsd_job *job = NULL;
    CHECK(rlsd_params_init(&params, sizeof params) == RLSD_OK && rlsd_request_init(&request, sizeof request) == RLSD_OK);
    params.steps = STEPS;
    params.gamma = 5;
    request.op = "inpainting";
    request.y = measured, request.y_count = PIXELS;
    request.params = &parameter, request.param_count = 1;
    request.particles = PARTICLES;
    request.seed = 7;
    request.out = out, request.out_count = ALL;
    request.gather = gather, request.all_particles = gather == NULL ? 0 : PARTICLES + 1;
    CHECK(rlsd_submit(engine, &params, &request, &job) == RLSD_OK);
    return job;
}

static void reconstruct(rlsd_engine *engine, float *out) {
    rlsd_job *job = submit(engine, out, NULL);
    CHECK(rlsd_run(engine) == RLSD_OK);
    rlsd_job_release(job);
}

static void round_up(void) { CHECK(fesetround(FE_UPWARD) == 0); }
static void trap(void) { feenableexcept(FE_ALL_EXCEPT); } /* where the processor can */
static void flush(void) {
#ifdef __SSE__
    _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
}

static int control(void) {
#ifdef __SSE__
    return (int)(_mm_getcsr() & ~0x3fu); /* without what has happened so far */
#else
    return fegetround();
#endif
}

static void all_three(void) { round_up(), flush(), trap(); }

/* With an engine that is open, whose other thread started as the program was then, or NULL: with one opened now. */
static void check_numbers(rlsd_engine *engine, const float *wanted, void (*change)(void)) {
    static float out[ALL];
    float normal[3], same[3];
    fenv_t before;
    rlsd_engine *own = NULL;
    int changed;
    rlsd_normal(1, 2, 3, RLSD_STREAM_USER, normal, 3);
    CHECK(fegetenv(&before) == 0);
    change();
    changed = control();
    if (engine == NULL) engine = own = open_engine(NULL);
    reconstruct(engine, out);
    rlsd_normal(1, 2, 3, RLSD_STREAM_USER, same, 3);
    rlsd_engine_close(own);
    CHECK(control() == changed);
    CHECK(fesetenv(&before) == 0);
    CHECK(memcmp(wanted, out, sizeof out) == 0 && memcmp(normal, same, sizeof same) == 0);
}

/* Results in memory that parent and child share stay there, whatever the child does with its copy of the handle. */
static void check_fork(rlsd_engine *engine, const float *wanted) {
    float *out = mmap(NULL, ALL * sizeof *out, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    rlsd_job *job;
    int done[2], status = -1;
    pid_t child;
    char byte = 0;
    CHECK(out != MAP_FAILED && pipe(done) == 0);
    job = submit(engine, out, NULL);
    CHECK(rlsd_tick(engine, NULL) == RLSD_OK);
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        close(done[1]);
        while (read(done[0], &byte, 1) > 0) { /* until the parent is done */
        }
        rlsd_job_release(job);
        rlsd_engine_close(engine);
        _Exit(0);
    }
    CHECK(rlsd_run(engine) == RLSD_OK && memcmp(wanted, out, ALL * sizeof *out) == 0);
    close(done[0]), close(done[1]);
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(memcmp(wanted, out, ALL * sizeof *out) == 0);
    rlsd_job_release(job);
    munmap(out, ALL * sizeof *out);
}

static int end_thread(void *user, const rlsd_progress *progress) {
    (void)user, (void)progress;
    pthread_exit(NULL);
}

static void *run(void *engine) { return rlsd_run(engine) == RLSD_OK ? NULL : engine; }

static void check_thread_that_ends(const float *wanted) {
    static float out[ALL];
    pthread_t thread;
    rlsd_engine *engine = open_engine(end_thread);
    rlsd_job *job = submit(engine, out, NULL);
    int64_t left = 1;
    CHECK(pthread_create(&thread, NULL, run, engine) == 0 && pthread_join(thread, NULL) == 0);
    while (left != 0) CHECK(rlsd_tick(engine, &left) == RLSD_OK); /* another thread goes on */
    CHECK(memcmp(wanted, out, sizeof out) == 0);
    rlsd_job_release(job);
    rlsd_engine_close(engine);
}

static rlsd_engine *busy; /* and a job of it, and how often nothing came of calls into it */
static rlsd_job *busy_job;
static int refused;

static void *call_busy(void *unused) {
    const rlsd_tensor given[2] = {{.name = "x", .data = mask, .count = PIXELS, .dtype = RLSD_FLOAT32},
                                  {.name = "mask", .data = mask, .count = PIXELS, .dtype = RLSD_FLOAT32}};
    static float y[PIXELS];
    const rlsd_tensor wanted = {.name = "y", .data = y, .count = PIXELS, .dtype = RLSD_FLOAT32};
    rlsd_request request;
    rlsd_job *job;
    size_t size;
    CHECK(rlsd_request_init(&request, sizeof request) == RLSD_OK);
    CHECK(rlsd_tick(busy, NULL) == RLSD_INVALID_ARGUMENT && strstr(rlsd_last_error(), "at work") != NULL);
    CHECK(rlsd_run(busy) == RLSD_INVALID_ARGUMENT);
    CHECK(rlsd_submit(busy, NULL, &request, &job) == RLSD_INVALID_ARGUMENT && job == NULL);
    CHECK(rlsd_job_snapshot(busy_job, NULL, 0, &size) == RLSD_INVALID_ARGUMENT && size == 0);
    CHECK(rlsd_evaluate(busy, "operator.inpainting.forward", 1, given, 2, &wanted, 1) == RLSD_INVALID_ARGUMENT);
    CHECK(strstr(rlsd_last_error(), "at work") != NULL);
    rlsd_engine_close(busy);
    ++refused;
    return unused;
}

static void call_busy_twice(void) {
    pthread_t thread;
    call_busy(NULL);
    CHECK(pthread_create(&thread, NULL, call_busy, NULL) == 0 && pthread_join(thread, NULL) == 0);
}

static int call_in_progress(void *user, const rlsd_progress *progress) {
    (void)user;
    if (progress->jobs_active != 0) call_busy_twice();
    return 0;
}

static int gather(void *user, float *rows, int64_t first, int64_t count, int64_t total, int64_t dim) {
    int64_t i;
    (void)user;
    CHECK(first == 0 && count == PARTICLES && total == PARTICLES + 1);
    for (i = 0; i < dim; ++i) rows[count * dim + i] = (float)(i % 7) / 8;
    return 0;
}

static int call_in_gather(void *user, float *rows, int64_t first, int64_t count, int64_t total, int64_t dim) {
    call_busy_twice();
    return gather(user, rows, first, count, total, dim);
}

static void run_busy(float *out, rlsd_progress_fn progress, rlsd_gather_fn gathering, int calls) {
    refused = 0;
    busy = open_engine(progress);
    busy_job = submit(busy, out, gathering);
    CHECK(rlsd_run(busy) == RLSD_OK && refused == calls);
    rlsd_job_release(busy_job);
    rlsd_engine_close(busy);
}

/* The bytes are those of a run that nobody disturbs. */
static void check_busy(const float *wanted) {
    static float out[ALL], gathered[ALL];
    run_busy(out, call_in_progress, NULL, 2 * (STEPS - 1));
    CHECK(memcmp(wanted, out, sizeof out) == 0);
    run_busy(gathered, NULL, gather, 0);
    run_busy(out, NULL, call_in_gather, 2 * (STEPS - 1));
    CHECK(memcmp(gathered, out, sizeof out) == 0 && memcmp(gathered, wanted, sizeof out) != 0);
}

static void check_little_memory(void) {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) /* which need more than there is */
    rlsd_engine *engine;
    rlsd_engine_options options;
    rlsd_status status;
    struct rlimit before, little, now;
    unsigned long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file != NULL && fscanf(file, "%lu", &pages) == 1 && fclose(file) == 0);
    CHECK(rlsd_engine_options_init(&options, sizeof options) == RLSD_OK);
    options.onnxruntime = library;
    options.threads = 1;
    CHECK(getrlimit(RLIMIT_AS, &before) == 0);
    little = before;
    little.rlim_cur = pages * (rlim_t)sysconf(_SC_PAGESIZE) + ((rlim_t)90 << 20); /* 18 are the bundle's, 30 the runtime's */
    CHECK(setrlimit(RLIMIT_AS, &little) == 0 && getrlimit(RLIMIT_AS, &now) == 0);
    if (now.rlim_cur != little.rlim_cur) return; /* an emulated processor */
    status = rlsd_engine_open(bundle, &options, &engine);
    CHECK(setrlimit(RLIMIT_AS, &before) == 0);
    CHECK(status == RLSD_OUT_OF_MEMORY);
#endif
}

/* The message of the main thread, which is longer than a string has room for in itself, has been freed by now. */
static void at_exit(void) {
    if (rlsd_run(NULL) != RLSD_INVALID_ARGUMENT || rlsd_last_error()[0] != '\0') _Exit(1);
}

int main(int argc, char **argv) {
    static float wanted[ALL];
    rlsd_engine *engine;
    void (*const changes[])(void) = {round_up, flush, trap};
    int i;
    if (argc != 3) return fprintf(stderr, "usage: surroundings BUNDLE ONNXRUNTIME_LIBRARY\n"), 2;
    bundle = argv[1], library = argv[2];
    for (i = 0; i < PIXELS; ++i) mask[i] = (float)(i % 32 < 16), measured[i] = mask[i] * (float)(i % 7) / 8;
    check_little_memory();
    engine = open_engine(NULL);
    reconstruct(engine, wanted);
    for (i = 0; i < 3; ++i) check_numbers(engine, wanted, changes[i]);
    check_numbers(NULL, wanted, all_three);
    check_fork(engine, wanted);
    rlsd_engine_close(engine);
    check_thread_that_ends(wanted);
    check_busy(wanted);
    CHECK(atexit(at_exit) == 0);
    CHECK(rlsd_engine_open("/nowhere/that/could/be/a/bundle", NULL, &engine) != RLSD_OK);
    return 0;
}
