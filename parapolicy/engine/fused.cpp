// The conditional 1-D UNet of a Diffusion Policy in one call: an interpreter of layers, for few rows on one core.
//
// Activations are (position, row, channel). A tap of a convolution is then a matrix product of consecutive rows, for any
// number of rows, and positions outside of the horizon are not multiplied at all. A row's sums are formed in the same
// order whatever the number of rows, so that its result is the same to the bit.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fused.h"

namespace parapolicy {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int TILE = 2 * LANES;  // output channels of one register tile
constexpr int BLOCK = 6;         // rows of one: with two vectors each, 12 of the 16 registers of AVX2
typedef float Vector __attribute__((vector_size(4 * LANES)));

inline Vector load(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

// sums[m][0 … TILE) += inputs[m][0 … count) W, with W (count, TILE).
template <int M>
void multiply(const float* const* inputs, float* const* sums, const float* weight, int64_t count) {
    Vector sum[M][2];
    for (int m = 0; m < M; m++) sum[m][0] = load(sums[m]), sum[m][1] = load(sums[m] + LANES);
    for (int64_t k = 0; k < count; k++, weight += TILE) {
        const Vector low = load(weight), high = load(weight + LANES);
        __builtin_prefetch(weight + 16 * TILE);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const Vector x = inputs[m][k] - Vector{};
            sum[m][0] += x * low;
            sum[m][1] += x * high;
        }
    }
    for (int m = 0; m < M; m++) store(sums[m], sum[m][0]), store(sums[m] + LANES, sum[m][1]);
}

typedef void (*Multiply)(const float* const*, float* const*, const float*, int64_t);
constexpr Multiply BY_ROWS[] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>};

struct Call {
    const float *weights, *values;
    const float *by_step, *by_element;  // FiLM values, (T, F) and (B, F); by_element may be null
    const int64_t *step, *element;
    int64_t film, rows;
    float* activations;
};

// The convolution without its norm: sums (target_length, rows, padded).
void convolve(const Call& call, const Layer& l, float* sums) {
    const int64_t rows = call.rows;
    for (int64_t i = 0; i < l.target_length * rows; i++)
        std::memcpy(sums + i * l.padded, call.values + l.bias, l.padded * sizeof(float));
    const float* source = call.activations + l.source * rows + l.source_channel;
    for (int64_t c = 0; c < l.padded; c += TILE)
        for (int64_t tap = 0; tap < l.taps; tap++) {
            // Output ``first`` + j ``step`` sees input ``from`` + j ``each`` through this tap.
            int64_t first = 0, step = 1, from = tap - l.padding, each = l.stride;
            if (l.transposed) {
                first = (tap + l.padding) % l.stride, step = l.stride, each = 1;
                from = (first + l.padding - tap) / l.stride;
            }
            while (from < 0) from += each, first += step;
            if (from >= l.source_length || first >= l.target_length) continue;
            const int64_t count = std::min((l.source_length - 1 - from) / each, (l.target_length - 1 - first) / step) + 1;
            const float* weight = call.weights + l.weight + (c * l.taps + tap * TILE) * l.inputs;
            const int64_t total = count * rows, blocks = (total + BLOCK - 1) / BLOCK;
            for (int64_t b = 0, done = 0; b < blocks; b++) {
                const int64_t size = (total - done + blocks - b - 1) / (blocks - b);
                const float* in[BLOCK];
                float* out[BLOCK];
                for (int64_t m = 0; m < size; m++) {
                    const int64_t j = (done + m) / rows, r = (done + m) % rows;
                    in[m] = source + ((from + each * j) * rows + r) * l.source_stride;
                    out[m] = sums + ((first + step * j) * rows + r) * l.padded + c;
                }
                BY_ROWS[size - 1](in, out, weight, l.inputs);
                done += size;
            }
        }
}

