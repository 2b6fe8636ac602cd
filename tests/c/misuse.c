/* Calls that rlsd.h does not allow, on a bundle with the operator "inpainting" and its parameter "mask": each must
 * return its status, name the fault, and leave everything usable.
 *
 *     misuse BUNDLE ONNXRUNTIME_LIBRARY
 */
#include "check.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { PARTICLES = 3, STEPS = 30 };

/* What the checks share: the bundle's shapes, the problem, and how to open an engine. */
typedef struct problem {
    const char *bundle, *runtime;
    size_t width, image, measured, masked;
    float *truth, *mask, *y;
    rlsd_tensor params[1];
} problem;

static float *floats(size_t count) {
    float *values = calloc(count, sizeof *values);
    if (values == NULL) exit(2);
    return values;
}

static rlsd_engine *open_engine(const problem *p, int threads, rlsd_progress_fn progress, void *user) {
    rlsd_engine_options options;
    rlsd_engine *engine = NULL;
    CHECK(rlsd_engine_options_init(&options, sizeof options) == RLSD_OK);
    options.onnxruntime = p->runtime;
    options.threads = threads;
    options.progress = progress;
    options.user = user;
    CHECK(rlsd_engine_open(p->bundle, &options, &engine) == RLSD_OK);
    CHECK(engine != NULL);
    return engine;
}

/* The numbers behind a line "key a b c" of rlsd_engine_describe; returns how many. */
static size_t described(const rlsd_engine *engine, const char *key, size_t *out, size_t room) {
    const char *at = rlsd_engine_describe(engine);
    size_t found = 0;
    while (strncmp(at, key, strlen(key)) != 0) {
        at = strchr(at, '\n');
        if (at++ == NULL || *at == '\0') return 0;
    }
    at += strlen(key);
    while (*at != '\n' && found < room) {
        char *end;
        out[found++] = strtoul(at, &end, 10);
        at = end;
    }
    return found;
}

/* Half of the columns are observed: y = mask * truth, computed by the bundle's own operator. */
static void simulate(problem *p, rlsd_engine *engine) {
    rlsd_tensor inputs[2], output;
    size_t i;
    for (i = 0; i < p->masked; ++i) p->mask[i] = i % p->width < p->width / 2 ? 1.0f : 0.0f;
    memset(inputs, 0, sizeof inputs);
    inputs[0].name = "x";
    inputs[0].data = p->truth;
    inputs[0].count = p->image;
    inputs[0].dtype = RLSD_FLOAT32;
    p->params[0].name = "mask";
    p->params[0].data = p->mask;
    p->params[0].count = p->masked;
    p->params[0].dtype = RLSD_FLOAT32;
    inputs[1] = p->params[0];
    output = inputs[0];
    output.name = "y";
    output.data = p->y;
    output.count = p->measured;
    CHECK(rlsd_evaluate(engine, "operator.inpainting.forward", 1, inputs, 2, &output, 1) == RLSD_OK);
    for (i = 0; i < p->measured; ++i) CHECK(p->y[i] == p->mask[i % p->masked] * p->truth[i]);
    output.name = "nothing";
    CHECK(rlsd_evaluate(engine, "operator.inpainting.forward", 1, inputs, 2, &output, 1) == RLSD_INVALID_ARGUMENT);
    CHECK(rlsd_evaluate(engine, "operator.inpainting.forward", 1, inputs, 1, &output, 0) == RLSD_INVALID_ARGUMENT);
    CHECK(rlsd_evaluate(engine, "operator.nothing.forward", 1, inputs, 2, &output, 1) == RLSD_INVALID_ARGUMENT);
}

static rlsd_request request_for(const problem *p, float *out) {
    rlsd_request request;
    CHECK(rlsd_request_init(&request, sizeof request) == RLSD_OK);
    request.op = "inpainting";
    request.y = p->y;
    request.y_count = p->measured;
    request.params = p->params;
    request.param_count = 1;
    request.particles = PARTICLES;
    request.seed = 7;
    request.out = out;
    request.out_count = PARTICLES * p->image;
    return request;
}

static rlsd_params params_for(double gamma) {
    rlsd_params params;
    CHECK(rlsd_params_init(&params, sizeof params) == RLSD_OK);
    CHECK(params.steps == 200 && params.guidance == 1.0);
    params.steps = STEPS;
    params.gamma = gamma;
    params.lr_x = 0.1;
    params.lr_z = 0.05;
    return params;
}

