// The conditional 1-D UNet or the transformer of a Diffusion Policy in one call: an interpreter of layers, for few rows
// on few cores.
//
// A layer is computed in parts: some channels, with all of their groups, of some rows. A part is convolved into sums
// that stay in a core's cache, then normalised and written. A row's sums are formed in the same order for every division
// into parts, so its result is the same to the bit.
//
// Threads share a call by blocks of rows. Each block goes through all layers, so that a core's activations stay in its
// cache. A single row is shared layer by layer, and so are few rows where reading the weights takes the time: they are
// then read once.
#include "fused.h"

#include <cmath>
#include <memory>
#include <new>

#include "attention.h"
#include "convolution.h"
#include "tiles.h"
#include "work_sharing.h"

namespace parapolicy {
namespace {

constexpr int64_t PART_ROWS = 16;  // most rows of a part: its sums stay in a core's cache
constexpr int64_t BLOCK_ROWS = 8;  // most rows of a block: enough to hide reading the weights behind the products
constexpr int64_t TILED_ROWS = 16;  // the same for the faster products of tiles
constexpr int64_t SHARED_ROWS = 2;  // rows per thread up to which tiles wait for the weights, so that threads share them
constexpr int64_t CACHED = 32 << 20;  // bytes of weights that may fit into the last-level cache

// Memory of a thread, kept between calls: the system clears memory that it allocates.
class Memory {
   public:
    float* get(int64_t count) {
        if (count > count_) {
            free();
            at_ = static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(64)));
            std::memset(at_, 0, count * sizeof(float));  // padding that is never written must not be NaN
            count_ = count;
        }
        return at_;
    }
    ~Memory() { free(); }

   private:
    void free() {
        if (at_) ::operator delete(at_, std::align_val_t(64));
        at_ = nullptr, count_ = 0;
    }
    float* at_ = nullptr;
    int64_t count_ = 0;
};

// Some rows, and their memory.
struct Call {
    const Network& network;
    const Films& films;
    const int64_t *step, *element;
    int64_t rows;
    float* exact;       // activations
    uint16_t* rounded;  // activations in bfloat16, which products read
};

// values[c] = f of its group's sum, for every channel c of whole groups.
template <class Function>
void by_groups(float* values, int64_t channels, int64_t group, const Function& f) {
    for (int64_t g = 0; g < channels; g += group) {
        float total = 0.f;
#pragma omp simd reduction(+ : total)
        for (int64_t c = g; c < g + group; c++) total += values[c];
        const float value = f(total);
        for (int64_t c = g; c < g + group; c++) values[c] = value;
    }
}

// GroupNorm of one row's sums as y = scale x + shift by channel. ``pitch``: from a position to the next.
void normalise(const Layer& l, const float* values, const Part& part, const float* sums, int64_t pitch, float* scale,
               float* shift) {
    // Channels after the outputs are padding and belong to no group.
    const int64_t channels = std::min(part.channels, l.outputs - part.channel);
    const float share = 1.f / (l.target_length * l.group);
    const float *weight = values + l.norm + part.channel, *bias = weight + l.outputs;
    const float epsilon = values[l.norm + 2 * l.outputs];
    for (int64_t c = 0; c < part.channels; c += LANES) {
        Vector total{};
        for (int64_t p = 0; p < l.target_length; p++) total += load(sums + p * pitch + c);
        store(shift + c, total);
    }
    by_groups(shift, channels, l.group, [&](float total) { return total * share; });
    for (int64_t c = 0; c < part.channels; c += LANES) {
        const Vector mean = load(shift + c);
        Vector squares{};
        for (int64_t p = 0; p < l.target_length; p++) {
            const Vector d = load(sums + p * pitch + c) - mean;
            squares += d * d;
        }
        store(scale + c, squares);
    }
    by_groups(scale, channels, l.group, [&](float total) { return 1.f / std::sqrt(total * share + epsilon); });
    for (int64_t c = 0; c < part.channels; c += LANES) {
        const Vector a = load(weight + c, channels - c) * load(scale + c);
        store(scale + c, a);
        store(shift + c, load(bias + c, channels - c) - load(shift + c) * a);
    }
}

