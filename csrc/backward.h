// The backward: scores once more, tile by tile; dq of a row of tiles stays, dk and dv of a key head are added to.
#pragma once
#include "masked_products.h"
#include "rows.h"
#include "threads.h"

namespace {

// An item is one key head of one sample, with the query heads that share it, and a part of its keys. Parts write dk and
// dv of their own keys, and a dq of their own, which are added up in order.
struct BackwardCut {
  int64_t parts, size;  // of the keys, in tiles

  explicit BackwardCut(const Call& c) {
    const int64_t wanted = (8 + c.b * c.hk - 1) / (c.b * c.hk);
    size = std::max<int64_t>((c.tiles_k() + wanted - 1) / wanted, 1);
    parts = std::max<int64_t>((c.tiles_k() + size - 1) / size, 1);
  }
};

// Where a gradient [b, h, n, d] is summed: in the tensor itself if its rows are floats that vectors fit and that lie
// one after the other, or else beside it.
class Total {
 public:
  Total(const Call& c, const Array& x, int64_t heads, int64_t n, int64_t d, int64_t parts = 1)
      : c_(c), x_(x), heads_(heads), n_(n), d_(d), width_(padded(d)), parts_(parts), direct_(c.dtype == FLOAT && d == width_ && x.row == d),
        beside_((parts - direct_) * c.b * heads * n * width_) {}

  float* row(int64_t part, int64_t b, int64_t h, int64_t n) {
    if (direct_ && part == 0) return reinterpret_cast<float*>(row_of(c_, x_, b, h, n));
    return beside_ + ((((part - direct_) * c_.b + b) * heads_ + h) * n_ + n) * width_;
  }
  Ahead next_tile(int64_t b, int64_t h, int64_t j) {  // of the first part
    const int64_t first = (j + 1) * TILE;
    return first < n_ ? Ahead(row(0, b, h, first), std::min(TILE, n_ - first) * width_) : Ahead();
  }
  int64_t step(int64_t part) const { return direct_ && part == 0 ? x_.row : width_; }

  void clear(int64_t part, int64_t b, int64_t h, int64_t first, int64_t end) {
    for (int64_t n = first; n < std::min(end, n_); ++n) std::memset(row(part, b, h, n), 0, width_ * sizeof(float));
  }

  // The parts added up in order, times a factor, in the tensor.
  void finish(int64_t b, int64_t h, int64_t first, float by) {
    for (int64_t n = first; n < std::min(first + TILE, n_); ++n) {
      float* to = row(0, b, h, n);
      for (int64_t p = 1; p < parts_; ++p) {
        const float* more = row(p, b, h, n);
        for (int64_t i = 0; i < d_; ++i) to[i] += more[i];
      }
      write(to, by, d_, c_.dtype, row_of(c_, x_, b, h, n));
    }
  }

 private:
  const Call& c_;
  const Array& x_;
  int64_t heads_, n_, d_, width_, parts_;
  bool direct_;
  Buffer<float> beside_;
};

// The rows of a strip, of queries or of what comes back to `out`, as both products take them.
template <class E>
class Side {
  static constexpr bool WOVEN = std::is_same<E, Pair>::value;

 public:
  explicit Side(int64_t d) : d_(d), rows_(TILE * room<E>(d)), woven_(WOVEN ? HALF_TILE * padded(d) : 0) {}

  void read(const Strip& strip, const Array& x, bool queries) {
    if (queries) strip.read_queries(rows_);
    else strip.read(x, d_, rows_ + 0);
    if constexpr (WOVEN) strip.read_woven(x, d_, woven_);
    is_finite_ = finite(rows_, strip.m * row());
  }
  const E* left() const { return rows_; }  // [rows, row()]
  int64_t row() const { return room<E>(d_); }
  const E* right() const {  // [rows, padded], or woven [32, padded]
    if constexpr (WOVEN) return woven_;
    else return rows_;
  }
  bool is_finite() const { return is_finite_; }

 private:
  int64_t d_;
  bool is_finite_ = true;
  Buffer<E> rows_;
  Buffer<Pair> woven_;
};

template <class E>
class Backward {
  static constexpr bool WOVEN = std::is_same<E, Pair>::value;

