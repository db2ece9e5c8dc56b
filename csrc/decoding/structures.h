// A step of decoding, as Python describes it: `backends/native/step_abi.py` has the same fields in the same order.
#pragma once
#include "abi.h"

namespace {

enum Activation : int64_t { GELU, SILU, RELU_SQUARED };

// One layer. Weights are [out, in], in numbers of the model's dtype like all that is `void`.
struct Layer {
  Call attention;  // of the new tokens and all keys; where `k` and `v` lie new ones are written, too
  const void *attn_gain, *to_q, *to_k, *to_v, *q_gain, *k_gain, *to_out;  // gains of heads, [heads, d], or null
  const void *ff_gain, *ff_in, *ff_in_bias, *ff_out, *ff_out_bias;        // biases, or null
};

// All layers, for `n` new tokens of each of `b` samples whose other keys are cached.
struct Step {
  int64_t b, n, dim, inner, depth, vocabulary, dtype, threads;
  int64_t activation, gated, rms, normed_heads;  // whether halves of `ff_in` are values and gates; norms by the mean square alone; q, k of length 1
  int64_t rotary;                                // features of a head that are turned
  int64_t positions_stride, angles_stride;       // from sample to sample; 0: alike
  float eps, offset, positions_scale, logits_scale;
  const int64_t *tokens, *positions;  // [b, n]; [b or 1, n], or null: no vectors of positions
  const void *embedding, *position_embedding, *final_gain, *to_logits;
  const float *cos, *sin;  // [b or 1, n, rotary / 2]
  float* logits;           // [b, n, vocabulary]
  const Layer* layers;

  int64_t rows() const { return b * n; }
  int64_t bytes() const { return dtype == FLOAT ? 4 : 2; }
};

inline std::string step_layout() {
  std::string text;
  const auto say = [&](const char* name, int64_t a, int64_t b) {
    text += std::string(name) + " " + std::to_string(a) + " " + std::to_string(b) + "\n";
  };
#define TM_FIELD(type, name) say(#name, offsetof(type, name), sizeof(type::name));
#define TM_LAYER(name) TM_FIELD(Layer, name)
#define TM_STEP(name) TM_FIELD(Step, name)
  TM_LAYER(attention) TM_LAYER(attn_gain) TM_LAYER(to_q) TM_LAYER(to_k) TM_LAYER(to_v) TM_LAYER(q_gain) TM_LAYER(k_gain) TM_LAYER(to_out)
  TM_LAYER(ff_gain) TM_LAYER(ff_in) TM_LAYER(ff_in_bias) TM_LAYER(ff_out) TM_LAYER(ff_out_bias)
  TM_STEP(b) TM_STEP(n) TM_STEP(dim) TM_STEP(inner) TM_STEP(depth) TM_STEP(vocabulary) TM_STEP(dtype) TM_STEP(threads)
  TM_STEP(activation) TM_STEP(gated) TM_STEP(rms) TM_STEP(normed_heads) TM_STEP(rotary) TM_STEP(positions_stride) TM_STEP(angles_stride)
  TM_STEP(eps) TM_STEP(offset) TM_STEP(positions_scale) TM_STEP(logits_scale) TM_STEP(tokens) TM_STEP(positions)
  TM_STEP(embedding) TM_STEP(position_embedding) TM_STEP(final_gain) TM_STEP(to_logits) TM_STEP(cos) TM_STEP(sin) TM_STEP(logits) TM_STEP(layers)
#undef TM_STEP
#undef TM_LAYER
#undef TM_FIELD
  say("bytes", sizeof(Layer), sizeof(Step));
  say("activations", GELU, SILU), say("activations", SILU, RELU_SQUARED);
  return text;
}

}  // namespace
