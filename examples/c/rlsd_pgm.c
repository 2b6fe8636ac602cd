/* PGM in, PGM out: several reconstructions of a grey image from an incomplete or corrupted measurement of it.
 *
 *     rlsd_pgm BUNDLE INPUT.pgm OUT [OPTION VALUE]...
 *
 * writes the measurement (OUT-measured.pgm), the reconstructions (OUT-0.pgm, OUT-1.pgm, ...) and their mean
 * (OUT-mean.pgm). INPUT is a clean image, of which the measurement is simulated, or the measurement itself.
 */
#include "pgm.h"

#include <rlsd.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "usage: rlsd_pgm BUNDLE INPUT.pgm OUT [OPTION VALUE]...\n"
    "  --op NAME        the bundle's forward operator                       inpainting\n"
    "  --mask FILE      a PGM, white where the image is seen (operators that take a mask)\n"
    "  --input WHAT     INPUT is an `image` to be measured, or `measured`   image\n"
    "  --particles N    how many reconstructions                            4\n"
    "  --steps K        how many timesteps                                  200\n"
    "  --gamma G        how strongly they repel each other                  5\n"
    "  --seed S         of the random numbers                               0\n";

typedef struct options {
    const char *bundle, *input, *out, *op, *mask, *what;
    double particles, steps, gamma, seed;
} options;

/* What is freed at the end, whatever happened. */
typedef struct work {
    rlsd_engine *engine;
    rlsd_job *job;
    float *image, *mask, *y, *particles, *mean;
    size_t shape[3], measured[3]; /* channels, height, width of an image and of a measurement */
} work;

static bool failed(const char *what) {
    fprintf(stderr, "%s: %s\n", what, rlsd_last_error());
    return false;
}

static bool number(const char *option, const char *text, bool whole, double *value) {
    char *end;
    *value = strtod(text, &end);
    const bool in_range = end != text && *end == '\0' && *value >= 0 && *value <= 1e9;
    if (in_range && (!whole || *value == (double)(long)*value)) return true;
    fprintf(stderr, "%s is %s; allowed is a %snumber from 0 to 1000000000\n", option, text, whole ? "whole " : "");
    return false;
}

static bool parse(int count, char **words, options *o) {
    *o = (options){.op = "inpainting", .what = "image", .particles = 4, .steps = 200, .gamma = 5};
    if (count < 4 || count % 2 != 0) return fputs(usage, stderr), false;
    o->bundle = words[1], o->input = words[2], o->out = words[3];
    for (int i = 4; i < count; i += 2) {
        const char *name = words[i], *value = words[i + 1];
        bool fine = true;
        if (strcmp(name, "--op") == 0) o->op = value;
        else if (strcmp(name, "--mask") == 0) o->mask = value;
        else if (strcmp(name, "--input") == 0) o->what = value;
        else if (strcmp(name, "--particles") == 0) fine = number(name, value, true, &o->particles);
        else if (strcmp(name, "--steps") == 0) fine = number(name, value, true, &o->steps);
        else if (strcmp(name, "--gamma") == 0) fine = number(name, value, false, &o->gamma);
        else if (strcmp(name, "--seed") == 0) fine = number(name, value, true, &o->seed);
        else return fprintf(stderr, "there is no option %s\n%s", name, usage), false;
        if (!fine) return false;
    }
    if (strcmp(o->what, "image") == 0 || strcmp(o->what, "measured") == 0) return true;
    return fprintf(stderr, "--input is %s; allowed are image and measured\n", o->what), false;
}

/* The three numbers behind a line "KEY c h w" of what the engine says about the bundle, with c = 1. */
static bool grey_shape(const rlsd_engine *engine, const char *key, size_t shape[3]) {
    const size_t length = strlen(key);
    for (const char *line = rlsd_engine_describe(engine); line != NULL && *line != '\0';) {
        if (strncmp(line, key, length) == 0 && line[length] == ' ' &&
            sscanf(line + length, "%zu %zu %zu", &shape[0], &shape[1], &shape[2]) == 3) {
            if (shape[0] == 1) return true;
            return fprintf(stderr, "%s has %zu channels; PGM has one\n", key, shape[0]), false;
        }
        line = strchr(line, '\n');
        if (line != NULL) ++line;
    }
    return fprintf(stderr, "the bundle has no %s of three dimensions\n", key), false;
}

static float *floats(size_t count) {
    float *values = calloc(count > 0 ? count : 1, sizeof *values);
    if (values == NULL) fputs("out of memory\n", stderr);
    return values;
}

