/* A policy without Python: load a plan file written by ``parapolicy export``, and sample action chunks. See
 * docs/embedding.md.
 *
 * All arrays are float, in row-major order. Functions that can fail return a code, 0 for success; they never end the
 * program or throw an exception. Several threads may use one policy at the same time. */
#ifndef PARAPOLICY_FUSED_H
#define PARAPOLICY_FUSED_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct parapolicy_policy parapolicy_policy;

enum {
    PARAPOLICY_OK = 0,
    PARAPOLICY_NO_FILE = 1,         /* the file cannot be read */
    PARAPOLICY_NO_PLAN = 2,         /* it is not a plan file */
    PARAPOLICY_OTHER_VERSION = 3,   /* written for another version of this library */
    PARAPOLICY_DAMAGED = 4,         /* truncated, changed, or with inconsistent sizes */
    PARAPOLICY_NO_MEMORY = 5,
    PARAPOLICY_BAD_ARGUMENT = 6,    /* a pointer is null or a setting is out of range */
    PARAPOLICY_BAD_OBSERVATION = 7, /* it holds a value that is not finite; nothing was computed */
    PARAPOLICY_BAD_RESULT = 8       /* the chunk holds a value that is not finite; do not execute it */
};

/* The meaning of a code: a static text. */
const char* parapolicy_message(int32_t code);

typedef struct {
    int64_t obs_steps, observed;       /* control steps of an observation, and numbers per step */
    int64_t horizon, action_dim;       /* actions of a chunk, and numbers per action */
    int64_t first_action, action_steps; /* index of the first action to execute, and their number */
    int64_t steps;                     /* denoising steps */
    int64_t noise;                     /* length of a chunk's noise: (steps + 1) * horizon * action_dim */
    double control_hz;                 /* control steps per second; 0: unknown */
} parapolicy_sizes;

/* Load a plan file; free it with parapolicy_free. */
int32_t parapolicy_load(const char* path, parapolicy_policy** policy);
void parapolicy_free(parapolicy_policy* policy);
int32_t parapolicy_get_sizes(const parapolicy_policy* policy, parapolicy_sizes* sizes);

typedef struct {
    int64_t threads; /* of a network call, including the caller's; at least 1 */
    double seconds;  /* time limit: sampling ends after the round that reaches it, with the best estimate; negative: none */
} parapolicy_options;

typedef struct {
    int64_t rounds, evaluations; /* network calls, and rows of all calls */
    int32_t complete;            /* 0: the time ran out */
} parapolicy_stats;

/* Sample a chunk.
 *   observation  (obs_steps, observed), in the environment's units, oldest first; the keys of a step are concatenated in
 *                the order of ``parapolicy inspect``
 *   noise        (steps + 1, horizon, action_dim), standard normal; draw new noise for every chunk
 *   options      null: one thread, no time limit
 *   trajectory   (horizon, action_dim), in the environment's units
 *   stats        may be null */
int32_t parapolicy_sample(const parapolicy_policy* policy, const float* observation, const float* noise,
                          const parapolicy_options* options, float* trajectory, parapolicy_stats* stats);

/* The same for an observation that is already normalised. */
int32_t parapolicy_sample_normalised(const parapolicy_policy* policy, const float* observation, const float* noise,
                                     const parapolicy_options* options, float* trajectory, parapolicy_stats* stats);

#ifdef __cplusplus
}
#endif
#endif