 public:
  Backward(const Call& c, const BackwardCut& cut, const Packed<E>& k, const Packed<E>& v, Total& dq, Total& dk, Total& dv)
      : c_(c), cut_(cut), k_(k), v_(v), strip_(c), dq_(dq), dk_(dk), dv_(dv), width_(padded(c.d)), vwidth_(padded(c.dv)),
        q_(c.d), dout_(c.dv), p_(TILE * TILE), dp_(TILE * TILE), words_(WOVEN ? TILE * HALF_TILE : 0),
        spare_(TILE * std::max(width_, vwidth_)) {}

  void operator()(int64_t item) {
    const int64_t part = item / (c_.b * c_.hk), bh = item % (c_.b * c_.hk), b = bh / c_.hk, hk = bh % c_.hk;
    const int64_t first = part * cut_.size, end = std::min(first + cut_.size, c_.tiles_k());
    dk_.clear(0, b, hk, first * TILE, end * TILE);
    dv_.clear(0, b, hk, first * TILE, end * TILE);
    for (int64_t head = hk * c_.group(); head < (hk + 1) * c_.group(); ++head)
      for (int64_t i = 0; i < c_.tiles_q(); ++i) {
        strip_.set(b, head, 1, i);
        begin();
        dq_.clear(part, b, head, i * TILE, (i + 1) * TILE);
        float* dq = dq_.row(part, b, head, i * TILE);
        tiles_in(c_, strip_.range, first, end, [&](int64_t j, int32_t kind) { tile(j, kind, dq, dq_.step(part)); });
      }
  }

 private:
  void begin() {
    q_.read(strip_, c_.q, true);
    dout_.read(strip_, c_.dout, false);
    alive_ = 0;
    for (int64_t r = 0; r < strip_.m; ++r) {
      const int64_t n = strip_.number(r);
      top_[r] = c_.lse[n] * LOG2E;
      if (c_.keys_lse) keys_top_[r] = c_.keys_lse[n] * LOG2E, dlse_[r] = c_.dlse[n];
      alive_ |= uint64_t(c_.lse[n] != -INF) << r;
      less_[r] = c_.delta[n] - (c_.dlse && !c_.keys_lse ? c_.dlse[n] : 0);
    }
    whole_ = alive_ == below(strip_.m);
  }

  void tile(int64_t j, int32_t kind, float* dq, int64_t dq_step) {
    const int64_t m = strip_.m, b = strip_.b, hk = strip_.hk;
    masked_ = strip_.see(j, kind, word_);
    if (!whole_) {
      for (int64_t r = 0; r < m; ++r) word_[r] = (masked_ ? word_[r] : ~0ull) & (alive_ >> r & 1 ? ~0ull : 0);
      masked_ = true;
    }
    multiply(q_, steps<E>(c_.d), k_, j, p_);
    strip_.score(j, p_, TILE, slopes_);
    const float factor = strip_.factor();
    for (int64_t r = 0; r < m; ++r)
      for (int64_t n = 0; n < TILE; n += W) {
        if (c_.keys_lse) store(shares_ + r * TILE + n, exp2v(load(p_ + r * TILE + n) * factor - keys_top_[r]));
        const vf p = exp2v(load(p_ + r * TILE + n) * factor - top_[r]);
        store(p_ + r * TILE + n, masked_ ? (bits_at(word_[r], n) ? p : vf{}) : p);
      }
    multiply(dout_, steps<E>(c_.dv), v_, j, dp_);
    float* kept = p_;
    if (c_.drop_below) {
      strip_.drop(j, dp_, TILE);
      std::memcpy(kept = dropped_, p_, m * TILE * 4);
      strip_.drop(j, kept, TILE);
    }
    const bool careful = masked_ && !(q_.is_finite() && dout_.is_finite() && k_.is_finite(b, hk, j));
    add_to_keys(careful, j, kept, dout_, c_.dout, c_.dv, dv_);
    for (int64_t r = 0; r < m; ++r)
      for (int64_t n = 0; n < TILE; n += W) {
        vf ds = load(p_ + r * TILE + n) * (load(dp_ + r * TILE + n) - less_[r]);
        if (c_.keys_lse) ds += load(shares_ + r * TILE + n) * dlse_[r];
        if (c_.softcap != 0) ds *= load(slopes_ + r * TILE + n);
        if (masked_) ds = bits_at(word_[r], n) ? ds : vf{};
        store(dp_ + r * TILE + n, ds);
      }
    add_to_keys(careful, j, dp_, q_, c_.q, c_.d, dk_);
    add_to_queries(careful, j, dq, dq_step);
  }