// Norm, Mish, FiLM and residual of a convolution's sums, into the target. ``scratch``: two floats per channel.
void finish(const Call& call, const Layer& l, const Part& part, const float* sums, float* scratch) {
    const int64_t rows = call.rows, length = l.target_length, pitch = part.rows * part.channels;
    const int64_t target_pitch = rows * l.target_stride, residual_pitch = rows * l.residual_stride;
    const bool norm = l.group > 0, gelus = l.gelu, film = l.film >= 0, residual = l.residual >= 0, exact = l.exact, rounded = l.rounded;
    float *scale = scratch, *shift = scratch + part.channels;
    for (int64_t i = 0; i < part.rows; i++) {
        const int64_t r = part.row + i;
        const float* row = sums + i * part.channels;
        if (norm) normalise(l, call.network.values, part, row, pitch, scale, shift);
        const float *by_step = nullptr, *by_element = nullptr;
        if (film) {
            const int64_t at = l.film + part.channel;
            by_step = call.films.by_step + call.step[r] * call.network.film + at;
            if (call.films.by_element) by_element = call.films.by_element + call.element[r] * call.network.film + at;
        }
        for (int64_t c = 0; c < part.channels; c += LANES) {
            const int64_t here = l.outputs - part.channel - c;
            const Vector a = load(scale + c), b = load(shift + c);
            Vector gain = splat(1.f), offset{};
            if (film) {
                offset = load(by_step + c, here);
                if (by_element) offset += load(by_element + c, here);
                if (l.film_scale) {
                    gain = offset, offset = load(by_step + l.outputs + c, here);
                    if (by_element) offset += load(by_element + l.outputs + c, here);
                }
            }
            const int64_t channel = part.channel + c;
            const int64_t target = l.target * rows + l.target_channel + r * l.target_stride + channel;
            const int64_t residual_at = l.residual * rows + l.residual_channel + r * l.residual_stride + channel;
            const float* past = residual ? call.exact + residual_at : nullptr;
            float* to = exact ? call.exact + target : nullptr;
            uint16_t* to_rounded = rounded ? call.rounded + target : nullptr;
            for (int64_t p = 0; p < length; p++) {
                Vector y = load(row + p * pitch + c);
                if (norm) y = mish(y * a + b);
                if (gelus) y = gelu(y);
                if (film) y = y * gain + offset;
                if (residual) y += load(past + p * residual_pitch);
                if (exact) store(to + p * target_pitch, y);
                if (rounded) store_rounded(to_rounded + p * target_pitch, y);
            }
        }
    }
}

// A layer's parts, units of channels by ranges of rows.
struct Parts {
    int64_t units, ranges;
    Parts(const Layer& l, int64_t rows, int64_t threads) : units(l.padded / l.unit) {
        const int64_t wanted = threads > 1 ? std::min((4 * threads + units - 1) / units, rows / 4) : 1;
        ranges = std::max((rows + PART_ROWS - 1) / PART_ROWS, std::max<int64_t>(wanted, 1));
        ranges = std::min(ranges, std::max<int64_t>(MOST_PARTS / units, 1));
    }
    Part part(const Layer& l, int64_t rows, int64_t i) const {
        // Ranges of the same channels are consecutive, so that their weights are in the cache.
        const int64_t unit = i / ranges, range = i % ranges, row = range * rows / ranges;
        return {unit * l.unit, l.unit, row, (range + 1) * rows / ranges - row};
    }
    int64_t scratch(const Layer& l, int64_t rows) const {  // floats that a part needs
        if (l.kind == ATTENTION) return attention_scratch(l);
        return (l.target_length * ((rows + ranges - 1) / ranges) + 2) * l.unit;
    }
};

