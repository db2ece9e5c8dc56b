// Products of few rows with many: those are read once, as they lie in memory, and what comes is called for early.
#pragma once
#include <type_traits>
#include <utility>

#include "isa/simd.h"
#include "products/soon.h"

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

template <class K>
using RowsOf = Rows<typename K::Number>;

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

// C[i, p] = the product of row i of A and row p of B, for as many rows of B at a time as a vector has room for results,
// two of them by turns where there is room to load numbers of A once for both. The last ones are read twice rather than
// what is behind them; results up to the next multiple of them are no numbers.
template <int M, class K>
TM_INLINE void dots_of(int64_t n, int64_t d, const typename K::Left* a, int64_t row, RowsOf<K> b, float* c,
                       int64_t ldc, int64_t away) {
  constexpr int ROWS = W / (M == 3 ? 4 : M);
  constexpr bool PAYS = (M > 1 || !std::is_same<K, FloatRows>::value) && (W == 16 || M * K::VECTORS <= 4);
  constexpr int TURNS = ROWS > 1 && PAYS ? 2 : 1;
  for (int64_t p = 0; p < n; p += ROWS) {
    vf x[W] = {};
#pragma GCC unroll 16
    for (int t = 0; t < ROWS; t += TURNS) {
      const typename K::Number* at[TURNS];
      for (int u = 0; u < TURNS; ++u) at[u] = b.at + (p + t + u < n ? p + t + u : n - 1) * b.step;
      const auto add = [&](int64_t j, auto kind) __attribute__((always_inline)) {
        using Kind = decltype(kind);
        constexpr int V = Kind::VECTORS;
        if (away)
          for (int u = 0; u < TURNS; ++u) call_for<Kind::STEP>(at[u] + away + j);
        decltype(load(a)) q[M * V];
#pragma GCC unroll 8
        for (int i = 0; i < M * V; ++i) q[i] = load(a + j / Kind::STEP * V * W + i / V * row + i % V * W);
#pragma GCC unroll 2
        for (int u = 0; u < TURNS; ++u) {
          decltype(load(a)) y[V];
          Kind::read(at[u] + j, y);
#pragma GCC unroll 8
          for (int i = 0; i < M * V; ++i) {
            vf& sum = x[i / V * ROWS + t + u];
            sum = plus_product(sum, q[i], y[i % V]);
          }
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

// C += A B, some columns at a time: so many vectors of them, and in how many passes.
template <int M>
constexpr int across() { return W == 16 && M < 3 ? 8 : 4; }
template <int M>
constexpr int64_t passes(int64_t vectors) {
  const int64_t rest = vectors % across<M>();
  return vectors / across<M>() + rest / 4 + rest % 4;
}
template <int M, class K, class S>
TM_INLINE void sums_of(int64_t n, int64_t k, const float* a, int64_t row, RowsOf<K> b, float* c, int64_t ldc,
                       S& soon) {
  constexpr int ACROSS = across<M>();
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
      soon.template call<N * W>(at);
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
  if constexpr (ACROSS > 4)
    if (j + 4 * W <= n) columns(j, Count<4>(), K()), j += 4 * W;
  for (; j + K::STEP <= n; j += K::STEP) columns(j, Count<K::VECTORS>(), K());
  if constexpr (!std::is_same<K, Narrow<K>>::value)
    if (j < n) columns(j, Count<1>(), Narrow<K>());
}

// Rows of C, MOST at a time: `run(first, how many)`.
template <int MOST, class F>
TM_INLINE void rows_of_result(int64_t m, F run) {
  int64_t i = 0;
  for (; i + MOST <= m; i += MOST) run(i, Count<MOST>());
  if constexpr (MOST > 4)
    if (i + 4 <= m) run(i, Count<4>()), i += 4;
  if (MOST > 3 && m - i == 3) run(i, Count<3>());
  if (MOST > 2 && m - i == 2) run(i, Count<2>());
  if (m - i == 1) run(i, Count<1>());
}

template <class K>
__attribute__((noinline)) void dots(int64_t m, int64_t n, int64_t d, const typename K::Left* a, int64_t row,
                                    RowsOf<K> b, float* c, int64_t ldc) {
  const int64_t away = further(b, d);
  constexpr int MOST = W == 16 && K::VECTORS == 1 ? 8 : 4;  // as the registers have room for
  rows_of_result<MOST>(m, [&](int64_t i, auto count) {
    dots_of<decltype(count)::value, K>(n, d, a + i * row, row, b, c + i * ldc, ldc, i ? 0 : away);
  });
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

// Some rows of B at a time, which are read again while they are in the first cache: by four rows of C if the registers
// have room for their sums, else by two, so that rows of B are read whole. Long rows of floats come so fast that memory
// is all that counts: those are called for in order.
template <class K>
__attribute__((noinline)) void sums(int64_t m, int64_t n, int64_t k, const float* a, int64_t row, RowsOf<K> b, float* c,
                                    int64_t ldc) {
  constexpr bool WIDE = W == 16, FLOATS = std::is_same<K, FloatRows>::value;
  const bool spreads = WIDE && FLOATS && m > 2 && n > 4 * W;
  const int64_t together = spreads ? 8 : 16;
  Beside beside{further(b, n)}, nothing{0};
  Spread<typename K::Number> spread(b, n);
  for (; k > 0; k -= together, a += together, b.at += together * b.step) {
    const int64_t some = k < together ? k : together;
    const auto rows = [&](int64_t i, auto count, auto& soon) {
      sums_of<decltype(count)::value, K>(n, some, a + i * row, row, b, c + i * ldc, ldc, soon);
    };
    const auto once = [&](int64_t i, auto count) { rows(i, count, i ? nothing : beside); };
    if constexpr (WIDE && FLOATS) {
      if (spreads) {
        int64_t all = 0;
        rows_of_result<4>(m, [&](int64_t, auto count) { all += passes<decltype(count)::value>(n / W); });
        spread.begin(b.at, some, all * some);
        rows_of_result<4>(m, [&](int64_t i, auto count) { rows(i, count, spread); });
        continue;
      }
    }
    if (WIDE && n <= 4 * W) rows_of_result<4>(m, once);
    else rows_of_result<2>(m, once);
  }
}

}  // namespace
