// A plan file: a network, its FiLM weights, a schedule, a sampler's tables and a normalizer, as export.py writes them.
//
//     header     the structure below
//     arrays     in the order of the pointers in PlanFile, each at the next multiple of 64 bytes
//
// Numbers are little-endian. All values of a file are checked: see check_network in plan_file.cpp.
#pragma once
#include <memory>

#include "chunk.h"

namespace parapolicy {

constexpr char MAGIC[9] = "parafuse";
constexpr uint32_t VERSION = 2;
constexpr int64_t ALIGNMENT = 64;

struct Header {
    char magic[8];
    uint32_t version, checksum;  // CRC-32 of the file with checksum 0
    int64_t bytes;               // of the file
    int64_t layers, weights, values, memory, length, channels, film, precision;  // weights: in 32-bit words
    int64_t steps, prediction, multistep, clips, overshoots;
    int64_t obs_steps, observed, first_action, action_steps;
    int64_t nodes, own, modes, window, most;  // nodes 0: sequential; modes: 1 if there are any
    double clip, control_hz, settle, last_state, last_estimate, last_noise;
};

struct PlanFile {
    std::unique_ptr<void, void (*)(void*)> memory{nullptr, nullptr};
    Header header;
    Network network;
    const float* by_step;     // (steps, film)
    const float* conditions;  // (obs_steps * observed, film)
    Schedule schedule;
    Nodes nodes;
    std::unique_ptr<float[]> transposed;  // modes
    const float *scale, *offset, *centre;                       // of an observation, each (obs_steps * observed)
    const float *action_scale, *action_offset, *action_centre;  // each (channels)
};

// Reads a file into ``plan``; the result is a code of parapolicy_fused.h. Throws std::bad_alloc.
int32_t read_plan(const char* path, PlanFile& plan);

}  // namespace parapolicy
