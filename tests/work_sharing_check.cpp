// Calls from several threads, each shared by several more; tests/test_work_sharing.py runs it under a sanitizer.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../parapolicy/engine/fused.h"
#include "../parapolicy/engine/work_sharing.h"

using parapolicy::Layer;

namespace {

// Two convolutions of kernel 3 over 32 channels and 8 positions, the first with a norm of 4 groups.
struct Small {
    static constexpr int64_t CHANNELS = 32, LENGTH = 8, TAPS = 3, BUFFER = CHANNELS * LENGTH;
    std::vector<Layer> layers;
    std::vector<float> weights, values;
    parapolicy::Network network;

    Small() : weights(2 * TAPS * CHANNELS * CHANNELS), values(4 * CHANNELS + 1) {
        std::mt19937 random(0);
        std::normal_distribution<float> normal(0.f, 0.1f);
        for (float& weight : weights) weight = normal(random);
        for (float& value : values) value = normal(random);
        for (int64_t i = 0; i < 2; i++) {
            Layer l{};
            l.taps = TAPS, l.stride = 1, l.padding = 1;
            l.source = i * BUFFER, l.target = (i + 1) * BUFFER;
            l.source_stride = l.target_stride = l.inputs = l.outputs = l.padded = CHANNELS;
            l.source_length = l.target_length = LENGTH, l.strip = l.unit = 16;
            l.weight = i * TAPS * CHANNELS * CHANNELS, l.bias = i * CHANNELS;
            l.group = i == 0 ? 8 : 0, l.norm = i == 0 ? 2 * CHANNELS : -1, l.film = -1, l.residual = -1, l.exact = 1;
            layers.push_back(l);
        }
        values.back() = 1e-5f;
        const int64_t precision = parapolicy::FLOAT32;
        network = {layers.data(), 2, weights.data(), values.data(), 3 * BUFFER, LENGTH, CHANNELS, 1, precision};
    }
};

bool computes_alike() {
    const Small small;
    const int64_t rows = 9, size = rows * Small::BUFFER;
    std::vector<float> x(size), alone(size);
    for (int64_t i = 0; i < size; i++) x[i] = float(i % 13) - 6.f;
    const std::vector<int64_t> zeros(rows, 0);
    const parapolicy::Films films{nullptr, 1, nullptr, 1};
    parapolicy::compute(small.network, films, x.data(), zeros.data(), zeros.data(), rows, alone.data(), 1);
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int64_t caller = 0; caller < 3; caller++)
        callers.emplace_back([&, caller] {
            std::vector<float> y(size);
            for (int i = 0; i < 100; i++) {
                const int64_t threads = 1 + (i + caller) % 4, *zero = zeros.data();
                parapolicy::compute(small.network, films, x.data(), zero, zero, rows, y.data(), threads);
                wrong += std::memcmp(y.data(), alone.data(), size * sizeof(float)) != 0;
            }
        });
    for (std::thread& caller : callers) caller.join();
    return wrong == 0;
}

bool does_each_part_once() {
    for (int64_t parts = 1; parts < 60; parts++) {
        std::vector<int> times(parts, 0);
        std::atomic<int> strangers{0};
        parapolicy::WorkSharing sharing(4);
        for (int work = 1; work <= 3; work++) {
            sharing.run(parts, [&](int64_t part, int64_t thread) {
                times[part]++;
                if (thread < 0 || thread >= 4) strangers++;
            });
            for (const int count : times)
                if (count != work) return false;
        }
        if (strangers) return false;
    }
    return true;
}

}  // namespace

int main() {
    const bool once = does_each_part_once(), alike = computes_alike();
    if (!once) std::puts("a part was done twice, or never, or by a thread without a number");
    if (!alike) std::puts("a result depends on who computes it");
    return once && alike ? 0 : 1;
}
