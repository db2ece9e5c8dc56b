// The tile products of csrc/ as functions that tests/backends/test_tiles.py calls.
#include "isa/amx.h"
#include "isa/amx_emulated.h"
#include "isa/usable.h"
#include "products/tiles.h"

namespace {

// The instruction alone, of one kind of tiles.
template <class T>
void add_product(const Pair* a, const Pair* b, float* c) {
  T::configure();
  T::template load<4>(a, 64), T::template load<6>(b, 64), T::template load<0>(c, 64);
  T::template add_product<0, 4, 6>();
  T::template store<0>(c, 64);
  T::release();
}

}  // namespace

extern "C" {
struct Product {
  int64_t m, n, k;
  const Pair* a;
  int64_t row;
  const Pair* b;
  int64_t ldb;
  float* c;
  int64_t ldc, add;
};

int is_usable() { return usable(); }
void emulated_instruction(const Pair* a, const Pair* b, float* c) { add_product<EmulatedAmx>(a, b, c); }
void instruction(const Pair* a, const Pair* b, float* c) { add_product<TileRegisters>(a, b, c); }
void products(const Product* first, int64_t count) {
  TileProducts run;
  for (const Product* p = first; p < first + count; ++p)
    run.multiply<1>(p->m, p->n, p->k, {p->a, p->row, 1, 0}, {p->b, p->ldb, 0}, p->c, p->ldc, p->add);
  run.flush();
}
}
