// A transformer's operations between its products: LayerNorm, and attention over few tokens. Tokens are positions.
#pragma once
#include <algorithm>
#include <cmath>

#include "fused.h"
#include "vectors.h"

// Hidden: two libraries in one process, built with different flags, must not share template instances.
namespace parapolicy __attribute__((visibility("hidden"))) {

constexpr int64_t MOST_KEYS = 64, KEY_ROOM = 16;  // attended tokens, and the multiple to which they are padded

// The two forms of a layer's target, float32 and bfloat16.
struct Target {
    float* exact;       // null: not needed
    uint16_t* rounded;  // null: not needed
    void write(int64_t at, Vector v) const {
        if (exact) store(exact + at, v);
        if (rounded) store_rounded(rounded + at, v);
    }
};

// (y - mean) / sqrt(variance + epsilon) weight + bias over the l.outputs channels of a token.
inline void normalise_token(const Layer& l, const float* values, const float* token, const Target& target) {
    const float *weight = values + l.norm, *bias = weight + l.outputs, share = 1.f / l.outputs;
    const auto sum = [](Vector v) {
        float total = 0.f;
        for (int i = 0; i < LANES; i++) total += v[i];
        return total;
    };
    Vector total{}, squares{};
    for (int64_t c = 0; c < l.outputs; c += LANES) total += load(token + c);
    const Vector mean = splat(sum(total) * share);
    for (int64_t c = 0; c < l.outputs; c += LANES) {
        const Vector d = load(token + c) - mean;
        squares += d * d;
    }
    const Vector scale = splat(1.f / std::sqrt(sum(squares) * share + bias[l.outputs]));
    for (int64_t c = 0; c < l.outputs; c += LANES)
        target.write(c, (load(token + c) - mean) * scale * load(weight + c) + load(bias + c));
}

inline int64_t attended(const Layer& l) { return l.memory ? l.memory : l.source_length; }

// Floats of scratch that ``attend`` needs.
inline int64_t attention_scratch(const Layer& l) {
    const int64_t room = (attended(l) + KEY_ROOM - 1) / KEY_ROOM * KEY_ROOM;
    return 2 * room * (l.outputs / l.heads) + l.target_length * l.outputs;
}

// Multi-head attention of one row. ``tokens``: queries and, without a memory, keys and values after them, at positions
// ``pitch`` apart. Results are written ``target_pitch`` apart. The memory's keys and values are by_step + by_element,
// (l.memory, 2, l.outputs). Position p attends to the first p + l.seen tokens.
inline void attend(const Layer& l, const float* tokens, int64_t pitch, const float* by_step, const float* by_element,
                   float* scratch, const Target& target, int64_t target_pitch) {
    const int64_t dim = l.outputs, size = dim / l.heads, keys = attended(l);
    const int64_t room = (keys + KEY_ROOM - 1) / KEY_ROOM * KEY_ROOM;
    float *transposed = scratch, *values = scratch + size * room, *mixed = values + size * room;
    const float scale = 1.f / std::sqrt(float(size));
    std::fill(transposed, values, 0.f);
    for (int64_t head = 0; head < dim; head += size) {
        for (int64_t j = 0; j < keys; j++)
            for (int64_t c = 0; c < size; c++) {
                const int64_t at = (l.memory ? 2 * j * dim : j * pitch + dim) + head + c;
                float key = l.memory ? by_step[at] : tokens[at], value = l.memory ? by_step[at + dim] : tokens[at + dim];
                if (l.memory && by_element) key += by_element[at], value += by_element[at + dim];
                transposed[c * room + j] = key, values[j * size + c] = value;
            }
        for (int64_t p = 0; p < l.target_length; p++) {
            const float* query = tokens + p * pitch + head;
            float* out = mixed + p * dim + head;
            const int64_t seen = std::min(keys, p + l.seen);
            float weight[MOST_KEYS], most = -INFINITY, total = 0.f;
            for (int64_t j = 0; j < seen; j += LANES) {
                Vector score{};
                for (int64_t c = 0; c < size; c++) score += query[c] * load(transposed + c * room + j);
                store(weight + j, score * scale);
            }
            for (int64_t j = 0; j < seen; j++) most = std::max(most, weight[j]);
            for (int64_t j = 0; j < seen; j += LANES) {
                const Vector x = load(weight + j) - most;  // clamped below: exponential() needs > -88, e^-80 is negligible
                store(weight + j, exponential(splat(-80.f) > x ? splat(-80.f) : x));
            }
            for (int64_t j = 0; j < seen; j++) total += weight[j];
            std::fill(out, out + size, 0.f);
            for (int64_t j = 0; j < seen; j++) {
                const float share = weight[j] / total;
#pragma omp simd
                for (int64_t c = 0; c < size; c++) out[c] += share * values[j * size + c];
            }
        }
    }
    for (int64_t p = 0; p < l.target_length; p++)
        for (int64_t c = 0; c < dim; c += LANES) target.write(p * target_pitch + c, load(mixed + p * dim + c));
}

}  // namespace parapolicy