// LayerNorm or attention of a part's rows.
void mix_tokens(const Call& call, const Layer& l, const Part& part, float* scratch) {
    const int64_t pitch = call.rows * l.source_stride, target_pitch = call.rows * l.target_stride;
    const int64_t film = call.network.film;
    for (int64_t r = part.row; r < part.row + part.rows; r++) {
        const float* tokens = call.exact + l.source * call.rows + r * l.source_stride;
        const int64_t at = l.target * call.rows + r * l.target_stride;
        const Target target{l.exact ? call.exact + at : nullptr, l.rounded ? call.rounded + at : nullptr};
        if (l.kind == ATTENTION) {
            const float* by_step = l.memory ? call.films.by_step + call.step[r] * film + l.film : nullptr;
            const bool both = l.memory && call.films.by_element;
            const float* by_element = both ? call.films.by_element + call.element[r] * film + l.film : nullptr;
            attend(l, tokens, pitch, by_step, by_element, scratch, target, target_pitch);
            continue;
        }
        for (int64_t p = 0; p < l.target_length; p++) {
            const Target there{l.exact ? target.exact + p * target_pitch : nullptr,
                               l.rounded ? target.rounded + p * target_pitch : nullptr};
            normalise_token(l, call.network.values, tokens + p * pitch, there);
        }
    }
}

void compute_part(const Call& call, const Layer& l, const Part& part, float* sums) {
    if (l.kind != CONVOLUTION) return mix_tokens(call, l, part, sums);
    const int32_t* weights = static_cast<const int32_t*>(call.network.weights);
    const auto* exact = reinterpret_cast<const int32_t*>(call.exact);
    const auto* rounded = reinterpret_cast<const int32_t*>(call.rounded);
    const float* values = call.network.values;
    const int64_t vectors = l.strip / LANES;
    if (l.precision == FLOAT32) {
        convolve<1>(l, exact, call.rows, weights, values, part, sums, [&](const Tap& tap, const int32_t* weight) {
            multiply_tap<Float32>(tap, weight, l.inputs, vectors);
        });
    } else if (tiles_allowed()) {
        Tiles tiles(l.inputs / 2, l.strip);
        convolve<2>(l, rounded, call.rows, weights, values, part, sums,
                    [&](const Tap& tap, const int32_t* weight) { tiles.multiply(tap, weight); });
    } else {
        convolve<2>(l, rounded, call.rows, weights, values, part, sums, [&](const Tap& tap, const int32_t* weight) {
            multiply_tap<Bfloat16>(tap, weight, l.inputs / 2, vectors);
        });
    }
    finish(call, l, part, sums, sums + l.target_length * part.rows * part.channels);
}

void copy_input(const Call& call, const float* x) {
    const Network& n = call.network;
    const int64_t width = n.layers[0].source_stride;  // the channels, padded with zeros
    for (int64_t p = 0; p < n.length; p++)
        for (int64_t r = 0; r < call.rows; r++)
            for (int64_t c = 0; c < width; c++) {
                const float value = c < n.channels ? x[(r * n.length + p) * n.channels + c] : 0.f;
                call.exact[(p * call.rows + r) * width + c] = value;
            }
}

void copy_output(const Call& call, float* y) {
    const Network& n = call.network;
    const Layer& last = n.layers[n.count - 1];
    const float* result = call.exact + last.target * call.rows;
    for (int64_t p = 0; p < n.length; p++)
        for (int64_t r = 0; r < call.rows; r++)
            std::memcpy(y + (r * n.length + p) * n.channels, result + (p * call.rows + r) * last.target_stride,
                        n.channels * sizeof(float));
}

// How a call is divided, and the memory it needs.
struct Division {
    int64_t threads, blocks, rows;  // rows: of the largest block
    int64_t activations, scratch;   // floats of a block, and of a thread