/* A call that must fail with this status, a sentence naming `word`, and no job. */
static void refused(rlsd_engine *engine, const rlsd_params *params, const rlsd_request *request, const char *word) {
    rlsd_job *job = (rlsd_job *)&job;
    CHECK(rlsd_submit(engine, params, request, &job) == RLSD_INVALID_ARGUMENT);
    CHECK(job == NULL);
    CHECK(strstr(rlsd_last_error(), word) != NULL);
}

static void check_bad_requests(const problem *p, rlsd_engine *engine) {
    float *out = floats(PARTICLES * p->image), *bad = floats(p->measured);
    const rlsd_request good = request_for(p, out);
    const rlsd_params fine = params_for(0);
    rlsd_tensor twice[2];
    rlsd_request request;
    rlsd_params params;
    rlsd_job *job = NULL;
#define WITH_REQUEST(change, word) (request = good, change, refused(engine, &fine, &request, word))
#define WITH_PARAMS(change, word) (params = fine, change, refused(engine, &params, &good, word))
    WITH_REQUEST(request.op = "nothing", "nothing");
    WITH_REQUEST(request.op = NULL, "op");
    WITH_REQUEST(request.y = NULL, "y");
    WITH_REQUEST(--request.y_count, "y");
    WITH_REQUEST(request.param_count = 0, "param");
    WITH_REQUEST(request.params = NULL, "param");
    WITH_REQUEST(request.particles = 0, "particles");
    WITH_REQUEST(request.particles = -1, "particles");
    WITH_REQUEST(request.particles = INT32_MAX, "particles");
    WITH_REQUEST(request.out = NULL, "out");
    WITH_REQUEST(++request.out_count, "out");
    WITH_REQUEST((request.out_latents = out, request.out_latents_count = 1), "out_latents");
    WITH_REQUEST((request.out_trace = out, request.out_trace_count = 1), "out_trace");
    WITH_REQUEST((request.context = out, request.context_count = 1), "context");
    WITH_REQUEST(request.first_particle = -1, "first_particle");
    WITH_REQUEST(request.all_particles = PARTICLES + 1, "all_particles");
    WITH_REQUEST((request.snapshot = out, request.snapshot_size = 4), "snapshot");
    WITH_REQUEST(request.snapshot_size = 4, "snapshot");
    WITH_REQUEST(request.size = 0, "size");
    WITH_REQUEST(request.size = sizeof request - 3, "size");
    memcpy(bad, p->y, p->measured * sizeof *bad);
    bad[p->measured - 1] = NAN;
    WITH_REQUEST(request.y = bad, "y");
    twice[0] = twice[1] = p->params[0];
    WITH_REQUEST((request.params = twice, request.param_count = 2), "param");
    twice[0].name = "other";
    WITH_REQUEST(request.params = twice, "mask");
    twice[0].name = NULL;
    WITH_REQUEST(request.params = twice, "mask");
    twice[0] = p->params[0];
    twice[0].dtype = RLSD_INT64;
    WITH_REQUEST(request.params = twice, "dtype");
    WITH_PARAMS(params.steps = 1, "steps");
    WITH_PARAMS(params.steps = 1000000, "steps");
    WITH_PARAMS(params.rho = -1, "rho");
    WITH_PARAMS(params.lambda = NAN, "lambda");
    WITH_PARAMS(params.lr_z = 0, "lr_z");
    WITH_PARAMS(params.lr_x = INFINITY, "lr_x");
    WITH_PARAMS(params.gamma = -1, "gamma");
    WITH_PARAMS(params.repulsion_until = 1.5, "repulsion_until");
    WITH_PARAMS(params.guidance = 2, "guidance");
    WITH_PARAMS(params.beta1 = 1, "beta1");
    WITH_PARAMS(params.beta2 = 1, "beta2");
    WITH_PARAMS(params.adam_eps = 0, "adam_eps");
    WITH_PARAMS(params.variant = 9, "variant");
    WITH_PARAMS(params.repulsion = 9, "repulsion");
    CHECK(rlsd_submit(NULL, NULL, &good, &job) == RLSD_INVALID_ARGUMENT);
    CHECK(rlsd_submit(engine, NULL, NULL, &job) == RLSD_INVALID_ARGUMENT);
    CHECK(rlsd_submit(engine, NULL, &good, NULL) == RLSD_INVALID_ARGUMENT);
    free(bad);
    free(out);
}

