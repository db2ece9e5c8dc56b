// The forward: for each strip of queries, tile by tile of keys, scores become weights where they lie and are summed with values.
//
// Weights are 2^(score - base), and bases are whole numbers: where one grows, what was summed shrinks without rounding. Floats take
// the highest score so far for it, or weights would lose digits. Pairs look in the first tile that a query sees, and leave room
// above what they find: the base stays until a sum grows to 2, and then the tile is done again.
#pragma once
#include "masked_products.h"
#include "queries.h"
#include "threads.h"

namespace {

constexpr float UNSET = std::numeric_limits<float>::lowest();  // a base, until some score above -inf was seen
constexpr int64_t SPLIT = 16;     // key tiles of a part at least, where few queries see many keys
constexpr int64_t MOST_PARTS = 32;
constexpr int64_t ENOUGH_ITEMS = 32;

// How a call is cut into items; by its sizes alone, so that results do not depend on threads. Few strips are cut along their
// keys. Where the second cache does not hold a head's keys, several strips go through a chunk of them before the next.
struct Cut {
  int64_t stacked;   // query heads whose queries lie side by side
  int64_t strips;    // of all samples and heads
  int64_t parts;     // of the keys of each
  int64_t size;      // key tiles of a part
  int64_t together;  // strips of an item
  int64_t chunk;     // key tiles that they go through at a time

  Cut(const Call& c, int64_t most_together, int64_t chunk_numbers) {
    stacked = stacked_heads(c);
    strips = c.tiles_q() * c.b * c.hq / stacked;
    const bool few = strips < 64 && c.nq <= TILE;
    size = few ? std::max(SPLIT, (c.tiles_k() + MOST_PARTS - 1) / MOST_PARTS) : std::max<int64_t>(c.tiles_k(), 1);
    parts = std::max<int64_t>((c.tiles_k() + size - 1) / size, 1);
    chunk = std::max<int64_t>(chunk_numbers / std::max(c.d, c.dv) / TILE, 1);
    together = c.tiles_k() > 2 * chunk ? std::max<int64_t>(std::min(most_together, strips / ENOUGH_ITEMS), 1) : 1;
    if (together == 1) chunk = std::max<int64_t>(c.tiles_k(), 1);
  }
  int64_t items(const Call& c) const { return (c.tiles_q() + together - 1) / together * c.b * c.hq / stacked; }
};

// What a part of a strip's keys comes to.
struct Partial {
  Buffer<float> sums;                        // of weighted values: [width, queries], in pieces of Kind::UNIT queries
  float total[TILE], rounded[TILE], base[TILE];  // of weights, and as products have them; weights are 2^(score - base)
  explicit Partial(int64_t width) : sums(TILE * width) {}
};

template <class Kind>
class Forward {
  using E = typename Kind::E;
  static constexpr int64_t PART = TILE / 2 * Kind::UNIT;  // of weights: from one to the next

 public:
  Forward(const Call& c, const Cut& cut, const Packed<Kind>& k, const Packed<Kind>& v)
      : c_(c), cut_(cut), k_(k), v_(v), width_(multiple(c.dv, Kind::ROWS)), scores_(TILE * Kind::UNIT),
        weights_(Kind::PARTS > 1 ? Kind::PARTS * PART : 0), out_(TILE * padded(width_)) {
    for (int64_t i = 0; i < cut.together; ++i) held_.push_back(std::make_unique<Held>(c, width_));
  }

  int64_t width() const { return width_; }

  // All keys of the strips of an item.
  void operator()(int64_t item) {
    const int64_t items = (c_.tiles_q() + cut_.together - 1) / cut_.together, first = item % items * cut_.together;
    const int64_t count = std::min(cut_.together, c_.tiles_q() - first);
    for (int64_t i = 0; i < count; ++i) {
      at(item / items * c_.tiles_q() + first + i, i);
      clear(held_[i]->sums);
    }
    for (int64_t j = 0; j < c_.tiles_k(); j += cut_.chunk)
      for (int64_t i = 0; i < count; ++i) now_ = held_[i].get(), attend(j, std::min(j + cut_.chunk, c_.tiles_k()), now_->sums);
    for (int64_t i = 0; i < count; ++i) now_ = held_[i].get(), finish(now_->sums);
  }

  // A strip, and its queries.
  Strip& at(int64_t i, int64_t place = 0) {
    now_ = held_[place].get();
    const int64_t heads = c_.hq / cut_.stacked, bh = i / c_.tiles_q();  // head by head: its keys stay in the cache
    now_->strip.set(bh / heads, bh % heads * cut_.stacked, cut_.stacked, c_.order[i % c_.tiles_q()]);
    now_->lanes = multiple(now_->strip.m, Kind::LANES);
    now_->q.read(now_->strip, c_.q, now_->lanes);
    return now_->strip;
  }

  void attend(int64_t first, int64_t end, Partial& into) {
    tiles_in(c_, now_->strip.range, first, end, [&](int64_t j, int32_t kind) {
      const bool masked = now_->strip.see(j, kind, seen_);
      for (int64_t q = 0; q < now_->lanes; q += Kind::UNIT) unit(j, {q, std::min(q + Kind::UNIT, now_->lanes)}, masked ? &seen_ : nullptr, into);
    });
    kind_.flush();
  }

