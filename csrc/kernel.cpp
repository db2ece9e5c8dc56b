// Exact attention under a mask, forward and backward, for one instruction set. Plain C to the outside; its only state is who starts
// threads, and some memory that is kept.
#include "backward.h"
#include "decoding/step.h"
#include "forward.h"
#include "isa/usable.h"
#include "parts.h"
#include "peak.h"
#include "reading.h"

namespace {

template <class Kind>
void pack(const Call& c, Packed<Kind>& k, Packed<Kind>& v) {
  const std::vector<int64_t> used = used_tiles(c);
  const int64_t tiles = used.size(), heads = c.b * c.hk;
  each(tiles * heads, c.threads, [&] {
    using Spare = typename Packed<Kind>::Spare;
    return [&, a = std::make_shared<Spare>(k), b = std::make_shared<Spare>(v)](int64_t i) {
      const int64_t tile = i / tiles * c.tiles_k() + used[i % tiles];
      k.make(tile, *a), v.make(tile, *b);
    };
  });
}

template <class Kind>
void forward(const Call& c, const Packed<Kind>& k, const Packed<Kind>& v) {
  const Cut cut(c, Kind::TOGETHER, Kind::SPAN == INT64_MAX ? Kind::SPAN : 2 * Kind::SPAN);
  const auto run = [&] { return std::make_shared<Forward<Kind>>(c, cut, k, v); };
  if (cut.parts == 1) return each(cut.items(c), c.threads, [&] { return [strips = run()](int64_t i) { (*strips)(i); }; });
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
}

template <class Kind>
void forward(const Call& c) {
  Packed<Kind> k(c, c.k, c.d, true, false), v(c, c.v, c.dv, false, true);
  pack(c, k, v);
  forward(c, k, v);
  if constexpr (Kind::PARTS > 1) {
    const Left_out rows = unsaid(c, k, v, false);
    if (!any(rows)) return;
    const Room out(c, c.hq, c.nq, c.dv), lse(c, c.hq, c.nq, 3);
    Call in_floats = c;
    in_floats.out = out.array(), in_floats.lse = static_cast<float*>(lse.array().data);
    if (c.base) in_floats.base = in_floats.lse + c.b * c.hq * c.nq, in_floats.log_total = in_floats.base + c.b * c.hq * c.nq;
    forward<Floats>(in_floats);
    take_rows(in_floats, c, rows);
  }
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

// Of all queries but some.
template <class Kind>
void backward(const Call& c, const Packed<Kind>& k, const Packed<Kind>& v, const Left_out& left_out) {
  const BackwardCut cut(c, Kind::SPAN);
  const QueryGradient<Kind> dq(c, cut.parts);
  each(cut.parts * c.b * c.hk, c.threads, [&] {
    return [run = std::make_shared<Backward<Kind>>(c, cut, k, v, dq, left_out)](int64_t i) { (*run)(i); };
  });
  if (cut.parts > 1)
    each(c.b * c.hq * c.tiles_q(), c.threads, [&] {
      return [&, spare = std::make_shared<Buffer<float>>(TILE * padded(c.d))](int64_t i) {
        const int64_t h = i / c.tiles_q();
        dq.finish(h / c.hq, h % c.hq, i % c.tiles_q(), *spare);
      };
    });
}

template <class Kind>
void backward(const Call& c, Left_out left_out = {}) {
  Packed<Kind> k(c, c.k, c.d, true, true), v(c, c.v, c.dv, true, false);
  pack(c, k, v);
  dot_outputs(c);
  if constexpr (Kind::PARTS > 1) left_out = unsaid(c, k, v, true);
  backward(c, k, v, left_out);
  if (Kind::PARTS == 1 || !any(left_out)) return;
  for (uint64_t& rows : left_out) rows = ~rows;
  const Room dq(c, c.hq, c.nq, c.d), dk(c, c.hk, c.nk, c.d), dv(c, c.hk, c.nk, c.dv);
  Call in_floats = c;
  in_floats.dq = dq.array(), in_floats.dk = dk.array(), in_floats.dv_out = dv.array();
  backward<Floats>(in_floats, left_out);
  add(c, c.dq, dq.array(), c.hq, c.nq, c.d);
  add(c, c.dk, dk.array(), c.hk, c.nk, c.d);
  add(c, c.dv_out, dv.array(), c.hk, c.nk, c.dv);
}

// Calls `run` with the kind in which this call's products are worked out.
template <class F>
void with_kind(const Call& c, F run) {
#if defined(TM_TILES)
  if (c.dtype == BFLOAT) return run(static_cast<Tiles<1>*>(nullptr));
  if (c.in_parts) return c.dtype == HALF ? run(static_cast<Tiles<2>*>(nullptr)) : run(static_cast<Tiles<3>*>(nullptr));
#else
  if constexpr (PAIRS)
    if (c.dtype == BFLOAT && are_pairs_quick()) return run(static_cast<Pairs*>(nullptr));
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
uint64_t tm_abi() { return hash_of(layout() + step_layout()); }  // Python looks whether its structure and constants are these
int tm_forward(const Call* c) {
  return guarded([&] {
    if (reads_as_it_lies(*c)) return read_forward(*c);
    with_kind(*c, [&](auto* kind) { forward<std::remove_pointer_t<decltype(kind)>>(*c); });
  });
}
int tm_step(const Step* s) {
  return guarded([&] { decode(*s); });
}
int tm_backward(const Call* c) {
  return guarded([&] { with_kind(*c, [&](auto* kind) { backward<std::remove_pointer_t<decltype(kind)>>(*c); }); });
}
}
