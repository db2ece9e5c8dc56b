// Products of few rows with many: those are read once, as they lie in memory, and what comes is called for early.
#pragma once
#include <type_traits>
#include <utility>

#include "isa/simd.h"

namespace {

// How rows are read: STEP numbers at a time, as VECTORS of what numbers of type LEFT are multiplied with.
struct FloatRows {
  using Number = float;
  using Left = float;
  static constexpr int VECTORS = 1, STEP = W;
  static TM_INLINE void read(const float* at, vf* to) { to[0] = load(at); }
};
struct BfloatRows {
  using Number = uint16_t;
  using Left = float;
  static constexpr int VECTORS = 1, STEP = W;
  static TM_INLINE void read(const uint16_t* at, vf* to) { to[0] = load(at); }
};
struct HalfRows {
  using Number = uint16_t;
  using Left = float;
  static constexpr int VECTORS = 1, STEP = W;
  static TM_INLINE void read(const uint16_t* at, vf* to) {
#if TM_WIDTH == 16 && defined(__AVX512F__)
    to[0] = (vf)_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#else
    vh halves;
    std::memcpy(&halves, at, sizeof halves);
    const vu bits = __builtin_convertvector(halves, vu), rest = (bits & 0x7fffu) << 13;
    const vu number = (vu)((vf)rest * 5.192296858534828e33f);  // 2^112: the exponents begin elsewhere
    to[0] = (vf)((rest >= 0x0f800000u ? rest | 0x7f800000u : number) | (bits & 0x8000u) << 16);
#endif
  }
};
// As pairs, for products of pairs.
struct PairRows {
  using Number = uint16_t;
  using Left = Pair;
  static constexpr int VECTORS = 1, STEP = 2 * W;
  static TM_INLINE void read(const uint16_t* at, vu* to) { std::memcpy(to, at, sizeof *to); }
};
// Pairs taken apart, which costs less than widening: numbers of even places, then those of odd ones.
struct SplitRows {
  using Number = uint16_t;
  using Left = float;
  static constexpr int VECTORS = 2, STEP = 2 * W;
  static TM_INLINE void read(const uint16_t* at, vf* to) {
    vu pairs;
    PairRows::read(at, &pairs);
    to[0] = (vf)(pairs << 16), to[1] = (vf)(pairs & 0xffff0000u);
  }
};
// What reads the end of a row that is no whole step.
template <class K>
using Narrow = std::conditional_t<std::is_same<K, SplitRows>::value, BfloatRows, K>;

// Rows of numbers: where the first is, and from one to the next.
template <class B>
struct Rows {
  const B* at;
  int64_t step;
};
template <class K>
using RowsOf = Rows<typename K::Number>;

// From a number to the one that is called for when it is read, into the second cache: some rows further on. Rows are
// read one after the other, not by turns, because a processor foresees what lies in line.
template <class B>
inline int64_t further(Rows<B> rows, int64_t width) {
  constexpr int64_t FURTHER = 8192;
  const int64_t bytes = width * sizeof(B);
  return (FURTHER + bytes - 1) / bytes * rows.step;
}
template <int NUMBERS, class B>
TM_INLINE void call_for(const B* at) {
  constexpr int LINE = 64 / sizeof(B);
#pragma GCC unroll 8
  for (int i = 0; i < NUMBERS; i += LINE) __builtin_prefetch(at + i, 0, 2);
}

// Neighbours of SIZE lanes added, in blocks of BLOCK: those of a come first in each, then those of b.
template <int SIZE, int BLOCK, int... I>
TM_INLINE vf folded(vf a, vf b, std::integer_sequence<int, I...>) {
  constexpr int HALF = BLOCK / 2;
  constexpr auto from = [](int i) constexpr {
    const int place = i % HALF;
    return i / BLOCK * BLOCK + place / SIZE * 2 * SIZE + place % SIZE + (i % BLOCK < HALF ? 0 : W);
  };
  return __builtin_shufflevector(a, b, from(I)...) + __builtin_shufflevector(a, b, (from(I) + SIZE)...);
}
template <int SIZE, int BLOCK>
TM_INLINE void fold(vf* x, int count) {
#pragma GCC unroll 16
  for (int i = 0; i < count; i += 2)
    x[i / 2] = folded<SIZE, BLOCK>(x[i], x[i + 1], std::make_integer_sequence<int, W>());
}

// Lane i is the sum over all lanes of x[i].
template <int N = W>
TM_INLINE vf sums_across(vf (&x)[N]) {
  fold<2, 4>(x, N), fold<1, 4>(x, N / 2);
  if constexpr (N == 16) fold<8, 16>(x, 4);
  if constexpr (N >= 8) fold<4, N>(x, 2);
  return x[0];
}

template <int N>
using Count = std::integral_constant<int, N>;

// C[i, p] = the product of row i of A and row p of B, for as many rows of B at a time as a vector has room for results.
// The last ones are read twice rather than what is behind them; results up to the next multiple of them are no numbers.
template <int M, class K>
TM_INLINE void dots_of(int64_t n, int64_t d, const typename K::Left* a, int64_t row, RowsOf<K> b, float* c,
                       int64_t ldc) {
  constexpr int ROWS = W / (M == 3 ? 4 : M);
  const int64_t away = further(b, d);
  for (int64_t p = 0; p < n; p += ROWS) {
    vf x[W] = {};
#pragma GCC unroll 16
    for (int t = 0; t < ROWS; ++t) {
      const auto* at = b.at + (p + t < n ? p + t : n - 1) * b.step;
      const auto add = [&](int64_t j, auto kind) __attribute__((always_inline)) {
        using Kind = decltype(kind);
        constexpr int V = Kind::VECTORS;
        decltype(load(a)) y[V];
        Kind::read(at + j, y);
        call_for<Kind::STEP>(at + away + j);
        const auto* q = a + j / Kind::STEP * V * W;
#pragma GCC unroll 8
        for (int i = 0; i < M * V; ++i) {
          vf& sum = x[i / V * ROWS + t];
          sum = plus_product(sum, load(q + i / V * row + i % V * W), y[i % V]);
        }
      };
      int64_t j = 0;
      for (; j + K::STEP <= d; j += K::STEP) add(j, K());
      if constexpr (!std::is_same<K, Narrow<K>>::value)
        if (j < d) add(j, Narrow<K>());
    }
    const vf s = sums_across(x);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) std::memcpy(c + i * ldc + p, reinterpret_cast<const float*>(&s) + i * ROWS, ROWS * 4);
  }
}

