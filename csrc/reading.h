// Few queries: keys and values are read once, as they lie in memory; packing them would take longer than the products.
#pragma once
#include "products/matvec.h"
#include "reading_cut.h"
#include "strip.h"
#include "threads.h"

namespace {

// Keys or values: how they are read.
struct Source {
  const Array& x;
  int64_t d, width;
  bool as_it_lies, is_split;  // else as floats that are made tile by tile; whether pairs of bf16 are taken apart

  Source(const Call& c, const Array& x_, int64_t d_)
      : x(x_), d(d_), width(padded(d_)), as_it_lies(d == width),
        is_split(as_it_lies && c.dtype == BFLOAT) {}

  // Where a number of a row is once pairs are taken apart.
  int64_t place(int64_t p) const {
    const int64_t block = p / (2 * W) * 2 * W, within = p % (2 * W);
    return !is_split || block + 2 * W > d ? p : block + within % 2 * W + within / 2;
  }
};

// The runs of bits that are on: `run(first, end)`.
template <class F>
TM_INLINE void runs_of(uint64_t word, F run) {
  while (word) {
    const int first = __builtin_ctzll(word);
    const uint64_t off = ~(word >> first);
    const int count = off ? __builtin_ctzll(off) : TILE;
    run(first, first + count);
    word &= ~(below(count) << first);
  }
}

class Reading {
  struct Tile {
    int64_t number;
    int32_t kind;
    bool masked;
  };
  static constexpr int64_t CHUNK = 4, LD = CHUNK * TILE;  // key tiles at a time; from one row of scores to the next

 public:
  Reading(const Call& c, const ReadingCut& cut)
      : c_(c), cut_(cut), keys_(c, c.k, c.d), values_(c, c.v, c.dv), strip_(c),
        in_pairs_(keys_.is_split && c.d % (2 * W) == 0 && c.scale > 0 && are_pairs_quick()), q_(FEW * keys_.width),
        scores_(FEW * LD), spare_(TILE * std::max(keys_.width, values_.width)), q_pairs_(FEW * keys_.width / 2) {
    std::fill(scores_ + 0, scores_ + FEW * LD, 0.0f);
  }

  void at(int64_t i) {  // the strip
    const int64_t heads = c_.hq / cut_.stacked;
    strip_.set(i / heads, i % heads * cut_.stacked, cut_.stacked, 0);
  }

  void attend(int64_t part, Part into) {
    for (int64_t r = 0; r < strip_.m; ++r) into.top[r] = -INF, into.total[r] = 0;
    std::fill(into.sums, into.sums + strip_.m * values_.width, 0.0f);
    read_queries();
    find_tiles(part * cut_.size, (part + 1) * cut_.size);
    for (size_t t = 0; t < tiles_.size(); t += CHUNK) chunk(t, std::min(t + CHUNK, tiles_.size()), into);
  }

  void finish(Part from) {
    for (int64_t r = 0; r < strip_.m; ++r) {
      strip_.write_lse(r, from.top[r], from.total[r], 0);
      float by = from.total[r] == 0 ? 0 : 1 / from.total[r];
      if (c_.sinks && from.total[r] != 0) by /= 1 + strip_.beside_sink(r, from.top[r], from.total[r]);
      for (int64_t p = 0; p < c_.dv; ++p) spare_[p] = from.sums[r * values_.width + values_.place(p)];
      write(spare_, by, c_.dv, c_.dtype, row_of(c_, c_.out, strip_.b, strip_.head_of(r), strip_.query(r)));
    }
  }

 private:
  // The queries in the order of keys. They take a scale that is not above 0: times it -inf would not stay hidden.
  void read_queries() {
    for (int64_t r = 0; r < strip_.m; ++r) {
      const void* row = row_of(c_, c_.q, strip_.b, strip_.head_of(r), strip_.query(r));
      if (in_pairs_) {
        pairs(row, c_.d, c_.d / 2, q_pairs_ + r * c_.d / 2);
        continue;
      }
      floats(row, c_.dtype, c_.d, keys_.width, spare_);
      for (int64_t p = 0; p < keys_.width; ++p)
        q_[r * keys_.width + keys_.place(p)] = c_.scale > 0 ? spare_[p] : spare_[p] * c_.scale;
    }
  }

