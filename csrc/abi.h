// One call, as Python describes it: `backends/native/call.py` has the same fields in the same order.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "products/matmul.h"

namespace {

constexpr int64_t TILE = 64;  // queries and keys of a tile: a row of one is a 64-bit word
constexpr float LN2 = 0.693147180559945309f, LOG2E = 1.44269504088896341f;
constexpr float INF = std::numeric_limits<float>::infinity();

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
  int64_t dtype, threads;
  float scale, softcap;  // softcap 0: none
  Array q, k, v, out;
  float* lse;          // [b, hq, nq], over keys only
  const float* sinks;  // [hq], or null

  // The mask: rows of tiles as runs of key tiles, (first, end, kind): the number of a pattern, or ALL, or SLABS.
  int64_t mask_b, mask_h;
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

  // The backward: `lse` is then the log-sum-exp with the sinks. What comes back to the one over keys is `dlse`, or null;
  // beside sinks that is another one, `keys_lse`, or null where there are none.
  Array dout, dq, dk, dv_out;
  const float *dlse, *keys_lse;  // [b, hq, nq]
  float* delta;  // [b, hq, nq]: dout . out, for the sinks

  int64_t tiles_q() const { return (nq + TILE - 1) / TILE; }
  int64_t tiles_k() const { return (nk + TILE - 1) / TILE; }
  int64_t group() const { return hq / hk; }
  int64_t bytes() const { return dtype == FLOAT ? 4 : 2; }  // of a number
  int64_t keys(int64_t j) const { return std::min(TILE, nk - j * TILE); }
};

// Numbers that begin where a cache line does.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n = 0) : held_(new T[n + 16 + 3 * W]) {
    void* start = held_.get();
    size_t room = (n + 16 + 2 * W) * sizeof(T);
    at_ = static_cast<T*>(std::align(64, (n + 2 * W) * sizeof(T), start, room));
  }
  operator T*() const { return at_; }

 private:
  std::unique_ptr<T[]> held_;
  T* at_;
};

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// How threads are started: with a function that has OpenMP's `GOMP_parallel` for its form (torch's own threads: they are
// warm, and would spin beside ours), or by us. After a fork only the second way is left.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
struct Threads {
  Parallel start = nullptr;
  pid_t process = 0;
};
inline Threads& starter() {
  static Threads threads;
  return threads;
}

template <class Work>
void together(int64_t threads, const Work& work) {
  if (threads < 2) return work();
  if (starter().start && starter().process == getpid()) {
    const auto call = [](void* given) { (*static_cast<const Work*>(given))(); };
    return starter().start(call, const_cast<Work*>(&work), unsigned(threads), 0);
  }
  std::vector<std::thread> others;
  try {
    for (int64_t t = 1; t < threads; ++t) others.emplace_back(work);
  } catch (...) {  // no more threads are to be had: those that are there do it
  }
  work();
  for (auto& thread : others) thread.join();
}

// Run `make()(i)` for every i < n, the next free thread taking the next i: what i computes must not depend on who does.
template <class Make>
void each(int64_t n, int64_t threads, Make make) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};  // an exception must not leave a thread
  together(std::min(threads, n), [&] {
    try {
      if (next.load(std::memory_order_relaxed) >= n) return;
      auto run = make();
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n && !failed;) run(i);
    } catch (...) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

}  // namespace
