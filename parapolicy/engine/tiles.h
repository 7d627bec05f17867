// Products of bfloat16 in the tile registers of AMX, 16 rows by 16 channels at a time.
#pragma once
#include <cstdint>

#include "convolution.h"
#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Hidden: two libraries in one process, built with different flags, must not share template instances.
namespace parapolicy __attribute__((visibility("hidden"))) {

#ifdef __AMX_BF16__

constexpr int64_t TILE = 16;  // rows, and words of a row, of a tile

// Whether the system lets this process use tiles: Linux does not save them before it is asked to.
inline bool tiles_allowed() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return allowed;
}

// Tiles 0 to 3 are sums, 4 inputs, 5 weights; 6 and 7 are the inputs and weights of the words after the last 16.
class Tiles {
  public:
    Tiles(int64_t words, int64_t channels) : words_(words), vectors_(channels / TILE) {}  // of a strip of weights
    ~Tiles() {
        if (shape_.rows[0]) _tile_release();
    }

    // sums[r][0 … channels) += inputs[r][0 … words) W for all rows r of a tap.
    void multiply(const Tap& tap, const int32_t* weight) {
        if (tap.rows == 1)
            return multiply(tap.input, tap.input_position, tap.sum, tap.sum_position, tap.count, weight);
        if (tap.input_position == tap.rows * tap.input_row && tap.sum_position == tap.rows * tap.sum_row)
            return multiply(tap.input, tap.input_row, tap.sum, tap.sum_row, tap.count * tap.rows, weight);
        for (int64_t i = 0; i < tap.count; i++)
            multiply(tap.input + i * tap.input_position, tap.input_row, tap.sum + i * tap.sum_position, tap.sum_row,
                     tap.rows, weight);
    }

  private:
    // The rows are ``input_pitch`` and ``sum_pitch`` words apart.
    void multiply(const int32_t* input, int64_t input_pitch, float* sum, int64_t sum_pitch, int64_t rows,
                  const int32_t* weight) {
        const auto function = vectors_ == 4 ? block<4> : vectors_ == 2 ? block<2> : block<1>;
        bool fetch = true;  // the first rows bring the weights into the nearest cache
        for (int64_t blocks = (rows + TILE - 1) / TILE; blocks > 0; blocks--, fetch = false) {
            const int64_t size = (rows + blocks - 1) / blocks;
            if (size != shape_.rows[0]) configure(size);
            function(input, 4 * input_pitch, sum, 4 * sum_pitch, weight, words_, fetch);
            input += size * input_pitch, sum += size * sum_pitch, rows -= size;
        }
    }

    struct alignas(64) Shape {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};  // of a row
        uint8_t rows[16] = {};
    };

    // GCC's intrinsics do not say which memory they read and write.
    static void fence() { asm volatile("" ::: "memory"); }

    void configure(int64_t rows) {
        const int64_t rest = words_ % TILE;
        for (int i = 0; i < 5; i++) shape_.bytes[i] = 64, shape_.rows[i] = rows;
        shape_.bytes[5] = 64, shape_.rows[5] = TILE;
        if (rest) {
            shape_.bytes[6] = 4 * rest, shape_.rows[6] = rows;
            shape_.bytes[7] = 64, shape_.rows[7] = rest;
        }
        fence();
        _tile_loadconfig(&shape_);
    }

// Sums += inputs times weights, of the words at k. A macro, because the intrinsics need the numbers of tiles as literals.
#define PARAPOLICY_ADD_PRODUCTS(INPUTS, WEIGHTS)         \
    _tile_loadd(INPUTS, input + k, input_pitch);         \
    _tile_loadd(WEIGHTS, weight, PITCH);                 \
    _tile_dpbf16ps(0, INPUTS, WEIGHTS);                  \
    if constexpr (V > 1) {                               \
        _tile_loadd(WEIGHTS, weight + TILE, PITCH);      \
        _tile_dpbf16ps(1, INPUTS, WEIGHTS);              \
    }                                                    \
    if constexpr (V > 2) {                               \
        _tile_loadd(WEIGHTS, weight + 2 * TILE, PITCH);  \
        _tile_dpbf16ps(2, INPUTS, WEIGHTS);              \
        _tile_loadd(WEIGHTS, weight + 3 * TILE, PITCH);  \
        _tile_dpbf16ps(3, INPUTS, WEIGHTS);              \
    }

    template <int V>  // pitches in bytes
    static void block(const int32_t* input, int64_t input_pitch, float* sum, int64_t sum_pitch, const int32_t* weight,
                      int64_t words, bool fetch) {
        constexpr int64_t PITCH = 4 * TILE * V, AHEAD = 8 * TILE * V;  // AHEAD: words; best of 8 to 64 rows
        fence();
        _tile_loadd(0, sum, sum_pitch);
        if constexpr (V > 1) {
            _tile_loadd(1, sum + TILE, sum_pitch);
        }
        if constexpr (V > 2) {
            _tile_loadd(2, sum + 2 * TILE, sum_pitch);
            _tile_loadd(3, sum + 3 * TILE, sum_pitch);
        }
        int64_t k = 0;
        for (; k + TILE <= words; k += TILE, weight += TILE * TILE * V) {
            if (fetch)
                for (int64_t i = 0; i < TILE * TILE * V; i += 16) __builtin_prefetch(weight + AHEAD + i);
            PARAPOLICY_ADD_PRODUCTS(4, 5)
        }
        if (k < words) {
            PARAPOLICY_ADD_PRODUCTS(6, 7)
        }
        _tile_stored(0, sum, sum_pitch);
        if constexpr (V > 1) {
            _tile_stored(1, sum + TILE, sum_pitch);
        }
        if constexpr (V > 2) {
            _tile_stored(2, sum + 2 * TILE, sum_pitch);
            _tile_stored(3, sum + 3 * TILE, sum_pitch);
        }
        fence();
    }
#undef PARAPOLICY_ADD_PRODUCTS

    const int64_t words_, vectors_;
    Shape shape_;
};

#else

inline bool tiles_allowed() { return false; }

struct Tiles {
    Tiles(int64_t, int64_t) {}
    void multiply(const Tap&, const int32_t*) {}
};

#endif

}  // namespace parapolicy
