// Keys and values as products take them, packed once a call: tiles transposed, and rows.
#pragma once
#include <vector>

#include "convert.h"
#include "memory.h"
#include "products/matmul.h"
#include "products/matvec.h"

namespace {

constexpr int64_t HALF_TILE = TILE / 2;  // pairs of rows: row r of a tile and row r + 32

inline char* row_of(const Call& c, const Array& x, int64_t b, int64_t h, int64_t n) {
  return static_cast<char*>(x.data) + (b * x.sample + h * x.head + n * x.row) * c.bytes();
}

// A product over d numbers as steps of floats or of pairs, and where the next row of them is.
template <class E>
inline int64_t steps(int64_t d) { return std::is_same<E, Pair>::value ? (d + 1) / 2 : d; }
template <class E>
inline int64_t room(int64_t d) { return std::is_same<E, Pair>::value ? (d + 1) / 2 : padded(d); }

inline void row_as(const Call& c, const void* from, int64_t d, float* to) { floats(from, c.dtype, d, padded(d), to); }
inline void row_as(const Call&, const void* from, int64_t d, Pair* to) { pairs(from, d, to); }

// The keys (or values) of every sample and key head. Rows of floats stay where they
// are if vectors fit them and they lie one after the other: far apart they would push each other out of the cache.
template <class E>
class Packed {
  static constexpr bool WOVEN = std::is_same<E, Pair>::value;

 public:
  // `rows`: [keys, width] of floats, or woven [32, width] for each tile; `turned`: tiles transposed [steps, 64].
  Packed(const Call& c, const Array& x, int64_t d, bool rows, bool turned)
      : c_(c), x_(x), d_(d), width_(padded(d)), steps_(steps<E>(d)), tiles_(c.tiles_k()),
        keeps_(rows && (WOVEN || c.dtype != FLOAT || d != width_ || x.row != d)), turns_(turned),
        rows_(keeps_ ? c.b * c.hk * tiles_ * row_tile() : 0), turned_(turns_ ? c.b * c.hk * tiles_ * steps_ * TILE : 0),
        finite_(c.b * c.hk * tiles_, 1) {}

  // Pack tile `i` of all; `spare` has room for a tile of rows.
  void make(int64_t i, E* spare) {
    const int64_t j = i % tiles_, h = i / tiles_ % c_.hk, b = i / tiles_ / c_.hk, keys = c_.keys(j);
    const auto key = [&](int64_t n) { return n < keys ? row_of(c_, x_, b, h, j * TILE + n) : nullptr; };
    E* to = WOVEN || !keeps_ ? spare : rows_ + i * row_tile();
    const E* from = to;
    int64_t step = room<E>(d_);
    if (!WOVEN && !keeps_ && c_.dtype == FLOAT && keys == TILE) {
      from = reinterpret_cast<const E*>(key(0)), step = x_.row;
    } else {
      for (int64_t n = 0; n < keys; ++n) row_as(c_, key(n), d_, to + n * step);
      std::fill(to + keys * step, to + TILE * step, E(0));
    }
    bool all = true;
    for (int64_t n = 0; n < keys; ++n) all &= finite(from + n * step, steps_);
    finite_[i] = all;
    if (turns_) transpose(from, step, steps_, turned_ + i * steps_ * TILE);
    if constexpr (WOVEN)
      for (int64_t n = 0; keeps_ && n < HALF_TILE; ++n)
        weave(key(n), key(n + HALF_TILE), d_, width_, rows_ + i * row_tile() + n * width_);
  }

  // Of one tile, with its step.
  Rows<E> rows(int64_t b, int64_t h, int64_t j) const {
    if (keeps_) return {rows_ + at(b, h, j) * row_tile(), width_};
    return {reinterpret_cast<const E*>(row_of(c_, x_, b, h, j * TILE)), x_.row};
  }
  const E* turned(int64_t b, int64_t h, int64_t j) const { return turned_ + at(b, h, j) * steps_ * TILE; }
  // The tile after one.
  Ahead next_rows(int64_t b, int64_t h, int64_t j) const {
    return j + 1 < tiles_ ? Ahead(rows(b, h, j + 1).at, WOVEN ? row_tile() : c_.keys(j + 1) * width_) : Ahead();
  }
  Ahead next_turned(int64_t b, int64_t h, int64_t j) const {
    return j + 1 < tiles_ ? Ahead(turned(b, h, j + 1), steps_ * TILE) : Ahead();
  }
  bool is_finite(int64_t b, int64_t h, int64_t j) const { return finite_[at(b, h, j)]; }
  void may_not_be_finite() { std::fill(finite_.begin(), finite_.end(), 0); }  // where nothing was packed
  int64_t width() const { return width_; }

 private:
  int64_t at(int64_t b, int64_t h, int64_t j) const { return (b * c_.hk + h) * tiles_ + j; }
  int64_t row_tile() const { return (WOVEN ? HALF_TILE : TILE) * width_; }

  const Call& c_;
  const Array& x_;
  int64_t d_, width_, steps_, tiles_;
  bool keeps_, turns_;
  Buffer<E> rows_, turned_;
  std::vector<uint8_t> finite_;
};

// The rows of one tile of keys or values to `use`: as they lie if vectors fit them, or as floats in `spare`.
template <class F>
TM_INLINE void with_rows(const Call& c, const Array& x, int64_t d, int64_t b, int64_t h, int64_t j, float* spare, F use) {
  const int64_t width = padded(d);
  const char* first = row_of(c, x, b, h, j * TILE);
  if (c.dtype == FLOAT && d == width) return use(Rows<float>{reinterpret_cast<const float*>(first), x.row});
  if (c.dtype == BFLOAT && d == width) return use(Rows<uint16_t>{reinterpret_cast<const uint16_t*>(first), x.row});
  for (int64_t n = 0; n < c.keys(j); ++n) floats(row_of(c, x, b, h, j * TILE + n), c.dtype, d, width, spare + n * width);
  use(Rows<float>{spare, width});
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
