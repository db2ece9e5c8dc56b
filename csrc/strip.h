// A strip, the queries of a tile side by side: which they are, what they may see of a tile of keys, what becomes of scores.
#pragma once
#include <cmath>
#include <limits>

#include "mask.h"
#include "pack.h"

namespace {

constexpr float LN2 = 0.693147180559945309f, LOG2E = 1.44269504088896341f;
constexpr float INF = std::numeric_limits<float>::infinity();

// The hash of `truemask/masks/hashing.py`, on 32-bit words or vectors of them.
template <class T>
TM_INLINE T mix(T x) {
  x = ((x >> 16) ^ x) * 0x45D9F3Bu;
  x = ((x >> 16) ^ x) * 0x45D9F3Bu;
  return (x >> 16) ^ x;
}
inline uint32_t hash_of(const uint32_t* words, int n) {
  uint32_t state = 0x9E3779B9u;
  for (int i = 0; i < n; ++i) state = mix(state ^ words[i]);
  for (int i = n - 2; i >= 0; --i) state = mix(state ^ words[i]);
  return state;
}

// Query heads whose rows lie side by side, since they share keys and a mask.
inline int64_t stacked_heads(const Call& c) { return c.mask_h == 1 && c.group() * c.nq <= TILE ? c.group() : 1; }

// The queries of one tile; of several query heads, one after the other, where few queries share their keys. In what belongs
// to a strip queries lie along the vectors: scores are [keys, queries].
struct Strip {
  const Call& c;
  int64_t b = 0, hk = 0, head = 0, tile = 0, each = 0, m = 0, place = 0;  // `each` queries of each head from `head` on
  const int64_t* range = nullptr;                              // of the runs that they see
  uint32_t row_hash[TILE] = {};
  explicit Strip(const Call& c_) : c(c_) {}

  void set(int64_t b_, int64_t head_, int64_t heads, int64_t tile_) {
    b = b_, head = head_, hk = head_ / c.group(), tile = tile_;
    each = std::min(TILE, c.nq - tile * TILE), m = each * heads;
    place = ((c.mask_b > 1 ? b : 0) * c.mask_h + (c.mask_h > 1 ? head : 0)) * c.tiles_q() + tile;
    range = c.starts + place;
    if (!c.drop_below) return;
    for (int64_t r = 0; r < m; ++r) {
      const uint32_t words[4] = {uint32_t(c.seed), uint32_t(b), uint32_t(head_of(r)), uint32_t(query(r))};
      row_hash[r] = hash_of(words, 4);
    }
  }
  int64_t head_of(int64_t r) const { return head + r / each; }
  int64_t query(int64_t r) const { return tile * TILE + r % each; }
  int64_t number(int64_t r) const { return (b * c.hq + head_of(r)) * c.nq + query(r); }  // in [b, hq, nq]

  // Of weights 2^(score - base), the highest of which was about 2^-room.
  void write_lse(int64_t r, float base, float total, int room) const {
    c.lse[number(r)] = total == 0 ? -INF : (base - room + std::log2(total * (1 << room))) * LN2;
    if (c.base) c.base[number(r)] = base, c.log_total[number(r)] = total == 0 ? -INF : std::log2(total);
  }
  // A sink's weight beside those. In doubles, since floats of the size of large scores have no digits for what is between.
  float beside_sink(int64_t r, float base, float total) const {
    return float(std::exp2(c.sinks[head_of(r)] * 1.4426950408889634 - base) / total);
  }

  void* row(const Array& x, int64_t r) const { return row_of(c, x, b, head_of(r), query(r)); }

  // Which keys of tile j each query sees; false if all do.
  bool see(int64_t j, int32_t kind, uint64_t* word) const {
    const int64_t keys = c.keys(j);
    if (kind == ALL && keys == TILE) return false;
    if (kind == SLABS) cut_slabs(j, word);
    else for (int64_t r = 0; r < each; ++r) word[r] = kind == ALL ? ~0ull : c.words[kind * TILE + c.mask_row + r];
    for (int64_t r = 0; r < each; ++r) word[r] &= below(keys);
    for (int64_t r = each; r < m; ++r) word[r] = word[r % each];
    return true;
  }
  bool see(int64_t j, int32_t kind, Seen& seen) const {
    if (!see(j, kind, seen.words())) return false;
    std::fill(seen.words() + m, seen.words() + TILE, 0);
    seen.set();
    return true;
  }