  // Those of the strip's tiles, as they are counted.
  void find_tiles(int64_t first, int64_t end) {
    tiles_.clear();
    for (int64_t r = strip_.range[0], seen = 0; r < strip_.range[1] && seen < end; ++r) {
      const int32_t* run = c_.runs + 3 * r;
      const int64_t from = run[0] + std::max<int64_t>(first - seen, 0);
      const int64_t stop = std::min({int64_t(run[1]), run[0] + end - seen, c_.tiles_k()});
      for (int64_t j = from; j < stop; ++j) tiles_.push_back({j, run[2], false});
      seen += run[1] - run[0];
    }
  }

  // Scores of some tiles, weights, weighted values.
  void chunk(size_t first, size_t end, Part into) {
    for (size_t t = first; t < end; ++t) {
      float* s = scores_ + (t - first) * TILE;
      Tile& tile = tiles_[t];
      tile.masked = strip_.see(tile.number, tile.kind, words_[t - first]);
      multiply_keys(tile, words_[t - first], s);
      score(tile.number, s);
      if (tile.masked) hide(words_[t - first], s);
    }
    for (int64_t r = 0; r < strip_.m; ++r) weigh(r, (end - first) * TILE, into);
    for (size_t t = first; t < end; ++t) {
      float* p = scores_ + (t - first) * TILE;
      if (c_.drop_below) drop(tiles_[t].number, p);
      add_values(tiles_[t], words_[t - first], p, into.sums);
    }
  }

  // Of the keys of a tile that some row sees; other scores stay as they were, and are hidden.
  void multiply_keys(const Tile& tile, const uint64_t* word, float* s) {
    Range seen{0, c_.keys(tile.number)};
    if (tile.masked) seen = keys_seen(word, 0, strip_.each), seen.first = seen.first / W * W;
    const auto multiply = [&](auto kind, auto rows, const auto* q, int64_t step) {
      rows.at += seen.first * rows.step;
      dots<decltype(kind)>(strip_.m, seen.end - seen.first, keys_.width, q, step, rows, s + seen.first, LD);
    };
    with_rows(keys_, tile.number, [&](auto kind, auto rows) {
      if constexpr (std::is_same<decltype(kind), SplitRows>::value)
        if (in_pairs_) return multiply(PairRows(), rows, static_cast<const Pair*>(q_pairs_), keys_.width / 2);
      multiply(kind, rows, static_cast<const float*>(q_), keys_.width);
    });
  }

  // What a row does not see is left out if it may not be finite.
  void add_values(const Tile& tile, const uint64_t* word, const float* p, float* to) {
    const int64_t width = values_.width, each = strip_.each;
    with_rows(values_, tile.number, [&](auto kind, auto rows) {
      using Kind = decltype(kind);
      const auto add = [&](int64_t query, int64_t apart, int64_t m, int64_t first, int64_t end) {
        sums<Kind>(m, width, end - first, p + query * LD + first, apart * LD, {rows.at + first * rows.step, rows.step},
                   to + query * width, apart * width);
      };
      if (!tile.masked) return add(0, 1, strip_.m, 0, TILE);
      if (each > 1 && are_finite<Kind>(c_.keys(tile.number), width, rows)) {
        const Range seen = keys_seen(word, 0, each);
        return add(0, 1, strip_.m, seen.first, seen.end);
      }
      for (int64_t n = 0; n < each; ++n)
        runs_of(word[n], [&](int64_t first, int64_t end) { add(n, each, cut_.stacked, first, end); });
    });
  }

  // The rows of a tile to `use`, with how they are read.
  template <class F>
  TM_INLINE void with_rows(const Source& from, int64_t j, F use) {
    const auto row = [&](int64_t n) { return row_of(c_, from.x, strip_.b, strip_.hk, j * TILE + n); };
    const void* at = row(0);
    if (from.is_split) return use(SplitRows(), Rows<uint16_t>{static_cast<const uint16_t*>(at), from.x.row});
    if (from.as_it_lies) {
      if (c_.dtype == HALF) return use(HalfRows(), Rows<uint16_t>{static_cast<const uint16_t*>(at), from.x.row});
      return use(FloatRows(), Rows<float>{static_cast<const float*>(at), from.x.row});
    }
    for (int64_t n = 0; n < c_.keys(j); ++n) floats(row(n), c_.dtype, from.d, from.width, spare_ + n * from.width);
    use(FloatRows(), Rows<float>{spare_, from.width});
  }

