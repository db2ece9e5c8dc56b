// The backward: scores once more, tile by tile of keys; what comes back to a strip's queries stays, that to keys is added to.
//
// As in the forward queries lie along the vectors, so that log-sum-exps stay in registers; weights and gradients of scores leave
// them as the products need them: [keys, queries] is the left operand of what keys get, and the right one of what queries get.
#pragma once
#include "masked_products.h"
#include "queries.h"
#include "threads.h"

namespace {

// An item is one key head of one sample, with the query heads that share it, and a part of its keys. Parts write dk and
// dv of their own keys, and a dq of their own, which are added up in order.
struct BackwardCut {
  int64_t parts, size, span;  // of the keys, in tiles; a span is gone through by all queries before the next

  BackwardCut(const Call& c, int64_t span_numbers) {
    const int64_t wanted = (8 + c.b * c.hk - 1) / (c.b * c.hk);
    size = std::max<int64_t>((c.tiles_k() + wanted - 1) / wanted, 1);
    parts = std::max<int64_t>((c.tiles_k() + size - 1) / size, 1);
    span = std::min(size, std::max<int64_t>(span_numbers / std::max(c.d, c.dv) / TILE, 1));
  }
};

// What comes back to the keys or values of an item, tiles from `begin` to `finish`: summed in the tensor [b, h, n, d] itself if
// its rows are floats that vectors fit and that lie one after the other, or else beside it, as always for tiles, which have
// rows that are not there.
class KeyGradient {
 public:
  KeyGradient(const Call& c, const Array& x, int64_t d, int64_t tiles, bool in_tiles)
      : c_(c), x_(x), d_(d), width_(padded(d)), direct_(!in_tiles && c.dtype == FLOAT && d == width_ && x.row == d),
        beside_(direct_ ? 0 : tiles * TILE * width_) {}

  void begin(int64_t b, int64_t h, Range tiles) {
    b_ = b, h_ = h, tiles_ = tiles;
    if (!direct_) std::memset(beside_, 0, (tiles.end - tiles.first) * TILE * width_ * sizeof(float));
    else for (int64_t j = tiles.first; j < tiles.end; ++j) std::memset(tile(j), 0, c_.keys(j) * width_ * sizeof(float));
  }
  float* tile(int64_t j) { return direct_ ? reinterpret_cast<float*>(row(j)) : beside_ + (j - tiles_.first) * TILE * width_; }
  Ahead next_tile(int64_t j) { return j + 1 < tiles_.end ? Ahead(tile(j + 1), c_.keys(j + 1) * width_) : Ahead(); }
  int64_t width() const { return width_; }

  void finish(float by) {
    for (int64_t j = tiles_.first; j < tiles_.end; ++j)
      for (int64_t n = 0; n < c_.keys(j); ++n) write(tile(j) + n * width_, by, d_, c_.dtype, row(j, n));
  }

 private:
  char* row(int64_t j, int64_t n = 0) const { return row_of(c_, x_, b_, h_, j * TILE + n); }

  const Call& c_;
  const Array& x_;
  int64_t d_, width_, b_ = 0, h_ = 0;
  Range tiles_{};
  bool direct_;
  Buffer<float> beside_;
};

// What comes back to the queries, turned: [d, 64] for each tile of theirs. Of each part where there are several.
template <class Kind>
class QueryGradient {
 public:
  QueryGradient(const Call& c, int64_t parts)
      : c_(c), parts_(parts), rows_(multiple(c.d, Kind::ROWS)), of_parts_(parts > 1 ? parts * c.b * c.hq * c.tiles_q() * size() : 0) {}

  int64_t size() const { return rows_ * TILE; }  // of a tile
  float* tile(int64_t part, int64_t b, int64_t h, int64_t i) const {
    return of_parts_ + (((part * c_.b + b) * c_.hq + h) * c_.tiles_q() + i) * size();
  }
  // A tile [d, 64], which is turned in `spare`, into the tensor.
  void write_tile(int64_t b, int64_t h, int64_t i, const float* from, float* spare) const {
    const int64_t count = std::min(TILE, c_.nq - i * TILE), row = padded(c_.d);
    transpose<float>(from, TILE, c_.d, count, spare, row);
    for (int64_t r = 0; r < count; ++r) write(spare + r * row, c_.scale, c_.d, c_.dtype, row_of(c_, c_.dq, b, h, i * TILE + r));
  }
  // Of all parts, added up in order.
  void finish(int64_t b, int64_t h, int64_t i, float* spare) const {
    float* all = tile(0, b, h, i);
    for (int64_t part = 1; part < parts_; ++part) {
      const float* more = tile(part, b, h, i);
      for (int64_t x = 0; x < size(); ++x) all[x] += more[x];
    }
    write_tile(b, h, i, all, spare);
  }

