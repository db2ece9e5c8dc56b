// The tile instructions of isa/amx.h in plain C++ for any processor, with the same results bit for bit (but for which
// NaN a NaN is): all but their speed can be tested everywhere.
//
// TDPBF16PS sums the products of the even and of the odd numbers of k apart, each by fused multiply-adds from 0, adds
// both sums, and adds that to C. Each step is rounded to nearest even; denormals, given or found, are zeros of their
// sign.
#pragma once
#include <cstdlib>

#include "isa/simd.h"

namespace {

class EmulatedAmx {
 public:
  static void configure() { registers() = {}, registers().configured = true; }
  static void release() { registers().configured = false; }
  template <int T>
  static void zero() {
    std::memset(tile(T), 0, sizeof(Tile));
  }
  template <int T>
  static void load(const void* at, int64_t step) {
    must_be_aligned(at, step);
    for (int i = 0; i < 16; ++i) std::memcpy(tile(T)[i], static_cast<const char*>(at) + i * step, 64);
  }
  template <int T>
  static void store(void* at, int64_t step) {
    must_be_aligned(at, step);
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(at) + i * step, tile(T)[i], 64);
  }
  template <int C, int A, int B>
  static void add_product() {
    add_product(tile(C), tile(A), tile(B));
  }

 private:
  typedef float Floats __attribute__((vector_size(16)));  // a quarter of a row: every processor has such vectors
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef double Doubles __attribute__((vector_size(32)));
  using Tile = uint32_t[16][16];

  struct Registers {
    alignas(64) Tile tiles[8];
    bool configured;
  };
  static Registers& registers() {
    static thread_local Registers own;
    return own;
  }
  // The processor takes any place, but six times longer for rows that lie across two cache lines: kernels have none.
  static void must_be_aligned(const void* at, int64_t step) {
    if ((uintptr_t(at) | uintptr_t(step)) % 64) std::abort();
  }
  static Tile& tile(int t) {
    if (!registers().configured) std::abort();  // where the processor raises SIGILL
    return registers().tiles[t];
  }

  // The even or the odd numbers of a tile.
  struct Half {
    alignas(64) float at[16][16];
    Half(const Tile& from, bool odd) {
      for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; j += 4) {
          const Words pairs = get<Words>(from[i] + j);
          put(flushed(odd ? pairs & 0xffff0000u : pairs << 16), at[i] + j);
        }
    }
  };

  template <class V>
  static TM_INLINE V get(const void* from) {
    V x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  template <class V>
  static TM_INLINE void put(V x, void* to) {
    std::memcpy(to, &x, sizeof x);
  }
  static TM_INLINE Words flushed(Words x) { return x & ((Words)((x & 0x7f800000u) != 0) | 0x80000000u); }
  static TM_INLINE Floats flushed(Floats x) { return (Floats)flushed((Words)x); }

  static __attribute__((noinline)) void add_product(Tile& c, const Tile& a, const Tile& b) {
    const Half even_a(a, false), odd_a(a, true), even_b(b, false), odd_b(b, true);
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; j += 4) {
        const Floats both = flushed(sum(even_a.at[i], even_b, j) + sum(odd_a.at[i], odd_b, j));
        put(flushed(flushed(get<Floats>(c[i] + j)) + both), c[i] + j);
      }
  }

  // A product of two bf16 has 16 binary digits, so that a float holds it exactly and to multiply, then add is to do
  // both at once; unless something is beyond a float's exponents, which is noticed.
  static TM_INLINE Floats sum(const float* a, const Half& b, int j) {
    Floats x = {};
    Ints wrong = {};
    for (int k = 0; k < 16; ++k) {
      const Floats left = a[k] - Floats{}, right = get<Floats>(b.at[k] + j), product = left * right;
      x = product + x;
      wrong |= (beyond(product) & (left != 0) & (right != 0)) | (beyond(x) & (x != 0));
    }
    return wrong[0] | wrong[1] | wrong[2] | wrong[3] ? wide_sum(a, b, j) : x;
  }
  // Not finite, denormal, or 0.
  static TM_INLINE Ints beyond(Floats x) { return (Ints)(((Words)x & 0x7fffffffu) + 0x00800000u) < 0x01000000; }

  // The same in doubles, which have exponents for all products. 53 digits are more than twice 24: to round a sum to
  // them and then to 24 is to round it once. The smallest that is rounded up to 2^-126 is half a digit of a float
  // below it.
  static __attribute__((noinline)) Floats wide_sum(const float* a, const Half& b, int j) {
    constexpr double LEAST = 0x1p-126 - 0x1p-151;
    Floats x = {};
    for (int k = 0; k < 16; ++k) {
      Doubles next = double(a[k]) * __builtin_convertvector(get<Floats>(b.at[k] + j), Doubles);
      next += __builtin_convertvector(x, Doubles);
      next = (next < LEAST) & (next > -LEAST) ? next * 0.0 : next;
      x = __builtin_convertvector(next, Floats);
    }
    return x;
  }
};

}  // namespace
