/* Reconstructs one image from the lower three quarters of it, with nothing but rlsd.h, and checks the result.
 *
 *     reconstruct BUNDLE ONNXRUNTIME_LIBRARY
 */
#include "check.h"

#include <math.h>
#include <string.h>

enum { SIDE = 32, PIXELS = SIDE * SIDE, PARTICLES = 3 };

static float image[PIXELS], mask[PIXELS], measured[PIXELS];

/* A bag, roughly: a bright block with a handle, black around it. */
static void draw(void) {
    for (int row = 0; row < SIDE; ++row)
        for (int column = 0; column < SIDE; ++column) {
            const int body = row >= 14 && row < 27 && column >= 5 && column < 27;
            const int handle = row >= 6 && row < 14 && (column == 10 || column == 21 || (row == 6 && column > 10 && column < 21));
            image[row * SIDE + column] = body ? 0.6f : handle ? 0.2f : -1.0f;
            mask[row * SIDE + column] = row >= SIDE / 4 ? 1.0f : 0.0f;
        }
}

static rlsd_engine *open_engine(const char *bundle, const char *library, int threads, rlsd_progress_fn progress, void *user) {
    rlsd_engine_options options;
    rlsd_engine *engine = NULL;
    CHECK(rlsd_engine_options_init(&options, sizeof options) == RLSD_OK);
    options.onnxruntime = library;
    options.threads = threads;
    options.progress = progress;
    options.user = user;
    CHECK(rlsd_engine_open(bundle, &options, &engine) == RLSD_OK);
    return engine;
}

static rlsd_params parameters(void) {
    rlsd_params params;
    CHECK(rlsd_params_init(&params, sizeof params) == RLSD_OK);
    params.steps = 60;
    params.lr_x = 0.2;
    params.lr_z = 0.1;
    params.gamma = 5;
    return params;
}

static rlsd_request request_of(rlsd_tensor *parameter, float *out) {
    rlsd_request request;
    CHECK(rlsd_request_init(&request, sizeof request) == RLSD_OK);
    *parameter = (rlsd_tensor){"mask", mask, PIXELS, RLSD_FLOAT32};
    request.op = "inpainting";
    request.y = measured;
    request.y_count = PIXELS;
    request.params = parameter;
    request.param_count = 1;
    request.particles = PARTICLES;
    request.seed = 7;
    request.out = out;
    request.out_count = PARTICLES * PIXELS;
    return request;
}

static void measure(rlsd_engine *engine) {
    const rlsd_tensor in[] = {{"x", image, PIXELS, RLSD_FLOAT32}, {"mask", mask, PIXELS, RLSD_FLOAT32}};
    const rlsd_tensor out[] = {{"y", measured, PIXELS, RLSD_FLOAT32}};
    CHECK(rlsd_evaluate(engine, "operator.inpainting.forward", 1, in, 2, out, 1) == RLSD_OK);
    for (int i = 0; i < PIXELS; ++i) CHECK(measured[i] == image[i] * mask[i]);
}

static void reconstruct(rlsd_engine *engine, float *out) {
    const rlsd_params params = parameters();
    rlsd_tensor parameter;
    const rlsd_request request = request_of(&parameter, out);
    rlsd_job *job = NULL;
    rlsd_job_info info = {.size = sizeof info};
    CHECK(rlsd_submit(engine, &params, &request, &job) == RLSD_OK);
    CHECK(rlsd_run(engine) == RLSD_OK);
    CHECK(rlsd_job_query(job, &info) == RLSD_OK);
    CHECK(info.state == RLSD_DONE && info.status == RLSD_OK && info.step == 59 && info.seconds > 0);
    rlsd_job_release(job);
}

static double residual(const float *x) {
    double sum = 0, count = 0;
    for (int i = 0; i < PIXELS; ++i)
        if (mask[i] != 0) {
            sum += pow(x[i] - image[i], 2);
            count += 1;
        }
    return sqrt(sum / count);
}

static void check_result(const float *out) {
    for (int i = 0; i < PARTICLES * PIXELS; ++i) CHECK(isfinite(out[i]));
    for (int p = 0; p < PARTICLES; ++p) CHECK(residual(out + p * PIXELS) < 0.1);
    double apart = 0;
    for (int i = 0; i < PIXELS; ++i) apart += fabs(out[i] - out[PIXELS + i]);
    CHECK(apart / PIXELS > 1e-3);
}

static int stop(void *user, const rlsd_progress *progress) {
    CHECK(progress->size == sizeof *progress && progress->jobs_active == 1);
    return ++*(int *)user == 3;
}