 private:
  const Call& c_;
  int64_t parts_, rows_;
  Buffer<float> of_parts_;
};

// Queries that are treated as if they saw nothing: a bit for each of a tile, for each tile of each head; or empty.
using Left_out = std::vector<uint64_t>;

template <class Kind>
class Backward {
  using E = typename Kind::E;
  static constexpr bool PAIRED = Kind::PER_STEP == 2;
  static constexpr int64_t LEFT = TILE / Kind::PER_STEP;  // from one row of a left operand to the next
  static constexpr int64_t PART = TILE * LEFT;            // of weights: from one to the next

 public:
  Backward(const Call& c, const BackwardCut& cut, const Packed<Kind>& k, const Packed<Kind>& v, const QueryGradient<Kind>& dq,
           const Left_out& left_out)
      : c_(c), cut_(cut), k_(k), v_(v), left_out_(left_out), strip_(c), dq_(dq), dk_(c, c.dk, c.d, cut.size, Kind::ROWS > 1),
        dv_(c, c.dv_out, c.dv, cut.size, Kind::ROWS > 1), q_(c.d, true), dout_(c.dv, true),
        scores_(TILE * Kind::UNIT), dp_(TILE * Kind::UNIT), slopes_(c.softcap != 0 ? TILE * Kind::UNIT : 0),
        weights_(PAIRED ? Kind::PARTS * PART : 0), ds_(PAIRED ? Kind::PARTS * PART : 0), ds_right_(PAIRED ? Kind::PARTS * PART : 0),
        sums_(cut.parts > 1 ? 0 : dq.size() * (cut.span < cut.size ? c.tiles_q() : 1)), spare_(TILE * padded(std::max(c.d, c.dv))) {}

  void operator()(int64_t item) {
    const int64_t part = item / (c_.b * c_.hk), b = item % (c_.b * c_.hk) / c_.hk, hk = item % c_.hk;
    const int64_t first = part * cut_.size, end = std::min(first + cut_.size, c_.tiles_k());
    dk_.begin(b, hk, {first, end});
    dv_.begin(b, hk, {first, end});
    for (int64_t head = hk * c_.group(); head < (hk + 1) * c_.group(); ++head)
      for (int64_t from = first; from < end; from += cut_.span)
        for (int64_t i = 0; i < c_.tiles_q(); ++i) strip(part, b, head, i, from == first, {from, std::min(from + cut_.span, end)}, end);
    dk_.finish(c_.scale);
    dv_.finish(1);
  }

 private:
  // The queries of a tile and a span of keys.
  void strip(int64_t part, int64_t b, int64_t head, int64_t i, bool begins, Range span, int64_t end) {
    strip_.set(b, head, 1, i);
    to_queries_ = cut_.parts > 1 ? dq_.tile(part, b, head, i) : sums_ + (cut_.span < cut_.size ? i * dq_.size() : 0);
    if (begins) std::memset(to_queries_, 0, dq_.size() * sizeof(float));
    begun_ = false;
    tiles_in(c_, strip_.range, span.first, span.end, [&](int64_t j, int32_t kind) {
      if (!begun_) begin();
      if (alive_) tile(j, kind);
    });
    kind_.flush();
    if (cut_.parts == 1 && span.end == end) dq_.write_tile(b, head, i, to_queries_, spare_);
  }