  void finish(const Partial& from) {
    const int64_t row = padded(width_);
    for (int64_t q = 0; q < now_->lanes; q += Kind::UNIT)
      transpose<float>(from.sums + q * width_, Kind::UNIT, width_, std::min(Kind::UNIT, now_->lanes - q), out_ + q * row, row);
    for (int64_t r = 0; r < now_->strip.m; ++r) {
      const float total = from.total[r];
      now_->strip.write_lse(r, from.base[r], total, Kind::ROOM);
      float by = total == 0 ? 0 : 1 / (total == total ? from.rounded[r] : total);
      if (c_.sinks && total != 0) by /= 1 + now_->strip.beside_sink(r, from.base[r], total);
      write(out_ + r * row, by, c_.dv, c_.dtype, now_->strip.row(c_.out, r));
    }
  }

  void clear(Partial& all) const {
    for (int64_t q = 0; q < now_->lanes; q += Kind::UNIT)
      for (int64_t p = 0; p < width_; ++p) std::memset(all.sums + q * width_ + p * Kind::UNIT, 0, std::min(Kind::UNIT, now_->lanes - q) * sizeof(float));
    for (float* x : {all.total, all.rounded}) std::fill(x, x + TILE, 0.0f);
    std::fill(all.base, all.base + now_->strip.m, UNSET);
    std::fill(all.base + now_->strip.m, all.base + TILE, 1e3f);  // weights of queries that are not there are 0
  }

 private:
  struct Held {  // of a strip
    Strip strip;
    Queries<Kind> q;
    int64_t lanes = 0;  // queries, as products have them
    Partial sums;
    Held(const Call& c, int64_t width) : strip(c), q(c.d, false), sums(width) {}
  };

  // Of a tile of keys and some queries.
  void unit(int64_t j, Range of, const Seen* seen, Partial& into) {
    const int64_t b = now_->strip.b, h = now_->strip.hk, keys = c_.keys(j);
    for (bool again = false;; again = true) {
      multiply_keys(kind_, keys, steps<Kind>(c_.d), k_.rows(b, h, j), now_->q.turned(of.first), of, seen, scores_ + 0, Kind::UNIT,
                    k_.next_rows(b, h, j));
      kind_.flush();
      now_->strip.score(j, of, scores_, Kind::UNIT);
      if (again || Kind::ROOM == 0 || c_.bias_kind != NO_BIAS || any_unset(of, into)) set_bases(of, keys, seen, again, into);
      const bool grown = seen ? weigh<true>(j, of, seen, into) : weigh<false>(j, of, seen, into);
      if (!grown || again || Kind::ROOM == 0) break;
    }
    std::copy(total_ + of.first, total_ + of.end, into.total + of.first);
    std::copy(rounded_ + of.first, rounded_ + of.end, into.rounded + of.first);
    float* sums = into.sums + of.first * width_;
    const Right<E> weights = {weights_at(), Kind::UNIT, PART};
    if (seen && !v_.is_finite(b, h, j))
      return add_chosen_to_queries(c_.dv, keys, [&](int64_t k, int64_t p) { return v_.number(b, h, j * TILE + k, p); }, weights, of,
                                   *seen, sums, Kind::UNIT);
    add_to_queries(kind_, c_.dv, keys, v_.turned(b, h, j), weights, of, seen, sums, Kind::UNIT, v_.next_turned(b, h, j));
  }

  // Weights as a right operand. Where scores are, but for those that are several parts.
  E* weights_at() const {
    if constexpr (Kind::PARTS > 1) return weights_;
    else return reinterpret_cast<E*>(scores_ + 0);
  }

  // The keys of a tile that some of a vector of queries see, as weights are made of them: two at a time.
  Range keys_of(int64_t q, const Seen* seen) const {
    constexpr int64_t TOGETHER = std::max<int64_t>(2, Kind::STEPS * Kind::PER_STEP);
    if (!seen) return {0, TILE};
    constexpr int64_t QUERIES = std::max<int64_t>(W, Kind::LANES);
    const Range found = seen->keys({q / QUERIES * QUERIES, q / QUERIES * QUERIES + QUERIES});
    return found.empty() ? found : found.widened(TOGETHER);
  }