// C += A B, some columns at a time; `away` is 0 where B was read already.
template <int M, class K>
TM_INLINE void sums_of(int64_t n, int64_t k, const float* a, int64_t row, RowsOf<K> b, float* c, int64_t ldc,
                       int64_t away) {
  constexpr int ACROSS = W == 16 ? 8 : 4;
  const auto columns = [&](int64_t j, auto count, auto kind) __attribute__((always_inline)) {
    using Kind = decltype(kind);
    constexpr int V = Kind::VECTORS, N = decltype(count)::value;
    vf x[M][N];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) x[i][t] = load(c + i * ldc + j + t * W);
    for (int64_t p = 0; p < k; ++p) {
      const auto* at = b.at + p * b.step + j;
      if (away) call_for<N * W>(at + away);
      vf y[N];
#pragma GCC unroll 8
      for (int t = 0; t < N; t += V) Kind::read(at + t * W, y + t);
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
  for (; j + ACROSS * W <= n; j += ACROSS * W) columns(j, Count<ACROSS>(), K());
  for (; j + K::STEP <= n; j += K::STEP) columns(j, Count<K::VECTORS>(), K());
  if constexpr (!std::is_same<K, Narrow<K>>::value)
    if (j < n) columns(j, Count<1>(), Narrow<K>());
}

template <class K>
__attribute__((noinline)) void dots(int64_t m, int64_t n, int64_t d, const typename K::Left* a, int64_t row,
                                    RowsOf<K> b, float* c, int64_t ldc) {
  const auto rows = [&](int64_t i, auto count) {
    dots_of<decltype(count)::value, K>(n, d, a + i * row, row, b, c + i * ldc, ldc);
  };
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) rows(i, Count<4>());
  if (m - i == 3) rows(i, Count<3>());
  if (m - i == 2) rows(i, Count<2>());
  if (m - i == 1) rows(i, Count<1>());
}

// Whether n rows have neither infinities nor NaN.
template <class K>
__attribute__((noinline)) bool are_finite(int64_t n, int64_t width, RowsOf<K> b) {
  vf wrong = {};  // 0 times what is finite is 0
  const auto look = [&](const auto* at, auto kind) __attribute__((always_inline)) {
    using Kind = decltype(kind);
    vf y[Kind::VECTORS];
    Kind::read(at, y);
    for (const vf& x : y) wrong += x * 0.0f;
  };
  for (int64_t p = 0; p < n; ++p) {
    int64_t j = 0;
    for (; j + K::STEP <= width; j += K::STEP) look(b.at + p * b.step + j, K());
    if (j < width) look(b.at + p * b.step + j, Narrow<K>());
  }
  return sum(wrong) == 0;
}

// Two rows of C at a time, so that rows of B are read whole, and again while they are in the first cache.
template <class K>
__attribute__((noinline)) void sums(int64_t m, int64_t n, int64_t k, const float* a, int64_t row, RowsOf<K> b, float* c,
                                    int64_t ldc) {
  constexpr int64_t TOGETHER = 16;
  const int64_t away = further(b, n);
  for (; k > 0; k -= TOGETHER, a += TOGETHER, b.at += TOGETHER * b.step) {
    const int64_t some = k < TOGETHER ? k : TOGETHER;
    int64_t i = 0;
    for (; i + 2 <= m; i += 2) sums_of<2, K>(n, some, a + i * row, row, b, c + i * ldc, ldc, i ? 0 : away);
    if (i < m) sums_of<1, K>(n, some, a + i * row, row, b, c + i * ldc, ldc, i ? 0 : away);
  }
}

}  // namespace
