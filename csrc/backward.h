// The backward: scores once more, tile by tile; dq of a row of tiles stays, dk and dv of a key head are added to.
#pragma once
#include "strip.h"

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

// Where a gradient [b, h, n, d] is summed: in the tensor itself if its rows are floats that vectors fit, or else beside it.
class Total {
 public:
  Total(const Call& c, const Array& x, int64_t heads, int64_t n, int64_t d, int64_t parts = 1)
      : c_(c), x_(x), heads_(heads), n_(n), d_(d), width_(padded(d)), parts_(parts), direct_(c.dtype == FLOAT && d == width_),
        beside_((parts - direct_) * c.b * heads * n * width_) {}

  float* row(int64_t part, int64_t b, int64_t h, int64_t n) {
    if (direct_ && part == 0) return reinterpret_cast<float*>(row_of(c_, x_, b, h, n));
    return beside_ + ((((part - direct_) * c_.b + b) * heads_ + h) * n_ + n) * width_;
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
  Buffer beside_;
};

class Backward {
 public:
  Backward(const Call& c, const BackwardCut& cut, const Packed& k, const Packed& v, Total& dq, Total& dk, Total& dv)
      : c_(c), cut_(cut), k_(k), v_(v), strip_(c), dq_(dq), dk_(dk), dv_(dv), width_(padded(c.d)), vwidth_(padded(c.dv)),
        q_(TILE * width_), dout_(TILE * vwidth_), p_(TILE * TILE), s_(TILE * TILE), dp_(TILE * TILE) {}

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
    strip_.read_queries(q_, width_);
    strip_.read(c_.dout, c_.dv, vwidth_, dout_);
    alive_ = 0;
    for (int64_t r = 0; r < strip_.m; ++r) {
      const int64_t n = strip_.number(r);
      top_[r] = c_.lse[n] * LOG2E;
      alive_ |= uint64_t(c_.lse[n] != -INF) << r;
      less_[r] = c_.delta[n] - (c_.extra ? c_.extra[n] : 0);
    }
    whole_ = alive_ == (strip_.m == TILE ? ~0ull : (1ull << strip_.m) - 1);
    finite_ = finite(q_, strip_.m * width_) && finite(dout_, strip_.m * vwidth_);
  }

  void tile(int64_t j, int32_t kind, float* dq, int64_t dq_step) {
    const int64_t m = strip_.m, keys = c_.keys(j), b = strip_.b, hk = strip_.hk;
    product(m, TILE, c_.d, q_, width_, 1, k_.turned(b, hk, j), TILE, s_, TILE, false);
    strip_.score(j, s_, TILE, slopes_);
    bool masked = strip_.see(j, kind);
    if (!whole_) {
      for (int64_t r = 0; r < m; ++r) strip_.word[r] = (masked ? strip_.word[r] : ~0ull) & (alive_ >> r & 1 ? ~0ull : 0);
      masked = true;
    }
    const float factor = strip_.factor();
    for (int64_t r = 0; r < m; ++r)
      for (int64_t n = 0; n < TILE; n += W) {
        const vf p = exp2v(load(s_ + r * TILE + n) * factor - top_[r]);
        store(p_ + r * TILE + n, masked ? (bits_at(strip_.word[r], n) ? p : vf{}) : p);
      }
    product(m, TILE, c_.dv, dout_, vwidth_, 1, v_.turned(b, hk, j), TILE, dp_, TILE, false);
    float* kept = p_;
    if (c_.drop_below) {
      strip_.drop(j, dp_, TILE);
      std::memcpy(kept = dropped_, p_, m * TILE * 4);
      strip_.drop(j, kept, TILE);
    }
    const bool careful = masked && !(finite_ && k_.is_finite(b, hk, j));
    add(careful, true, keys, vwidth_, m, kept, dout_, vwidth_, dv_.row(0, b, hk, j * TILE), dv_.step(0));
    for (int64_t r = 0; r < m; ++r)
      for (int64_t n = 0; n < TILE; n += W) {
        vf ds = load(p_ + r * TILE + n) * (load(dp_ + r * TILE + n) - less_[r]);
        if (c_.softcap != 0) ds *= load(slopes_ + r * TILE + n);
        if (masked) ds = bits_at(strip_.word[r], n) ? ds : vf{};
        store(dp_ + r * TILE + n, ds);
      }
    add(careful, true, keys, width_, m, dp_, q_, width_, dk_.row(0, b, hk, j * TILE), dk_.step(0));
    add(careful, false, m, width_, keys, dp_, k_.rows(b, hk, j), k_.row(), dq, dq_step);
  }

  // C += A B or its turn; with care for what may not be finite behind cells that are off.
  void add(bool careful, bool turned, int64_t m, int64_t n, int64_t k, const float* a, const float* b, int64_t ldb, float* c,
           int64_t ldc) {
    const int64_t row = turned ? 1 : TILE, step = turned ? TILE : 1;
    if (careful) chosen_product(m, n, k, a, row, step, b, ldb, c, ldc, strip_.word, turned);
    else product(m, n, k, a, row, step, b, ldb, c, ldc, true);
  }

  const Call& c_;
  const BackwardCut& cut_;
  const Packed &k_, &v_;
  Strip strip_;
  Total &dq_, &dk_, &dv_;
  int64_t width_, vwidth_;
  Buffer q_, dout_, p_, s_, dp_;
  Buffer dropped_{TILE * TILE}, slopes_{TILE * TILE};
  float top_[TILE], less_[TILE];
  uint64_t alive_ = 0;
  bool whole_ = true, finite_ = true;
};

}  // namespace
