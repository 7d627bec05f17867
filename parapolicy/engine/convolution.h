// Convolutions over activations (position, row, channel): a tap is a matrix product of consecutive rows, for any number
// of rows, and positions outside of the horizon are not multiplied.
#pragma once
#include <algorithm>

#include "fused.h"
#include "vectors.h"

// Hidden: two libraries in one process, built with different flags, must not share template instances.
namespace parapolicy __attribute__((visibility("hidden"))) {

// sums[m][0 … V LANES) += inputs[m][0 … words) W, where W's rows are ``pitch`` vectors apart.
template <class P, int M, int V>
void multiply(const int32_t* const* inputs, float* const* sums, const int32_t* weight, int64_t words, int64_t pitch) {
    Vector sum[M][V];
    const int32_t* in[M];
    PARAPOLICY_UNROLL for (int m = 0; m < M; m++) {
        in[m] = inputs[m];
        PARAPOLICY_UNROLL for (int v = 0; v < V; v++) sum[m][v] = load(sums[m] + v * LANES);
    }
    for (int64_t k = 0; k < words; k++, weight += pitch * LANES) {
        Words w[V];
        PARAPOLICY_UNROLL for (int v = 0; v < V; v++) {
            std::memcpy(&w[v], weight + v * LANES, sizeof w[v]);
        }
        PARAPOLICY_UNROLL for (int m = 0; m < M; m++) {
            PARAPOLICY_UNROLL for (int v = 0; v < V; v++) sum[m][v] = P::multiply_add(sum[m][v], w[v], in[m][k]);
        }
    }
    PARAPOLICY_UNROLL for (int m = 0; m < M; m++) {
        PARAPOLICY_UNROLL for (int v = 0; v < V; v++) store(sums[m] + v * LANES, sum[m][v]);
    }
}

typedef void (*Multiply)(const int32_t* const*, float* const*, const int32_t*, int64_t, int64_t);

template <class P, int V>
Multiply multiply_by_rows(int64_t rows) {
    static constexpr Multiply TABLE[] = {multiply<P, 1, V>, multiply<P, 2, V>, multiply<P, 3, V>,
                                         multiply<P, 4, V>, multiply<P, 5, V>, multiply<P, 6, V>};
    return TABLE[rows - 1];
}

// Rows that a tap of a convolution multiplies: ``count`` positions of ``rows`` rows. Pitches are in words.
struct Tap {
    const int32_t* input;
    float* sum;
    int64_t input_row, sum_row;  // pitches from a row to the next
    int64_t input_position, sum_position, count, rows;
};

// sums[r][0 … LANES vectors) += inputs[r][0 … words) W for all rows r of a tap.
template <class P>
void multiply_tap(const Tap& tap, const int32_t* weight, int64_t words, int64_t vectors) {
    const int64_t step = std::min<int64_t>(vectors, VECTORS);
    const int32_t* input = tap.input;
    float* sum = tap.sum;
    int64_t left = tap.count * tap.rows, r = 0;
    for (int64_t blocks = (left + P::ROWS - 1) / P::ROWS; blocks > 0; blocks--) {
        const int64_t size = (left + blocks - 1) / blocks;
        const int32_t* in[P::ROWS];
        float* out[P::ROWS];
        for (int64_t m = 0; m < size; m++) {
            in[m] = input + r * tap.input_row, out[m] = sum + r * tap.sum_row;
            if (++r == tap.rows) r = 0, input += tap.input_position, sum += tap.sum_position;
        }
        const Multiply function = step == VECTORS ? multiply_by_rows<P, VECTORS>(size)
                                  : step == 2     ? multiply_by_rows<P, 2>(size)
                                                  : multiply_by_rows<P, 1>(size);
        for (int64_t v = 0; v < vectors; v += step) {
            function(in, out, weight + v * LANES, words, vectors);
            for (int64_t m = 0; m < size; m++) out[m] += step * LANES;
        }
        left -= size;
    }
}

// A part of a layer: some channels of some rows.
struct Part {
    int64_t channel, channels;  // whole strips
    int64_t row, rows;
};

// The convolution's sums (target_length, part.rows, part.channels), without the operations after it. ``source``: the
// activations in the precision of the products, with ``rows`` rows. ``multiply``: adds a tap's products with weights.
template <int INPUTS, class Function>
void convolve(const Layer& l, const int32_t* source, int64_t rows, const int32_t* weights, const float* values,
              const Part& part, float* sums, const Function& multiply) {
    const int64_t width = part.channels, row_words = l.source_stride / INPUTS;
    for (int64_t i = 0; i < l.target_length * part.rows; i++)
        std::memcpy(sums + i * width, values + l.bias + i / part.rows * l.bias_pitch + part.channel,
                    width * sizeof(float));
    source += (l.source * rows + l.source_channel) / INPUTS + part.row * row_words;
    for (int64_t c = 0; c < width; c += l.strip)
        for (int64_t tap = 0; tap < l.taps; tap++) {
            // Output ``first`` + j ``step`` sees input ``from`` + j ``each`` through this tap.
            int64_t first = 0, step = 1, from = tap - l.padding, each = l.stride;
            if (l.transposed) {
                first = (tap + l.padding) % l.stride, step = l.stride, each = 1;
                from = (first + l.padding - tap) / l.stride;
            }
            while (from < 0) from += each, first += step;
            if (from >= l.source_length || first >= l.target_length) continue;
            const int64_t seen = (l.source_length - 1 - from) / each, seeing = (l.target_length - 1 - first) / step;
            const int64_t position = rows * row_words, sum_position = part.rows * width;
            const Tap seen_rows{source + from * position, sums + first * sum_position + c, row_words, width,
                                each * position, step * sum_position, std::min(seen, seeing) + 1, part.rows};
            const int64_t at = (part.channel + c) * l.taps + tap * l.strip;
            multiply(seen_rows, weights + l.weight + at * (l.inputs / INPUTS));
        }
}

}  // namespace parapolicy
