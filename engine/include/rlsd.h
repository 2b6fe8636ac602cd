/* rlsd.h - the C interface of the RLSD reconstruction engine.
 *
 * RLSD (Repulsive Latent Score Distillation, arXiv 2406.16683) draws N diverse
 * reconstructions x_1..x_N of an image from one measurement y = f(x) + noise.
 * This header is the whole interface; its comments are the manual.
 *
 * In five calls:
 *
 *     rlsd_engine *engine;  rlsd_job *job;
 *     rlsd_engine_open("fashion", NULL, &engine);         load and verify a bundle
 *     rlsd_submit(engine, &params, &request, &job);       as often as you like
 *     rlsd_run(engine);                                   until all jobs are done
 *     rlsd_job_release(job);
 *     rlsd_engine_close(engine);
 *
 * Ownership   Only handles belong to the library. Every buffer belongs to the caller.
 *             Inputs are copied before a call returns; a job's output buffers must
 *             stay valid until that job is done (or is released, or its engine closed).
 *             On a GPU, y, params, context, out and out_latents of a request may each be
 *             memory of the host or of the engine's device. Device inputs may come from
 *             work that is still queued: the call waits for the whole device.
 * Threads     One engine is used by one thread at a time; different engines may run in
 *             parallel. Only rlsd_cancel may be called from any thread. rlsd_submit,
 *             rlsd_tick, rlsd_run, rlsd_evaluate and rlsd_job_snapshot fail with
 *             RLSD_INVALID_ARGUMENT while another of these is under way; then, too,
 *             rlsd_engine_close does nothing, and a job that is not done must not be
 *             released. On a GPU a tick after jobs have come or gone may record CUDA
 *             graphs: until it returns no other thread may allocate or free memory of a
 *             GPU by other libraries, or wait for a whole device (engines of this library
 *             wait for each other). The CUDA context that is current for the calling
 *             thread is so again afterwards. A thread that calls needs a stack of 256 KiB,
 *             most of it for ONNX Runtime. The engine's own threads take no signals but
 *             SIGPROF and their own faults.
 * Callbacks   Run on the calling thread. They may call rlsd_cancel, rlsd_job_query and
 *             other engines, but not into the same engine (see Threads). They have to
 *             return: no exception and no longjmp may leave them.
 * Numbers     Rounding, flushing to zero and traps of floating point that the calling
 *             thread has set are put aside during a call, callbacks included.
 * Processes   An engine belongs to the process that opened it. In a child that it forks
 *             calls fail with RLSD_INVALID_ARGUMENT, rlsd_engine_close does nothing and
 *             rlsd_job_release frees the handle only; the child may open engines of its
 *             own (on a CPU: CUDA does not survive fork). As a process exits no call may
 *             be under way in another thread: cancel, and join it before.
 * Errors      Every call returns RLSD_OK (0) or a positive rlsd_status, and leaves one
 *             sentence in rlsd_last_error() of the calling thread. After an error the
 *             handle is as it was before the call, unless the call says otherwise.
 *             Handle outputs (rlsd_x **out) are set to NULL before anything else.
 * Versions    Structs start with their size and only ever grow at the end: fill them
 *             with their _init function, which is given sizeof of the caller's struct.
 *             Enum values are never reused.
 * Tensors     Dense, row-major, float32 unless said otherwise; images are channels x
 *             height x width in the range [-1, 1]. "Per item" shapes have no batch axis.
 */
#ifndef RLSD_H
#define RLSD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define RLSD_API __attribute__((visibility("default")))
#else
#define RLSD_API
#endif

#define RLSD_VERSION "0.2.0"

typedef struct rlsd_engine rlsd_engine;
typedef struct rlsd_job rlsd_job;

