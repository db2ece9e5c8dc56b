// The tile instructions of AMX, as functions whose registers are numbers: eight of 16 rows, each of 64 bytes.
//
// `TileRegisters` is what kernels use: the processor's own, or under TM_TILES_EMULATED the same in plain C++. Each thread
// configures its registers before it uses them and releases them at the end; whether a process may at all:
// isa/usable.h.
#pragma once
#include "isa/simd.h"
#if defined(TM_TILES_EMULATED)
#include "isa/amx_emulated.h"
#endif

namespace {

#if defined(__AMX_BF16__)
// What LDTILECFG reads. All registers are whole: to configure again takes long, so that edges are padded in memory.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // of a row
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

// Our own assembler, because GCC 12 does not know that its `_tile_loadd` reads memory: numbers that are stored before
// it may be stored behind it. Hence the clobbers; and all are volatile, which keeps their order.
struct Amx {
  static TM_INLINE void configure() {
    const TileConfig all;
    asm volatile("ldtilecfg %0" ::"m"(all) : "memory");
  }
  // Else each switch of context would save 8 KiB more.
  static TM_INLINE void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int T>
  static TM_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  static TM_INLINE void load(const void* at, int64_t step) {  // `step`: bytes from row to row
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(at), "r"(step) : "memory");
  }
  template <int T>
  static TM_INLINE void store(void* at, int64_t step) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(at), "r"(step) : "memory");
  }
  // C[16, 16] += A[16, 16] B[16, 16]: floats += pairs times pairs.
  template <int C, int A, int B>
  static TM_INLINE void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
#endif

#if defined(TM_TILES_EMULATED)
#define TM_TILES
using TileRegisters = EmulatedAmx;
#elif defined(__AMX_BF16__)
#define TM_TILES
using TileRegisters = Amx;
#endif

}  // namespace
