// The functions of parapolicy_fused.h.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif
#include "parapolicy_fused.h"

#include <cmath>
#include <new>
#include <stdexcept>
#include <vector>

#include "chunk.h"
#include "plan_file.h"

using namespace parapolicy;

struct parapolicy_policy {
    PlanFile plan;
};

namespace {

template <typename Function>
int32_t guarded(Function function) {
    try {
        return function();
    } catch (const std::bad_alloc&) {
        return PARAPOLICY_NO_MEMORY;
    } catch (const std::length_error&) {
        return PARAPOLICY_NO_MEMORY;
    }
}

bool finite(const float* values, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (!std::isfinite(values[i])) return false;
    return true;
}

int32_t sample(const PlanFile& plan, const float* condition, const float* noise, const parapolicy_options& options,
               float* trajectory, parapolicy_stats& stats) {
    const Header& h = plan.header;
    const int64_t observed = h.obs_steps * h.observed, size = h.length * h.channels;
    if (!finite(condition, observed)) return PARAPOLICY_BAD_OBSERVATION;
    std::vector<float> by_element(h.film);
    parapolicy_film_values(plan.conditions, condition, observed, h.film, 1, by_element.data());
    const Films films{plan.by_step, h.steps, by_element.data(), 1};
    const Job job{&plan.network, &films, &plan.schedule, INT64_MAX / 2, options.threads, nullptr, options.seconds};
    int64_t result;
    if (h.nodes) {
        float residual;
        const Costs costs{&stats.rounds, &stats.evaluations, &stats.complete, &residual};
        result = parapolicy_collocation(&job, &plan.nodes, noise, 1, trajectory, nullptr, &costs);
    } else {
        result = parapolicy_sequential(&job, noise, 1, trajectory, nullptr);
        stats.rounds = stats.evaluations = result, stats.complete = result == h.steps;
    }
    if (result < 0) return result == NO_MEMORY ? PARAPOLICY_NO_MEMORY : PARAPOLICY_DAMAGED;
    for (int64_t i = 0; i < size; i++) {
        const int64_t c = i % h.channels;
        trajectory[i] = (trajectory[i] - plan.action_offset[c]) / plan.action_scale[c] + plan.action_centre[c];
    }
    return finite(trajectory, size) ? PARAPOLICY_OK : PARAPOLICY_BAD_RESULT;
}

int32_t sample_checked(const parapolicy_policy* policy, const float* observation, const float* noise, bool normalised,
                       const parapolicy_options* options, float* trajectory, parapolicy_stats* stats) {
    const parapolicy_options used = options ? *options : parapolicy_options{1, -1.0};
    if (!policy || !observation || !noise || !trajectory || used.threads < 1 || std::isnan(used.seconds))
        return PARAPOLICY_BAD_ARGUMENT;
    return guarded([&] {
        const PlanFile& plan = policy->plan;
        std::vector<float> condition(observation, observation + plan.header.obs_steps * plan.header.observed);
        if (!normalised)
            for (size_t i = 0; i < condition.size(); i++)
                condition[i] = (condition[i] - plan.centre[i]) * plan.scale[i] + plan.offset[i];
        parapolicy_stats spent{};
        const int32_t code = sample(plan, condition.data(), noise, used, trajectory, spent);
        if (stats) *stats = spent;
        return code;
    });
}

}  // namespace

extern "C" {

const char* parapolicy_message(int32_t code) {
    switch (code) {
        case PARAPOLICY_OK: return "success";
        case PARAPOLICY_NO_FILE: return "the plan file cannot be read";
        case PARAPOLICY_NO_PLAN: return "this is not a plan file; write one with parapolicy export";
        case PARAPOLICY_OTHER_VERSION: return "the plan file has another version; export it again";
        case PARAPOLICY_DAMAGED: return "the plan file is damaged; export it again";
        case PARAPOLICY_NO_MEMORY: return "there is not enough memory";
        case PARAPOLICY_BAD_ARGUMENT: return "a pointer is null or a setting is out of range";
        case PARAPOLICY_BAD_OBSERVATION: return "the observation holds a value that is not finite";
        case PARAPOLICY_BAD_RESULT: return "the chunk holds a value that is not finite";
        default: return "unknown code";
    }
}

int32_t parapolicy_load(const char* path, parapolicy_policy** policy) {
    if (!path || !policy) return PARAPOLICY_BAD_ARGUMENT;
    *policy = nullptr;
    return guarded([&] {
        std::unique_ptr<parapolicy_policy> made(new parapolicy_policy);
        const int32_t code = read_plan(path, made->plan);
        if (code == PARAPOLICY_OK) *policy = made.release();
        return code;
    });
}

void parapolicy_free(parapolicy_policy* policy) { delete policy; }

int32_t parapolicy_get_sizes(const parapolicy_policy* policy, parapolicy_sizes* sizes) {
    if (!policy || !sizes) return PARAPOLICY_BAD_ARGUMENT;
    const Header& h = policy->plan.header;
    const int64_t noise = (h.steps + 1) * h.length * h.channels;
    *sizes = {h.obs_steps, h.observed, h.length, h.channels, h.first_action, h.action_steps, h.steps, noise, h.control_hz};
    return PARAPOLICY_OK;
}

int32_t parapolicy_sample(const parapolicy_policy* policy, const float* observation, const float* noise,
                          const parapolicy_options* options, float* trajectory, parapolicy_stats* stats) {
    return sample_checked(policy, observation, noise, false, options, trajectory, stats);
}

int32_t parapolicy_sample_normalised(const parapolicy_policy* policy, const float* observation, const float* noise,
                                     const parapolicy_options* options, float* trajectory, parapolicy_stats* stats) {
    return sample_checked(policy, observation, noise, true, options, trajectory, stats);
}
}
