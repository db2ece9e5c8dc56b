// Products of matrices in tile registers: C[m, n] = or += A[m, k] B[k, n], floats from pairs of bf16.
#pragma once
#include "isa/amx.h"
#include "products/operands.h"

#if defined(TM_TILES)
namespace {

// Which parts of two numbers are multiplied, the smallest products first. Of three parts, those are left out that are below
// what a float can say beside the largest; of two, none is.
struct PartPair {
  int8_t a, b;
};
template <int N>
constexpr PartPair PART_PAIRS[1] = {{0, 0}};
template <>
inline constexpr PartPair PART_PAIRS<2>[4] = {{1, 1}, {1, 0}, {0, 1}, {0, 0}};
template <>
inline constexpr PartPair PART_PAIRS<3>[6] = {{2, 0}, {1, 1}, {0, 2}, {1, 0}, {0, 1}, {0, 0}};

// One thread's tile registers, and the products in them. Made, used and destroyed on the thread that uses it, one at
// a time.
//
// Blocks of C are 2 x 2 tiles (registers 0 to 3), so that each tile of A (4, 5) or B (6, 7) that is loaded serves
// twice. What a block found is not stored at its end but while the next one begins, of this call or another: a store
// waits until its products are through, and what comes behind a store that waits has to wait as well. Until `flush`
// the last block is therefore in the registers only, and its place in memory must be left alone.
class TileProducts {
 public:
  static constexpr int64_t SIDE = 16;  // rows of a tile, and words of a row

  TileProducts() { TileRegisters::configure(); }
  ~TileProducts() { TileRegisters::release(); }
  TileProducts(const TileProducts&) = delete;
  TileProducts& operator=(const TileProducts&) = delete;

  // k counts pairs; m, n and k are multiples of SIDE above 0. Rows of A (steps of which follow each other) and of B (two
  // rows of numbers) are words, of C `ldc` floats; all begin where a cache line does, for a tile whose rows do not takes
  // six times longer to load. C does not overlap A and B, which are of N parts.
  template <int N>
  __attribute__((noinline)) void multiply(int64_t m, int64_t n, int64_t k, Left<Pair> a, Right<Pair> b, float* c, int64_t ldc,
                                     bool add) {
    const Operands all = {k, a.row, a.part, b.row, b.part, ldc, add};
    for (int64_t part = 0; part < N; ++part)
      if (pending_.within(a.at + part * a.part, m, a.row, k) || pending_.within(b.at + part * b.part, k, b.row, n)) flush();
    if (add && pending_.shares(c, ldc, first(m), first(n))) flush();
    // Every block reads two rows of A's tiles and two columns of B's. The larger operand's are kept meanwhile, so
    // that it comes from the second cache once; the smaller one, read again for each, has the better chance to stay
    // in the first.
    if (m >= n) {
      for (int64_t i = 0; i < m; i += 2 * SIDE)
        for (int64_t j = 0; j < n; j += 2 * SIDE) block<N>(m - i, n - j, a.at + i * a.row, b.at + j, c + i * ldc + j, all);
    } else {
      for (int64_t j = 0; j < n; j += 2 * SIDE)
        for (int64_t i = 0; i < m; i += 2 * SIDE) block<N>(m - i, n - j, a.at + i * a.row, b.at + j, c + i * ldc + j, all);
    }
  }

  // What the last products found lies in memory only now.
  void flush() {
    store<0>(), store<1>(), store<2>(), store<3>();
    pending_ = {};
  }

 private:
  struct Operands {
    int64_t k, row, a_part, ldb, b_part, ldc;
    bool add;
  };
  enum Sums { ZERO, LOADED, KEPT };  // what a block's sums begin with; KEPT: with those in the registers

  // A block that is not stored yet: m x n numbers, none if m is 0.
  struct Pending {
    float* c = nullptr;
    int64_t ldc = 0, m = 0, n = 0;

