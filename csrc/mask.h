// What the words of a masked tile say: bit j of word i is cell (i, j); and which tiles a row of tiles has.
#pragma once
#include "abi.h"
#include "isa/simd.h"

namespace {

inline uint64_t below(int64_t n) { return n >= TILE ? ~0ull : (1ull << n) - 1; }  // the first n bits

// From the first to the last of some keys or rows.
struct Range {
  int64_t first, end;
  bool empty() const { return first >= end; }
  Range widened(int64_t to) const { return {first / to * to, (end + to - 1) / to * to}; }
};

// The keys that some of the rows [begin, end) see.
inline Range keys_seen(const uint64_t* word, int64_t begin, int64_t end) {
  uint64_t all = 0;
  for (int64_t r = begin; r < end; ++r) all |= word[r];
  return all ? Range{__builtin_ctzll(all), TILE - __builtin_clzll(all)} : Range{0, 0};
}

// The rows of m that see some of the keys [begin, end).
inline Range rows_seeing(const uint64_t* word, int64_t m, int64_t begin, int64_t end) {
  const uint64_t keys = below(end) & ~below(begin);
  Range found{m, 0};
  for (int64_t r = 0; r < m; ++r)
    if (word[r] & keys) found = {std::min(found.first, r), r + 1};
  return found;
}

// Some rows of a masked tile at a time, so that products skip what none of them sees: `run(first, end)`.
template <class F>
TM_INLINE void in_groups(int64_t m, F run) {
  constexpr int64_t GROUP = 12;
  for (int64_t r = 0; r < m; r += GROUP) run(r, std::min(r + GROUP, m));
}

// The key tiles of a strip's runs in [first, end): `take(j, kind)`.
template <class F>
TM_INLINE void tiles_in(const Call& c, const int64_t* range, int64_t first, int64_t end, F take) {
  for (int64_t r = range[0]; r < range[1]; ++r) {
    const int32_t* run = c.runs + 3 * r;
    for (int64_t j = std::max<int64_t>(run[0], first); j < std::min<int64_t>(run[1], end); ++j) take(j, run[2]);
  }
}

}  // namespace
