// The queries of a strip, or what comes back to their outputs, as right operands: turned, and as rows.
#pragma once
#include "strip.h"

namespace {

// Turned: [steps of d, queries], in pieces of Kind::UNIT queries. Rows: [steps of queries, padded d].
template <class Kind>
class Queries {
  using E = typename Kind::E;
  static constexpr bool PAIRED = Kind::PER_STEP == 2;

 public:
  Queries(int64_t d, bool rows)
      : d_(d), width_(padded(d)), steps_(steps<Kind>(d)), turned_(steps_ * TILE), straight_(TILE * (PAIRED ? steps_ : width_)),
        rows_(rows && PAIRED ? TILE / 2 * width_ : 0), keeps_rows_(rows) {}

  void read(const Strip& strip, const Array& x, int64_t lanes) {
    const Call& c = strip.c;
    const int64_t row = PAIRED ? steps_ : width_;
    for (int64_t r = 0; r < strip.m; ++r) {
      if constexpr (PAIRED) pairs(strip.row(x, r), d_, steps_, straight_ + r * row);
      else floats(strip.row(x, r), c.dtype, d_, width_, straight_ + r * row);
    }
    std::fill(straight_ + strip.m * row, straight_ + lanes * row, E(0));
    for (int64_t q = 0; q < lanes; q += Kind::UNIT)
      transpose<E>(straight_ + q * row, row, std::min(Kind::UNIT, lanes - q), steps_, turned(q), Kind::UNIT);
    if (!keeps_rows_) return;
    if constexpr (PAIRED) {
      const auto row_at = [&](int64_t r) { return r < strip.m ? strip.row(x, r) : nullptr; };
      for (int64_t r = 0; r < lanes; r += 2) weave(row_at(r), row_at(r + 1), d_, width_, rows_ + r / 2 * width_);
      finite_ = true;
      for (int64_t r = 0; r < strip.m; ++r) finite_ &= finite_bfloats(static_cast<const uint16_t*>(strip.row(x, r)), d_);
    } else {
      finite_ = finite(straight_, strip.m * width_);
    }
  }

  E* turned(int64_t q) const { return turned_ + q * steps_; }  // of the piece that begins with query q
  const E* rows() const {
    if constexpr (PAIRED) return rows_;
    else return straight_;
  }
  int64_t width() const { return width_; }
  bool is_finite() const { return finite_; }

 private:
  int64_t d_, width_, steps_;
  Buffer<E> turned_, straight_, rows_;
  bool keeps_rows_, finite_ = true;
};

}  // namespace
