// Exact attention under a mask, forward and backward, for one instruction set. Plain C to the outside; its only state is who starts threads.
#include <chrono>

#include "backward.h"
#include "forward.h"

namespace {

template <class E>
void pack(const Call& c, Packed<E>& k, Packed<E>& v) {
  const std::vector<int64_t> used = used_tiles(c);
  const int64_t tiles = used.size(), heads = c.b * c.hk;
  each(tiles * heads, c.threads, [&] {
    return [&, spare = std::make_shared<Buffer<E>>(TILE * padded(std::max(c.d, c.dv)))](int64_t i) {
      const int64_t tile = i / tiles * c.tiles_k() + used[i % tiles];
      k.make(tile, *spare), v.make(tile, *spare);
    };
  });
}

// Parts of a strip's keys as one, always in the same order.
void join(Partial& into, const Partial& part, int64_t m, int64_t width) {
  for (int64_t r = 0; r < m; ++r) {
    if (part.total[r] == 0) continue;
    const float top = part.top[r] > into.top[r] ? part.top[r] : into.top[r];
    const float a = into.total[r] == 0 ? 0 : std::exp2(into.top[r] - top), b = std::exp2(part.top[r] - top);
    for (int64_t p = 0; p < width; ++p) into.sums[r * width + p] = into.sums[r * width + p] * a + part.sums[r * width + p] * b;
    into.total[r] = into.total[r] * a + part.total[r] * b, into.top[r] = top;
  }
}

template <class E>
void forward(const Call& c, const Cut& cut) {
  Packed<E> k(c, c.k, c.d, false, !cut.direct), v(c, c.v, c.dv, !cut.direct, false);
  if (cut.direct) v.may_not_be_finite();
  else pack(c, k, v);
  if (cut.parts == 1) {
    each(cut.strips, c.threads, [&] {
      return [&, run = std::make_shared<Forward<E>>(c, cut, k, v), own = std::make_shared<Partial>(v.width())](int64_t i) {
        run->at(i);
        run->attend(0, c.tiles_k(), *own);
        run->finish(*own);
      };
    });
    return;
  }
  std::vector<std::unique_ptr<Partial>> found(cut.strips * cut.parts);
  each(cut.strips * cut.parts, c.threads, [&] {
    return [&, run = std::make_shared<Forward<E>>(c, cut, k, v)](int64_t i) {
      found[i] = std::make_unique<Partial>(v.width());
      run->at(i / cut.parts);
      run->attend(i % cut.parts * cut.size, (i % cut.parts + 1) * cut.size, *found[i]);
    };
  });
  each(cut.strips, c.threads, [&] {
    return [&, run = std::make_shared<Forward<E>>(c, cut, k, v)](int64_t i) {
      Partial& all = *found[i * cut.parts];
      const int64_t m = run->at(i).m;
      for (int64_t p = 1; p < cut.parts; ++p) join(all, *found[i * cut.parts + p], m, v.width());
      run->finish(all);
    };
  });
}

// dout . out of every query.
void dot_outputs(const Call& c) {
  each(c.b * c.hq * c.tiles_q(), c.threads, [&] {
    return [&, x = std::make_shared<Buffer<float>>(c.dv), y = std::make_shared<Buffer<float>>(c.dv)](int64_t i) {
      const int64_t bh = i / c.tiles_q(), first = i % c.tiles_q() * TILE;
      for (int64_t n = first; n < std::min(first + TILE, c.nq); ++n) {
        floats(row_of(c, c.dout, bh / c.hq, bh % c.hq, n), c.dtype, c.dv, c.dv, *x);
        floats(row_of(c, c.out, bh / c.hq, bh % c.hq, n), c.dtype, c.dv, c.dv, *y);
        float total = 0;
        for (int64_t p = 0; p < c.dv; ++p) total += (*x)[p] * (*y)[p];
        c.delta[bh * c.nq + n] = total;
      }
    };
  });
}

template <class E>
void backward(const Call& c) {
  Packed<E> k(c, c.k, c.d, true, true), v(c, c.v, c.dv, false, true);
  pack(c, k, v);
  dot_outputs(c);
  const BackwardCut cut(c);
  Total dq(c, c.dq, c.hq, c.nq, c.d, cut.parts), dk(c, c.dk, c.hk, c.nk, c.d), dv(c, c.dv_out, c.hk, c.nk, c.dv);
  each(cut.parts * c.b * c.hk, c.threads, [&] {
    return [run = std::make_shared<Backward<E>>(c, cut, k, v, dq, dk, dv)](int64_t i) { (*run)(i); };
  });
  each(c.b * c.hq * c.tiles_q(), c.threads, [&] {
    return [&](int64_t i) {
      const int64_t h = i / c.tiles_q();
      dq.finish(h / c.hq, h % c.hq, i % c.tiles_q() * TILE, c.scale);
    };
  });
  each(c.b * c.hk * c.tiles_k(), c.threads, [&] {
    return [&](int64_t i) {
      const int64_t h = i / c.tiles_k(), first = i % c.tiles_k() * TILE;
      dk.finish(h / c.hk, h % c.hk, first, c.scale > 0 ? c.scale : 1);
      dv.finish(h / c.hk, h % c.hk, first, 1);
    };
  });
}

// Whether products take pairs of bf16.
bool in_pairs(const Call& c) { return PAIRS && c.dtype == BFLOAT && c.scale > 0; }

// Additions and multiplications a second that one thread reaches, in floats or pairs of bf16: nothing is faster.
template <class E>
double peak(double seconds) {
  constexpr int N = W == 16 ? 24 : 12, ROUNDS = 10000;
  const auto one = splat(E(1));
  vf x[N] = {};
  int64_t done = 0;
  const auto start = std::chrono::steady_clock::now();
  double took = 0;
  for (; took < seconds; ++done, took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count())
    for (int i = 0; i < ROUNDS; ++i)
#pragma GCC unroll 32
      for (int n = 0; n < N; ++n) x[n] = plus_product(x[n], one, one);
  volatile float seen = 0;
  for (int n = 0; n < N; ++n) seen = seen + sum(x[n]);
  return double(done) * ROUNDS * N * W * (std::is_same<E, Pair>::value ? 4 : 2) / took;
}

// 0, or 1 if there was not enough memory: no exception crosses into Python.
template <class F>
int guarded(F run) {
  try {
    run();
    return 0;
  } catch (...) {
    return 1;
  }
}

}  // namespace

extern "C" {
void tm_start_threads_with(Parallel start) { starter() = {start, getpid()}; }  // or with null: by ourselves
double tm_peak(double seconds, int pairs) { return PAIRS && pairs ? peak<Pair>(seconds) : peak<float>(seconds); }
uint64_t tm_abi() { return abi(); }  // Python looks whether its structure and constants are these
int tm_forward(const Call* c) {
  return guarded([&] {
    const Cut cut(*c);
    if (in_pairs(*c) && !cut.direct) forward<Pair>(*c, cut);
    else forward<float>(*c, cut);
  });
}
int tm_backward(const Call* c) {
  return guarded([&] { in_pairs(*c) ? backward<Pair>(*c) : backward<float>(*c); });
}
}
