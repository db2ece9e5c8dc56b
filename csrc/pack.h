// Keys and values as left operands, packed once a call, or as they lie.
#pragma once
#include <vector>

#include "convert.h"
#include "memory.h"
#include "products/kinds.h"

namespace {

inline char* row_of(const Call& c, const Array& x, int64_t b, int64_t h, int64_t n) {
  return static_cast<char*>(x.data) + (b * x.sample + h * x.head + n * x.row) * c.bytes();
}

// The rows of a tile in the bf16 that products have: as they came, or split into parts.
template <class Kind>
class RowParts {
 public:
  explicit RowParts(int64_t d) : d_(d), floats_(SPLITS ? d : 0), parts_(SPLITS ? Kind::PARTS * TILE * d : 0) {}

  // Row n, or none. False if parts cannot say what it is; then there is none.
  bool read(int64_t n, const void* row, int64_t dtype) {
    from_[n] = static_cast<const uint16_t*>(row);
    if (!SPLITS || !row) return true;
    floats(row, dtype, d_, d_, floats_);
    if (!is_said(floats_, d_)) return from_[n] = nullptr, false;
    split<Kind::PARTS>(floats_, d_, parts_ + n * d_, TILE * d_);
    return true;
  }
  const uint16_t* row(int64_t n, int part) const { return SPLITS && from_[n] ? parts_ + (part * TILE + n) * d_ : from_[n]; }

 private:
  static constexpr bool SPLITS = Kind::PARTS > 1;
  int64_t d_;
  Buffer<float> floats_;
  Buffer<uint16_t> parts_;
  const uint16_t* from_[TILE] = {};
};

// The keys (or values) of every sample and key head. Floats stay where they are if rows lie one after the other: far apart
// they would push each other out of the cache. Their rows and the same turned are one memory; pairs and tiles need two.
template <class Kind>
class Packed {
  using E = typename Kind::E;
  static constexpr bool PAIRED = Kind::PER_STEP == 2;

 public:
  // `rows`: a left operand [64, d] for each tile; `turned`: [d, 64]. Steps are along the second of both.
  Packed(const Call& c, const Array& x, int64_t d, bool rows, bool turned)
      : c_(c), x_(x), d_(d), tiles_(c.tiles_k()), copied_(PAIRED ? rows : c.dtype != FLOAT || x.row != d), turns_(PAIRED && turned),
        row_(PAIRED ? steps<Kind>(d) : copied_ ? padded(d) : d), rows_(copied_ ? c.b * c.hk * tiles_ * tile() : 0),
        turned_(turns_ ? c.b * c.hk * tiles_ * turned_tile() : 0), finite_(c.b * c.hk * tiles_, 1),
        unsaid_(Kind::PARTS > 1 ? c.b * c.hk * tiles_ : 0, 0) {}

  // What `make` needs besides, of a thread.
  struct Spare {
    RowParts<Kind> rows;
    Buffer<E> woven;
    explicit Spare(const Packed& of) : rows(of.d_), woven(of.turns_ ? TILE / 2 * padded(of.d_) : 0) {}
  };

