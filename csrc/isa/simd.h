// Vectors as the compiler has them: 16, 8 or 4 floats, by the instruction set that this is compiled for.
// GCC's and Clang's vector extensions, so that the same source runs everywhere; one instruction that they cannot say.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(TM_WIDTH)  // tests ask for wide vectors where the processor has none
#elif defined(__AVX512F__)
#define TM_WIDTH 16
#elif defined(__AVX__)
#define TM_WIDTH 8
#else
#define TM_WIDTH 4
#endif
#define TM_INLINE inline __attribute__((always_inline))

namespace {

constexpr int W = TM_WIDTH;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

TM_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
TM_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
TM_INLINE vf splat(float x) { return x - vf{}; }

// Rounded before something is subtracted: the highest of large scores less itself must be 0, which a fused product is not.
TM_INLINE vf rounded_product(vf a, vf b) {
  vf x = a * b;
#if defined(__FMA__)
  asm("" : "+v"(x));
#endif
  return x;
}

// Two bf16 in a word: what a product takes where the processor multiplies pairs of them.
typedef uint32_t Pair;
#if defined(__AVX512BF16__) || defined(TM_PAIRS)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif
TM_INLINE vu load(const Pair* p) {
  vu x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
TM_INLINE void store(Pair* p, vu x) { std::memcpy(p, &x, sizeof x); }
TM_INLINE vu splat(Pair x) { return x - vu{}; }

// x + a b, the sum of both products of pairs.
TM_INLINE vf plus_product(vf x, vf a, vf b) { return x + a * b; }
TM_INLINE vf plus_product(vf x, vu a, vu b) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)x, (__m512bh)a, (__m512bh)b);
#else
  x += (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
  return x + (vf)(a << 16) * (vf)(b << 16);
#endif
}

// Whether products of pairs pay: to Intel's processors one is two products of vectors of floats, to AMD's it is one.
inline bool are_pairs_quick() {
#if defined(TM_PAIRS)
  return true;
#elif defined(__AVX512BF16__)
  static const bool found = __builtin_cpu_is("amd");
  return found;
#else
  return false;
#endif
}
// To bf16, to even where two are as near.
typedef uint16_t vh __attribute__((vector_size(W * 2)));
#if TM_WIDTH == 16 && defined(__AVX512BF16__)
TM_INLINE vh halved(vf x) { return (vh)_mm512_cvtneps_pbh((__m512)x); }
#else
TM_INLINE vh halved(vf x) {
  const vu bits = (vu)x;
  const vu near = bits + 0x7fffu + ((bits >> 16) & 1u);
  return __builtin_convertvector((x == x ? near : bits | 0x400000u) >> 16, vh);
}
#endif
TM_INLINE vu paired(vh low, vh high) { return __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16; }
TM_INLINE void store(uint16_t* p, vh x) { std::memcpy(p, &x, sizeof x); }

// Rounded to bf16 in the upper half of each word, away from 0 where two are as near; of numbers that are finite.
TM_INLINE vu rounded_bfloat(vf x) { return ((vu)x + 0x8000u) & 0xffff0000u; }

// Numbers as N bf16 that sum up to them, the largest first: to nearest, each in the upper half of a word, or as halves.
template <int N>
TM_INLINE void split(vf x, vu* to) {
  for (int part = 0; part < N; ++part) to[part] = rounded_bfloat(x), x -= (vf)to[part];
}
template <int N>
TM_INLINE void halved(vf x, vh* to) {
  for (int part = 0; part < N; ++part) to[part] = halved(x), x -= (vf)(__builtin_convertvector(to[part], vu) << 16);
}

// Some bf16 as floats.
TM_INLINE vf load(const uint16_t* p) {
  vh x;
  std::memcpy(&x, p, sizeof x);
  return (vf)(__builtin_convertvector(x, vu) << 16);
}
TM_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
TM_INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }

TM_INLINE vi lanes() {
  vi x = {};
  for (int i = 0; i < W; ++i) x[i] = i;
  return x;
}

// Over all lanes: halves are folded until four are left.
typedef float v4 __attribute__((vector_size(16)));

