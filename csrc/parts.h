// Calls whose numbers are sums of bf16: what parts cannot say goes to floats, row by row, so that nobody's bits follow from what
// they do not see.
#pragma once
#include "backward.h"
#include "forward.h"

namespace {

// For each tile of queries of each head, those that must be computed in floats: that are, or see, or get back what parts cannot
// say. Such keys and queries are zeros in what parts are packed from.
template <class Kind>
Left_out unsaid(const Call& c, const Packed<Kind>& k, const Packed<Kind>& v, bool backward) {
  Left_out rows(c.b * c.hq * c.tiles_q(), 0);
  const bool all_keys = k.is_said() && v.is_said();
  each(rows.size(), c.threads, [&] {
    return [&, numbers = std::make_shared<Buffer<float>>(std::max(c.d, c.dv)), strip = std::make_shared<Strip>(c)](int64_t i) {
      const int64_t head = i / c.tiles_q();
      strip->set(head / c.hq, head % c.hq, 1, i % c.tiles_q());
      const auto said = [&](const Array& x, int64_t d, int64_t r) {
        floats(strip->row(x, r), c.dtype, d, d, *numbers);
        return is_said(*numbers, d);
      };
      for (int64_t r = 0; r < strip->m; ++r)
        if (!said(c.q, c.d, r) || (backward && !said(c.dout, c.dv, r))) rows[i] |= 1ull << r;
      if (all_keys) return;
      uint64_t word[TILE];
      tiles_in(c, strip->range, 0, c.tiles_k(), [&](int64_t j, int32_t kind) {
        const uint64_t keys = k.unsaid(strip->b, strip->hk, j) | v.unsaid(strip->b, strip->hk, j);
        if (!keys) return;
        const bool masked = strip->see(j, kind, word);
        for (int64_t r = 0; r < strip->m; ++r)
          if (!masked || word[r] & keys) rows[i] |= 1ull << r;
      });
    };
  });
  return rows;
}

inline bool any(const Left_out& rows) {
  return std::any_of(rows.begin(), rows.end(), [](uint64_t x) { return x; });
}

// Room for a tensor [b, h, n, d] of its own.
class Room {
 public:
  Room(const Call& c, int64_t h, int64_t n, int64_t d) : numbers_(c.b * h * n * d) {
    array_ = {numbers_ + 0, h * n * d, n * d, d};
  }
  Array array() const { return array_; }

 private:
  Buffer<float> numbers_;
  Array array_;
};

// The rows of some queries from one call to another, which shares its sizes.
inline void take_rows(const Call& from, const Call& to, const Left_out& rows) {
  for (int64_t i = 0; i < int64_t(rows.size()); ++i)
    for (uint64_t left = rows[i]; left; left &= left - 1) {
      const int64_t h = i / from.tiles_q(), n = i % from.tiles_q() * TILE + __builtin_ctzll(left), at = h * from.nq + n;
      const auto row = [&](const Call& c) { return row_of(c, c.out, h / c.hq, h % c.hq, n); };
      std::memcpy(row(to), row(from), from.dv * from.bytes());
      to.lse[at] = from.lse[at];
      if (to.base) to.base[at] = from.base[at], to.log_total[at] = from.log_total[at];
    }
}

// x += y, tensors [b, h, n, d].
inline void add(const Call& c, const Array& x, const Array& y, int64_t h, int64_t n, int64_t d) {
  each(c.b * h, c.threads, [&] {
    return [&, a = std::make_shared<Buffer<float>>(d), b = std::make_shared<Buffer<float>>(d)](int64_t i) {
      for (int64_t r = 0; r < n; ++r) {
        floats(row_of(c, x, i / h, i % h, r), c.dtype, d, d, *a);
        floats(row_of(c, y, i / h, i % h, r), c.dtype, d, d, *b);
        for (int64_t p = 0; p < d; ++p) (*a)[p] += (*b)[p];
        write(*a, 1, d, c.dtype, row_of(c, x, i / h, i % h, r));
      }
    };
  });
}

}  // namespace
