// The products of a tile under what queries see of it: what none of some keys or queries sees is skipped.
#pragma once
#include "mask.h"
#include "pack.h"

namespace {

// Scores [keys, queries], rows `ld` apart: keys as a left operand times queries turned. Where nothing is seen they stay as
// they were. `seen` is null where all is; only then is `ahead` fetched.
template <class Kind, class E>
void multiply_keys(Kind& kind, int64_t keys, int64_t steps, Left<E> rows, Right<E> queries, Range of, const Seen* seen, float* to,
                   int64_t ld, Ahead ahead) {
  if (!seen) return kind(keys, of.size(), steps, rows, queries, to, ld, false, ahead);
  for (int64_t k = 0; k < keys; k += Kind::GROUP) {
    const Range some{k, std::min(k + Kind::GROUP, keys)}, q = seen->queries(some, of);
    if (q.empty()) continue;
    const Range wide = Range{q.first - of.first, q.end - of.first}.widened(Kind::LANES);
    kind(some.size(), wide.size(), steps, rows.down(k), queries.along(wide.first), to + k * ld + wide.first, ld, false);
  }
}

// Adds to what queries get, [m, queries], rows `ld` apart: keys or values turned, times weights [steps of keys, queries].
template <class Kind, class E>
void add_to_queries(Kind& kind, int64_t m, int64_t keys, Left<E> turned, Right<E> weights, Range of, const Seen* seen, float* to,
                    int64_t ld, Ahead ahead) {
  const auto add = [&](Range queries, Range k, Ahead soon) {
    const int64_t q = queries.first - of.first, first = k.first / Kind::PER_STEP;
    const int64_t count = (k.end + Kind::PER_STEP - 1) / Kind::PER_STEP - first;
    if (count > 0) kind(m, queries.size(), count, turned.along(first), weights.down(first).along(q), to + q, ld, true, soon);
  };
  if (!seen) return add(of, {0, keys}, ahead);
  Range same{of.first, of.first}, k{0, 0};  // queries that see the same keys go together
  for (int64_t q = of.first; q < of.end; q += Kind::LANES) {
    Range now = seen->keys({q, q + Kind::LANES});
    if (!now.empty()) now = now.widened(Kind::STEPS * Kind::PER_STEP);
    now.end = std::min(now.end, multiple(keys, Kind::STEPS * Kind::PER_STEP));
    if (!(now == k)) add(same, k, {}), same.first = q, k = now;
    same.end = q + Kind::LANES;
  }
  add(same, k, {});
}

// Adds to what keys get, [keys, width], rows `ld` apart: weights as a left operand [keys, steps of queries], times queries.
template <class Kind, class E>
void add_to_keys(Kind& kind, int64_t keys, int64_t width, int64_t queries, Left<E> weights, Right<E> rows, const Seen* seen, float* to,
                 int64_t ld, Ahead ahead) {
  const auto add = [&](Range k, Range q, Ahead soon) {
    const int64_t first = q.first / Kind::PER_STEP, count = (q.end + Kind::PER_STEP - 1) / Kind::PER_STEP - first;
    kind(k.size(), width, count, weights.down(k.first).along(first), rows.down(first), to + k.first * ld, ld, true, soon);
  };
  if (!seen) return add({0, keys}, {0, queries}, ahead);
  for (int64_t k = 0; k < keys; k += Kind::GROUP) {
    const Range some{k, std::min(k + Kind::GROUP, keys)}, q = seen->queries(some, {0, queries});
    if (!q.empty()) add(some, q.widened(Kind::STEPS * Kind::PER_STEP), {});
  }
}

// Weights of one part as a right operand holds them, once more as floats: those of key k and of queries from q on.
TM_INLINE vf weights_of(Right<float> from, int64_t k, int64_t q) { return load(from.at + k * from.row + q); }
TM_INLINE vf weights_of(Right<Pair> from, int64_t k, int64_t q) {
  const vu both = load(from.at + k / 2 * from.row + q);
  return (vf)(k % 2 ? both & 0xffff0000u : both << 16);
}
// And those of key k and query q in a left operand.
inline float weight_of(Left<float> from, int64_t k, int64_t q) { return from.at[k * from.row + q]; }
inline float weight_of(Left<Pair> from, int64_t k, int64_t q) {
  return from_bfloat(uint16_t(from.at[k * from.row + q / 2] >> q % 2 * 16));
}

// The same two over the cells that are seen alone, so that what is behind others may be NaN: `number(k, p)` is of a key,
// and `rows` are of queries, `step` apart.
template <class E, class Number>
void add_chosen_to_queries(int64_t m, int64_t keys, Number number, Right<E> weights, Range of, const Seen& seen, float* to,
                           int64_t ld) {
  for (int64_t k = 0; k < keys; ++k)
    for (int64_t p = 0; p < m; ++p) {
      const float x = number(k, p);
      for (int64_t q = 0; q < of.size(); q += W) {
        const vf before = load(to + p * ld + q);
        store(to + p * ld + q, seen.lanes(k, of.first + q) ? before + weights_of(weights, k, q) * x : before);
      }
    }
}
template <class E>
void add_chosen_to_keys(int64_t keys, int64_t width, int64_t queries, Left<E> weights, const float* rows, int64_t step,
                        const Seen& seen, float* to, int64_t ld) {
  for (int64_t k = 0; k < keys; ++k)
    for (int64_t q = 0; q < queries; ++q) {
      if (!seen.cell(k, q)) continue;
      const vf x = splat(weight_of(weights, k, q));
      for (int64_t p = 0; p < width; p += W) store(to + k * ld + p, load(to + k * ld + p) + x * load(rows + q * step + p));
    }
}

}  // namespace
