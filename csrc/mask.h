// What queries see of a tile of keys, and which tiles a row of tiles has.
#pragma once
#include "abi.h"
#include "isa/simd.h"

namespace {

inline uint64_t below(int64_t n) { return n >= TILE ? ~0ull : (1ull << n) - 1; }  // the first n bits

// From the first to the last of some keys or queries.
struct Range {
  int64_t first, end;
  int64_t size() const { return end - first; }
  bool empty() const { return first >= end; }
  bool operator==(const Range& other) const { return first == other.first && end == other.end; }
  Range widened(int64_t to) const { return {first / to * to, (end + to - 1) / to * to}; }
};

// A tile of the mask: bit k of a query's word says whether it sees key k.
class Seen {
 public:
  uint64_t* words() { return word_; }
  const uint64_t* words() const { return word_; }

  // After the words of `lanes` queries have been set.
  void set(int64_t lanes) {
    for (int64_t q = 0; q < lanes; ++q) half_[0][q] = uint32_t(word_[q]), half_[1][q] = uint32_t(word_[q] >> 32);
  }
  // Which of the queries from q on see key k: all ones or zeros.
  TM_INLINE vi lanes(int64_t k, int64_t q) const {
    vu x;
    std::memcpy(&x, half_[k / 32] + q, sizeof x);
    return (x & (vu{} + (1u << k % 32))) != 0u;
  }
  bool cell(int64_t k, int64_t q) const { return word_[q] >> k & 1; }

  // The keys that some of the queries see.
  Range keys(Range queries) const {
    uint64_t all = 0;
    for (int64_t q = queries.first; q < queries.end; ++q) all |= word_[q];
    return all ? Range{__builtin_ctzll(all), TILE - __builtin_clzll(all)} : Range{0, 0};
  }
  // The queries of those that see some of the keys.
  Range queries(Range keys, Range of) const {
    const uint64_t bits = below(keys.end) & ~below(keys.first);
    Range found{of.end, of.first};
    for (int64_t q = of.first; q < of.end; ++q)
      if (word_[q] & bits) found = {std::min(found.first, q), q + 1};
    return found;
  }

 private:
  uint64_t word_[TILE];
  uint32_t half_[2][TILE];
};

// The key tiles of a strip's runs in [first, end): `take(j, kind)`.
template <class F>
TM_INLINE void tiles_in(const Call& c, const int64_t* range, int64_t first, int64_t end, F take) {
  for (int64_t r = range[0]; r < range[1]; ++r) {
    const int32_t* run = c.runs + 3 * r;
    for (int64_t j = std::max<int64_t>(run[0], first); j < std::min<int64_t>(run[1], end); ++j) take(j, run[2]);
  }
}

}  // namespace
