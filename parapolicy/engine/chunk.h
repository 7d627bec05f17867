// A whole chunk from its noise: the samplers ``sequential`` and ``collocation`` over the network.
//
// They follow samplers/sequential.py and samplers/collocation.py round by round. Elementwise operations have the same
// order and no fused multiplications, so they are equal to the bit.
#pragma once

#include <cstdint>

#include "fused.h"

namespace parapolicy {

enum Prediction : int64_t { EPSILON, SAMPLE, V_PREDICTION, FLOW_PREDICTION };

// A solver's tables, each (steps); see schedule/schedule.py.
struct Schedule {
    const float *state, *estimate, *previous, *noise;  // A, B, C, S
    const float *alpha, *sigma, *overshoot;
    int64_t steps, prediction, multistep, clips, overshoots;
    double clip;
};

// A schedule between the nodes of collocation; see Tables in samplers/collocation.py. ``own``: entries per node, one for
// each number of a sample, or 1 if all numbers are treated alike.
struct Nodes {
    const int64_t* steps;                      // (count)
    const float *modes, *transposed;           // (size, size), or null
    const float *kappa, *kept;                 // (count, own)
    const float *response;                     // (count, count, own)
    const float *first, *noise;                // (count, own), (count, schedule.steps, own)
    const float* sigma;                        // (count)
    const float* interpolation;                // (schedule.steps, count, own); null if no estimates are needed
    int64_t count, own, window, most;          // most: rounds of one sample
    double settle, state, estimate, last_noise;  // the last three: A, B and S of the last step
};

// The inputs of sampling besides the sampler's own tables.
struct Job {
    const Network* network;
    const Films* films;
    const Schedule* schedule;
    int64_t max_rows, threads;  // of a network call
    int32_t (*stop)();          // called after every round; not 0: end sampling; null: never
    double seconds;             // after the call, sampling ends with the present round; negative: never
    const float *part, *free;   // (batch, size), HeldNumbers of hold.py; null: nothing is held
};

// The costs of a batch's samples; each (batch).
struct Costs {
    int64_t *rounds, *evaluations;
    int32_t* complete;
    float* residual;
};

enum Failure : int64_t { NO_MEMORY = -1, BEYOND_TABLE = -2 };

}  // namespace parapolicy

extern "C" {

// FiLM values (batch, films) of conditions (batch, inputs): their Mish times the weights (inputs, films). The result is
// the same to the bit for every compiler and batch size.
void parapolicy_film_values(const float* weights, const float* conditions, int64_t inputs, int64_t films, int64_t batch,
                            float* values);

// Samples x (batch, size) and estimates u (batch, steps, size), which may be null, from noise (steps + 1, batch, size).
// Returns the number of steps taken, or a Failure.
int64_t parapolicy_sequential(const parapolicy::Job* job, const float* noise, int64_t batch, float* x, float* u);

// The same with collocation. Returns 0, or a Failure.
int64_t parapolicy_collocation(const parapolicy::Job* job, const parapolicy::Nodes* nodes, const float* noise,
                               int64_t batch, float* x, float* u, const parapolicy::Costs* costs);
}