  // Pack tile `i` of all.
  void make(int64_t i, Spare& spare) {
    const int64_t j = i % tiles_, h = i / tiles_ % c_.hk, b = i / tiles_ / c_.hk, keys = c_.keys(j);
    bool all = true;
    if constexpr (PAIRED) {
      for (int64_t n = 0; n < TILE; ++n) {
        const bool said = spare.rows.read(n, n < keys ? row_of(c_, x_, b, h, j * TILE + n) : nullptr, c_.dtype);
        if (!said) unsaid_[i] |= 1ull << n;
        else if (n < keys) all &= finite_bfloats(spare.rows.row(n, 0), d_);
      }
      for (int part = 0; part < Kind::PARTS; ++part) {
        for (int64_t n = 0; n < multiple(keys, Kind::ROWS) && copied_; ++n) {
          E* to = rows_ + i * tile() + (part * TILE + n) * row_;
          if (const uint16_t* row = spare.rows.row(n, part)) pairs(row, d_, row_, to);
          else std::fill(to, to + row_, 0);
        }
        if (turns_) turn(spare, part, steps<Kind>(keys), turned_ + i * turned_tile() + part * turned_part());
      }
    } else {
      for (int64_t n = 0; n < keys; ++n) {
        const void* key = row_of(c_, x_, b, h, j * TILE + n);
        const E* row = static_cast<const E*>(key);
        if (copied_) floats(key, c_.dtype, d_, d_, rows_ + (i * TILE + n) * row_), row = rows_ + (i * TILE + n) * row_;
        all &= finite(row, d_);
      }
    }
    finite_[i] = all;
  }

  // Of one tile.
  Left<E> rows(int64_t b, int64_t h, int64_t j) const {
    if (copied_) return {rows_ + at(b, h, j) * tile(), row_, 1, TILE * row_};
    return {reinterpret_cast<const E*>(row_of(c_, x_, b, h, j * TILE)), row_, 1, 0};
  }
  Left<E> turned(int64_t b, int64_t h, int64_t j) const {
    if constexpr (PAIRED) return {turned_ + at(b, h, j) * turned_tile(), TILE / 2, 1, turned_part()};
    const Left<E> x = rows(b, h, j);
    return {x.at, 1, x.row, 0};
  }
  // The tile after one.
  Ahead next_rows(int64_t b, int64_t h, int64_t j) const {
    return j + 1 < tiles_ ? Ahead(rows(b, h, j + 1).at, c_.keys(j + 1) * row_) : Ahead();
  }
  Ahead next_turned(int64_t b, int64_t h, int64_t j) const {
    return j + 1 < tiles_ ? Ahead(turned(b, h, j + 1).at, PAIRED ? turned_tile() : c_.keys(j + 1) * row_) : Ahead();
  }
  bool is_finite(int64_t b, int64_t h, int64_t j) const { return finite_[at(b, h, j)]; }
  // The keys of a tile that parts cannot say, and whether there are none at all.
  uint64_t unsaid(int64_t b, int64_t h, int64_t j) const { return unsaid_[at(b, h, j)]; }
  bool is_said() const { return std::all_of(unsaid_.begin(), unsaid_.end(), [](uint64_t x) { return !x; }); }
  // A number of a key as it came, rounded to nothing.
  float number(int64_t b, int64_t h, int64_t key, int64_t p) const {
    float x;
    floats(row_of(c_, x_, b, h, key) + p * c_.bytes(), c_.dtype, 1, 1, &x);
    return x;
  }

 private:
  int64_t at(int64_t b, int64_t h, int64_t j) const { return (b * c_.hk + h) * tiles_ + j; }
  int64_t tile() const { return Kind::PARTS * TILE * row_; }
  int64_t turned_part() const { return multiple(d_, Kind::ROWS) * TILE / 2; }
  int64_t turned_tile() const { return Kind::PARTS * turned_part(); }

  void turn(const Spare& spare, int part, int64_t pairs, Pair* to) const {  // of keys that follow each other
    const int64_t width = padded(d_);
    for (int64_t n = 0; n < pairs; ++n)
      weave(spare.rows.row(2 * n, part), spare.rows.row(2 * n + 1, part), d_, width, spare.woven + n * width);
    transpose<Pair>(spare.woven, width, pairs, d_, to, TILE / 2);
    std::fill(to + d_ * TILE / 2, to + turned_part(), 0);
  }

  const Call& c_;
  const Array& x_;
  int64_t d_, tiles_;
  bool copied_, turns_;
  int64_t row_;
  Buffer<E> rows_, turned_;
  std::vector<uint8_t> finite_;
  std::vector<uint64_t> unsaid_;
};

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
