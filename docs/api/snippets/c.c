/* cc example.c $(pkg-config --cflags --libs rlsd) && ./a.out models/fashion/bundle */
#include <rlsd.h>
#include <stdio.h>

enum { PIXELS = 32 * 32, PARTICLES = 2 };

static int failed(rlsd_status status) {
    if (status != RLSD_OK) fprintf(stderr, "%s\n", rlsd_last_error());
    return status != RLSD_OK;
}

int main(int count, char **words) {
    static float y[8 * 8], out[PARTICLES * PIXELS]; /* a flat grey image, a quarter of the resolution */
    rlsd_engine *engine = NULL;
    rlsd_job *job = NULL;
    rlsd_params params;
    rlsd_request request;
    rlsd_job_info info = {.size = sizeof info};
    if (count != 2 || failed(rlsd_engine_open(words[1], NULL, &engine))) return 1;
    rlsd_params_init(&params, sizeof params);
    rlsd_request_init(&request, sizeof request);
    params.steps = 30;
    request.op = "superres4";
    request.y = y;
    request.y_count = sizeof y / sizeof *y;
    request.particles = PARTICLES;
    request.out = out;
    request.out_count = sizeof out / sizeof *out;
    int bad = failed(rlsd_submit(engine, &params, &request, &job)) || failed(rlsd_run(engine)) ||
              failed(rlsd_job_query(job, &info));
    if (!bad) printf("%d steps, first pixels %.2f %.2f\n", info.step, out[0], out[PIXELS]);
    rlsd_job_release(job);
    rlsd_engine_close(engine);
    return bad;
}