    Division(const Network& n, int64_t all, int64_t wanted)
        : threads(std::min(std::max<int64_t>(wanted, 1), MOST_THREADS)) {
        const int64_t bytes = 4 * (n.layers[n.count - 1].weight);  // without the last layer's
        const bool tiled = n.precision == BFLOAT16 && tiles_allowed();
        const int64_t room = threads * (tiled ? TILED_ROWS : BLOCK_ROWS);
        const int64_t most = std::min(threads * ((all + room - 1) / room), all);
        const bool attends = std::any_of(n.layers, n.layers + n.count, [](const Layer& l) { return l.kind == ATTENTION; });
        if (tiled && all <= SHARED_ROWS * threads && !attends)
            blocks = 1;
        else
            blocks = bytes <= CACHED ? std::min(most, MOST_PARTS) : all >= room ? threads : 1;
        rows = (all + blocks - 1) / blocks;
        activations = filled(n.memory * rows);
        scratch = 0;
        for (int64_t i = 0; i < n.count; i++)
            for (const int64_t count : {all / blocks, rows}) {  // smaller blocks may have larger parts
                const Parts parts(n.layers[i], count, layer_threads());
                scratch = std::max(scratch, filled(parts.scratch(n.layers[i], count)));
            }
    }
    int64_t layer_threads() const { return blocks == 1 ? threads : 1; }  // threads that share a layer
    static int64_t filled(int64_t count) { return (count + 1023) / 1024 * 1024; }
};

}  // namespace

int64_t compute(const Network& network, const Films& films, const float* x, const int64_t* step,
                const int64_t* element, int64_t rows, float* y, int64_t threads) {
    for (int64_t r = 0; r < rows; r++)
        if (step[r] < 0 || step[r] >= films.steps || element[r] < 0 || element[r] >= films.elements) return r;
    if (rows == 0) return -1;
    const Division division(network, rows, threads);
    const int64_t copies = division.blocks == 1 ? 1 : division.threads, sample = network.length * network.channels;
    static thread_local Memory exact_memory, rounded_memory, scratch_memory;
    float* exact = exact_memory.get(division.activations * copies);
    const int64_t halves = network.precision == BFLOAT16 ? division.activations / 2 : 0;  // floats in size
    float* rounded = rounded_memory.get(halves * copies);
    float* scratch = scratch_memory.get(division.scratch * division.threads);
    WorkSharing sharing(division.threads);
    sharing.run(division.blocks, [&](int64_t block, int64_t thread) {
        const int64_t row = block * rows / division.blocks, count = (block + 1) * rows / division.blocks - row;
        const Call call{network, films, step + row, element + row, count, exact + thread * division.activations,
                        reinterpret_cast<uint16_t*>(rounded + thread * halves)};
        copy_input(call, x + row * sample);
        for (int64_t i = 0; i < network.count; i++) {
            const Layer& l = network.layers[i];
            const Parts parts(l, count, division.layer_threads());
            const auto work = [&](int64_t part, int64_t worker) {
                compute_part(call, l, parts.part(l, count, part), scratch + worker * division.scratch);
            };
            if (division.blocks == 1)
                sharing.run(parts.units * parts.ranges, work);
            else
                for (int64_t part = 0; part < parts.units * parts.ranges; part++) work(part, thread);
        }
        copy_output(call, y + row * sample);
    });
    return -1;
}

}  // namespace parapolicy

// Whether this build uses bfloat16 product instructions.
extern "C" int64_t parapolicy_multiplies_bfloat16() {
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return 1;
#else
    return 0;
#endif
}

// As compute; -2 if there is not enough memory.
extern "C" int64_t parapolicy_compute(const parapolicy::Network* network, const parapolicy::Films* films,
                                      const float* x, const int64_t* step, const int64_t* element, int64_t rows,
                                      float* y, int64_t threads) {
    try {
        return parapolicy::compute(*network, *films, x, step, element, rows, y, threads);
    } catch (const std::bad_alloc&) {
        return -2;
    }
}