  float scale() const { return c_.scale > 0 ? c_.scale : 1; }
  bool as_they_are() const { return c_.softcap == 0 && c_.bias_kind == NO_BIAS; }

  // Products of a tile become scores as softmax takes them, but for a factor.
  void score(int64_t j, float* s) const {
    if (as_they_are()) return;
    for (int64_t r = 0; r < strip_.m; ++r) {
      float* x = s + r * LD;
      for (int64_t n = 0; n < TILE; n += W) {
        const vf y = load(x + n) * scale();
        store(x + n, c_.softcap == 0 ? y : tanhv(y / splat(c_.softcap)) * c_.softcap);
      }
      if (c_.bias_kind != NO_BIAS) strip_.add_bias(r, j, x, 1);
    }
  }

  // -inf where cells are off.
  void hide(const uint64_t* word, float* s) const {
    for (int64_t r = 0; r < strip_.m; ++r)
      for (int64_t n = 0; n < TILE; n += W)
        store(s + r * LD + n, bits_at(word[r], n) ? load(s + r * LD + n) : splat(-INF));
  }

  // Weights times 1 / (1 - rate) where dropout keeps them, 0 elsewhere.
  void drop(int64_t j, float* p) const {
    for (int64_t r = 0; r < strip_.m; ++r)
      for (int64_t n = 0; n < TILE; n += W) {
        const vi kept = strip_.kept(vu{} + strip_.row_hash[r], (vu)(lanes() + int32_t(j * TILE + n)));
        store(p + r * LD + n, kept ? load(p + r * LD + n) * c_.keep_scale : vf{});
      }
  }

  // Scores of one row become weights; what was summed before shrinks if there is a new highest score.
  void weigh(int64_t r, int64_t n, Part into) const {
    float* s = scores_ + r * LD;
    const float factor = as_they_are() ? scale() * LOG2E : LOG2E;
    vf high = load(s);
    for (int64_t j = W; j < n; j += W) high = larger(load(s + j), high);
    float now = largest(high) * factor;
    now = now > into.top[r] ? now : into.top[r];
    const float base = now == -INF ? 0 : now;
    if (now != into.top[r]) shrink(r, into.total[r] == 0 ? 0 : exp2f_(into.top[r] - base), into);
    into.top[r] = now;
    vf all = vf{};
    for (int64_t j = 0; j < n; j += W) {
      const vf p = exp2v(rounded_product(load(s + j), splat(factor)) - base);
      store(s + j, p);
      all += p;
    }
    into.total[r] += sum(all);
  }
  void shrink(int64_t r, float by, Part into) const {
    float* to = into.sums + r * values_.width;
    for (int64_t p = 0; p < values_.width; p += W) store(to + p, load(to + p) * by);
    into.total[r] *= by;
  }

  const Call& c_;
  const ReadingCut& cut_;
  Source keys_, values_;
  Strip strip_;
  std::vector<Tile> tiles_;  // of the part
  bool in_pairs_;
  Buffer<float> q_, scores_, spare_;
  Buffer<Pair> q_pairs_;
  uint64_t words_[CHUNK][FEW];  // what each row sees of the tiles that are masked
};

// Part i of all strips; whoever does the last one that is `missing` of a strip joins them.
inline void read_part(Reading& run, const ReadingCut& cut, const Parts& parts, std::atomic<int64_t>* missing, int64_t i) {
  const int64_t strip = i / cut.parts, first = strip * cut.parts;
  run.at(strip);
  run.attend(i % cut.parts, parts[i]);
  if (--missing[strip] > 0) return;
  for (int64_t p = 1; p < cut.parts; ++p) parts.join(parts[first], parts[first + p]);  // always in this order
  run.finish(parts[first]);
}

inline void read_forward(const Call& c) {
  const ReadingCut cut(c);
  const Parts parts(c, cut);
  std::vector<std::atomic<int64_t>> missing(cut.strips);
  for (auto& count : missing) count = cut.parts;
  each(cut.strips * cut.parts, c.threads, [&] {
    return [&, run = std::make_shared<Reading>(c, cut)](int64_t i) { read_part(*run, cut, parts, missing.data(), i); };
  });
}

}  // namespace
