// Exact attention under a mask, forward and backward, for one instruction set. Plain C to the outside; its only state is who starts threads.
#include "backward.h"
#include "forward.h"
#include "isa/usable.h"
#include "peak.h"
#include "reading.h"

namespace {

// False if numbers of the kind cannot say what keys and values are.
template <class Kind>
bool pack(const Call& c, Packed<Kind>& k, Packed<Kind>& v) {
  const std::vector<int64_t> used = used_tiles(c);
  const int64_t tiles = used.size(), heads = c.b * c.hk;
  each(tiles * heads, c.threads, [&] {
    using Spare = typename Packed<Kind>::Spare;
    return [&, a = std::make_shared<Spare>(k), b = std::make_shared<Spare>(v)](int64_t i) {
      const int64_t tile = i / tiles * c.tiles_k() + used[i % tiles];
      k.make(tile, *a), v.make(tile, *b);
    };
  });
  return Kind::PARTS == 1 || (k.is_finite() && v.is_finite());
}

// Both directions are false if they ended before they were done, since numbers of the kind cannot say what came in.
template <class Kind>
bool forward(const Call& c) {
  const Cut cut(c, Kind::TOGETHER, Kind::SPAN == INT64_MAX ? Kind::SPAN : 2 * Kind::SPAN);
  Packed<Kind> k(c, c.k, c.d, true, false), v(c, c.v, c.dv, false, true);
  if (!pack(c, k, v)) return false;
  std::atomic<bool> finite{true};
  const auto run = [&] { return std::make_shared<Forward<Kind>>(c, cut, k, v, finite); };
  if (cut.parts == 1) {
    each(cut.items(c), c.threads, [&] { return [strips = run()](int64_t i) { (*strips)(i); }; });
    return finite;
  }
  std::vector<std::unique_ptr<Partial>> found(cut.strips * cut.parts);
  each(cut.strips * cut.parts, c.threads, [&] {
    return [&, strips = run()](int64_t i) {
      found[i] = std::make_unique<Partial>(strips->width());
      strips->at(i / cut.parts);
      strips->clear(*found[i]);
      strips->attend(i % cut.parts * cut.size, (i % cut.parts + 1) * cut.size, *found[i]);
    };
  });
  each(cut.strips, c.threads, [&] {
    return [&, strips = run()](int64_t i) {
      Partial& all = *found[i * cut.parts];
      const int64_t m = strips->at(i).m;
      for (int64_t p = 1; p < cut.parts; ++p) join<Kind>(all, *found[i * cut.parts + p], m, strips->width());
      strips->finish(all);
    };
  });
  return finite;
}

// dout . out of every query.
void dot_outputs(const Call& c) {
  each(c.b * c.hq * c.tiles_q(), c.threads, [&] {
    const int64_t width = padded(c.dv);
    return [&, width, x = std::make_shared<Buffer<float>>(width), y = std::make_shared<Buffer<float>>(width)](int64_t i) {
      const int64_t bh = i / c.tiles_q(), first = i % c.tiles_q() * TILE;
      for (int64_t n = first; n < std::min(first + TILE, c.nq); ++n) {
        floats(row_of(c, c.dout, bh / c.hq, bh % c.hq, n), c.dtype, c.dv, width, *x);
        floats(row_of(c, c.out, bh / c.hq, bh % c.hq, n), c.dtype, c.dv, width, *y);
        vf total{};
        for (int64_t p = 0; p < width; p += W) total = plus_product(total, load(*x + p), load(*y + p));
        c.delta[bh * c.nq + n] = sum(total);
      }
    };
  });
}

template <class Kind>
bool backward(const Call& c) {
  Packed<Kind> k(c, c.k, c.d, true, true), v(c, c.v, c.dv, true, false);
  if (!pack(c, k, v)) return false;
  std::atomic<bool> finite{true};
  dot_outputs(c);
  const BackwardCut cut(c, Kind::SPAN);
  const QueryGradient<Kind> dq(c, cut.parts);
  KeyGradient dk(c, c.dk, c.d, Kind::ROWS > 1), dv(c, c.dv_out, c.dv, Kind::ROWS > 1);
  each(cut.parts * c.b * c.hk, c.threads, [&] {
    return [run = std::make_shared<Backward<Kind>>(c, cut, k, v, dq, dk, dv, finite)](int64_t i) { (*run)(i); };
  });
  if (!finite) return false;
  if (cut.parts > 1)
    each(c.b * c.hq * c.tiles_q(), c.threads, [&] {
      return [&, spare = std::make_shared<Buffer<float>>(TILE * padded(c.d))](int64_t i) {
        const int64_t h = i / c.tiles_q();
        dq.finish(h / c.hq, h % c.hq, i % c.tiles_q(), *spare);
      };
    });
  each(c.b * c.hk * c.tiles_k(), c.threads, [&] {
    return [&](int64_t i) {
      const int64_t h = i / c.tiles_k(), j = i % c.tiles_k();
      dk.finish(h / c.hk, h % c.hk, j, c.scale);
      dv.finish(h / c.hk, h % c.hk, j, 1);
    };
  });
  return true;
}

// Calls `run` with the kind in which this call's products are worked out.
template <class F>
void with_kind(const Call& c, F run) {
#if defined(TM_TILES)
  if (c.dtype == BFLOAT) return void(run(static_cast<Tiles<1>*>(nullptr)));
  if (c.in_parts && (c.dtype == HALF ? run(static_cast<Tiles<2>*>(nullptr)) : run(static_cast<Tiles<3>*>(nullptr)))) return;
#else
  if constexpr (PAIRS)
    if (c.dtype == BFLOAT && are_pairs_quick()) return void(run(static_cast<Pairs*>(nullptr)));
#endif
  run(static_cast<Floats*>(nullptr));
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
double tm_peak(double seconds, int halves, int64_t threads) { return peak(seconds, halves, threads); }
int tm_products_of_bf16() {  // 0: of floats, 1: of pairs, 2: of tiles
#if defined(TM_TILES)
  return 2;
#else
  return PAIRS && are_pairs_quick();
#endif
}
int tm_usable() { return usable(); }  // asked before all else: 1, or why this process may not use this library
uint64_t tm_abi() { return abi(); }  // Python looks whether its structure and constants are these
int tm_forward(const Call* c) {
  return guarded([&] {
    if (reads_as_it_lies(*c)) return read_forward(*c);
    with_kind(*c, [&](auto* kind) { return forward<std::remove_pointer_t<decltype(kind)>>(*c); });
  });
}
int tm_backward(const Call* c) {
  return guarded([&] { with_kind(*c, [&](auto* kind) { return backward<std::remove_pointer_t<decltype(kind)>>(*c); }); });
}
}
