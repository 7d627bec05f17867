// A policy in a control loop of 1 kHz, without Python: push_t PLAN OBSERVATIONS CHUNKS [NOISE]
//
// PLAN is a file of ``parapolicy export``; the other files are float32. OBSERVATIONS holds one observation per control
// step, as a robot would measure it. CHUNKS receives every sampled trajectory. NOISE may hold each chunk's noise.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <future>
#include <iterator>
#include <random>
#include <thread>
#include <vector>

#include "parapolicy_fused.h"

typedef std::vector<float> Floats;
typedef std::chrono::steady_clock Clock;

static void check(int32_t code) {
    if (code != PARAPOLICY_OK) std::fprintf(stderr, "error: %s\n", parapolicy_message(code)), std::exit(1);
}

static Floats read(const char* path) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
    const float* values = reinterpret_cast<const float*>(bytes.data());
    return Floats(values, values + bytes.size() / sizeof(float));
}

int main(int count, char** arguments) {
    if (count < 4) return std::fprintf(stderr, "usage: push_t PLAN OBSERVATIONS CHUNKS [NOISE]\n"), 2;
    parapolicy_policy* policy;
    parapolicy_sizes size;
    check(parapolicy_load(arguments[1], &policy));
    check(parapolicy_get_sizes(policy, &size));
    if (size.control_hz <= 0) return std::fprintf(stderr, "%s does not say its control rate\n", arguments[1]), 1;
    const Floats observations = read(arguments[2]), given = count > 4 ? read(arguments[4]) : Floats();
    std::ofstream chunks(arguments[3], std::ios::binary);
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    const int64_t control_steps = observations.size() / size.observed, per_step = 1000 / size.control_hz;

    // Sample one chunk in its own thread; meanwhile the loop continues with the previous chunk.
    const auto sample = [&](Floats observation, Floats noise) {
        Floats trajectory(size.horizon * size.action_dim);
        check(parapolicy_sample(policy, observation.data(), noise.data(), nullptr, trajectory.data(), nullptr));
        return trajectory;
    };
    std::future<Floats> next;
    Floats chunk;
    int64_t sampled = 0, asked_at = 0, begun_at = 0, late = 0, held = 0;
    const auto take = [&] {
        chunk = next.get(), begun_at = asked_at;
        chunks.write(reinterpret_cast<const char*>(chunk.data()), chunk.size() * sizeof(float));
    };
    const Clock::time_point begin = Clock::now();
    for (int64_t tick = 0; tick < control_steps * per_step; tick++) {
        const Clock::time_point due = begin + std::chrono::milliseconds(tick);
        std::this_thread::sleep_until(due);
        late += Clock::now() - due > std::chrono::milliseconds(1);
        const int64_t step = tick / per_step;
        if (tick % per_step == 0 && step % size.action_steps == 0 && !next.valid()) {
            Floats observation, noise(size.noise);
            for (int64_t i = size.obs_steps - 1; i >= 0; i--) {  // the first step is repeated for those before it
                const auto at = observations.begin() + std::max<int64_t>(step - i, 0) * size.observed;
                observation.insert(observation.end(), at, at + size.observed);
            }
            for (float& z : noise) z = normal(random);
            const int64_t from = sampled++ * size.noise;
            if (from + size.noise <= int64_t(given.size()))
                std::copy(&given[from], &given[from] + size.noise, noise.begin());
            next = std::async(std::launch::async, sample, observation, noise), asked_at = step;
        }
        if (next.valid() && (chunk.empty() || next.wait_for(std::chrono::seconds(0)) == std::future_status::ready))
            take();  // waits for the first chunk
        const int64_t index = size.first_action + step - begun_at;
        held += index >= size.horizon;
        const float* action = &chunk[std::min(index, size.horizon - 1) * size.action_dim];
        (void)action;  // to the robot's servos
    }
    if (next.valid()) take();  // its thread still reads the policy
    std::printf("%lld chunks; %lld ticks of 1 ms, %lld late, %lld without an action\n", (long long)sampled,
                (long long)(control_steps * per_step), (long long)late, (long long)held);
    parapolicy_free(policy);
}