static void check_bad_calls(const problem *p) {
    float numbers[4] = {0, 0, 0, 0}, g[4], h[2];
    rlsd_engine *engine = (rlsd_engine *)&engine;
    rlsd_engine_options options;
    rlsd_params params;
    CHECK(rlsd_engine_open(NULL, NULL, &engine) == RLSD_INVALID_ARGUMENT && engine == NULL);
    CHECK(rlsd_engine_open(p->bundle, NULL, NULL) == RLSD_INVALID_ARGUMENT);
    CHECK(rlsd_engine_options_init(&options, sizeof options) == RLSD_OK);
    options.onnxruntime = p->runtime;
    CHECK(rlsd_engine_open("/nonexistent", &options, &engine) == RLSD_BAD_BUNDLE && engine == NULL);
    CHECK(rlsd_last_error()[0] != '\0');
    options.onnxruntime = "/nonexistent";
    CHECK(rlsd_engine_open(p->bundle, &options, &engine) == RLSD_NO_RUNTIME && engine == NULL);
    options.onnxruntime = p->runtime;
    options.threads = -1;
    CHECK(rlsd_engine_open(p->bundle, &options, &engine) == RLSD_INVALID_ARGUMENT && engine == NULL);
    options.threads = 1;
    options.device = "toaster";
    CHECK(rlsd_engine_open(p->bundle, &options, &engine) == RLSD_INVALID_ARGUMENT && engine == NULL);
    CHECK(rlsd_params_init(NULL, sizeof params) == RLSD_INVALID_ARGUMENT);
    CHECK(rlsd_params_init(&params, 0) == RLSD_INVALID_ARGUMENT);
    CHECK(rlsd_job_query(NULL, NULL) == RLSD_INVALID_ARGUMENT);
    CHECK(rlsd_tick(NULL, NULL) == RLSD_INVALID_ARGUMENT && rlsd_run(NULL) == RLSD_INVALID_ARGUMENT);
    CHECK(rlsd_repulsion_gradient(numbers, 0, 2, 0, 0, 0, g, h) == RLSD_INVALID_ARGUMENT);
    CHECK(rlsd_repulsion_gradient(numbers, 2, 2, 0, 0, 0, g, h) == RLSD_OK);
    CHECK(isfinite(g[0]) && g[0] == -g[2] && g[1] == -g[3] && g[0] * g[0] + g[1] * g[1] > 0); /* they coincide */
    numbers[3] = NAN;
    CHECK(rlsd_repulsion_gradient(numbers, 2, 2, 0, 0, 0, g, h) == RLSD_OK);
    CHECK(g[0] == 0 && g[1] == 0 && g[2] == 0 && g[3] == 0);
    rlsd_cancel(NULL);
    rlsd_job_release(NULL);
    rlsd_engine_close(NULL);
    rlsd_normal(1, 2, 3, RLSD_STREAM_USER, numbers, 4);
    rlsd_normal(1, 2, 3, RLSD_STREAM_USER, g, 3);
    CHECK(memcmp(numbers, g, 3 * sizeof(float)) == 0 && strcmp(rlsd_version(), RLSD_VERSION) == 0);
}

static int abort_at_third(void *user, const rlsd_progress *progress) {
    CHECK(progress->size >= sizeof *progress && progress->jobs_active == 1);
    return ++*(int *)user == 3;
}

/* An abort from the progress callback ends the job, zeroes its output, and leaves the engine usable. */
static void check_cancel(const problem *p) {
    int calls = 0;
    float *out = floats(PARTICLES * p->image);
    rlsd_engine *engine = open_engine(p, 2, abort_at_third, &calls);
    const rlsd_request request = request_for(p, out);
    const rlsd_params params = params_for(5.0);
    rlsd_job_info info;
    rlsd_job *job, *dropped, *queued;
    int64_t left = -1;
    size_t i;
    memset(out, 1, PARTICLES * p->image * sizeof *out);
    CHECK(rlsd_submit(engine, &params, &request, &job) == RLSD_OK);
    CHECK(rlsd_run(engine) == RLSD_CANCELLED && calls == 3);
    info.size = sizeof info;
    CHECK(rlsd_job_query(job, &info) == RLSD_OK && info.state == RLSD_DONE && info.status == RLSD_CANCELLED);
    for (i = 0; i < PARTICLES * p->image; ++i) CHECK(out[i] == 0.0f);
    rlsd_job_release(job);
    CHECK(rlsd_tick(engine, &left) == RLSD_OK && left == 0);

    CHECK(rlsd_submit(engine, &params, &request, &job) == RLSD_OK);
    CHECK(rlsd_submit(engine, &params, &request, &dropped) == RLSD_OK);
    CHECK(rlsd_tick(engine, &left) == RLSD_OK && left == 2);
    rlsd_job_release(dropped); /* in flight: only this one stops */
    CHECK(rlsd_tick(engine, &left) == RLSD_OK && left == 1);
    CHECK(rlsd_job_query(job, &info) == RLSD_OK && info.state == RLSD_ACTIVE && info.step == 2);
    rlsd_cancel(engine);
    CHECK(rlsd_tick(engine, &left) == RLSD_CANCELLED && left == 0);
    CHECK(rlsd_submit(engine, &params, &request, &queued) == RLSD_OK);
    rlsd_engine_close(engine);
    rlsd_job_release(queued); /* outlives its engine */
    rlsd_job_release(job);
    free(out);
}