inline float exponential(float x) {  // |x| < 88, to 2e-7; by arithmetic alone, so that loops over it vectorise
    const float shifted = x * 1.44269504f + 12582912.f, n = shifted - 12582912.f;  // 1.5 2^23 rounds to an integer
    const float f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691e-4f;
    y = y * f + 1.3981999e-3f, y = y * f + 8.3334519e-3f, y = y * f + 4.1665795e-2f;
    y = y * f + 1.6666665e-1f, y = y * f + 5.0000001e-1f;
    y = y * (f * f) + f + 1.f;
    int32_t bits, power;
    std::memcpy(&bits, &y, 4), std::memcpy(&power, &shifted, 4);
    bits += power << 23;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline float mish(float x) {  // x tanh(log(1 + e^x)), with one exponential
    const float e = exponential(std::min(std::max(x, -80.f), 20.f)), n = e * (e + 2.f);
    return x * (n / (n + 2.f));
}

// Norm, Mish, FiLM and residual of what convolve gave, into the target.
void finish(const Call& call, const Layer& l, const float* sums, std::vector<float>& scratch) {
    const int64_t rows = call.rows, length = l.target_length, n = l.outputs, pitch = rows * l.padded;
    scratch.resize(2 * n);
    float *scale = scratch.data(), *shift = scale + n;
    for (int64_t r = 0; r < rows; r++) {
        const float* row = sums + r * l.padded;
        if (l.groups > 0) {
            const int64_t size = n / l.groups;
            const float* norm = call.values + l.norm;  // weights, biases, epsilon
            const float share = 1.f / (length * size);
            for (int64_t g = 0; g < n; g += size) {
                float total = 0.f, squares = 0.f;
                for (int64_t p = 0; p < length; p++)
#pragma omp simd reduction(+ : total)
                    for (int64_t c = 0; c < size; c++) total += row[p * pitch + g + c];
                const float mean = total * share;
                for (int64_t p = 0; p < length; p++)
#pragma omp simd reduction(+ : squares)
                    for (int64_t c = 0; c < size; c++) {
                        const float d = row[p * pitch + g + c] - mean;
                        squares += d * d;
                    }
                const float inverse = 1.f / std::sqrt(squares * share + norm[2 * n]);
                for (int64_t c = g; c < g + size; c++) {
                    scale[c] = norm[c] * inverse;
                    shift[c] = norm[n + c] - mean * scale[c];
                }
            }
        }
        const float* by_step = l.film < 0 ? nullptr : call.by_step + call.step[r] * call.film + l.film;
        const float* by_element =
            by_step && call.by_element ? call.by_element + call.element[r] * call.film + l.film : nullptr;
        for (int64_t p = 0; p < length; p++) {
            const int64_t i = p * rows + r;
            const float* in = row + p * pitch;
            float* out = call.activations + l.target * rows + l.target_channel + i * l.target_stride;
            if (l.groups > 0)
#pragma omp simd
                for (int64_t c = 0; c < n; c++) out[c] = mish(in[c] * scale[c] + shift[c]);
            else
                std::memcpy(out, in, n * sizeof(float));
            if (by_step && l.film_scale)
#pragma omp simd
                for (int64_t c = 0; c < n; c++) {
                    const float a = by_element ? by_step[c] + by_element[c] : by_step[c];
                    const float b = by_element ? by_step[n + c] + by_element[n + c] : by_step[n + c];
                    out[c] = a * out[c] + b;
                }
            else if (by_step)
#pragma omp simd
                for (int64_t c = 0; c < n; c++) out[c] += by_element ? by_step[c] + by_element[c] : by_step[c];
            if (l.residual >= 0) {
                const float* past = call.activations + l.residual * rows + l.residual_channel + i * l.residual_stride;
#pragma omp simd
                for (int64_t c = 0; c < n; c++) out[c] += past[c];
            }
        }
    }
}

}  // namespace

int64_t compute(const Network& network, const Films& films, const float* x, const int64_t* step,
                const int64_t* element, int64_t rows, float* y, int64_t threads) {
    for (int64_t r = 0; r < rows; r++)
        if (step[r] < 0 || step[r] >= films.steps || element[r] < 0 || element[r] >= films.elements) return r;
    static thread_local std::vector<float> activations, sums, scratch;
    activations.resize(std::max<size_t>(activations.size(), network.memory * rows));
    const Layer* layers = network.layers;
    size_t widest = 0;
    for (int64_t i = 0; i < network.count; i++)
        widest = std::max<size_t>(widest, layers[i].target_length * rows * layers[i].padded);
    sums.resize(std::max(sums.size(), widest));
    const Call call{static_cast<const float*>(network.weights), network.values, films.by_step, films.by_element, step,
                    element, network.film, rows, activations.data()};
    const int64_t length = network.length, channels = network.channels;
    for (int64_t p = 0; p < length; p++)
        for (int64_t r = 0; r < rows; r++)
            std::memcpy(call.activations + (p * rows + r) * channels, x + (r * length + p) * channels, channels * sizeof(float));
    for (int64_t i = 0; i < network.count; i++) {
        convolve(call, layers[i], sums.data());
        finish(call, layers[i], sums.data(), scratch);
    }
    const Layer& last = layers[network.count - 1];
    for (int64_t p = 0; p < length; p++)
        for (int64_t r = 0; r < rows; r++)
            std::memcpy(y + (r * length + p) * channels,
                        call.activations + last.target * rows + (p * rows + r) * last.target_stride,
                        channels * sizeof(float));
    return -1;
}

}  // namespace parapolicy

extern "C" int64_t parapolicy_tile() { return parapolicy::TILE; }

extern "C" int64_t parapolicy_compute(const parapolicy::Network* network, const parapolicy::Films* films, const float* x,
                                      const int64_t* step, const int64_t* element, int64_t rows, float* y,
                                      int64_t threads) {
    return parapolicy::compute(*network, *films, x, step, element, rows, y, threads);
}
