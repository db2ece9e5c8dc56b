// The two products of attention in numbers of one kind: floats, pairs of bf16, or tiles of pairs.
//
// Both are C = or += A B with queries along the vectors: scores are keys times queries, and what keys give to queries is values
// (turned) times weights.
#pragma once
#include "abi.h"
#include "products/matmul.h"
#include "products/tiles.h"

namespace {

struct Floats {
  using E = float;
  static constexpr int64_t PER_STEP = 1;         // numbers in a step
  static constexpr int PARTS = 1;                // bf16 that a number is the sum of
  static constexpr int64_t STEPS = 1, ROWS = 1;  // left operands have multiples of these
  static constexpr int64_t LANES = W;            // queries of a product are a multiple of it
  static constexpr int64_t UNIT = TILE;          // queries whose scores are worked out at a time
  static constexpr int64_t GROUP = 12;           // keys that skip together what they do not see
  static constexpr int64_t SPAN = INT64_MAX;     // numbers of keys that the second cache is filled with at a time
  static constexpr int64_t TOGETHER = 1;         // strips that go through those before the next
  static constexpr int EXP2 = 6;                 // degree of its polynomial
  static constexpr int ROOM = 0;                 // binary digits between a query's highest weight so far and 1; with none, none may pass 1

  void operator()(int64_t m, int64_t n, int64_t k, Left<float> a, Right<float> b, float* c, int64_t ldc, bool add,
                  Ahead ahead = {}) const {
    product(m, n, k, a.at, a.row, a.step, b.at, b.row, c, ldc, add, ahead);
  }
  void flush() const {}
};

struct Pairs {
  using E = Pair;
  static constexpr int64_t PER_STEP = 2, STEPS = 1, ROWS = 1, LANES = W, UNIT = TILE, GROUP = 12, SPAN = INT64_MAX, TOGETHER = 1;
  static constexpr int PARTS = 1, EXP2 = 4, ROOM = 20;

  void operator()(int64_t m, int64_t n, int64_t k, Left<Pair> a, Right<Pair> b, float* c, int64_t ldc, bool add,
                  Ahead ahead = {}) const {
    product(m, n, k, a.at, a.row, a.step, b.at, b.row, c, ldc, add, ahead);
  }
  void flush() const {}
};

#if defined(TM_TILES)
// What is written must stay in the first cache, or it costs five times as much: so half of a tile's queries at a time. And what is
// read, in the second: spans of keys, or of their gradients.
//
// bf16 are what they are; fp16 are two of them and floats three, whose products are as good as theirs.
template <int N>
struct Tiles {
  using E = Pair;
  static constexpr int64_t PER_STEP = 2, STEPS = 16, ROWS = 16, LANES = 32, UNIT = 32, GROUP = 32, SPAN = (1 << 16) / N, TOGETHER = 8;
  static constexpr int PARTS = N, EXP2 = N == 1 ? 4 : 6, ROOM = N == 1 ? 20 : 0;

  void operator()(int64_t m, int64_t n, int64_t k, Left<Pair> a, Right<Pair> b, float* c, int64_t ldc, bool add, Ahead = {}) {
    products_.template multiply<N>(multiple(m, ROWS), n, multiple(k, STEPS), a, b, c, ldc, add);
  }
  void flush() { products_.flush(); }

 private:
  TileProducts products_;
};
#endif

// The steps that so many numbers take, in a left operand's multiple.
template <class Kind>
inline int64_t steps(int64_t n) { return multiple((n + Kind::PER_STEP - 1) / Kind::PER_STEP, Kind::STEPS); }

// Whether weights are rounded to be multiplied: then outputs are divided by the sum of rounded ones.
template <class Kind>
constexpr bool ROUNDS = Kind::PER_STEP == 2 && Kind::PARTS == 1;

}  // namespace
