// What stands between the products of a model: norms, activations, turned heads.
#pragma once
#include <cmath>

#include "decoding/structures.h"
#include "strip.h"

namespace {

// x Phi(x). The complement of the error function is W. J. Cody's kind of Chebyshev fit as in Numerical Recipes (`erfcc`),
// whose relative error is below 1.2e-7 everywhere.
TM_INLINE vf gelu(vf x) {
  const vf z = (x < 0 ? -x : x) * 0.70710678118654752f, t = 1.0f / (1.0f + 0.5f * z);
  const vf p = polynomial(t, 0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f,
                          0.37409196f, 1.00002368f, -1.26551223f);
  const vf beyond = t * exp2v((p - z * z) * LOG2E);
  return 0.5f * x * (x < 0 ? beyond : 2.0f - beyond);
}
TM_INLINE vf silu(vf x) { return x / (1.0f + exp2v(x * -LOG2E)); }
TM_INLINE vf relu_squared(vf x) {
  const vf y = larger(vf{}, x);  // in this order NaN stays
  return y * y;
}
TM_INLINE vf activated(vf x, int64_t how) { return how == GELU ? gelu(x) : how == SILU ? silu(x) : relu_squared(x); }

// Number i of an array in the model's dtype.
TM_INLINE float number(const void* from, int64_t dtype, int64_t i) {
  if (dtype == FLOAT) return static_cast<const float*>(from)[i];
  const uint16_t half = static_cast<const uint16_t*>(from)[i];
  return dtype == BFLOAT ? from_bfloat(half) : from_half(half);
}
inline const void* number_at(const void* from, int64_t dtype, int64_t i) {
  return static_cast<const char*>(from) + i * (dtype == FLOAT ? 4 : 2);
}

// f(x) summed over numbers, some vectors side by side.
template <class F>
TM_INLINE float summed(const float* x, int64_t n, F f) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int t = 0; t < 4; ++t) sums[t] += f(load(x + i + t * W));
  float rest = 0;
  for (; i < n; ++i) rest += f(splat(x[i]))[0];
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}
inline float length_of(const float* x, int64_t n) {
  return std::sqrt(summed(x, n, [](vf y) { return y * y; }));
}

// A vector whose mean is taken away (unless `rms`), divided by the root of its mean square.
inline void norm(const float* x, int64_t n, bool rms, float eps, float* to) {
  const float middle = rms ? 0 : summed(x, n, [](vf y) { return y; }) / n;
  const float squares = summed(x, n, [&](vf y) { return (y - middle) * (y - middle); });
  const float by = 1 / std::sqrt(squares / n + eps);
  for (int64_t i = 0; i < n; ++i) to[i] = (x[i] - middle) * by;
}

// A head of queries or keys: of length 1, normed by its gain (which is added to 1), turned by pairs.
inline void finish_head(const Step& s, const void* gain, int64_t d, const float* cos, const float* sin, float* x) {
  if (s.normed_heads) {
    const float by = 1 / std::max(length_of(x, d), 1e-12f);
    for (int64_t i = 0; i < d; ++i) x[i] *= by;
  }
  if (gain) {
    norm(x, d, true, 1e-8f, x);
    for (int64_t i = 0; i < d; ++i) x[i] *= number(gain, s.dtype, i) + 1;
  }
  for (int64_t i = 0; i < s.rotary / 2; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i], x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

}  // namespace