typedef enum rlsd_status {
    RLSD_OK = 0,
    RLSD_INVALID_ARGUMENT = 1,  /* a value, shape or name that is not allowed          */
    RLSD_BAD_BUNDLE = 2,        /* a file is missing, altered, or of another format     */
    RLSD_NO_RUNTIME = 3,        /* no usable ONNX Runtime library                       */
    RLSD_RUNTIME_ERROR = 4,     /* ONNX Runtime refused or failed                       */
    RLSD_OUT_OF_MEMORY = 5,
    RLSD_NON_FINITE = 6,        /* a latent, image or gradient became NaN or infinite   */
    RLSD_CANCELLED = 7,
    RLSD_INTERNAL = 8,          /* a fault of ours: please report it                    */
    RLSD_NO_DEVICE = 9          /* no usable NVIDIA driver, or no such GPU              */
} rlsd_status;

/* The message of this thread's last failed call, "" if none failed. Never NULL; valid
 * until this thread's next call into the library. */
RLSD_API const char *rlsd_last_error(void);

/* The library's version, "MAJOR.MINOR.PATCH". */
RLSD_API const char *rlsd_version(void);

/* How many processors this process may keep busy: those that it may run on, but no more
 * than its control group's share of their time, rounded up (docker run --cpus, a limit
 * of Kubernetes). 1 if memory is too short to find out. */
RLSD_API int32_t rlsd_usable_processors(void);

/* ------------------------------------------------------------------ engine */

typedef enum rlsd_log_level { RLSD_LOG_INFO = 1, RLSD_LOG_WARNING = 2 } rlsd_log_level;

typedef struct rlsd_progress {
    size_t size;
    int64_t jobs_queued, jobs_active, jobs_done; /* since the engine was opened */
    int64_t particle_steps;      /* finished in this call of rlsd_run            */
    int64_t particle_steps_left; /* of all jobs submitted and not done           */
    double seconds;              /* since this call of rlsd_run began            */
} rlsd_progress;

/* Called on the thread that called rlsd_run, after each tick or at intervals. Non-zero
 * asks for an abort, as rlsd_cancel does. Must not call into the same engine. */
typedef int (*rlsd_progress_fn)(void *user, const rlsd_progress *progress);
typedef void (*rlsd_log_fn)(void *user, rlsd_log_level level, const char *message);

typedef struct rlsd_engine_options {
    size_t size;
    const char *onnxruntime;   /* path of libonnxruntime; NULL: $RLSD_ONNXRUNTIME, then
                                  the loader's default search                          */
    const char *device;        /* "cpu", or "cuda:0" and so on for a GPU, which needs a
                                  bundle exported for CUDA and onnxruntime-gpu; NULL:
                                  "cpu" or "cuda:0", as the bundle was exported for    */
    int32_t threads;           /* worker threads; 0: rlsd_usable_processors()          */
    int32_t max_particles;     /* particles in flight at once, over all jobs; 0: 256. A
                                  larger single job runs alone                         */
    rlsd_progress_fn progress; /* may be NULL                                          */
    rlsd_log_fn log;           /* may be NULL                                          */
    void *user;                /* handed to both callbacks                             */
    double progress_interval;  /* seconds from one call of progress to the next, at the
                                  least; 0: after each tick. The last tick always has one */
} rlsd_engine_options;

RLSD_API rlsd_status rlsd_engine_options_init(rlsd_engine_options *options, size_t size);

/* Opens a bundle (a directory that `rlsd export` wrote): checks its manifest and the
 * size and SHA-256 of each of its files, loads ONNX Runtime, creates the sessions.
 * options may be NULL. On failure *out is NULL. Nothing is sent anywhere: since ONNX
 * Runtime's official builds would report their use, the environment variable
 * ORT_DISABLE_TELEMETRY is set to 1 unless it is set. (Set it yourself at the start where
 * other threads read the environment meanwhile, or where your program uses ONNX Runtime
 * before: it looks once a process.) */
RLSD_API rlsd_status rlsd_engine_open(const char *bundle, const rlsd_engine_options *options,
                                      rlsd_engine **out);

/* Frees the engine. Its jobs that are not done are dropped; their handles stay valid
 * only for rlsd_job_release. NULL is fine. */
RLSD_API void rlsd_engine_close(rlsd_engine *engine);