static bool open_bundle(const options *o, work *w) {
    char key[256];
    snprintf(key, sizeof key, "operator %s", o->op);
    if (rlsd_engine_open(o->bundle, NULL, &w->engine) != RLSD_OK) return failed(o->bundle);
    if (!grey_shape(w->engine, "image", w->shape) || !grey_shape(w->engine, key, w->measured)) return false;
    const size_t pixels = w->shape[1] * w->shape[2];
    w->image = floats(pixels);
    w->mask = floats(pixels);
    w->mean = floats(pixels);
    w->y = floats(w->measured[1] * w->measured[2]);
    return w->image != NULL && w->mask != NULL && w->mean != NULL && w->y != NULL;
}

/* Reads the measurement, or makes one of the image with the bundle's own operator. */
static bool measure(const options *o, work *w, const rlsd_tensor *mask) {
    const size_t height = w->shape[1], width = w->shape[2], count = w->measured[1] * w->measured[2];
    const bool measured = strcmp(o->what, "measured") == 0;
    if (o->mask != NULL && measured && (w->measured[1] != height || w->measured[2] != width))
        return fprintf(stderr, "--mask is %zu x %zu, as an image; what %s measures is %zu x %zu\n", width, height, o->op,
                       w->measured[2], w->measured[1]),
               false;
    if (o->mask != NULL) {
        if (!pgm_read(o->mask, width, height, w->mask)) return false;
        for (size_t i = 0; i < width * height; ++i) w->mask[i] = w->mask[i] > 0 ? 1.0f : 0.0f;
    }
    if (measured) {
        if (!pgm_read(o->input, w->measured[2], w->measured[1], w->y)) return false;
        for (size_t i = 0; o->mask != NULL && i < count; ++i) w->y[i] *= w->mask[i]; /* what is hidden counts as 0 */
        return true;
    }
    if (!pgm_read(o->input, width, height, w->image)) return false;
    const rlsd_tensor inputs[] = {{"x", w->image, width * height, RLSD_FLOAT32}, *mask};
    const rlsd_tensor y = {"y", w->y, count, RLSD_FLOAT32};
    char graph[256];
    snprintf(graph, sizeof graph, "operator.%s.forward", o->op);
    if (rlsd_evaluate(w->engine, graph, 1, inputs, o->mask != NULL ? 2 : 1, &y, 1) != RLSD_OK) return failed(graph);
    return true;
}

static bool reconstruct(const options *o, work *w, const rlsd_tensor *mask) {
    const size_t pixels = w->shape[1] * w->shape[2];
    rlsd_params params;
    rlsd_request request;
    if (rlsd_params_init(&params, sizeof params) != RLSD_OK || rlsd_request_init(&request, sizeof request) != RLSD_OK)
        return failed("rlsd.h");
    params.steps = (int32_t)o->steps;
    params.gamma = o->gamma;
    params.rho = 0.1, params.lr_x = 0.1, params.lr_z = 0.05; /* for priors of this size; the defaults are for Stable Diffusion */
    request.op = o->op;
    request.y = w->y;
    request.y_count = w->measured[1] * w->measured[2];
    request.params = mask;
    request.param_count = o->mask != NULL ? 1 : 0;
    request.particles = (int32_t)o->particles;
    request.seed = (uint64_t)o->seed;
    request.out_count = (size_t)request.particles * pixels;
    request.out = w->particles = floats(request.out_count);
    if (w->particles == NULL) return false;
    if (rlsd_submit(w->engine, &params, &request, &w->job) != RLSD_OK) return failed(o->input);
    if (rlsd_run(w->engine) != RLSD_OK) return failed(o->input);
    return true;
}

static bool write_all(const options *o, work *w) {
    const size_t height = w->shape[1], width = w->shape[2], pixels = width * height, count = (size_t)o->particles;
    char name[32];
    for (size_t p = 0; p < count; ++p) {
        const float *particle = w->particles + p * pixels;
        for (size_t i = 0; i < pixels; ++i) w->mean[i] += particle[i] / (float)count;
        snprintf(name, sizeof name, "%zu", p);
        if (!pgm_write(o->out, name, width, height, particle)) return false;
    }
    return pgm_write(o->out, "mean", width, height, w->mean) &&
           pgm_write(o->out, "measured", w->measured[2], w->measured[1], w->y);
}

int main(int count, char **words) {
    options o;
    work w = {0};
    if (!parse(count, words, &o)) return 2;
    bool fine = open_bundle(&o, &w);
    if (fine) {
        const rlsd_tensor mask = {"mask", w.mask, w.shape[1] * w.shape[2], RLSD_FLOAT32};
        fine = measure(&o, &w, &mask) && reconstruct(&o, &w, &mask) && write_all(&o, &w);
    }
    rlsd_job_release(w.job);
    rlsd_engine_close(w.engine);
    free(w.image), free(w.mask), free(w.mean), free(w.y), free(w.particles);
    return fine ? 0 : 1;
}