  // What products are multiplied with to be scores in base 2, once they have been through `score`.
  float factor() const { return as_they_are() ? c.scale * LOG2E : LOG2E; }

  // Products of the keys of tile j and of queries (rows `ld` apart) become scores as softmax takes them, but for the factor.
  // `slopes`, if not null, gets the derivative of a soft cap.
  void score(int64_t j, Range queries, float* s, int64_t ld, float* slopes = nullptr) const {
    if (as_they_are()) return;
    for (int64_t k = 0; k < c.keys(j); ++k)
      for (int64_t q = 0; q < queries.size(); q += W) {
        vf x = load(s + k * ld + q) * c.scale;
        if (c.softcap != 0) {
          x = x / splat(c.softcap);
          if (slopes) store(slopes + k * ld + q, tanh_slope(x));
          x = tanhv(x) * c.softcap;
        }
        store(s + k * ld + q, x);
      }
    if (c.bias_kind == NO_BIAS) return;
    for (int64_t r = queries.first; r < std::min(queries.end, m); ++r) add_bias(r, j, s + r - queries.first, ld);
  }

  // Whether dropout keeps cells: all ones or zeros. Of key k of tile j and queries from q on; of a row's hash and some keys.
  TM_INLINE vi kept(int64_t j, int64_t k, int64_t q) const {
    vu row;
    std::memcpy(&row, row_hash + q, sizeof row);
    return kept(row, vu{} + uint32_t(j * TILE + k));
  }
  TM_INLINE vi kept(vu row, vu keys) const {
    const vu below = vu{} + uint32_t(std::min<uint64_t>(c.drop_below, 0xffffffffu));
    return mix(mix(mix((vu{} + 0x9E3779B9u) ^ row) ^ keys) ^ row) >= below;
  }

  // Adds the bias of query r and the keys of tile j to numbers that are `step` apart.
  void add_bias(int64_t r, int64_t j, float* x, int64_t step) const {
    const int64_t h = head_of(r), keys = c.keys(j), q = query(r);
    if (c.bias_kind == TENSOR) {
      const int64_t* by = c.bias_strides;
      const float* from = c.bias + b * by[0] + h * by[1] + q * by[2] + j * TILE * by[3];
      for (int64_t n = 0; n < keys; ++n) x[n * step] += from[n * by[3]];
      return;
    }
    const int64_t at = c.q_positions[b * c.q_stride + q];
    const int64_t* k = c.k_positions + b * c.k_stride + j * TILE;
    const float* numbers = c.bias + h * c.bias_strides[1];
    for (int64_t n = 0; n < keys; ++n) {
      const int64_t apart = k[n] - at;
      if (c.bias_kind == ALIBI) x[n * step] -= numbers[0] * float(apart < 0 ? -apart : apart);
      else x[n * step] += numbers[std::min(std::max(apart, -c.reach), c.reach) + c.reach];
    }
  }

 private:
  bool as_they_are() const { return c.softcap == 0 && c.bias_kind == NO_BIAS; }

  // The words of tile j from the ends of the slabs' runs.
  void cut_slabs(int64_t j, uint64_t* word) const {
    const int64_t first = tile * TILE + c.mask_row, stop = first + each, left = j * TILE;
    std::fill(word, word + each, 0);
    for (int64_t s = c.slab_first[place]; c.slab_rows[s] < stop; ++s) {
      const int64_t begin = std::max(c.slab_rows[s], first), end = std::min(c.slab_rows[s + 1], stop);
      const auto at = [](int64_t line, int64_t row) { return (line >> 1) + (line & 1 ? row : 0); };
      const int64_t* last = c.slab_hi + c.slab_starts[s + 1];
      const int64_t* hi = std::partition_point(c.slab_hi + c.slab_starts[s], last, [&](int64_t x) { return at(x, end - 1) <= left; });
      for (const int64_t* lo = c.slab_lo + (hi - c.slab_hi); hi < last && at(*lo, begin) < left + TILE; ++hi, ++lo)
        for (int64_t row = begin; row < end; ++row) {
          const int64_t a = std::max<int64_t>(at(*lo, row) - left, 0), b = at(*hi, row) - left;
          if (b > a && a < TILE) word[row - first] |= below(b) & ~below(a);
        }
      if (end == stop) break;  // of another sample's or head's slabs, rows begin again
    }
  }
};

}  // namespace