template <class F>
TM_INLINE float folded(vf x, F fold) {
  v4 part[W / 4];
  std::memcpy(part, &x, sizeof x);
  for (int n = W / 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) part[i] = fold(part[i], part[i + n]);
  v4 y = part[0];
  y = fold(y, __builtin_shufflevector(y, y, 2, 3, 0, 1));
  y = fold(y, __builtin_shufflevector(y, y, 1, 0, 3, 2));
  return y[0];
}
TM_INLINE float sum(vf x) {
  return folded(x, [](v4 a, v4 b) __attribute__((always_inline)) { return a + b; });
}
TM_INLINE float largest(vf x) {
  return folded(x, [](v4 a, v4 b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// The highest coefficient first.
template <class... C>
TM_INLINE vf polynomial(vf x, float highest, C... others) {
  vf sum = splat(highest);
  ((sum = sum * x + others), ...);
  return sum;
}

// 2^x: 0 below 2^-126, infinite beyond 2^128, NaN where x is. The relative error is 2e-9, or 3e-6 by a polynomial of degree 4.
#if TM_WIDTH == 16 && defined(__AVX512F__)
template <int DEGREE = 6>
TM_INLINE vf exp2v(vf x) {
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 9);  // what is above the next lower whole number, by which scalef scales
  const vf p = DEGREE == 4 ? polynomial(f, 1.3534167916e-2f, 5.2011460611e-2f, 2.4144275689e-1f, 6.9300383447e-1f, 1.0000025934f)
                           : polynomial(f, 2.1702255457e-4f, 1.2439687828e-3f, 9.6788409962e-3f, 5.5483341985e-2f, 2.4022983627e-1f,
                                        6.9314698384e-1f, 1.0f);
  return (vf)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126), _CMP_NLT_UQ), (__m512)p, (__m512)x);
}
#else
template <int DEGREE = 6>
TM_INLINE vf exp2v(vf x) {
  const vf magic = splat(12582912.0f + 127);  // 1.5 * 2^23: what is added is rounded, and its exponent stands in the lowest bits
  x = larger(splat(-127.0f), x);              // in this order NaN stays
  x = smaller(splat(128.0f), x);
  const vf shifted = x + magic;
  const vf f = x - (shifted - magic);
  const vf p = DEGREE == 4 ? polynomial(f, 9.5701019112e-3f, 5.5917860319e-2f, 2.4024744828e-1f, 6.9312181474e-1f, 9.9999926145e-1f)
                           : polynomial(f, 1.534027366e-4f, 1.339988406e-3f, 9.618509525e-3f, 5.550328924e-2f, 2.402264670e-1f,
                                        6.931472056e-1f, 1.0f);
  return p * (vf)((vi)shifted << 23);
}
#endif

TM_INLINE float exp2f_(float x) { return exp2v(splat(x))[0]; }

// tanh; the polynomial for small numbers is Cephes's, whose relative error is below 1e-7.
TM_INLINE vf tanhv(vf x) {
  const vf size = x < 0 ? -x : x;
  const vf z = x * x;
  const vf p = polynomial(z, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f);
  const vf small = x + x * z * p;
  const vf e = exp2v(size * -2.8853900817779268f);  // exp(-2 |x|)
  const vf large = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? small : (x < 0 ? -large : large);
}

// Its derivative 1 - tanh^2, with all its digits where tanh is nearly 1.
TM_INLINE vf tanh_slope(vf x) {
  const vf e = exp2v((x < 0 ? -x : x) * -2.8853900817779268f);  // exp(-2 |x|)
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}

// Which lanes are on in a word, from bit `at`: all ones or zeros.
TM_INLINE vi bits_at(uint64_t word, int64_t at) {
  vi one = {};
  for (int i = 0; i < W; ++i) one[i] = int32_t(1u << i);
  return ((vi{} + int32_t(uint32_t(word >> at))) & one) != 0;
}

// Whether a lane has some bit.
TM_INLINE bool any(vi x) {
#if TM_WIDTH == 16 && defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#else
  uint64_t parts[W / 2], all = 0;
  std::memcpy(parts, &x, sizeof x);
  for (int i = 0; i < W / 2; ++i) all |= parts[i];
  return all;
#endif
}

}  // namespace