    bool is(const float* at, int64_t step, int64_t rows, int64_t columns) const {
      return c == at && ldc == step && m == rows && n == columns;
    }
    // Whether some of it may lie between the first and the last of `rows` rows.
    bool within(const void* at, int64_t rows, int64_t step, int64_t columns) const {
      const auto start = uintptr_t(at), mine = uintptr_t(c);
      return m && mine < start + ((rows - 1) * step + columns) * 4 && start < mine + ((m - 1) * ldc + n) * 4;
    }
    // Whether numbers of it are among those of another block, without being all of them.
    bool shares(const float* at, int64_t step, int64_t rows, int64_t columns) const {
      if (!within(at, rows, step, columns) || is(at, step, rows, columns)) return false;
      if (step != ldc) return true;
      int64_t place = (intptr_t(c) - intptr_t(at)) / 4;
      const int64_t column = (place % ldc + ldc) % ldc, below = (place - column) / ldc;
      const bool beside = column >= columns && column + n <= ldc;
      return !beside && below < rows && below + m + (column + n > ldc) > 0;
    }
  };

  static int64_t first(int64_t n) { return n > SIDE ? 2 * SIDE : SIDE; }

  template <int PARTS>
  void block(int64_t m, int64_t n, const Pair* a, const Pair* b, float* c, const Operands& all) {
    if (m > SIDE) n > SIDE ? block<PARTS, 2, 2>(a, b, c, all) : block<PARTS, 2, 1>(a, b, c, all);
    else n > SIDE ? block<PARTS, 1, 2>(a, b, c, all) : block<PARTS, 1, 1>(a, b, c, all);
  }
  template <int PARTS, int M, int N>
  void block(const Pair* a, const Pair* b, float* c, const Operands& all) {
    const Sums from = !all.add ? ZERO : pending_.is(c, all.ldc, M * SIDE, N * SIDE) ? KEPT : LOADED;
    bool first = true;
    for (const PartPair parts : PART_PAIRS<PARTS>) {
      const Pair *x = a + parts.a * all.a_part, *y = b + parts.b * all.b_part;
      for (int64_t p = 0; p < all.k; p += SIDE, first = false)
        first ? step<M, N, true>(x, y, c, all, from) : step<M, N, false>(x + p, y + p * all.ldb, c, all, from);
    }
    pending_ = {c, all.ldc, M * SIDE, N * SIDE};
  }

  // Adds 16 pairs of k. The first step begins the sums, and stores what was pending between its loads.
  template <int M, int N, bool FIRST>
  TM_INLINE void step(const Pair* a, const Pair* b, float* c, const Operands& all, Sums from) {
    if constexpr (FIRST) begin<0, M, N>(c, all.ldc, from);
    TileRegisters::load<4>(a, all.row * 4);
    TileRegisters::load<6>(b, all.ldb * 4);
    TileRegisters::add_product<0, 4, 6>();
    if constexpr (FIRST) begin<1, M, N>(c, all.ldc, from);
    if constexpr (N == 2) {
      TileRegisters::load<7>(b + SIDE, all.ldb * 4);
      TileRegisters::add_product<1, 4, 7>();
    }
    if constexpr (FIRST) begin<2, M, N>(c, all.ldc, from);
    if constexpr (M == 2) {
      TileRegisters::load<5>(a + SIDE * all.row, all.row * 4);
      TileRegisters::add_product<2, 5, 6>();
    }
    if constexpr (FIRST) begin<3, M, N>(c, all.ldc, from);
    if constexpr (M == 2 && N == 2) TileRegisters::add_product<3, 5, 7>();
  }
  template <int T, int M, int N>
  TM_INLINE void begin(const float* c, int64_t ldc, Sums from) {
    if (from == KEPT) return;
    store<T>();
    if constexpr (T / 2 < M && T % 2 < N) {
      if (from == LOADED) TileRegisters::load<T>(c + T / 2 * SIDE * ldc + T % 2 * SIDE, ldc * 4);
      else TileRegisters::zero<T>();
    }
  }
  // Register T of what is pending.
  template <int T>
  TM_INLINE void store() {
    if (T / 2 * SIDE < pending_.m && T % 2 * SIDE < pending_.n)
      TileRegisters::store<T>(pending_.c + T / 2 * SIDE * pending_.ldc + T % 2 * SIDE, pending_.ldc * 4);
  }

  Pending pending_;
};

}  // namespace
#endif
