// The forward: rows of tiles by online softmax, some key tiles at a time, whose scores stay in the first cache.
#pragma once
#include "masked_products.h"
#include "rows.h"
#include "threads.h"

namespace {

constexpr int64_t CHUNK = 4;         // key tiles at a time
constexpr int64_t LD = CHUNK * TILE;  // from one row of scores to the next
constexpr int64_t SPLIT = 16;        // key tiles of a part at least, where few queries see many keys
constexpr int64_t MOST_PARTS = 32;
constexpr int64_t FEW = 8;           // rows up to which keys are read as they lie: transposing them would take longer

// How a call is cut into items; by its sizes alone, so that results do not depend on threads.
struct Cut {
  int64_t stacked;  // query heads whose rows lie one below the other
  int64_t strips;   // of all samples and heads
  bool direct;      // whether keys and values are read as they lie
  int64_t parts;    // of the keys of each
  int64_t size;     // key tiles of a part

  explicit Cut(const Call& c) {
    stacked = c.mask_h == 1 && c.group() * c.nq <= TILE ? c.group() : 1;
    strips = c.tiles_q() * c.b * c.hq / stacked;
    direct = stacked * c.nq <= FEW;
    const bool few = strips < 64 && c.nq <= TILE;
    size = few ? std::max(SPLIT, (c.tiles_k() + MOST_PARTS - 1) / MOST_PARTS) : std::max<int64_t>(c.tiles_k(), 1);
    parts = std::max<int64_t>((c.tiles_k() + size - 1) / size, 1);
  }
};

// What a part of a strip's keys comes to: sums of weighted values, their weights, the highest score in base 2.
struct Partial {
  Buffer<float> sums;  // [64, width]
  float total[TILE], top[TILE];
  explicit Partial(int64_t width) : sums(TILE * width) {}
};

template <class E>
class Forward {
  static constexpr bool WOVEN = std::is_same<E, Pair>::value;

 public:
  Forward(const Call& c, const Cut& cut, const Packed<E>& k, const Packed<E>& v)
      : c_(c), cut_(cut), k_(k), v_(v), strip_(c), depth_(room<E>(c.d)), width_(padded(c.dv)), q_(TILE * depth_),
        scores_(TILE * LD), weights_(WOVEN ? TILE * HALF_TILE : 0), keys_(cut.direct ? TILE * depth_ : 0),
        values_(TILE * width_) {}

  Strip& at(int64_t i) {  // the strip, and its queries
    const int64_t heads = c_.hq / cut_.stacked, bh = i / c_.tiles_q();  // head by head: its keys stay in the cache
    strip_.set(bh / heads, bh % heads * cut_.stacked, cut_.stacked, c_.order[i % c_.tiles_q()]);
    strip_.read_queries(q_);
    return strip_;
  }

  void attend(int64_t first, int64_t end, Partial& into) {
    for (int64_t r = 0; r < strip_.m; ++r) into.top[r] = -INF, into.total[r] = 0;
    std::fill(into.sums + 0, into.sums + strip_.m * width_, 0.0f);
    held_ = 0;
    tiles_in(c_, strip_.range, first, end, [&](int64_t j, int32_t kind) {
      tiles_[held_] = j, kinds_[held_] = kind;
      if (++held_ == CHUNK) chunk(into);
    });
    if (held_) chunk(into);
  }

  void finish(const Partial& from) const {
    for (int64_t r = 0; r < strip_.m; ++r) {
      const float lse = from.total[r] == 0 ? -INF : (from.top[r] + std::log2(from.total[r])) * LN2;
      float by = from.total[r] == 0 ? 0 : 1 / from.total[r];
      if (c_.sinks && from.total[r] != 0) by /= 1 + std::exp(c_.sinks[strip_.head_of(r)] - lse);
      write(from.sums + r * width_, by, c_.dv, c_.dtype, row_of(c_, c_.out, strip_.b, strip_.head_of(r), strip_.query(r)));
      c_.lse[strip_.number(r)] = lse;
    }
  }

