/* A policy without Python: load a plan file that ``parapolicy export`` wrote, and sample action chunks. See docs/embedding.md.
 *
 * All arrays are float, row by row. Functions that can fail return a code, 0 for success; none of them ends the program or
 * lets an exception out. Several threads may use one policy at the same time. */
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
    PARAPOLICY_NO_PLAN = 2,         /* it is no plan file */
    PARAPOLICY_OTHER_VERSION = 3,   /* of another version of this library */
    PARAPOLICY_DAMAGED = 4,         /* shortened, changed, or with sizes that do not fit together */
    PARAPOLICY_NO_MEMORY = 5,
    PARAPOLICY_BAD_ARGUMENT = 6,    /* a pointer is null, or a setting out of range */
    PARAPOLICY_BAD_OBSERVATION = 7, /* holds what is not finite; nothing was computed */
    PARAPOLICY_BAD_RESULT = 8       /* the chunk holds what is not finite; do not send it to a robot */
};

/* What a code means: a text that stays. */
const char* parapolicy_message(int32_t code);

typedef struct {
    int64_t obs_steps, observed;       /* control steps of an observation, and numbers of each */
    int64_t horizon, action_dim;       /* actions of a chunk, and numbers of each */
    int64_t first_action, action_steps; /* which of them are meant to be executed */
    int64_t steps;                     /* of denoising */
    int64_t noise;                     /* numbers of noise of a chunk: (steps + 1) * horizon * action_dim */
    double control_hz;                 /* control steps per second; 0: unknown */
} parapolicy_sizes;

/* Load a plan file; free it with parapolicy_free. */
int32_t parapolicy_load(const char* path, parapolicy_policy** policy);
void parapolicy_free(parapolicy_policy* policy);
int32_t parapolicy_get_sizes(const parapolicy_policy* policy, parapolicy_sizes* sizes);

typedef struct {
    int64_t threads; /* of a network call, with the caller's; at least 1 */
    double seconds;  /* sampling ends with the round in which they have passed, with the best estimate; negative: never */
} parapolicy_options;

typedef struct {
    int64_t rounds, evaluations; /* network calls, and rows of all of them */
    int32_t complete;            /* 0: the time ran out */
} parapolicy_stats;

/* Sample a chunk.
 *   observation  (obs_steps, observed), in units, oldest first; in a step, the keys one after the other as
 *                ``parapolicy inspect`` lists them
 *   noise        (steps + 1, horizon, action_dim), standard normal; one chunk's, not to be used again
 *   options      null: one thread, no limit of time
 *   trajectory   (horizon, action_dim), in units
 *   stats        may be null */
int32_t parapolicy_sample(const parapolicy_policy* policy, const float* observation, const float* noise,
                          const parapolicy_options* options, float* trajectory, parapolicy_stats* stats);

/* The same from an observation that is normalised already. */
int32_t parapolicy_sample_normalised(const parapolicy_policy* policy, const float* observation, const float* noise,
                                     const parapolicy_options* options, float* trajectory, parapolicy_stats* stats);

#ifdef __cplusplus
}
#endif
#endif
