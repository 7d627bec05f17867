// A network as a list of layers, and the call that computes it; see fused.cpp.
#pragma once
#include <cstdint>

namespace parapolicy {

// A convolution and the operations after it, or a LayerNorm of each position, or attention among positions. Widths and
// strides are in channels. ``source``, ``target`` and ``residual`` are offsets of buffers in a row's activations. Buffers
// begin at multiples of 64 and, except for the input's, hold a multiple of 16 channels; those beyond a layer's outputs
// are 0.
struct Layer {
    int64_t transposed, taps, stride, padding;
    int64_t source, source_channel, source_stride, source_length, inputs;  // inputs: even in bfloat16
    int64_t target, target_channel, target_stride, target_length, outputs;
    int64_t padded, strip, unit;  // padded outputs; channels of a strip of weights, and of a part of work
    int64_t weight, bias;         // offsets in weights (words) and in values
    int64_t group, norm;          // channels of a group; 0: no norm and no Mish
    int64_t film, film_scale;     // film -1: none
    int64_t residual, residual_channel, residual_stride;  // residual -1: none
    int64_t exact, rounded;       // whether the target is needed in float32, and in bfloat16
    int64_t precision;            // of the weights, and of the source in their products
    int64_t kind, gelu;           // gelu: applied to the sums
    int64_t bias_pitch;           // from a position's bias to the next one's; 0: all have the same
    int64_t heads;                // of attention
    int64_t memory, seen;         // tokens whose keys and values are FiLM values, 0: attention is among positions; a
                                  // position p attends to the first p + seen tokens
};

enum Kind : int64_t { CONVOLUTION = 0, LAYER_NORM = 1, ATTENTION = 2 };
enum Precision : int64_t { FLOAT32 = 0, BFLOAT16 = 1 };

struct Network {
    const Layer* layers;
    int64_t count;
    const void* weights;       // in the order of reading; a word is a float32 or two bfloat16
    const float* values;       // biases and norms
    int64_t memory;            // activations per row; the input is at 0, in float32
    int64_t length, channels;  // of a sample
    int64_t film;              // FiLM values of all layers
    int64_t precision;         // BFLOAT16: of some layers
};

// FiLM values by step (steps, film) and by batch element (elements, film), which are added.
struct Films {
    const float* by_step;
    int64_t steps;
    const float* by_element;  // null: none
    int64_t elements;
};

// x (rows, length, channels) -> y (rows, length, channels), with a step and a batch element per row, on at most
// ``threads`` threads. Returns -1, or the first row whose step or element is not below ``steps`` or ``elements``; then y
// is unchanged. Several threads may call it at the same time. A row's result is the same to the bit for any number of
// rows and threads. Throws std::bad_alloc.
int64_t compute(const Network& network, const Films& films, const float* x, const int64_t* step,
                const int64_t* element, int64_t rows, float* y, int64_t threads);

}  // namespace parapolicy
