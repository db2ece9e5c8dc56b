// One step of decoding, from token ids to logits: every weight is read once, as it lies, by threads that stay awake.
//
// The phases of a layer: q, k, v; their heads, whose keys and values go into the cache; attention; its projection; the
// feedforward's first product; its second one. Norms are computed by every thread for itself, which takes less than waiting.
#pragma once
#include "decoding/functions.h"
#include "decoding/team.h"
#include "products/matvec.h"
#include "reading.h"

namespace {

constexpr int64_t BLOCK = 16;  // rows of a weight that are multiplied with all vectors while the second cache holds them

// What threads share: the stream, what one phase leaves to the next, attention's parts.
struct Shared {
  const Step& s;
  const Call& call;  // that of the first layer: sizes are those of all
  int64_t heads, kv_heads, d, features;  // features: of all heads
  Buffer<float> x, raw, hidden, lse;     // [rows, dim]; [rows, q, k and v]; [rows, inner]
  Buffer<char> q, out;                   // [b, heads, n, d] and [rows, features], in the model's dtype
  std::vector<ReadingCut> cuts;
  std::vector<Parts> parts;
  std::vector<std::atomic<int64_t>> missing;
  Team team;

  static constexpr int64_t PHASES = 6;  // of a layer

  explicit Shared(const Step& s_)
      : s(s_), call(s_.layers->attention), heads(call.hq), kv_heads(call.hk), d(call.d), features(heads * d),
        x(s.rows() * s.dim), raw(s.rows() * width()), hidden(s.rows() * s.inner), lse(s.rows() * heads),
        q(s.rows() * features * s.bytes()), out(s.rows() * features * s.bytes()),
        missing(s.depth * s.rows() * heads), team(PHASES * s.depth + 2, s.threads) {
    for (int64_t l = 0; l < s.depth; ++l) {
      const Call& layer = s.layers[l].attention;
      cuts.emplace_back(layer);
      parts.emplace_back(layer, cuts[l]);
      for (int64_t i = 0; i < cuts[l].strips; ++i) missing[l * s.rows() * heads + i] = cuts[l].parts;
    }
  }
  int64_t width() const { return features + 2 * kv_heads * d; }
  Array queries() const { return {q, features * s.n, d * s.n, d}; }
  Array outputs() const { return {out, features * s.n, d, features}; }
};

// One thread's way through the phases; K: how rows of weights are read.
template <class K>
class Decoding {
  using Number = typename K::Number;

 public:
  explicit Decoding(Shared& all)
      : all_(all), s_(all.s), call_(all.call), left_(s_.rows() * std::max({s_.dim, all.features, int64_t(1)})),
        made_(s_.rows() * LD), more_(s_.rows() * LD), gates_(s_.rows() * LD), gain_(s_.dim) {
    call_.q = all.queries(), call_.out = all.outputs(), call_.lse = all.lse, call_.threads = 1;
  }

  void operator()() {
    embed();
    for (int64_t l = 0; l < s_.depth; ++l) layer(l, s_.layers[l]);
    const float* x = normed(s_.final_gain);
    multiply(s_.vocabulary, {s_.to_logits}, x, s_.dim, [&](int64_t r, int64_t first, int64_t n, const float* y, const float*) {
      for (int64_t i = 0; i < n; ++i) s_.logits[r * s_.vocabulary + first + i] = y[i] * s_.logits_scale;
    });
  }

 private:
  static constexpr int64_t LD = BLOCK + 16;  // `dots` writes whole vectors
  static constexpr int64_t NEAR = 512;       // numbers of several vectors that the first cache holds beside rows of weights

  // The weights of a product: of the outputs' rows, and of as many gates.
  struct Weights {
    const void *values, *gates = nullptr;
  };

  void embed() {
    all_.team.go(phase_++, s_.rows(), 1, [&](int64_t first, int64_t end) {
      for (int64_t r = first; r < end; ++r) {
        float* x = all_.x + r * s_.dim;
        floats(number_at(s_.embedding, s_.dtype, s_.tokens[r] * s_.dim), s_.dtype, s_.dim, s_.dim, x);
        if (!s_.positions) continue;
        const int64_t at = std::max<int64_t>(s_.positions[r / s_.n * s_.positions_stride + r % s_.n], 0);
        for (int64_t i = 0; i < s_.dim; ++i) x[i] += number(s_.position_embedding, s_.dtype, at * s_.dim + i) * s_.positions_scale;
      }
    });
  }

