// Which calls read keys and values as they lie, and how such a call is cut into parts that are joined again.
#pragma once
#include <cmath>

#include "memory.h"
#include "strip.h"

namespace {

constexpr int64_t FEW = 32;  // rows, at most

// So few rows that packing keys would take longer than all products. Floats of one tile are not packed but in gaps, and tiles
// are done with sixteen rows as soon as with one. Not where gradients are wanted: the backward weighs by the same sums of scores
// only if it computes them in the same order.
inline bool reads_as_it_lies(const Call& c) {
  if (c.base) return false;
  int64_t few = FEW;
  if (c.dtype == FLOAT && c.nk <= TILE) few = FEW / 4;
#if defined(TM_TILES)
  if (c.dtype == BFLOAT) few = FEW / 2;
#endif
  return stacked_heads(c) * c.nq <= few;
}

// How such a call is cut into items; by its sizes and its mask alone, so that results do not depend on threads.
struct ReadingCut {
  static constexpr int64_t LEAST = 16, MOST = 32, ENOUGH = 64;  // tiles of a part; parts; strips that need none
  int64_t stacked, strips;
  int64_t parts, size;  // of the key tiles that a strip sees, and the tiles of each

  explicit ReadingCut(const Call& c) : stacked(stacked_heads(c)), strips(c.b * c.hq / stacked) {
    int64_t longest = 1;
    for (int64_t i = 0; i < c.mask_b * c.mask_h; ++i) {
      int64_t seen = 0;
      for (int64_t r = c.starts[i]; r < c.starts[i + 1]; ++r) seen += c.runs[3 * r + 1] - c.runs[3 * r];
      longest = std::max(longest, seen);
    }
    size = strips < ENOUGH ? std::max(LEAST, (longest + MOST - 1) / MOST) : longest;
    parts = (longest + size - 1) / size;
  }
};

// What a part of a strip's keys comes to, for each row: sums of weighted values and of weights, the highest score.
struct Part {
  float *sums, *total, *top;
};

// The parts of all strips.
class Parts {
 public:
  Parts(const Call& c, const ReadingCut& cut)
      : rows_(cut.stacked * c.nq), width_(padded(c.dv)), numbers_(cut.strips * cut.parts * room()) {}
  Part operator[](int64_t i) const {
    float* at = numbers_ + i * room();
    return {at, at + rows_ * width_, at + rows_ * width_ + rows_};
  }
  // Another part of the same strip added to one.
  void join(Part into, Part from) const {
    for (int64_t r = 0; r < rows_; ++r) {
      if (from.total[r] == 0) continue;
      const float top = from.top[r] > into.top[r] ? from.top[r] : into.top[r];
      const float a = into.total[r] == 0 ? 0 : std::exp2(into.top[r] - top), b = std::exp2(from.top[r] - top);
      float *to = into.sums + r * width_, *x = from.sums + r * width_;
      for (int64_t p = 0; p < width_; p += W) store(to + p, load(to + p) * a + load(x + p) * b);
      into.total[r] = into.total[r] * a + from.total[r] * b, into.top[r] = top;
    }
  }

 private:
  int64_t room() const { return padded(rows_ * (width_ + 2)); }
  int64_t rows_, width_;
  Buffer<float> numbers_;
};

}  // namespace
