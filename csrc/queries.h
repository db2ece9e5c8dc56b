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
      : d_(d), width_(padded(d)), steps_(steps<Kind>(d)), turned_(Kind::PARTS * steps_ * TILE),
        straight_(TILE * (PAIRED ? steps_ : width_)), rows_(rows && PAIRED ? Kind::PARTS * TILE / 2 * width_ : 0), came_(PAIRED ? d : 0),
        keeps_rows_(rows) {}

  void read(const Strip& strip, const Array& x, int64_t lanes) {
    if constexpr (PAIRED) {
      finite_ = true;
      for (int64_t r = 0; r < lanes; ++r) {
        const void* row = r < strip.m ? strip.row(x, r) : nullptr;
        came_.read(r, row, strip.c.dtype);
        finite_ &= !keeps_rows_ || !came_.row(r, 0) || finite_bfloats(came_.row(r, 0), d_);
      }
      for (int part = 0; part < Kind::PARTS; ++part) read_part(strip.m, lanes, part);
    } else {
      for (int64_t r = 0; r < strip.m; ++r) floats(strip.row(x, r), strip.c.dtype, d_, width_, straight_ + r * width_);
      turn(strip.m, lanes, width_, turned_);
      if (keeps_rows_) finite_ = finite(straight_, strip.m * width_);
    }
  }

  Right<E> turned(int64_t q) const { return {turned_ + q * steps_, Kind::UNIT, steps_ * TILE}; }  // of the piece that begins with query q
  Right<E> rows() const {
    if constexpr (PAIRED) return {rows_, width_, TILE / 2 * width_};
    else return {straight_, width_, 0};
  }
  int64_t width() const { return width_; }
  bool is_finite() const { return finite_; }  // if rows are kept

 private:
  void read_part(int64_t m, int64_t lanes, int part) {
    for (int64_t r = 0; r < m; ++r) {
      E* to = straight_ + r * steps_;
      if (const uint16_t* row = came_.row(r, part)) pairs(row, d_, steps_, to);
      else std::fill(to, to + steps_, E(0));
    }
    turn(m, lanes, steps_, turned_ + part * steps_ * TILE);
    E* rows = rows_ + part * TILE / 2 * width_;
    for (int64_t r = 0; r < lanes && keeps_rows_; r += 2)
      weave(came_.row(r, part), came_.row(r + 1, part), d_, width_, rows + r / 2 * width_);
  }
  void turn(int64_t m, int64_t lanes, int64_t row, E* to) {
    std::fill(straight_ + m * row, straight_ + lanes * row, E(0));
    for (int64_t q = 0; q < lanes; q += Kind::UNIT)
      transpose<E>(straight_ + q * row, row, std::min(Kind::UNIT, lanes - q), steps_, to + q * steps_, Kind::UNIT);
  }

  int64_t d_, width_, steps_;
  Buffer<E> turned_, straight_, rows_;
  RowParts<Kind> came_;
  bool keeps_rows_, finite_ = true;
};

}  // namespace