 private:
  void chunk(Partial& into) {
    for (int64_t t = 0; t < held_; ++t) {
      float* s = scores_ + t * TILE;
      masked_[t] = strip_.see(tiles_[t], kinds_[t], words_[t]);
      multiply_keys(t, s);
      strip_.score(tiles_[t], s, LD);
      if (masked_[t]) strip_.hide(words_[t], s, LD);
    }
    for (int64_t r = 0; r < strip_.m; ++r) weigh(r, held_ * TILE, into);
    for (int64_t t = 0; t < held_; ++t) {
      float* p = scores_ + t * TILE;
      if (c_.drop_below) strip_.drop(tiles_[t], p, LD);
      if (masked_[t] && !v_.is_finite(strip_.b, strip_.hk, tiles_[t])) add_chosen_values(t, p, into);
      else add_values(t, p, into);
    }
    held_ = 0;
  }

  const uint64_t* seen(int64_t t) const { return masked_[t] ? words_[t] : nullptr; }

  // Scores of a tile of the chunk; what no row of a group sees is left as it was, and hidden after.
  void multiply_keys(int64_t t, float* s) {
    const int64_t b = strip_.b, h = strip_.hk, j = tiles_[t];
    if (cut_.direct) {
      if constexpr (!WOVEN)
        with_rows(c_, c_.k, c_.d, b, h, j, keys_, [&](auto rows) {
          dots(strip_.m, c_.keys(j), depth_, q_, depth_, rows, s, LD);
        });
      return;
    }
    times_turned<E>(strip_.m, steps<E>(c_.d), q_, depth_, k_.turned(b, h, j), seen(t), s, LD,
                    k_.next_turned(b, h, j));
  }

  // Adds weights times the values of a tile of the chunk.
  void add_values(int64_t t, float* p, Partial& into) {
    const int64_t b = strip_.b, h = strip_.hk, j = tiles_[t];
    if (cut_.direct) {
      if constexpr (!WOVEN)
        with_rows(c_, c_.v, c_.dv, b, h, j, values_, [&](auto rows) {
          sums(strip_.m, width_, c_.keys(j), p, LD, rows, into.sums, width_);
        });
      return;
    }
    add_times_rows<E>(strip_.m, TILE, width_, p, LD, v_.rows(b, h, j), seen(t), weights_, into.sums, width_,
                      v_.next_rows(b, h, j));
  }

  // The same where values that a row may not see are not finite.
  void add_chosen_values(int64_t t, const float* p, Partial& into) {
    const int64_t j = tiles_[t];
    with_rows(c_, c_.v, c_.dv, strip_.b, strip_.hk, j, values_, [&](auto rows) {
      chosen_product(strip_.m, width_, c_.keys(j), p, LD, 1, rows.at, rows.step, into.sums, width_, words_[t], false);
    });
  }

  // Scores of one row become weights; what was summed before shrinks if there is a new highest score.
  void weigh(int64_t r, int64_t n, Partial& into) {
    float* s = scores_ + r * LD;
    const float factor = strip_.factor();
    vf high = load(s);
    for (int64_t j = W; j < n; j += W) high = larger(load(s + j), high);
    float now = largest(high) * factor;
    now = now > into.top[r] ? now : into.top[r];
    const float base = now == -INF ? 0 : now;
    if (now != into.top[r]) {
      const float shrink = into.total[r] == 0 ? 0 : exp2f_(into.top[r] - base);
      for (int64_t p = 0; p < width_; p += W) store(into.sums + r * width_ + p, load(into.sums + r * width_ + p) * shrink);
      into.total[r] *= shrink, into.top[r] = now;
    }
    vf all = vf{};
    for (int64_t j = 0; j < n; j += W) {
      const vf p = exp2v(load(s + j) * factor - base);
      store(s + j, p);
      all += p;
    }
    into.total[r] += sum(all);
  }

  const Call& c_;
  const Cut& cut_;
  const Packed<E>&k_, &v_;
  Strip strip_;
  int64_t depth_, width_, held_ = 0;  // head sizes as products have them
  Buffer<E> q_;
  Buffer<float> scores_;
  Buffer<Pair> weights_;
  Buffer<float> keys_, values_;
  int64_t tiles_[CHUNK];
  int32_t kinds_[CHUNK];
  bool masked_[CHUNK];
  uint64_t words_[CHUNK][TILE];  // what each row sees of the tiles that are masked
};

}  // namespace
