// Products with few rows of A: B is read once, as it lies in memory, what comes next is called for early.
#pragma once
#include <type_traits>

#include "isa/simd.h"

namespace {

// Rows of floats or of bf16: where the first is, and from one to the next.
template <class B>
struct Rows {
  const B* at;
  int64_t step;
};

// Calls for rows that will be read soon, a line of memory at a time: a processor waits for few at once.
template <class B>
class Stream {
 public:
  Stream(Rows<B> rows, int64_t first, int64_t width)
      : at_(reinterpret_cast<const char*>(rows.at) + first * rows.step * sizeof(B)), step_(rows.step * sizeof(B)),
        bytes_(width * sizeof(B)) {}

  template <int NUMBERS>
  TM_INLINE void call_for() {
    constexpr int64_t BYTES = NUMBERS * sizeof(B);
    if constexpr (BYTES % LINE == 0) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < BYTES; i += LINE) line();
    } else if ((owed_ += BYTES) >= LINE) {
      owed_ -= LINE, line();
    }
  }

 private:
  static constexpr int64_t LINE = 64;
  TM_INLINE void line() {
    __builtin_prefetch(at_ + byte_);
    if ((byte_ += LINE) >= bytes_) byte_ = 0, at_ += step_;
  }
  const char* at_;
  int64_t step_, bytes_, byte_ = 0, owed_ = 0;
};

template <int N>
using Number = std::integral_constant<int, N>;

// C[i, p] = the product of row i of A and row p of B; two rows of B at a time.
template <int M, class B>
TM_INLINE void dots_of(int64_t n, int64_t d, const float* a, int64_t row, Rows<B> b, float* c, int64_t ldc) {
  Stream<B> soon(b, 8, d);
  const auto rows = [&](int64_t p, auto count) __attribute__((always_inline)) {
    constexpr int N = decltype(count)::value;
    vf x[M][N] = {};
    for (int64_t j = 0; j < d; j += W) {
      vf y[N];
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) y[t] = load(b.at + (p + t) * b.step + j);
      soon.template call_for<N * W>();
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const vf s = load(a + i * row + j);
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) x[i][t] += s * y[t];
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t)
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) c[i * ldc + p + t] = sum(x[i][t]);
  };
  int64_t p = 0;
  for (; p + 2 <= n; p += 2) rows(p, Number<2>());
  if (p < n) rows(p, Number<1>());
}

// C += A B, sixteen rows of B at a time.
template <int M, class B>
TM_INLINE void sums_of(int64_t n, int64_t k, const float* a, int64_t row, Rows<B> b, float* c, int64_t ldc) {
  constexpr int64_t TOGETHER = 16;
  for (int64_t first = 0; first < k; first += TOGETHER) {
    const int64_t end = first + TOGETHER < k ? first + TOGETHER : k;
    Stream<B> soon(b, end, n);
    const auto columns = [&](int64_t j, auto count) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      vf x[M][N];
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) x[i][t] = load(c + i * ldc + j + t * W);
      for (int64_t p = first; p < end; ++p) {
        soon.template call_for<N * W>();
        vf y[N];
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) y[t] = load(b.at + p * b.step + j + t * W);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
          const vf s = splat(a[i * row + p]);
#pragma GCC unroll 8
          for (int t = 0; t < N; ++t) x[i][t] += s * y[t];
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) store(c + i * ldc + j + t * W, x[i][t]);
    };
    int64_t j = 0;
    for (; j + 2 * W <= n; j += 2 * W) columns(j, Number<2>());
    if (j < n) columns(j, Number<1>());
  }
}

// `run(first row, how many)`, at most four rows at a time.
template <class F>
TM_INLINE void by_rows(int64_t m, F run) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) run(i, Number<4>());
  if (m - i == 3) run(i, Number<3>());
  if (m - i == 2) run(i, Number<2>());
  if (m - i == 1) run(i, Number<1>());
}

template <class B>
__attribute__((noinline)) void dots(int64_t m, int64_t n, int64_t d, const float* a, int64_t row, Rows<B> b, float* c,
                                    int64_t ldc) {
  by_rows(m, [&](int64_t i, auto count) {
    dots_of<decltype(count)::value>(n, d, a + i * row, row, b, c + i * ldc, ldc);
  });
}
template <class B>
__attribute__((noinline)) void sums(int64_t m, int64_t n, int64_t k, const float* a, int64_t row, Rows<B> b, float* c,
                                    int64_t ldc) {
  by_rows(m, [&](int64_t i, auto count) {
    sums_of<decltype(count)::value>(n, k, a + i * row, row, b, c + i * ldc, ldc);
  });
}

}  // namespace