  // Scores become weights in their place; whether some query's sum has grown too large.
  template <bool MASKED>
  bool weigh(int64_t j, Range of, const Seen* seen, const Partial& from) {
    const bool drops = c_.drop_below;
    bool grown = false;
    for (int64_t q = of.first; q < of.end; q += W) {
      float* s = scores_ + (q - of.first);
      const Range keys = keys_of(q, seen);
      const vf factor = splat(now_->strip.factor()), base = load(from.base + q);
      vf total{}, rounded{};  // summed from 0 and then added: long sums lose less
      for (int64_t k = keys.first; k < keys.end; k += 2) {
        vf x[2];
#pragma GCC unroll 2
        for (int64_t i = 0; i < 2; ++i) {
          x[i] = exp2v<Kind::EXP2>(rounded_product(load(s + (k + i) * Kind::UNIT), factor) - base);
          if (MASKED) x[i] = seen->lanes(k + i, q) ? x[i] : vf{};
        }
        total += x[0] + x[1];
        if (ROUNDS<Kind>) rounded += (vf)rounded_bfloat(x[0]) + (vf)rounded_bfloat(x[1]);
        if (drops)
          for (int64_t i = 0; i < 2; ++i) x[i] = now_->strip.kept(j, k + i, q) ? x[i] * c_.keep_scale : vf{};
        put(q - of.first, k, x);
      }
      const vf before = load(from.total + q);
      total += before, rounded += load(from.rounded + q);
      grown |= any((vi)total & (vi)(before < INF) & 0x40000000);  // 2 or more, infinite or NaN, if it is not lost already
      store(total_ + q, total), store(rounded_ + q, ROUNDS<Kind> ? rounded : total);
    }
    return grown;
  }
  TM_INLINE void put(int64_t q, int64_t k, const vf* x) {
    E* to = weights_at() + q;
    if constexpr (Kind::PER_STEP == 2) {
      vu low[Kind::PARTS], high[Kind::PARTS];
      split<Kind::PARTS>(x[0], low), split<Kind::PARTS>(x[1], high);
      for (int part = 0; part < Kind::PARTS; ++part) store(to + part * PART + k / 2 * Kind::UNIT, low[part] >> 16 | high[part]);
    } else {
      store(to + k * Kind::UNIT, x[0]), store(to + (k + 1) * Kind::UNIT, x[1]);
    }
  }

  bool any_unset(Range of, const Partial& from) const {
    vi all{};
    for (int64_t q = of.first; q < of.end; q += W) all |= load(from.base + q) == UNSET;
    return any(all);
  }

  // Bases of queries that have none, and of those whose scores go too far beyond theirs.
  __attribute__((noinline)) void set_bases(Range of, int64_t count, const Seen* seen, bool again, Partial& into) {
    const vf factor = splat(now_->strip.factor());
    for (int64_t q = of.first; q < of.end; q += W) {
      const Range keys = keys_of(q, seen);
      vf top = splat(-INF);
      for (int64_t k = keys.first; k < std::min(keys.end, count); ++k) {
        const vf x = load(scores_ + k * Kind::UNIT + q - of.first) * factor;
        top = larger(seen ? (seen->lanes(k, q) ? x : splat(-INF)) : x, top);
      }
      if (again || any(top > load(into.base + q))) raise(of, q, top, again, into);
    }
  }
  __attribute__((noinline)) void raise(Range of, int64_t q, vf top, bool again, Partial& into) {
    vf by = splat(1.0f);
    const bool fixed = Kind::ROOM && c_.bias_kind == NO_BIAS;  // until a sum grows: what others see must not move a base
    for (int64_t i = 0; i < W; ++i) {
      float& base = into.base[q + i];
      float wanted = std::ceil(top[i]) + Kind::ROOM;
      if (!(wanted < INF && wanted > -INF) || (again ? total_[q + i] < 2 : base != UNSET && (top[i] <= base || fixed))) continue;
      if (base != UNSET) {
        wanted = std::max(wanted, base + Kind::ROOM);
        by[i] = std::exp2(base - wanted);
      }
      base = wanted;
    }
    kind_.flush();
    for (float* x : {into.total + q, into.rounded + q}) store(x, load(x) * by);
    for (int64_t p = 0; p < width_; ++p) {
      float* x = into.sums + of.first * width_ + p * Kind::UNIT + q - of.first;
      store(x, load(x) * by);
    }
  }

  const Call& c_;
  const Cut& cut_;
  const Packed<Kind>&k_, &v_;
  Kind kind_;
  std::vector<std::unique_ptr<Held>> held_;  // of the strips at hand
  Held* now_ = nullptr;
  int64_t width_;        // of values, as products have them
  Buffer<float> scores_;       // [keys, queries]; then weights as a right operand
  Buffer<E> weights_;          // or else here
  Buffer<float> out_;
  float total_[TILE], rounded_[TILE];
  Seen seen_;
};

// Parts of a strip's keys as one, always in the same order.
template <class Kind>
void join(Partial& into, const Partial& part, int64_t m, int64_t width) {
  for (int64_t r = 0; r < m; ++r) {
    if (part.total[r] == 0) continue;
    const float base = into.total[r] == 0 || part.base[r] > into.base[r] ? part.base[r] : into.base[r];
    const float a = into.total[r] == 0 ? 0 : std::exp2(into.base[r] - base), b = std::exp2(part.base[r] - base);
    const int64_t first = r / Kind::UNIT * Kind::UNIT * width + r % Kind::UNIT;
    for (int64_t p = 0; p < width; ++p) {
      float* x = into.sums + first + p * Kind::UNIT;
      *x = *x * a + part.sums[first + p * Kind::UNIT] * b;
    }
    into.total[r] = into.total[r] * a + part.total[r] * b;
    into.rounded[r] = into.rounded[r] * a + part.rounded[r] * b, into.base[r] = base;
  }
}

}  // namespace
