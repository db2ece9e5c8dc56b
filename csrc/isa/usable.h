// Whether this process may use what the library was compiled for: tiles take more than a processor that has them.
#pragma once
#if defined(__AMX_BF16__) && defined(__linux__) && !defined(TM_TILES_EMULATED)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace {

// `REFUSALS` of backends/isa.py has the words.
enum Usable : int { USABLE = 1, NO_TILES = 0, NOT_SAVED = -1, OTHER_TILES = -2, NOT_PERMITTED = -3 };

#if !defined(__AMX_BF16__) || defined(TM_TILES_EMULATED)
inline Usable usable() { return USABLE; }
#elif !defined(__linux__)
inline Usable usable() { return NOT_PERMITTED; }  // how other systems are asked is not known
#else
struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Cpuid(unsigned leaf, unsigned part) { __get_cpuid_count(leaf, part, &a, &b, &c, &d); }
};

// Which registers the system saves when it switches threads (XCR0).
inline uint64_t saved_registers() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// In this order: each question may be asked only if those before it were answered well. Linux gives the tiles' 8 KiB to
// processes that ask for them (ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA), once for all threads and for what is forked;
// without it the first tile instruction is a SIGILL.
inline Usable usable() {
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, OSXSAVE = 1u << 27;
  constexpr uint64_t STATE = 3u << 17;  // configuration and data
  const unsigned features = Cpuid(7, 0).d;
  if (!(features & BF16) || !(features & TILE)) return NO_TILES;
  if (!(Cpuid(1, 0).c & OSXSAVE) || (saved_registers() & STATE) != STATE) return NOT_SAVED;
  const Cpuid palette(0x1d, 1);
  const bool eight = palette.a >> 16 == 1024 && palette.b >> 16 == 8;
  if (!eight || (palette.b & 0xffff) != 64 || (palette.c & 0xffff) != 16) return OTHER_TILES;
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? USABLE : NOT_PERMITTED;
}
#endif

}  // namespace
