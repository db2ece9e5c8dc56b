// Products of a masked tile: what no row of a group sees is skipped.
#pragma once
#include "mask.h"
#include "pack.h"
#include "products/matmul.h"

namespace {

// The steps of a product over some keys or rows of a tile: themselves, or the pairs of them and those 32 further.
template <class E>
inline Range steps_of(Range x) {
  if (!std::is_same<E, Pair>::value) return x;
  if (x.end <= HALF_TILE) return x;
  return x.first >= HALF_TILE ? Range{x.first - HALF_TILE, x.end - HALF_TILE} : Range{0, HALF_TILE};
}

// The product of m rows (`row` apart) and the keys or values of a tile, turned: [m, 64], rows `ld` apart. What no row of
// a group sees is left as it was; `word` is null where all is seen, and only then is `ahead` fetched.
template <class E>
void times_turned(int64_t m, int64_t steps, const E* rows, int64_t row, const E* turned, const uint64_t* word, float* to,
                  int64_t ld, Ahead ahead) {
  if (!word) return product(m, TILE, steps, rows, row, 1, turned, TILE, to, ld, false, ahead);
  in_groups(m, [&](int64_t first, int64_t end) {
    const Range keys = keys_seen(word, first, end).widened(W);
    product(end - first, keys.end - keys.first, steps, rows + first * row, row, 1, turned + keys.first, TILE,
            to + first * ld + keys.first, ld, false);
  });
}

// Adds weights [m, keys], rows `ld` apart, times the keys or values of a tile as they lie: [m, width], rows `step` apart.
// `woven` has room for weights in pairs.
template <class E>
void add_times_rows(int64_t m, int64_t keys, int64_t width, const float* weights, int64_t ld, Rows<E> rows,
                    const uint64_t* word, Pair* woven, float* to, int64_t step, Ahead ahead) {
  const E* left;
  if constexpr (std::is_same<E, Pair>::value) {
    for (int64_t r = 0; r < m; ++r) weave(weights + r * ld, weights + r * ld + HALF_TILE, HALF_TILE, woven + r * HALF_TILE);
    left = woven, ld = HALF_TILE;
  } else {
    left = weights;
  }
  const auto add = [&](int64_t first, int64_t end, Range seen) {
    const Range k = steps_of<E>(seen);
    product(end - first, width, k.end - k.first, left + first * ld + k.first, ld, 1, rows.at + k.first * rows.step, rows.step,
            to + first * step, step, true, word ? Ahead() : ahead);
  };
  if (!word) return add(0, m, {0, keys});
  in_groups(m, [&](int64_t first, int64_t end) {
    const Range seen = keys_seen(word, first, end);
    if (!seen.empty()) add(first, end, seen);
  });
}

}  // namespace
