// Rows of q, k and v as floats, keys of a tile transposed, and whether everything in them is finite.
#pragma once
#include "call.h"

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

inline char* row_of(const Call& c, const Array& x, int64_t b, int64_t h, int64_t n) {
  return static_cast<char*>(x.data) + (b * x.sample + h * x.head + n * x.row) * (c.dtype == FLOAT ? 4 : 2);
}

inline bool finite(const float* x, int64_t n) {
  vf wrong = vf{};  // 0 times what is finite is 0
  int64_t i = 0;
  for (; i + W <= n; i += W) wrong += load(x + i) * 0.0f;
  float rest = sum(wrong);
  for (; i < n; ++i) rest += x[i] * 0.0f;
  return rest == 0;
}

// x [64, d] transposed: [d, 64].
inline void transpose(const float* x, int64_t row, int64_t d, float* to) {
  int64_t p = 0;
  for (; p + 4 <= d; p += 4)
    for (int64_t j = 0; j < TILE; j += 4) {
      v4 a, b, e, f;
      std::memcpy(&a, x + j * row + p, 16);
      std::memcpy(&b, x + (j + 1) * row + p, 16);
      std::memcpy(&e, x + (j + 2) * row + p, 16);
      std::memcpy(&f, x + (j + 3) * row + p, 16);
      const v4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ef = __builtin_shufflevector(e, f, 0, 4, 1, 5);
      const v4 AB = __builtin_shufflevector(a, b, 2, 6, 3, 7), EF = __builtin_shufflevector(e, f, 2, 6, 3, 7);
      const v4 r[4] = {__builtin_shufflevector(ab, ef, 0, 1, 4, 5), __builtin_shufflevector(ab, ef, 2, 3, 6, 7),
                       __builtin_shufflevector(AB, EF, 0, 1, 4, 5), __builtin_shufflevector(AB, EF, 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) std::memcpy(to + (p + i) * TILE + j, r + i, 16);
    }
  for (; p < d; ++p)
    for (int64_t j = 0; j < TILE; ++j) to[p * TILE + j] = x[j * row + p];
}

// The keys (or values) that a call uses, for every sample and key head.
class Packed {
 public:
  // `rows`: as rows of floats without gaps; `turned`: tiles transposed.
  Packed(const Call& c, const Array& x, int64_t d, bool rows, bool turned)
      : c_(c), x_(x), d_(d), width_(padded(d)), tiles_(c.tiles_k()), copied_(c.dtype != FLOAT || d % W),
        rows_(rows && copied_ ? c.b * c.hk * tiles_ * TILE * width_ : 0),
        turned_(turned ? c.b * c.hk * tiles_ * TILE * d : 0), keeps_rows_(rows && copied_), turns_(turned),
        finite_(c.b * c.hk * tiles_, 1) {}

  // Pack tile `i` of all; `spare` has room for a tile of rows.
  void make(int64_t i, float* spare) {
    const int64_t j = i % tiles_, h = i / tiles_ % c_.hk, b = i / tiles_ / c_.hk, keys = c_.keys(j);
    const bool direct = !copied_ && keys == TILE;
    const float* from = reinterpret_cast<const float*>(row_of(c_, x_, b, h, j * TILE));
    int64_t row = x_.row;
    if (!direct) {
      float* to = keeps_rows_ ? rows_ + i * TILE * width_ : spare;
      for (int64_t n = 0; n < keys; ++n) floats(row_of(c_, x_, b, h, j * TILE + n), c_.dtype, d_, width_, to + n * width_);
      std::fill(to + keys * width_, to + TILE * width_, 0.0f);
      from = to, row = width_;
    }
    bool all = true;
    for (int64_t n = 0; n < keys; ++n) all &= finite(from + n * row, d_);
    finite_[i] = all;
    if (turns_) transpose(from, row, d_, turned_ + i * TILE * d_);
  }

  // Key j * 64 of a sample's head as a row, and from one row to the next.
  const float* rows(int64_t b, int64_t h, int64_t j) const {
    if (copied_) return rows_ + at(b, h, j) * TILE * width_;
    return reinterpret_cast<const float*>(row_of(c_, x_, b, h, j * TILE));
  }
  int64_t row() const { return copied_ ? width_ : x_.row; }
  const float* turned(int64_t b, int64_t h, int64_t j) const { return turned_ + at(b, h, j) * TILE * d_; }
  bool is_finite(int64_t b, int64_t h, int64_t j) const { return finite_[at(b, h, j)]; }
  int64_t width() const { return width_; }

 private:
  int64_t at(int64_t b, int64_t h, int64_t j) const { return (b * c_.hk + h) * tiles_ + j; }

  const Call& c_;
  const Array& x_;
  int64_t d_, width_, tiles_;
  bool copied_;
  Buffer rows_, turned_;
  bool keeps_rows_, turns_;
  std::vector<uint8_t> finite_;
};

// The rows of one tile of keys or values as floats without gaps: where they are, or copied into `spare`.
struct Rows {
  const float* at;
  int64_t row;
};
inline Rows rows_of(const Call& c, const Array& x, int64_t d, int64_t b, int64_t h, int64_t j, float* spare) {
  const int64_t width = padded(d);
  if (c.dtype == FLOAT && d == width) return {reinterpret_cast<const float*>(row_of(c, x, b, h, j * TILE)), x.row};
  for (int64_t n = 0; n < c.keys(j); ++n) floats(row_of(c, x, b, h, j * TILE + n), c.dtype, d, width, spare + n * width);
  return {spare, width};
}

// Which key tiles some row of tiles sees.
inline std::vector<int64_t> used_tiles(const Call& c) {
  std::vector<int64_t> change(c.tiles_k() + 1, 0), used;
  const int64_t runs = c.starts[c.mask_b * c.mask_h * c.tiles_q()];
  for (int64_t r = 0; r < runs; ++r) ++change[c.runs[3 * r]], --change[c.runs[3 * r + 1]];
  for (int64_t j = 0, open = 0; j < c.tiles_k(); ++j)
    if ((open += change[j]) > 0) used.push_back(j);
  return used;
}

}  // namespace
