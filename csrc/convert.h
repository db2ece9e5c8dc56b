// Numbers as they come and go: bf16, fp16 and floats; pairs of bf16; whether all are finite; transposing.
#pragma once
#include <algorithm>

#include "abi.h"

namespace {

inline float from_bfloat(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline uint16_t to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_half(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = x & 0x7fff;
  uint32_t bits = rest << 13;
  float y;
  std::memcpy(&y, &bits, 4);
  y *= 5.192296858534828e33f;  // 2^112: the exponents begin elsewhere
  std::memcpy(&bits, &y, 4);
  if (rest >= 0x7c00) bits = 0x7f800000 | (rest & 0x3ff) << 13;
  bits |= sign;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds beyond 65504
  if (bits < 0x38800000) {                       // below 2^-14: a whole number of 2^-24
    float y;
    std::memcpy(&y, &bits, 4);
    y += 0.5f;  // whose last bit is 2^-24
    std::memcpy(&bits, &y, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  return sign | uint16_t((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

// n numbers as floats, zeros up to `width`.
inline void floats(const void* from, int64_t dtype, int64_t n, int64_t width, float* to) {
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  if (dtype == FLOAT) std::memcpy(to, from, n * 4);
  else if (dtype == BFLOAT) for (int64_t i = 0; i < n; ++i) to[i] = from_bfloat(halves[i]);
  else for (int64_t i = 0; i < n; ++i) to[i] = from_half(halves[i]);
  for (int64_t i = n; i < width; ++i) to[i] = 0;
}

// The opposite, times a factor.
inline void write(const float* from, float by, int64_t n, int64_t dtype, void* to) {
  uint16_t* halves = static_cast<uint16_t*>(to);
  if (dtype == FLOAT) for (int64_t i = 0; i < n; ++i) static_cast<float*>(to)[i] = from[i] * by;
  else if (dtype == BFLOAT) for (int64_t i = 0; i < n; ++i) halves[i] = to_bfloat(from[i] * by);
  else for (int64_t i = 0; i < n; ++i) halves[i] = to_half(from[i] * by);
}

inline bool finite(const float* x, int64_t n) {
  vf wrong = vf{};  // 0 times what is finite is 0
  int64_t i = 0;
  for (; i + W <= n; i += W) wrong += load(x + i) * 0.0f;
  float rest = sum(wrong);
  for (; i < n; ++i) rest += x[i] * 0.0f;
  return rest == 0;
}
inline bool finite_bfloats(const uint16_t* x, int64_t n) {
  uint16_t most = 0;  // of sizes: in vectors, as a conjunction would not be
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t size = x[i] & 0x7fff;
    most = size > most ? size : most;
  }
  return most < 0x7f80;
}

// Whether bf16 that sum up to floats say as much as those: beyond 2^60 sums of their products might be infinite where those of
// floats are not; below 2^-126, which products of the last parts of small numbers are, tiles have zeros. One number may be
// smaller beside others.
inline bool is_said(const float* x, int64_t n) {
  constexpr uint32_t LEAST = (127 - 100) << 23, USUAL = (127 - 60) << 23, MOST = (127 + 60) << 23;
  uint32_t all = 1, most = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t size;
    std::memcpy(&size, x + i, 4);
    size &= 0x7fffffff;
    all &= (size == 0) | (size - LEAST <= MOST - LEAST);
    most = size > most ? size : most;
  }
  return all && (most == 0 || most >= USUAL);
}

// n floats as N bf16 each that sum up to them, `apart` from one part to the next: to nearest, so that of 24 digits each leaves
// the next one 8 less.
template <int N>
void split(const float* from, int64_t n, uint16_t* to, int64_t apart) {
  for (int64_t i = 0; i < n; ++i) {
    float rest = from[i];
    for (int part = 0; part < N; ++part) {
      uint32_t bits;
      std::memcpy(&bits, &rest, 4);
      const uint32_t near = (bits + 0x8000) & 0xffff0000;
      to[part * apart + i] = uint16_t(near >> 16);
      float found;
      std::memcpy(&found, &near, 4);
      rest -= found;
    }
  }
}

// A row of bf16 as pairs of neighbours, zeros up to `steps`.
inline void pairs(const void* from, int64_t n, int64_t steps, Pair* to) {
  std::fill(to + n / 2, to + steps, 0);
  std::memcpy(to, from, n * 2);
}
// Two rows of bf16 as pairs, one of each, zeros up to `width`; a row that is null is zeros.
inline void weave(const void* low, const void* high, int64_t n, int64_t width, Pair* to) {
  const uint16_t *a = static_cast<const uint16_t*>(low), *b = static_cast<const uint16_t*>(high);
  if (a && b) for (int64_t i = 0; i < n; ++i) to[i] = a[i] | Pair(b[i]) << 16;
  else for (int64_t i = 0; i < n; ++i) to[i] = a ? a[i] : b ? Pair(b[i]) << 16 : 0;
  std::fill(to + n, to + width, 0);
}

// x [n, d], rows `row` apart, transposed: [d, n], rows `ld` apart.
template <class E>
void transpose(const E* x, int64_t row, int64_t n, int64_t d, E* to, int64_t ld) {
  static_assert(sizeof(E) == 4, "");
  const int64_t n4 = n / 4 * 4, d4 = d / 4 * 4;
  for (int64_t p = 0; p < d4; p += 4)
    for (int64_t j = 0; j < n4; j += 4) {
      v4 a, b, e, f;
      std::memcpy(&a, x + j * row + p, 16);
      std::memcpy(&b, x + (j + 1) * row + p, 16);
      std::memcpy(&e, x + (j + 2) * row + p, 16);
      std::memcpy(&f, x + (j + 3) * row + p, 16);
      const v4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ef = __builtin_shufflevector(e, f, 0, 4, 1, 5);
      const v4 AB = __builtin_shufflevector(a, b, 2, 6, 3, 7), EF = __builtin_shufflevector(e, f, 2, 6, 3, 7);
      const v4 r[4] = {__builtin_shufflevector(ab, ef, 0, 1, 4, 5), __builtin_shufflevector(ab, ef, 2, 3, 6, 7),
                       __builtin_shufflevector(AB, EF, 0, 1, 4, 5), __builtin_shufflevector(AB, EF, 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) std::memcpy(to + (p + i) * ld + j, r + i, 16);
    }
  for (int64_t p = 0; p < d; ++p)
    for (int64_t j = p < d4 ? n4 : 0; j < n; ++j) to[p * ld + j] = x[j * row + p];
}

}  // namespace
