// Additions and multiplications a second that this machine reaches in registers: nothing is faster.
#pragma once
#include <chrono>
#include <mutex>

#include "isa/amx.h"
#include "threads.h"

namespace {

// How many of them are done in so many seconds and more, by rounds of `work`, each of `flops`: per second.
template <class Work>
double pace(double seconds, double flops, Work work) {
  const auto start = std::chrono::steady_clock::now();
  int64_t rounds = 0;
  double took = 0;
  for (; took < seconds; ++rounds, took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count())
    work();
  return double(rounds) * flops / took;
}

// What compilers cannot see through: they would do once what no step changes.
inline float unknown(float x) {
  volatile float hidden = x;
  return hidden;
}
TM_INLINE vf next(vf x, float a) { return plus_product(splat(a), x, splat(a)); }
TM_INLINE vf next(vf x, Pair a) { return plus_product(x, splat(a), splat(a)); }

// By vectors of floats, or of pairs of bf16.
template <class E>
double vector_peak(double seconds) {
  constexpr int N = W == 16 ? 24 : 12, STEPS = 10000;
  const E factor = E(unknown(0.5f));
  vf x[N] = {};
  const double found = pace(seconds, double(STEPS) * N * W * (std::is_same<E, Pair>::value ? 4 : 2), [&] {
    for (int i = 0; i < STEPS; ++i)
#pragma GCC unroll 32
      for (int n = 0; n < N; ++n) x[n] = next(x[n], factor);
  });
  for (int n = 0; n < N; ++n) unknown(sum(x[n]));
  return found;
}

#if defined(TM_TILES)
// By tiles: four sums, as products have them.
inline double tile_peak(double seconds) {
  constexpr int STEPS = 100;
  TileRegisters::configure();
  TileRegisters::zero<4>(), TileRegisters::zero<5>(), TileRegisters::zero<6>(), TileRegisters::zero<7>();  // no number is slower than another
  const double found = pace(seconds, double(STEPS) * 4 * 16 * 16 * 32 * 2, [] {
    for (int i = 0; i < STEPS; ++i) {
      TileRegisters::add_product<0, 4, 6>(), TileRegisters::add_product<1, 4, 7>();
      TileRegisters::add_product<2, 5, 6>(), TileRegisters::add_product<3, 5, 7>();
    }
  });
  TileRegisters::release();
  return found;
}
#endif

// All threads together, as they share the machine's power and clock: the sum of what each reached, in fp32 or in what
// products of bf16 are made of.
inline double peak(double seconds, bool halves, int64_t threads) {
  std::mutex adding;
  double total = 0;
  together(threads, [&] {
#if defined(TM_TILES)
    const double found = halves ? tile_peak(seconds) : vector_peak<float>(seconds);
#else
    const double found = PAIRS && halves ? vector_peak<Pair>(seconds) : vector_peak<float>(seconds);
#endif
    const std::lock_guard<std::mutex> lock(adding);
    total += found;
  });
  return total;
}

}  // namespace
