// Vectors of the processor's width with the compiler's vector extensions, and the arithmetic that networks need.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#include <arm_neon.h>
#endif

// Hidden: two libraries in one process, built with different flags, must not share template instances.
namespace parapolicy __attribute__((visibility("hidden"))) {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;  // vectors of a register tile
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2;
#else
constexpr int LANES = 4, VECTORS = 2;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

#define PARAPOLICY_UNROLL _Pragma("GCC unroll 8")

inline Vector splat(float x) { return x - Vector{}; }

inline Vector load(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Vector load(const float* p, int64_t count) {  // the first ``count`` numbers; 0 in the other lanes
    if (count >= LANES) return load(p);
    Vector v{};
    if (count > 0) std::memcpy(&v, p, count * sizeof(float));
    return v;
}

inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

inline void store_rounded(uint16_t* p, Vector v) {
#ifdef __AVX512BF16__
    const Halves halves = (Halves)_mm512_cvtneps_pbh((__m512)v);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    const Halves halves = (Halves)vcvt_bf16_f32((float32x4_t)v);
#else
    const Bits bits = (Bits)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Halves halves = __builtin_convertvector(v != v ? Bits{} + 0x7fc0 : rounded, Halves);
#endif
    std::memcpy(p, &halves, sizeof halves);
}

// Products of one 32-bit word, repeated in every lane, with a vector of words.
struct Float32 {
    static constexpr int ROWS = 6;    // of a register tile
    static constexpr int INPUTS = 1;  // numbers per word
    static Vector multiply_add(Vector sum, Words weight, int32_t input) {
        return sum + (Vector)weight * (Vector)(input - Words{});
    }
};

struct Bfloat16 {
    static constexpr int INPUTS = 2;
#if defined(__AVX512BF16__)
    static constexpr int ROWS = 6;
    static Vector multiply_add(Vector sum, Words weight, int32_t input) {
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)weight, (__m512bh)_mm512_set1_epi32(input));
    }
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    static constexpr int ROWS = 6;
    static Vector multiply_add(Vector sum, Words weight, int32_t input) {
        return (Vector)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)weight, (bfloat16x8_t)(input - Words{}));
    }
#else
    static constexpr int ROWS = 4;
    static Vector multiply_add(Vector sum, Words weight, int32_t input) {
        const Words both = input - Words{}, high = Words{} - 65536;
        sum += (Vector)(weight << 16) * (Vector)(both << 16);
        return sum + (Vector)(weight & high) * (Vector)(both & high);
    }
#endif
};

inline Vector exponential(Vector x) {  // |x| < 88, to 2e-7
    const Vector shifted = x * 1.44269504f + 12582912.f, n = shifted - 12582912.f;  // 1.5 2^23 rounds to an integer
    const Vector f = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector y = splat(1.9875691e-4f);
    y = y * f + 1.3981999e-3f, y = y * f + 8.3334519e-3f, y = y * f + 4.1665795e-2f;
    y = y * f + 1.6666665e-1f, y = y * f + 5.0000001e-1f;
    y = y * (f * f) + f + 1.f;
    return (Vector)((Words)y + ((Words)shifted << 23));
}

inline Vector reciprocal(Vector x) {
#ifdef __AVX512F__
    const Vector y = (Vector)_mm512_rcp14_ps((__m512)x);
    return y * (2.f - x * y);
#else
    return 1.f / x;
#endif
}

// x (1 + erf(x / sqrt 2)) / 2, to 1e-7 |x|: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
inline Vector gelu(Vector x) {
    const Vector z = (x < 0.f ? -x : x) * 0.70710678f, t = reciprocal(1.f + 0.3275911f * z), square = -z * z;
    Vector y = 1.061405429f * t - 1.453152027f;
    y = y * t + 1.421413741f, y = y * t - 0.284496736f, y = y * t + 0.254829592f;
    const Vector rest = y * t * exponential(splat(-80.f) > square ? splat(-80.f) : square);  // 1 - erf(z)
    return x * 0.5f * (x < 0.f ? rest : 2.f - rest);
}

inline Vector mish(Vector x) {  // x tanh(log(1 + e^x)), with one exponential; NaN stays NaN
    Vector low = splat(20.f) < x ? splat(20.f) : x;
    low = splat(-80.f) > low ? splat(-80.f) : low;
    const Vector e = exponential(low), n = e * (e + 2.f);
    return x * (n * reciprocal(n + 2.f));
}

}  // namespace parapolicy
