// Products of small matrices: C[m, n] = or += A[m, k] B[k, n]. A has any two strides, rows of B and C have no gaps.
// A and B are floats, or pairs of bf16: then a step of k takes both.
#pragma once
#include <algorithm>

#include "isa/simd.h"

namespace {

constexpr int ROWS = W == 4 ? 4 : 6;      // of C that stay in registers
constexpr int ACROSS = W == 16 ? 4 : 2;   // vectors of each

// Memory without gaps that is read soon. A few of its lines are called for with each block: a processor waits for few at
// once, so that calling for all would stop it.
class Ahead {
 public:
  Ahead() = default;
  template <class T>
  Ahead(const T* at, int64_t numbers) : at_(reinterpret_cast<const char*>(at)), lines_(numbers * sizeof(T) / LINE) {}

  void spread(int64_t blocks) { each_ = (lines_ + blocks - 1) / blocks; }
  TM_INLINE void some() {
    for (int64_t i = 0; i < each_; ++i, at_ += LINE) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr int64_t LINE = 64;
  const char* at_ = nullptr;
  int64_t lines_ = 0, each_ = 0;
};

template <int M, int V, class E>
TM_INLINE void block(const E* a, int64_t row, int64_t step, const E* b, int64_t ldb, int64_t k, float* c,
                     int64_t ldc, bool add) {
  vf x[M][V];  // summed from 0 and then added to C: long sums lose less
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) x[i][j] = vf{};
  for (int64_t p = 0; p < k; ++p) {
    decltype(load(b)) y[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) y[j] = load(b + p * ldb + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const auto s = splat(a[i * row + p * step]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) x[i][j] = plus_product(x[i][j], s, y[j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) store(c + i * ldc + j * W, add ? load(c + i * ldc + j * W) + x[i][j] : x[i][j]);
}

// Rows of a panel of V vectors: sums in registers, as many as hide that each waits for the one before, and as many as there
// is room for: what is loaded of B then serves more of them.
template <int V>
constexpr int rows_of_panel() { return (V == 1 && W > 4) || (V == 2 && W == 16) ? 12 : ROWS; }

template <int V, class E>
TM_INLINE void panel(int64_t m, const E* a, int64_t row, int64_t step, const E* b, int64_t ldb, int64_t k, float* c,
                     int64_t ldc, bool add, Ahead& ahead) {
  constexpr int M = rows_of_panel<V>();
  for (; m >= M; m -= M, a += M * row, c += M * ldc) {
    ahead.some();
    block<M, V>(a, row, step, b, ldb, k, c, ldc, add);
  }
  if (M > ROWS && m >= ROWS) block<ROWS, V>(a, row, step, b, ldb, k, c, ldc, add), m -= ROWS, a += ROWS * row, c += ROWS * ldc;
  switch (m) {
    case 5: return block<5, V>(a, row, step, b, ldb, k, c, ldc, add);
    case 4: return block<4, V>(a, row, step, b, ldb, k, c, ldc, add);
    case 3: return block<3, V>(a, row, step, b, ldb, k, c, ldc, add);
    case 2: return block<2, V>(a, row, step, b, ldb, k, c, ldc, add);
    case 1: return block<1, V>(a, row, step, b, ldb, k, c, ldc, add);
  }
}

// n is a multiple of W. `row` and `step` are A's strides along m and k. `ahead` is fetched meanwhile.
template <class E>
__attribute__((noinline)) void product(int64_t m, int64_t n, int64_t k, const E* a, int64_t row, int64_t step, const E* b,
                                       int64_t ldb, float* c, int64_t ldc, bool add, Ahead ahead = {}) {
  ahead.spread(std::max<int64_t>(m / ROWS * n / (ACROSS * W), 1));
  int64_t j = 0;
  for (; j + ACROSS * W <= n; j += ACROSS * W) panel<ACROSS>(m, a, row, step, b + j, ldb, k, c + j, ldc, add, ahead);
  if (W == 16 && j + 2 * W <= n) panel<2>(m, a, row, step, b + j, ldb, k, c + j, ldc, add, ahead), j += 2 * W;
  for (; j < n; j += W) panel<1>(m, a, row, step, b + j, ldb, k, c + j, ldc, add, ahead);
}

}  // namespace