/* Facts about the opened bundle and the runtime, as lines "key value...", one fact a
 * line: the manifest's own lines, then onnxruntime, max_particles, device, threads (on a
 * CPU) or capability (on a GPU), bytes_per_particle and, on a GPU, what was tuned.
 * Belongs to the engine; valid until it is closed. */
RLSD_API const char *rlsd_engine_describe(const rlsd_engine *engine);

/* ------------------------------------------------------------------ jobs */

typedef enum rlsd_variant {
    RLSD_AUGMENTED = 1,    /* "rlsd": latents z and images x, coupled; the result is x */
    RLSD_NONAUGMENTED = 2  /* "rlsd-nonaug": latents only; the result is D(z)          */
} rlsd_variant;

typedef enum rlsd_repulsion {
    RLSD_REPULSION_AUTO = 0,     /* features when the bundle has an extractor, else latent */
    RLSD_REPULSION_FEATURES = 1, /* phi(D(z))                                              */
    RLSD_REPULSION_LATENT = 2    /* z itself                                               */
} rlsd_repulsion;

/* The algorithm's parameters, in the symbols of the paper. */
typedef struct rlsd_params {
    size_t size;
    int32_t variant;          /* rlsd_variant                                     [1]    */
    int32_t steps;            /* K >= 2 timesteps, the last is not visited        [200]  */
    double rho;               /* weight of ||x - D(z)||^2 in the step of x, >= 0  [0.07] */
    double lambda;            /* weight of the score term, >= 0                   [0.15] */
    double lr_x, lr_z;        /* Adam's learning rates, > 0                       [0.4, 0.8] */
    double gamma;             /* strength of the repulsion, >= 0                  [0]    */
    double repulsion_until;   /* share of the steps with repulsion, 0..1          [1]    */
    int32_t repulsion;        /* rlsd_repulsion                                   [0]    */
    double guidance;          /* classifier-free guidance scale, 1: off           [1]    */
    double beta1, beta2;      /* Adam's decay rates, 0 <= beta < 1                [0.9, 0.99] */
    double adam_eps;          /* Adam's epsilon, > 0                              [4e-8] */
} rlsd_params;

RLSD_API rlsd_status rlsd_params_init(rlsd_params *params, size_t size);

typedef enum rlsd_dtype { RLSD_FLOAT32 = 1, RLSD_INT64 = 2 } rlsd_dtype;

/* A named dense array: an operator's parameter, or an input or output of a graph. */
typedef struct rlsd_tensor {
    const char *name;
    void *data;      /* only read where it is an input                     */
    size_t count;    /* number of elements, checked against what is wanted */
    int32_t dtype;   /* rlsd_dtype                                         */
} rlsd_tensor;

/* Called in each step of a job whose particles repel others that are not this engine's: one
 * measurement, its particles spread over several processes. rows [total, dim] is where
 * the particles see each other (features or latents), first .. first + count - 1 filled
 * in; the callee fills in all others, as MPI_Allgatherv does in place. Every process has to
 * submit the same such jobs in the same order. On a GPU rows lies in its memory, is free to
 * be used by any stream, and has to be complete on return; dim includes padding. Called on
 * the thread of rlsd_tick; must not call into the same engine. Non-zero ends the job with
 * RLSD_RUNTIME_ERROR. A job that ends with an error in one process calls no more in it, and
 * the others wait: end theirs as well. With several such jobs in flight exchange each job's
 * rows apart from the others' (a communicator of its own in gather_user), or those of two
 * jobs meet where one has ended. */
typedef int (*rlsd_gather_fn)(void *user, float *rows, int64_t first, int64_t count,
                              int64_t total, int64_t dim);

