// The instructions of isa/amx.h one by one, and their operands in every form, for tests/backends/amx_instructions.py.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <iterator>
#include <utility>

#include "isa/amx.h"
#include "isa/amx_emulated.h"

namespace {

// Calls `run` with the number of a register as a constant.
template <class F, int... I>
void with_tile(int t, F run, std::integer_sequence<int, I...>) {
  ((I == t ? run(std::integral_constant<int, I>()) : void()), ...);
}
template <class F>
void with_tile(int t, F run) {
  with_tile(t, run, std::make_integer_sequence<int, 8>());
}

template <class T>
void add_product(int c, int a, int b) {
  with_tile(c, [&](auto c_) {
    with_tile(a, [&](auto a_) {
      with_tile(b, [&](auto b_) {
        constexpr int C = c_, A = a_, B = b_;
        if constexpr (C != A && A != B && B != C) T::template add_product<C, A, B>();
      });
    });
  });
}

// A tile from here to there by register 5, whose operand is written further(base,index,scale). Registers for the place
// and the step are as before afterwards.
#define WITH(base, index, instruction)                                                                                \
  "push %%" base "\n push %%" index "\n push %0\n push %1\n pop %%" index "\n pop %%" base "\n" instruction           \
  "\n pop %%" index "\n pop %%" base
#define PLACE(base, index, scale, further) #further "(%%" base ",%%" index "," #scale ")"
#define CARRIED_OUT(base, index, instruction, at, step)                                                               \
  asm volatile(WITH(base, index, instruction)::"r"(at), "r"(step) : "memory")
#define MOVED(base, index, scale, further)                                                                            \
  [](const char* from, char* to, int64_t step) {                                                                      \
    const char *from_there = from - (further), *to_there = to - (further);                                            \
    CARRIED_OUT(base, index, "tileloadd " PLACE(base, index, scale, further) ", %%tmm5", from_there, step / scale);   \
    CARRIED_OUT(base, index, "tilestored %%tmm5, " PLACE(base, index, scale, further), to_there, step / scale);       \
  }
using Move = void (*)(const char*, char*, int64_t);
constexpr Move MOVES[] = {
    MOVED("rax", "rbp", 1, 0),     MOVED("rcx", "rsi", 2, 64),      MOVED("rdx", "rdi", 4, -128),
    MOVED("rbx", "r8", 8, 4096),   MOVED("rbp", "r9", 1, 0),        MOVED("rsi", "r10", 2, -4096),
    MOVED("rdi", "r11", 4, 0),     MOVED("r8", "r12", 8, 127),      MOVED("r9", "r13", 1, 128),
    MOVED("r10", "r14", 2, 0),     MOVED("r11", "r15", 4, -1),      MOVED("r12", "rax", 8, 0),
    MOVED("r13", "rcx", 1, 0),     MOVED("r14", "rdx", 2, 1000000), MOVED("r15", "rbx", 4, 0),
    MOVED("r13", "r12", 8, -129),
};

// A whole tile that lies on the stack: what is before the stack pointer there is a signal's.
void load_from_stack(const char* from) {
  const int64_t step = 64;
  int64_t count = 1024;
  asm volatile(
      "sub $1152, %%rsp\n lea 64(%%rsp), %%rdi\n rep movsb\n tileloadd 64(%%rsp,%2,1), %%tmm5\n add $1152, %%rsp"
      : "+S"(from), "+c"(count)
      : "r"(step)
      : "rdi", "memory");
}

// One at an address that is itself in the code.
bool load_from_number(const char* from) {
  const int64_t step = 64;
  void* at = mmap(reinterpret_cast<void*>(0x30000000), 4096, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (at != reinterpret_cast<void*>(0x30000000)) return false;
  std::memcpy(at, from, 1024);
  asm volatile("tileloadd 0x30000000(,%0,1), %%tmm5" ::"r"(step) : "memory");
  munmap(at, 4096);
  return true;
}

const TileConfig WHOLE;

// Eight whole tiles, from operands of other forms.
constexpr void (*CONFIGURES[])() = {
    [] { asm volatile("ldtilecfg %0" ::"m"(WHOLE) : "memory"); },  // where the code is, and so far
    [] { asm volatile("mov %0, %%rax\n ldtilecfg (%%rax)" ::"r"(&WHOLE) : "rax", "memory"); },
    [] { asm volatile("mov %0, %%r12\n ldtilecfg (%%r12)" ::"r"(&WHOLE) : "r12", "memory"); },
    [] { asm volatile("mov %0, %%r13\n ldtilecfg (%%r13)" ::"r"(&WHOLE) : "r13", "memory"); },
    [] { asm volatile("lea -300(%0), %%r9\n ldtilecfg 300(%%r9)" ::"r"(&WHOLE) : "r9", "memory"); },
    [] {
      asm volatile("mov $10, %%r14\n lea -85(%0), %%r8\n ldtilecfg 5(%%r8,%%r14,8)" ::"r"(&WHOLE)
                   : "r8", "r14", "memory");
    },
};

}  // namespace

extern "C" {
void configure() { Amx::configure(); }
void configure_by(const void* from) { asm volatile("ldtilecfg (%0)" ::"r"(from) : "memory"); }
int configure_in_form(int i) { return i < int(std::size(CONFIGURES)) ? CONFIGURES[i](), 1 : 0; }
void release() { Amx::release(); }
void zero(int t) { with_tile(t, [](auto i) { Amx::zero<i>(); }); }
void load(int t, const void* at, int64_t step) { with_tile(t, [&](auto i) { Amx::load<i>(at, step); }); }
void store(int t, void* at, int64_t step) { with_tile(t, [&](auto i) { Amx::store<i>(at, step); }); }
void multiply(int c, int a, int b) { add_product<Amx>(c, a, b); }

void emulated(const void* a, const void* b, void* c) {
  using E = EmulatedAmx;
  E::configure(), E::load<0>(c, 64), E::load<1>(a, 64), E::load<2>(b, 64);
  E::add_product<0, 1, 2>(), E::store<0>(c, 64), E::release();
}

int moved(int i, const char* from, char* to, int64_t step) {
  return i < int(std::size(MOVES)) ? MOVES[i](from, to, step), 1 : 0;
}
void from_stack(const char* from) { load_from_stack(from); }
int from_number(const char* from) { return load_from_number(from); }
void same_row(const void* from) { asm volatile("tileloadd (%0), %%tmm5" ::"r"(from) : "memory"); }

void square() { asm volatile(".byte 0xc4, 0xe2, 0x7a, 0x5c, 0xc0"); }  // TDPBF16PS of register 0 three times
void nothing_known() { asm volatile("ud2"); }
void kept_out_of_caches(const void* from) { asm volatile("tileloaddt1 (%0), %%tmm5" ::"r"(from) : "memory"); }
void end_at_the_signal(int informed) {
  struct sigaction mine = {};
  mine.sa_handler = [](int) { _exit(40); };
  if (informed) {
    mine.sa_flags = SA_SIGINFO;
    mine.sa_sigaction = [](int, siginfo_t* why, void*) { _exit(why->si_addr ? 41 : 42); };
  }
  sigaction(SIGILL, &mine, nullptr);
}
}