static void check_cancel(const char *bundle, const char *library, float *out) {
    int calls = 0;
    rlsd_engine *engine = open_engine(bundle, library, 1, stop, &calls);
    const rlsd_params params = parameters();
    rlsd_tensor parameter;
    const rlsd_request request = request_of(&parameter, out);
    rlsd_job *job = NULL;
    rlsd_job_info info = {.size = sizeof info};
    out[0] = 1;
    CHECK(rlsd_submit(engine, &params, &request, &job) == RLSD_OK);
    CHECK(out[0] == 0); /* zeroed at submit */
    CHECK(rlsd_run(engine) == RLSD_CANCELLED && calls == 3);
    CHECK(rlsd_job_query(job, &info) == RLSD_OK && info.status == RLSD_CANCELLED && info.state == RLSD_DONE);
    for (int i = 0; i < PARTICLES * PIXELS; ++i) CHECK(out[i] == 0);
    rlsd_job_release(job);
    CHECK(rlsd_submit(engine, &params, &request, &job) == RLSD_OK);
    rlsd_engine_close(engine); /* the job's handle outlives it */
    rlsd_job_release(job);
}

static void refuse(rlsd_engine *engine, rlsd_params params, rlsd_request request, const char *word) {
    rlsd_job *job = (rlsd_job *)engine;
    CHECK(rlsd_submit(engine, &params, &request, &job) == RLSD_INVALID_ARGUMENT);
    CHECK(job == NULL);
    if (strstr(rlsd_last_error(), word) == NULL) {
        fprintf(stderr, "'%s' is not in the message: %s\n", word, rlsd_last_error());
        exit(1);
    }
}

static void check_refusals(rlsd_engine *engine, const char *library, float *out) {
    rlsd_tensor parameter;
    const rlsd_params params = parameters();
    const rlsd_request good = request_of(&parameter, out);
    rlsd_request request = good;
    rlsd_params wrong = params;
    request.op = "zoom", refuse(engine, params, request, "zoom"), request = good;
    request.y_count = 5, refuse(engine, params, request, "y has 5"), request = good;
    request.param_count = 0, refuse(engine, params, request, "parameters"), request = good;
    request.particles = 0, refuse(engine, params, request, "particles is 0"), request = good;
    request.out_count = 1, refuse(engine, params, request, "out has 1"), request = good;
    wrong.steps = 1, refuse(engine, wrong, good, "steps is 1"), wrong = params;
    wrong.lr_z = NAN, refuse(engine, wrong, good, "lr_z"), wrong = params;
    wrong.size = 3, refuse(engine, wrong, good, "size 3"), wrong = params;
    measured[100] = NAN, refuse(engine, params, good, "y has a value"), measured[100] = 0;

    rlsd_engine *none = engine;
    rlsd_engine_options options;
    CHECK(rlsd_engine_options_init(&options, sizeof options) == RLSD_OK);
    options.onnxruntime = library;
    CHECK(rlsd_engine_open("/nowhere", &options, &none) == RLSD_BAD_BUNDLE && none == NULL);
    options.onnxruntime = "/nowhere/libonnxruntime.so";
    CHECK(rlsd_engine_open("/nowhere", &options, &none) == RLSD_NO_RUNTIME && none == NULL);
    CHECK(rlsd_run(NULL) == RLSD_INVALID_ARGUMENT);
    rlsd_engine_close(NULL);
    rlsd_job_release(NULL);
    rlsd_cancel(NULL);
}

int main(int argc, char **argv) {
    static float once[PARTICLES * PIXELS], again[PARTICLES * PIXELS];
    if (argc != 3) return fprintf(stderr, "usage: reconstruct BUNDLE ONNXRUNTIME_LIBRARY\n"), 2;
    draw();
    rlsd_engine *engine = open_engine(argv[1], argv[2], 2, NULL, NULL);
    measure(engine);
    reconstruct(engine, once);
    check_result(once);
    check_refusals(engine, argv[2], again);
    rlsd_engine_close(engine);

    measured[100] = image[100] * mask[100];
    engine = open_engine(argv[1], argv[2], 1, NULL, NULL);
    reconstruct(engine, again);
    CHECK(memcmp(once, again, sizeof once) == 0); /* the number of threads changes no byte */
    rlsd_engine_close(engine);
    check_cancel(argv[1], argv[2], again);
    printf("residual %.4f, %.4f, %.4f\n", residual(once), residual(once + PIXELS), residual(once + 2 * PIXELS));
    return 0;
}
