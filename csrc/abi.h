// One call, as Python describes it: `backends/native/abi.py` has the same fields in the same order.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

namespace {

constexpr int64_t TILE = 64;  // queries and keys of a tile: a row of one is a 64-bit word

enum Dtype : int64_t { FLOAT, BFLOAT, HALF };
enum Kind : int32_t { ALL = -1, SLABS = -2 };
enum BiasKind : int64_t { NO_BIAS, TENSOR, ALIBI, RELATIVE };

// A tensor [b, h, n, d]: strides in elements, the last one is 1.
struct Array {
  void* data;
  int64_t sample, head, row;
};

struct Call {
  int64_t b, hq, hk, nq, nk, d, dv;  // sizes
  int64_t dtype, threads, in_parts;  // whether fp32 and fp16 are multiplied as sums of bf16, where there are tiles
  float scale, softcap;  // softcap 0: none
  Array q, k, v, out;
  float* lse;          // [b, hq, nq], over keys only
  const float* sinks;  // [hq], or null
  float *base, *log_total;  // [b, hq, nq], or null: in binary digits lse is their sum, which would lose those of large scores

  // The mask: rows of tiles as runs of key tiles, (first, end, kind): the number of a pattern, or ALL, or SLABS.
  int64_t mask_b, mask_h;
  int64_t mask_row;       // the row of the mask that the first query has; not 0 only in its first row of tiles
  const int64_t* starts;  // [mask_b * mask_h * rows of tiles + 1]
  const int32_t* runs;    // [runs, 3]
  const uint64_t* words;  // [patterns, 64]: bit j of word i is cell (i, j)
  const int64_t* order;   // rows of tiles, the longest first
  // Where a run's kind is SLABS its ends are worked out for each row. Slab s has the rows from slab_rows[s] to the next,
  // and runs of keys [lo, hi) from slab_starts[s] to the next: an end is 2 * (its place on row 0) + (whether it moves).
  const int64_t* slab_first;  // [mask_b * mask_h * rows of tiles]: the slab of the first row
  const int64_t *slab_rows, *slab_starts;
  const int64_t *slab_lo, *slab_hi;

  int64_t bias_kind;
  const float* bias;  // TENSOR: numbers; ALIBI: slopes; RELATIVE: [heads, 2 reach + 1]
  int64_t bias_strides[4];  // of a tensor; of heads in [1]
  int64_t reach;
  const int64_t *q_positions, *k_positions;
  int64_t q_stride, k_stride;  // from sample to sample

  uint64_t drop_below;  // of 2^32; 0: no dropout
  uint64_t seed;
  float keep_scale;

  // The backward: `log_total` is then that with the sinks, and `lse` null. What comes back to the lse over keys is `dlse`, or
  // null; beside sinks that has another one, `keys_log_total`, or null where there are none.
  Array dout, dq, dk, dv_out;
  const float *dlse, *keys_log_total;  // [b, hq, nq]
  float* delta;  // [b, hq, nq]: dout . out, for the sinks

  int64_t tiles_q() const { return (nq + TILE - 1) / TILE; }
  int64_t tiles_k() const { return (nk + TILE - 1) / TILE; }
  int64_t group() const { return hq / hk; }
  int64_t bytes() const { return dtype == FLOAT ? 4 : 2; }  // of a number
  int64_t keys(int64_t j) const { return std::min(TILE, nk - j * TILE); }
};

// What Python must agree on, as text: the fields with their places and sizes, and the constants. A field that is missing
// here moves those behind it, or changes the size of all.
inline std::string layout() {
  std::string text;
  const auto say = [&](const char* name, int64_t a, int64_t b) {
    text += std::string(name) + " " + std::to_string(a) + " " + std::to_string(b) + "\n";
  };
#define TM_FIELD(type, name) say(#name, offsetof(type, name), sizeof(type::name));
#define TM_CALL(name) TM_FIELD(Call, name)
  TM_FIELD(Array, data) TM_FIELD(Array, sample) TM_FIELD(Array, head) TM_FIELD(Array, row)
  TM_CALL(b) TM_CALL(hq) TM_CALL(hk) TM_CALL(nq) TM_CALL(nk) TM_CALL(d) TM_CALL(dv) TM_CALL(dtype) TM_CALL(threads) TM_CALL(in_parts)
  TM_CALL(scale) TM_CALL(softcap) TM_CALL(q) TM_CALL(k) TM_CALL(v) TM_CALL(out) TM_CALL(lse) TM_CALL(sinks) TM_CALL(base) TM_CALL(log_total)
  TM_CALL(mask_b) TM_CALL(mask_h) TM_CALL(mask_row) TM_CALL(starts) TM_CALL(runs) TM_CALL(words) TM_CALL(order)
  TM_CALL(slab_first) TM_CALL(slab_rows) TM_CALL(slab_starts) TM_CALL(slab_lo) TM_CALL(slab_hi)
  TM_CALL(bias_kind) TM_CALL(bias) TM_CALL(bias_strides) TM_CALL(reach)
  TM_CALL(q_positions) TM_CALL(k_positions) TM_CALL(q_stride) TM_CALL(k_stride)
  TM_CALL(drop_below) TM_CALL(seed) TM_CALL(keep_scale)
  TM_CALL(dout) TM_CALL(dq) TM_CALL(dk) TM_CALL(dv_out) TM_CALL(dlse) TM_CALL(keys_log_total) TM_CALL(delta)
#undef TM_CALL
#undef TM_FIELD
  say("bytes", sizeof(Array), sizeof(Call));
  say("tile", TILE, TILE);
  say("dtypes", FLOAT, FLOAT), say("dtypes", BFLOAT, HALF);
  say("runs", ALL, SLABS);
  say("biases", TENSOR, ALIBI), say("biases", ALIBI, RELATIVE);
  return text;
}

// FNV-1a.
inline uint64_t hash_of(const std::string& text) {
  uint64_t hash = 14695981039346656037u;
  for (const unsigned char c : text) hash = (hash ^ c) * 1099511628211u;
  return hash;
}

}  // namespace