  void begin() {
    begun_ = true;
    lanes_ = multiple(strip_.m, Kind::LANES);
    q_.read(strip_, c_.q, lanes_);
    dout_.read(strip_, c_.dout, lanes_);
    alive_ = below(strip_.m);
    if (!left_out_.empty()) alive_ &= ~left_out_[(strip_.b * c_.hq + strip_.head) * c_.tiles_q() + strip_.tile];
    std::fill(base_, base_ + TILE, 1e30f);  // weights of queries that are not there are 0
    for (float* x : {log_total_, keys_log_total_, less_, dlse_}) std::fill(x, x + TILE, 0.0f);
    for (int64_t r = 0; r < strip_.m; ++r) {
      const int64_t n = strip_.number(r);
      less_[r] = c_.delta[n] - (c_.dlse && !c_.keys_log_total ? c_.dlse[n] : 0);
      if (c_.log_total[n] == -INF) alive_ &= ~(1ull << r);  // nor of those that see nothing
      if (!(alive_ >> r & 1)) continue;
      base_[r] = c_.base[n], log_total_[r] = c_.log_total[n];
      if (c_.keys_log_total) keys_log_total_[r] = c_.keys_log_total[n], dlse_[r] = c_.dlse[n];
    }
  }

  void tile(int64_t j, int32_t kind) {
    const int64_t b = strip_.b, hk = strip_.hk, keys = c_.keys(j);
    bool masked = strip_.see(j, kind, seen_);
    // Queries that are not there are zeros, and those times infinity would be NaN.
    const bool not_there = strip_.m % (Kind::PER_STEP * Kind::STEPS) && !(k_.is_finite(b, hk, j) && v_.is_finite(b, hk, j));
    if (not_there || alive_ != below(strip_.m)) hide_dead(masked), masked = true;
    const Seen* seen = masked ? &seen_ : nullptr;
    for (int64_t q = 0; q < lanes_; q += Kind::UNIT) {
      const Range of{q, std::min(q + Kind::UNIT, lanes_)};
      multiply_keys(kind_, keys, steps<Kind>(c_.d), k_.rows(b, hk, j), q_.turned(q), of, seen, scores_ + 0, Kind::UNIT,
                    k_.next_rows(b, hk, j));
      multiply_keys(kind_, keys, steps<Kind>(c_.dv), v_.rows(b, hk, j), dout_.turned(q), of, seen, dp_ + 0, Kind::UNIT,
                    v_.next_rows(b, hk, j));
      kind_.flush();
      strip_.score(j, of, scores_, Kind::UNIT, c_.softcap != 0 ? slopes_ + 0 : nullptr);
      const bool plain = c_.softcap == 0 && !c_.keys_log_total && !c_.drop_below;
      if (masked) plain ? weigh<true, true>(j, of) : weigh<true, false>(j, of);
      else plain ? weigh<false, true>(j, of) : weigh<false, false>(j, of);
    }
    if (masked && !(q_.is_finite() && dout_.is_finite() && k_.is_finite(b, hk, j))) return add_chosen(j);
    const int64_t queries = multiple(strip_.m, Kind::PER_STEP * Kind::STEPS);
    add_to_keys(kind_, keys, dv_.width(), queries, left(weights_, scores_), dout_.rows(), seen, dv_.tile(j), dv_.width(), dv_.next_tile(j));
    add_to_keys(kind_, keys, dk_.width(), queries, left(ds_, dp_), q_.rows(), seen, dk_.tile(j), dk_.width(), dk_.next_tile(j));
    add_to_queries(kind_, c_.d, keys, k_.turned(b, hk, j), right(), {0, lanes_}, seen, to_queries_, TILE, k_.next_turned(b, hk, j));
  }

  // Pairs have weights of their own; floats stay where scores were.
  Left<E> left(const Buffer<E>& paired, const Buffer<float>& floats) const {
    if constexpr (PAIRED) return {paired, LEFT, 1, PART};
    else return {floats, LEFT, 1, 0};
  }
  Right<E> right() const {
    if constexpr (PAIRED) return {ds_right_, TILE, PART};
    else return {dp_, TILE, 0};
  }

  void hide_dead(bool masked) {
    uint64_t* word = seen_.words();
    for (int64_t r = 0; r < TILE; ++r) word[r] = (masked ? word[r] : ~0ull) & (alive_ >> r & 1 ? ~0ull : 0);
    seen_.set();
  }

