// A network as a list of layers, and the call that computes it; see fused.cpp.
#pragma once
#include <cstdint>

namespace parapolicy {

// One convolution and what follows it. Widths and strides are in channels; ``source``, ``target`` and ``residual`` say
// where in a row's activations a buffer begins.
struct Layer {
    int64_t transposed, taps, stride, padding;
    int64_t source, source_channel, source_stride, source_length, inputs;
    int64_t target, target_channel, target_stride, target_length, outputs, padded;  // padded: to whole tiles
    int64_t weight, bias;                                                           // where in weights and values
    int64_t groups, norm, film, film_scale;                                         // 0 groups: no norm; film -1: none
    int64_t residual, residual_channel, residual_stride;                            // residual -1: none
};

enum Precision : int64_t { FLOAT32 = 0, BFLOAT16 = 1 };

struct Network {
    const Layer* layers;
    int64_t count;
    const void* weights;  // of the precision, in the order in which they are read
    const float* values;  // biases and norms
    int64_t memory;       // activations per row; the input's are at 0
    int64_t length, channels;  // of a sample
    int64_t film;              // FiLM values of all layers
    int64_t precision;
};

// FiLM values by step (steps, film) and by batch element (elements, film), which are added.
struct Films {
    const float* by_step;
    int64_t steps;
    const float* by_element;  // null: none, and every element below ``elements`` has none
    int64_t elements;
};

// x (rows, length, channels) -> y likewise, at a step and a batch element per row, by at most ``threads`` threads.
// Returns -1, or the first row whose step or element is not below ``steps`` or ``elements``; then y is left alone.
// Several threads may call it at once. A row's result is the same to the bit for any number of rows and threads.
int64_t compute(const Network& network, const Films& films, const float* x, const int64_t* step,
                const int64_t* element, int64_t rows, float* y, int64_t threads);

}  // namespace parapolicy