  // Products of a side's rows with keys or values, [m, 64].
  void multiply(const Side<E>& side, int64_t steps, const Packed<E>& by, int64_t j, float* to) {
    const int64_t b = strip_.b, hk = strip_.hk;
    times_turned<E>(strip_.m, steps, side.left(), side.row(), by.turned(b, hk, j), seen(), to, TILE,
                    by.next_turned(b, hk, j));
  }
  const uint64_t* seen() const { return masked_ ? word_ : nullptr; }

  // Adds x turned [64, rows] times the rows of a side to the gradient of keys or values.
  void add_to_keys(bool careful, int64_t j, const float* x, const Side<E>& side, const Array& from, int64_t d, Total& total) {
    const int64_t m = strip_.m, keys = c_.keys(j), width = padded(d), to_step = total.step(0);
    float* to = total.row(0, strip_.b, strip_.hk, j * TILE);
    if (careful)
      return chosen_product(keys, width, m, x, 1, TILE, as_floats(side, from, d), width, to, to_step, word_, true);
    const E* left;
    if constexpr (WOVEN) {
      for (int64_t r = 0; r < HALF_TILE; ++r) {
        if (r < m) weave(x + r * TILE, r + HALF_TILE < m ? x + (r + HALF_TILE) * TILE : nullptr, TILE, words_ + r * TILE);
        else std::fill(words_ + r * TILE, words_ + (r + 1) * TILE, 0);
      }
      left = words_;
    } else {
      left = x;
    }
    const auto add = [&](int64_t first, int64_t end, Range rows) {
      const Range k = steps_of<E>(rows);
      product(end - first, width, k.end - k.first, left + k.first * TILE + first, 1, TILE, side.right() + k.first * width, width,
              to + first * to_step, to_step, true, masked_ ? Ahead() : total.next_tile(strip_.b, strip_.hk, j));
    };
    if (!masked_) return add(0, keys, {0, m});
    in_groups(keys, [&](int64_t first, int64_t end) {
      const Range rows = rows_seeing(word_, m, first, end);
      if (!rows.empty()) add(first, end, rows);
    });
  }

  // Adds the scores' gradients times the keys to the queries' gradient.
  void add_to_queries(bool careful, int64_t j, float* to, int64_t to_step) {
    const int64_t m = strip_.m, b = strip_.b, hk = strip_.hk, keys = c_.keys(j);
    if (careful)
      return with_rows(c_, c_.k, c_.d, b, hk, j, spare_, [&](auto rows) {
        chosen_product(m, width_, keys, dp_, TILE, 1, rows.at, rows.step, to, to_step, word_, false);
      });
    add_times_rows<E>(m, keys, width_, dp_, TILE, k_.rows(b, hk, j), seen(), words_, to, to_step,
                      k_.next_rows(b, hk, j));
  }

  const float* as_floats(const Side<E>& side, const Array& from, int64_t d) {
    if constexpr (!WOVEN) return side.right();
    strip_.read(from, d, spare_ + 0);
    return spare_;
  }

  const Call& c_;
  const BackwardCut& cut_;
  const Packed<E>&k_, &v_;
  Strip strip_;
  Total &dq_, &dk_, &dv_;
  int64_t width_, vwidth_;
  Side<E> q_, dout_;
  Buffer<float> p_, dp_;
  Buffer<Pair> words_;
  Buffer<float> spare_;
  Buffer<float> dropped_{TILE * TILE}, slopes_{TILE * TILE};
  Buffer<float> shares_{TILE * TILE};  // of each key among the keys, where sinks have shares too
  float top_[TILE], less_[TILE], keys_top_[TILE], dlse_[TILE];
  uint64_t alive_ = 0, word_[TILE];  // what each row sees of the tile at hand, if it is masked
  bool whole_ = true, masked_ = false;
};

}  // namespace
