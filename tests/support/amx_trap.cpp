// Preloaded into a process, it runs what is compiled for AMX on a processor without: each tile instruction, which is a
// SIGILL there, is decoded, carried out in plain C++ and skipped.
//
// It knows the six instructions of isa/amx.h; any other SIGILL goes to the handler before this one. What a processor
// refuses ends the process with a message. Every thread has its own registers; being preloaded they lie where no memory
// has to be asked for, which a handler must not do (-ftls-model=initial-exec).
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "isa/amx_emulated.h"
#include "amx_decoded.h"

namespace {

using Tile = uint8_t[16][64];

struct Registers {
  alignas(64) Tile tiles[8];
  int rows[8], bytes[8];  // of each, as configured
  bool configured;
};
thread_local Registers own;
std::atomic<uint64_t> carried_out{0}, apart{0};

[[noreturn]] void refuse(const char* why) {
  char text[200] = "amx_trap: ";
  std::strncat(std::strncat(text, why, 150), "\n", 2);
  if (write(STDERR_FILENO, text, std::strlen(text)) < 0) _exit(1);
  abort();
}

// -- doing it ---------------------------------------------------------------------------------------------------------

// 64 bytes: palette, first row, 14 zeros, bytes of a row of eight tiles, 16 zeros, their rows, 8 zeros.
void configure(const uint8_t* from) {
  own = {};
  if (from[0] == 0) return;
  if (from[0] != 1) refuse("a palette that is not there");
  if (from[1] != 0) refuse("a first row other than 0, which is for interrupted loads only");
  for (int i = 2; i < 64; ++i)
    if (from[i] != 0 && !(i >= 16 && i < 32) && !(i >= 48 && i < 56))
      refuse("a configuration with other than zeros where nothing is");
  for (int t = 0; t < 8; ++t) {
    own.bytes[t] = from[16 + 2 * t] | from[17 + 2 * t] << 8, own.rows[t] = from[48 + t];
    if (own.bytes[t] > 64 || own.rows[t] > 16) refuse("a tile that is too large");
    if (!own.bytes[t] != !own.rows[t]) refuse("a tile with rows or columns only");
  }
  own.configured = true;
}

// A register that may be used.
Tile& tile(int t) {
  if (!own.configured) refuse("a tile instruction where this thread has configured no tiles");
  if (!own.rows[t]) refuse("a tile that is not configured");
  return own.tiles[t];
}

void load(Tile& to, const Instruction& x) {
  std::memset(to, 0, sizeof to);
  for (int i = 0; i < own.rows[x.tile]; ++i) std::memcpy(to[i], x.at + i * x.step, own.bytes[x.tile]);
}

void store(const Tile& from, const Instruction& x) {
  for (int i = 0; i < own.rows[x.tile]; ++i) std::memcpy(x.at + i * x.step, from[i], own.bytes[x.tile]);
}

// By the emulation of whole tiles: beyond a smaller one there are zeros, which infinity would make NaN.
void add_product(Tile& c, const Tile& a, const Tile& b, const Instruction& x) {
  if (x.tile == x.a || x.tile == x.b || x.a == x.b) refuse("a product of tiles that are not three");
  if (own.bytes[x.tile] % 4 || own.bytes[x.a] % 4 || own.bytes[x.b] % 4) refuse("a product of parts of words");
  if (own.rows[x.tile] != own.rows[x.a] || own.bytes[x.tile] != own.bytes[x.b] || own.bytes[x.a] != 4 * own.rows[x.b])
    refuse("a product of tiles that do not fit");
  EmulatedAmx::configure();
  EmulatedAmx::load<0>(c, 64), EmulatedAmx::load<1>(a, 64), EmulatedAmx::load<2>(b, 64);
  EmulatedAmx::add_product<0, 1, 2>();
  EmulatedAmx::store<0>(c, 64);
  for (int i = 0; i < 16; ++i) {
    const int kept = i < own.rows[x.tile] ? own.bytes[x.tile] : 0;
    std::memset(c[i] + kept, 0, 64 - kept);
  }
}

void carry_out(const Instruction& x) {
  if (x.kind == CONFIGURE) configure(x.at + x.step);
  if (x.kind == RELEASE) own = {};
  if (x.kind == ZERO) std::memset(tile(x.tile), 0, sizeof(Tile));
  if (x.kind == LOAD) load(tile(x.tile), x);
  if (x.kind == STORE) store(tile(x.tile), x);
  if (x.kind == PRODUCT) add_product(tile(x.tile), tile(x.a), tile(x.b), x);
  if (x.kind == LOAD || x.kind == STORE) apart += (uintptr_t(x.at) | uintptr_t(x.step)) % 64 != 0;
  ++carried_out;
}

// -- the signal -------------------------------------------------------------------------------------------------------

struct sigaction before;  // who had the signal

void pass_on(int signal, siginfo_t* info, void* context) {
  if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(signal, info, context);
  if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(signal);
  sigaction(signal, &before, nullptr);  // the instruction raises it again
}

void on_illegal_instruction(int signal, siginfo_t* info, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction found = decoded(registers);
  if (found.kind == UNKNOWN) return pass_on(signal, info, context);
  do {  // and those that follow at once, because a signal takes long
    carry_out(found);
    registers[REG_RIP] = greg_t(found.end);
    found = decoded(registers);
  } while (found.kind != UNKNOWN);
}

}  // namespace

extern "C" {
uint64_t amx_trap_carried_out() { return carried_out; }
uint64_t amx_trap_apart() { return apart; }  // loads and stores whose rows do not begin at cache lines

// Once more, where somebody else took the signal since.
__attribute__((constructor)) void amx_trap_install() {
  struct sigaction mine = {}, old;
  mine.sa_sigaction = on_illegal_instruction;
  mine.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &mine, &old);
  if (!(old.sa_flags & SA_SIGINFO) || old.sa_sigaction != on_illegal_instruction) before = old;
}
}