/* What to reconstruct. */
typedef struct rlsd_request {
    size_t size;
    const char *op;            /* name of a forward operator of the bundle             */
    const float *y;            /* the measurement, in the operator's measurement shape */
    size_t y_count;
    const rlsd_tensor *params; /* the operator's parameters of this item, any order    */
    size_t param_count;
    const float *context;      /* conditioning, as the bundle's; NULL: the null context */
    size_t context_count;
    int32_t particles;         /* N >= 1                                               */
    uint64_t seed;             /* the random numbers depend on seed, item, particle    */
    uint32_t item;             /*   and step, and on nothing else                      */
    float *out;                /* [N, C, H, W]: the reconstructions; zeroed at submit  */
    size_t out_count;
    float *out_latents;        /* [N, latent shape]: the final z, or NULL              */
    size_t out_latents_count;
    float *out_trace;          /* [K - 1, N, 3], memory of the host: see below; or NULL */
    size_t out_trace_count;
    int32_t first_particle;    /* the job's are particles first_particle and on: random  */
    int32_t all_particles;     /*   numbers as theirs; of so many in all, 0: of N alone  */
    rlsd_gather_fn gather;     /* needed where all_particles > N; else NULL              */
    void *gather_user;         /* handed to it                                           */
    const void *snapshot;      /* of rlsd_job_snapshot: go on from there; or NULL        */
    size_t snapshot_size;
} rlsd_request;

/* The trace says how a job went. For step k and particle i it has the data loss
 * (1/2) mean (y - f(.))^2 whose gradient the step follows (at x_i as step k finds it, or
 * at D(z_i) where there is no x); the bandwidth h_i of the repulsion, NaN in steps without,
 * so that the median distance from particle i to the others is sqrt(h_i ln(max(N - 1, 2)))
 * unless h_i is at its floor (particles that nearly coincide);
 * and the diversity sqrt(mean (z_i - z_j)^2) over the other particles j of this job (or this
 * share of one) and the values of z, as step k finds them, NaN for N = 1. It is written step
 * by step, and changes no result. A buffer for [K - 1, N, 2], as callers of older versions
 * have it, gets no diversity. */

RLSD_API rlsd_status rlsd_request_init(rlsd_request *request, size_t size);

/* Checks and queues one job. Nothing runs yet. params may be NULL for the defaults. */
RLSD_API rlsd_status rlsd_submit(rlsd_engine *engine, const rlsd_params *params,
                                 const rlsd_request *request, rlsd_job **out);

/* Runs one tick: every particle in flight takes one step. *left (may be NULL) receives
 * the number of jobs not yet done. Jobs may be submitted between ticks: they join the
 * next one. An error other than RLSD_CANCELLED has ended the jobs it concerns; the rest
 * go on with the next call. On a GPU it should always be the same thread that ticks: ONNX
 * Runtime records CUDA graphs for the calling thread, and another one records them anew. */
RLSD_API rlsd_status rlsd_tick(rlsd_engine *engine, int64_t *left);

/* Ticks until no job is left. Returns the first failed job's status (the others are
 * finished all the same), RLSD_CANCELLED after rlsd_cancel. */
RLSD_API rlsd_status rlsd_run(rlsd_engine *engine);

/* Asks the engine to stop at once; from any thread, or a signal's handler. Jobs that are
 * not done end with RLSD_CANCELLED and zeroed outputs; the engine can be used again. A
 * request that finds nothing running takes effect at the next rlsd_tick or rlsd_run. */
RLSD_API void rlsd_cancel(rlsd_engine *engine);

typedef enum rlsd_job_state { RLSD_QUEUED = 1, RLSD_ACTIVE = 2, RLSD_DONE = 3 } rlsd_job_state;

typedef struct rlsd_job_info {
    size_t size;
    int32_t state;         /* rlsd_job_state                                    */
    int32_t status;        /* rlsd_status: why it ended, RLSD_OK while it runs  */
    int32_t step, steps;   /* finished, and in all (K - 1)                      */
    double seconds;        /* from its first tick to its last                   */
    const char *message;   /* "" or one sentence; valid until the job is released */
} rlsd_job_info;

/* info->size must be set (sizeof *info). */
RLSD_API rlsd_status rlsd_job_query(const rlsd_job *job, rlsd_job_info *info);

/* Writes what it takes to go on with a job that is not done, in another process or after a
 * crash: submitted with that snapshot and else the same request and params, it ends with
 * the same bytes as if it had never been interrupted (on a GPU: up to the last bits, where
 * other jobs beside it are packed into other batches). Between ticks; the job goes on. *size
 * receives the snapshot's bytes. out NULL: only that. A capacity that is too small is
 * RLSD_INVALID_ARGUMENT. A snapshot carries checksums: of itself, and of bundle, request
 * and params; rlsd_submit refuses one that does not fit. No secrets, no code; its format
 * belongs to this version of the library. */