/* A job goes on from its snapshot, in an engine of another number of threads, to the same bytes. */
static void check_snapshot(const problem *p) {
    const size_t count = PARTICLES * p->image;
    float *whole = floats(count), *resumed = floats(count);
    rlsd_engine *engine = open_engine(p, 1, NULL, NULL), *next = open_engine(p, 2, NULL, NULL);
    rlsd_request request = request_for(p, whole);
    rlsd_params params = params_for(5.0);
    rlsd_job *job, *again;
    size_t size = 1, i;
    char *bytes;
    CHECK(rlsd_submit(engine, &params, &request, &job) == RLSD_OK);
    for (i = 0; i < 3; ++i) CHECK(rlsd_tick(engine, NULL) == RLSD_OK);
    CHECK(rlsd_job_snapshot(NULL, NULL, 0, &size) == RLSD_INVALID_ARGUMENT && size == 0);
    CHECK(rlsd_job_snapshot(job, NULL, 0, NULL) == RLSD_INVALID_ARGUMENT);
    CHECK(rlsd_job_snapshot(job, NULL, 0, &size) == RLSD_OK && size > 3 * count * sizeof(float));
    bytes = malloc(size);
    CHECK(bytes != NULL);
    CHECK(rlsd_job_snapshot(job, bytes, size - 1, &size) == RLSD_INVALID_ARGUMENT);
    CHECK(rlsd_job_snapshot(job, bytes, size, &size) == RLSD_OK);
    CHECK(rlsd_run(engine) == RLSD_OK);
    CHECK(rlsd_job_snapshot(job, bytes, size, &i) == RLSD_INVALID_ARGUMENT && i == 0);
    request.out = resumed;
    request.snapshot = bytes;
    request.snapshot_size = size - 1;
    refused(next, &params, &request, "snapshot");
    request.snapshot_size = size;
    request.seed += 1;
    refused(next, &params, &request, "snapshot");
    request.seed -= 1;
    bytes[size / 2] ^= 1;
    refused(next, &params, &request, "snapshot");
    bytes[size / 2] ^= 1;
    CHECK(rlsd_submit(next, &params, &request, &again) == RLSD_OK);
    CHECK(rlsd_run(next) == RLSD_OK && memcmp(whole, resumed, count * sizeof(float)) == 0);
    rlsd_job_release(again);
    rlsd_job_release(job);
    rlsd_engine_close(next);
    rlsd_engine_close(engine);
    free(bytes);
    free(resumed);
    free(whole);
}

int main(int count, char **arguments) {
    problem p;
    size_t shape[4] = {0, 0, 0, 0}, bytes, i;
    rlsd_engine *engine;
    if (count != 3) {
        fprintf(stderr, "usage: %s BUNDLE ONNXRUNTIME_LIBRARY\n", arguments[0]);
        return 2;
    }
    memset(&p, 0, sizeof p);
    p.bundle = arguments[1];
    p.runtime = arguments[2];
    CHECK(rlsd_last_error()[0] == '\0');
    engine = open_engine(&p, 1, NULL, NULL);
    CHECK(described(engine, "image ", shape, 4) == 3);
    p.width = shape[2];
    p.image = shape[0] * shape[1] * shape[2];
    CHECK(described(engine, "operator inpainting ", shape, 4) == 3);
    p.measured = shape[0] * shape[1] * shape[2];
    CHECK(described(engine, "operator_param inpainting mask ", shape, 4) == 3);
    p.masked = shape[0] * shape[1] * shape[2];
    CHECK(described(engine, "bytes_per_particle ", &bytes, 1) == 1 && bytes > 0);
    p.truth = floats(p.image);
    p.mask = floats(p.masked);
    p.y = floats(p.measured);
    for (i = 0; i < p.image; ++i) p.truth[i] = (float)(0.6 * sin(0.01 * (double)i));
    simulate(&p, engine);
    check_bad_requests(&p, engine);
    rlsd_engine_close(engine);
    check_bad_calls(&p);
    check_cancel(&p);
    check_snapshot(&p);
    free(p.truth);
    free(p.mask);
    free(p.y);
    return 0;
}