  void layer(int64_t l, const Layer& layer) {
    project(layer);
    place_heads(layer);
    attend(l, layer);
    add_to_stream(layer.to_out, nullptr, attended(), all_.features);
    feed_in(layer);
    add_to_stream(layer.ff_out, layer.ff_out_bias, all_.hidden, s_.inner);
  }

  // All of q, k and v, one after the other in `raw`.
  void project(const Layer& layer) {
    const float* x = normed(layer.attn_gain);
    const void* weights[3] = {layer.to_q, layer.to_k, layer.to_v};
    const int64_t keys = all_.kv_heads * all_.d, ends[3] = {all_.features, all_.features + keys, all_.width()};
    all_.team.go(phase_++, all_.width(), BLOCK, [&](int64_t first, int64_t end) {
      for (int part = 0, begin = 0; part < 3; begin = ends[part++])
        rows_of({weights[part]}, std::max<int64_t>(first - begin, 0), std::min(end, ends[part]) - begin, x, s_.dim,
                [&](int64_t r, int64_t at, int64_t n, const float* y, const float*) {
                  std::copy(y, y + n, all_.raw + r * all_.width() + begin + at);
                });
    });
  }

  // Queries to where attention reads them, keys and values behind those that the cache has.
  void place_heads(const Layer& layer) {
    const int64_t h = all_.heads, g = all_.kv_heads, d = all_.d, heads = h + 2 * g;
    const Call& c = layer.attention;
    all_.team.go(phase_++, s_.rows() * heads, 4, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        const int64_t r = i / heads, head = i % heads, b = r / s_.n, n = r % s_.n, row = c.nk - s_.n + n;
        float* x = all_.raw + r * all_.width() + head * d;
        if (head < h) finish(layer.q_gain, head, b, n, x), write(x, 1, d, s_.dtype, row_of(c, all_.queries(), b, head, n));
        else if (head < h + g) finish(layer.k_gain, head - h, b, n, x), write(x, 1, d, s_.dtype, row_of(c, c.k, b, head - h, row));
        else write(x, 1, d, s_.dtype, row_of(c, c.v, b, head - h - g, row));
      }
    });
  }
  void finish(const void* gains, int64_t head, int64_t b, int64_t n, float* x) {
    const int64_t at = b * s_.angles_stride + n * (s_.rotary / 2);
    finish_head(s_, gains ? number_at(gains, s_.dtype, head * all_.d) : nullptr, all_.d, s_.cos + at, s_.sin + at, x);
  }

  void attend(int64_t l, const Layer& layer) {
    const ReadingCut& cut = all_.cuts[l];
    const Call shared = call_;
    call_ = layer.attention;
    call_.q = shared.q, call_.out = shared.out, call_.lse = shared.lse, call_.threads = 1;
    Reading run(call_, cut);
    all_.team.go(phase_++, cut.strips * cut.parts, 1, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) read_part(run, cut, all_.parts[l], &all_.missing[l * s_.rows() * all_.heads], i);
    });
  }

  // What attention gave, as floats in the order of the weights.
  const float* attended() {
    for (int64_t r = 0; r < s_.rows(); ++r) {
      floats(number_at(all_.out, s_.dtype, r * all_.features), s_.dtype, all_.features, all_.features, wide());
      arrange(wide(), all_.features, left_ + r * all_.features);
    }
    return left_;
  }

  void feed_in(const Layer& layer) {
    const float* x = normed(layer.ff_gain);
    const auto bias = [&](int64_t i) { return layer.ff_in_bias ? number(layer.ff_in_bias, s_.dtype, i) : 0.0f; };
    const Weights weights{layer.ff_in, s_.gated ? number_at(layer.ff_in, s_.dtype, s_.inner * s_.dim) : nullptr};
    multiply(s_.inner, weights, x, s_.dim, [&](int64_t r, int64_t first, int64_t n, float* y, float* gates) {
      float* acts = s_.gated ? gates : y;
      for (int64_t i = 0; i < n; ++i) y[i] += bias(first + i);
      for (int64_t i = 0; i < n && s_.gated; ++i) gates[i] += bias(s_.inner + first + i);
      for (int64_t i = 0; i < n; i += W) store(acts + i, activated(load(acts + i), s_.activation));
      float* to = all_.hidden + r * s_.inner;
      for (int64_t i = 0; i < n; ++i) to[place(first + i, s_.inner)] = s_.gated ? y[i] * gates[i] : y[i];
    });
  }

  void add_to_stream(const void* weight, const void* bias, const float* left, int64_t width) {
    multiply(s_.dim, {weight}, left, width, [&](int64_t r, int64_t first, int64_t n, const float* y, const float*) {
      float* x = all_.x + r * s_.dim + first;
      for (int64_t i = 0; i < n; ++i) x[i] += y[i] + (bias ? number(bias, s_.dtype, first + i) : 0);
    });
  }

  // The stream normed, in the order of the weights.
  const float* normed(const void* gain) {
    for (int64_t i = 0; i < s_.dim; ++i) gain_[i] = number(gain, s_.dtype, i) + s_.offset;
    for (int64_t r = 0; r < s_.rows(); ++r) {
      norm(all_.x + r * s_.dim, s_.dim, s_.rms, s_.eps, wide());
      for (int64_t i = 0; i < s_.dim; ++i) wide_[i] *= gain_[i];
      arrange(wide(), s_.dim, left_ + r * s_.dim);
    }
    return left_;
  }

  // The vectors of `left` times each of n rows of weights, as a phase: `take(vector, first row, rows, products, gates)`.
  template <class F>
  void multiply(int64_t n, Weights weights, const float* left, int64_t width, F take) {
    all_.team.go(phase_++, n, BLOCK, [&](int64_t first, int64_t end) { rows_of(weights, first, end, left, width, take); });
  }
  template <class F>
  void rows_of(Weights weights, int64_t first, int64_t end, const float* left, int64_t width, F take) {
    for (int64_t i = first; i < end; i += BLOCK) {
      const int64_t n = std::min(BLOCK, end - i);
      products(weights.values, i, n, left, width, made_);
      if (weights.gates) products(weights.gates, i, n, left, width, gates_);
      for (int64_t r = 0; r < s_.rows(); ++r) take(r, i, n, made_ + r * LD, gates_ + r * LD);
    }
  }
  void products(const void* weight, int64_t first, int64_t n, const float* left, int64_t width, float* to) {
    const RowsOf<K> rows{static_cast<const Number*>(weight) + first * width, width};
    const int64_t m = s_.rows(), some = m < 3 ? width : std::min(width, NEAR);
    dots<K>(m, n, some, left, width, rows, to, LD);
    for (int64_t p = some; p < width; p += some) {
      dots<K>(m, n, std::min(some, width - p), left + p, width, {rows.at + p, width}, more_, LD);
      for (int64_t i = 0; i < m * LD; i += W) store(to + i, load(to + i) + load(more_ + i));
    }
  }

  // Where a number stands among those that are multiplied with weights: pairs of those are taken apart.
  static int64_t place(int64_t i, int64_t width) {
    if (!std::is_same<K, SplitRows>::value) return i;
    const int64_t block = i / (2 * W) * 2 * W, within = i % (2 * W);
    return block + 2 * W > width ? i : block + within % 2 * W + within / 2;
  }
  static void arrange(const float* from, int64_t width, float* to) {
    for (int64_t i = 0; i < width; ++i) to[place(i, width)] = from[i];
  }
  float* wide() {
    const size_t most = std::max(s_.dim, all_.features);
    if (wide_.size() < most) wide_.resize(most);
    return wide_.data();
  }

  Shared& all_;
  const Step& s_;
  Call call_;
  Buffer<float> left_, made_, more_, gates_, gain_;
  std::vector<float> wide_;
  int64_t phase_ = 0;
};

template <class K>
void decode(Shared& all) {
  all.team.run([&] { Decoding<K> run(all); run(); });
}
inline void decode(const Step& s) {
  Shared all(s);
  if (s.dtype == FLOAT) decode<FloatRows>(all);
  else if (s.dtype == BFLOAT) decode<SplitRows>(all);
  else decode<HalfRows>(all);
}

}  // namespace