RLSD_API rlsd_status rlsd_job_snapshot(const rlsd_job *job, void *out, size_t capacity,
                                       size_t *size);

/* Frees the handle; a job that is not done is dropped and its outputs are zeroed. NULL
 * is fine. */
RLSD_API void rlsd_job_release(rlsd_job *job);

/* ------------------------------------------------------------------ tools */

/* Runs one graph of the bundle on `count` samples: "denoiser", "decoder",
 * "decoder_pull", "features", "features_pull", "encoder", "operator.NAME.forward",
 * "operator.NAME.loss". Inputs and outputs are matched by name and hold `count` samples
 * each; outputs that are not asked for are dropped. */
RLSD_API rlsd_status rlsd_evaluate(rlsd_engine *engine, const char *graph, int64_t count,
                                   const rlsd_tensor *inputs, size_t input_count,
                                   const rlsd_tensor *outputs, size_t output_count);

/* Standard normal numbers from Philox4x32-10, addressed and not streamed:
 * out[e] depends on (seed, item, particle, stream, e) alone. Streams 0 .. 2^31-1 are the
 * engine's steps; use RLSD_STREAM_USER + k for your own (measurement noise, say). */
#define RLSD_STREAM_USER 0xC0000000u
RLSD_API void rlsd_normal(uint64_t seed, uint32_t item, uint32_t particle, uint32_t stream,
                          float *out, size_t count);

/* Repulsion among N particles of one job (what the engine runs on the CPU), for tests
 * and for users who bring their own loop. phi: [N, D]. g: [N, D] receives
 * sum_j 2 k_ij (phi_i - phi_j) / h_i divided by sum_{j != i} k_ij. bandwidth: [N]
 * receives h_i, or NULL. Where particles coincide the direction is drawn from
 * (seed, item, particle, step). See engine/reference.py for the exact rule. With a NaN or
 * an infinity anywhere in phi all of g is 0, and bandwidths may be NaN. */
RLSD_API rlsd_status rlsd_repulsion_gradient(const float *phi, int64_t n, int64_t d, uint64_t seed,
                                             uint32_t item, uint32_t step, float *g,
                                             float *bandwidth);

/* Where the time went since the engine was opened, summed over the worker threads. */
typedef struct rlsd_stats {
    size_t size;
    int64_t ticks, particle_steps;
    int64_t denoiser_runs, decoder_runs, decoder_pull_runs; /* samples that counted */
    double denoiser, decoder, decoder_pull, features, operators; /* seconds in graphs */
    double repulsion;  /* seconds in distances, kernel and gradient                  */
    double elementwise;/* seconds in noise, Adam, checks                             */
    double idle;       /* seconds that workers waited for each other                 */
    double wall;       /* seconds inside rlsd_tick, not summed over threads          */
    int64_t launches;         /* on a GPU: kernels and graphs that the engine launched */
    int64_t synchronisations; /*   times that it waited for the device                 */
    int64_t redone;           /*   particle-steps done again with a smaller scale of
                                   the cotangents, since a half had overflowed         */
    int64_t not_recorded;     /*   graphs that could not be recorded as CUDA graphs: each
                                   costs the host a launch for every node, every time  */
} rlsd_stats;

/* stats->size must be set (sizeof *stats). */
RLSD_API rlsd_status rlsd_engine_stats(const rlsd_engine *engine, rlsd_stats *stats);

/* ONNX Runtime's entry point for libraries of custom operators: lets any program that
 * uses ONNX Runtime run our graphs (SessionOptions.register_custom_ops_library in
 * Python). options: OrtSessionOptions *, api_base: const OrtApiBase *; returns
 * OrtStatus *, NULL on success. */
RLSD_API void *RegisterCustomOps(void *options, const void *api_base);

#ifdef __cplusplus
}
#endif
#endif