  // Scores become weights, and with what comes back to them their gradients. PLAIN: no soft cap, dropout or lse of its own.
  template <bool MASKED, bool PLAIN>
  void weigh(int64_t j, Range of) {
    const vf factor = splat(strip_.factor());
    for (int64_t q = of.first; q < of.end; q += W) {
      float *s = scores_ + (q - of.first), *g = dp_ + (q - of.first);
      const vf base = load(base_ + q), log_total = load(log_total_ + q), less = load(less_ + q);
      for (int64_t k = 0; k < TILE; k += 2) {
        vf p[2], ds[2];
#pragma GCC unroll 2
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t at = (k + i) * Kind::UNIT;
          const vf x = rounded_product(load(s + at), factor) - base;  // as in the forward, to the last bit
          vf dp = load(g + at);
          p[i] = exp2v<Kind::EXP2>(x - log_total);
          const vf weight = p[i];
          if (!PLAIN && c_.drop_below) {
            const vi kept = strip_.kept(j, k + i, q);
            p[i] = kept ? p[i] * c_.keep_scale : vf{}, dp = kept ? dp * c_.keep_scale : vf{};
          }
          ds[i] = weight * (dp - less);
          if (!PLAIN && c_.keys_log_total) ds[i] += exp2v(x - load(keys_log_total_ + q)) * load(dlse_ + q);
          if (!PLAIN && c_.softcap != 0) ds[i] *= load(slopes_ + (q - of.first) + at);
          if (MASKED) {
            const vi on = seen_.lanes(k + i, q);
            p[i] = on ? p[i] : vf{}, ds[i] = on ? ds[i] : vf{};
          }
        }
        put(s, g, k, q, p, ds);
      }
    }
  }
  TM_INLINE void put(float* s, float* g, int64_t k, int64_t q, const vf* p, const vf* ds) {
    if constexpr (PAIRED) {
      vh weights[2][Kind::PARTS], both[2][Kind::PARTS];
      for (int64_t i = 0; i < 2; ++i) halved<Kind::PARTS>(p[i], weights[i]), halved<Kind::PARTS>(ds[i], both[i]);
      for (int64_t part = 0; part < Kind::PARTS; ++part) {
        for (int64_t i = 0; i < 2; ++i) {
          store(reinterpret_cast<uint16_t*>(weights_ + part * PART + (k + i) * LEFT) + q, weights[i][part]);
          store(reinterpret_cast<uint16_t*>(ds_ + part * PART + (k + i) * LEFT) + q, both[i][part]);
        }
        store(ds_right_ + part * PART + k / 2 * TILE + q, paired(both[0][part], both[1][part]));
      }
    } else {
      for (int64_t i = 0; i < 2; ++i) store(s + (k + i) * Kind::UNIT, p[i]), store(g + (k + i) * Kind::UNIT, ds[i]);
    }
  }

  // The three products where numbers that a cell may not see are not finite.
  __attribute__((noinline)) void add_chosen(int64_t j) {
    const int64_t b = strip_.b, hk = strip_.hk, m = strip_.m, keys = c_.keys(j);
    const auto of_keys = [&](const Array& x, int64_t d, Left<E> weights, KeyGradient& to) {
      for (int64_t r = 0; r < m; ++r) floats(strip_.row(x, r), c_.dtype, d, padded(d), spare_ + r * padded(d));
      add_chosen_to_keys(keys, to.width(), m, weights, spare_, padded(d), seen_, to.tile(j), to.width());
    };
    of_keys(c_.dout, c_.dv, left(weights_, scores_), dv_);
    of_keys(c_.q, c_.d, left(ds_, dp_), dk_);
    add_chosen_to_queries(c_.d, keys, [&](int64_t k, int64_t p) { return k_.number(b, hk, j * TILE + k, p); }, right(), {0, lanes_},
                          seen_, to_queries_, TILE);
  }

  const Call& c_;
  const BackwardCut& cut_;
  const Packed<Kind>&k_, &v_;
  const Left_out& left_out_;
  Kind kind_;
  Strip strip_;
  const QueryGradient<Kind>& dq_;
  KeyGradient dk_, dv_;
  Queries<Kind> q_, dout_;
  Buffer<float> scores_, dp_, slopes_;  // [keys, queries]; floats become weights and gradients of scores in their place
  Buffer<E> weights_, ds_, ds_right_;   // those of pairs
  Buffer<float> sums_, spare_;
  float* to_queries_ = nullptr;  // [d, 64]
  float base_[TILE], log_total_[TILE], keys_log_total_[TILE], less_[TILE], dlse_[TILE];
  uint64_t alive_ = 0;
  int64_t lanes_ = 0;
  bool begun_ = false;
  Seen seen_;
};

}  // namespace
