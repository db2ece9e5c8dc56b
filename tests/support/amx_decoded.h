// The tile instructions of isa/amx.h as numbers: what the code at a place says, and where its operand lies.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstring>

namespace {

enum Kind { UNKNOWN, CONFIGURE, RELEASE, ZERO, LOAD, STORE, PRODUCT };

struct Instruction {
  Kind kind = UNKNOWN;
  int tile = 0, a = 0, b = 0;
  uint8_t* at = nullptr;  // in memory
  int64_t step = 0;       // from row to row: the index, times its scale
  const uint8_t* end = nullptr;
};

// As instructions count the general registers.
constexpr int GENERAL[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                           REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

template <class T>
T next(const uint8_t*& from) {
  T x;
  std::memcpy(&x, from, sizeof x);
  from += sizeof x;
  return x;
}

// Place, step and end of an instruction whose operand lies in memory. `from`: its ModRM byte.
void read_place(Instruction& x, const uint8_t* from, int more_index, int more_base, const greg_t* registers) {
  const int form = next<uint8_t>(from), mod = form >> 6;
  int base = form & 7;
  bool in_code = mod == 0 && base == 5, nowhere = false;
  if (base == 4) {
    const int sib = next<uint8_t>(from), index = (sib >> 3 & 7) | more_index;
    if (index != 4) x.step = int64_t(uint64_t(registers[GENERAL[index]]) << (sib >> 6));
    base = sib & 7, nowhere = mod == 0 && base == 5;
  }
  int64_t further = 0;
  if (mod == 1) further = next<int8_t>(from);
  if (mod == 2 || in_code || nowhere) further = next<int32_t>(from);
  const int64_t start = in_code ? int64_t(from) : nowhere ? 0 : registers[GENERAL[base | more_base]];
  x.at = reinterpret_cast<uint8_t*>(start + further);
  x.end = from;
}

// Of the third VEX byte (without vvvv), the opcode and ModRM. No tile register has a fourth bit.
Kind kind_of(int prefix, int opcode, int form) {
  const bool in_memory = form < 0xc0;
  switch (opcode << 8 | prefix) {
    case 0x4900: return in_memory ? (form & 0x38 ? UNKNOWN : CONFIGURE) : form == 0xc0 ? RELEASE : UNKNOWN;
    case 0x4903: return !in_memory && (form & 7) == 0 ? ZERO : UNKNOWN;
    case 0x4b03: return in_memory && (form & 7) == 4 ? LOAD : UNKNOWN;
    case 0x4b02: return in_memory && (form & 7) == 4 ? STORE : UNKNOWN;
    case 0x5c02: return in_memory ? UNKNOWN : PRODUCT;
    default: return UNKNOWN;
  }
}

Instruction decoded(const greg_t* registers) {
  Instruction x;
  const auto code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (code[0] != 0xc4 || (code[1] & 0x9f) != 0x82) return x;  // VEX of three bytes, map 0F38, R as if it were none
  const int form = code[4], other = ~code[2] >> 3 & 15;
  const bool high_base = !(code[1] & 0x20), high_index = !(code[1] & 0x40);
  x.kind = kind_of(code[2] & 0x87, code[3], form);
  x.tile = form >> 3 & 7, x.a = form & 7, x.b = other, x.end = code + 5;
  const bool in_memory = x.kind == CONFIGURE || x.kind == LOAD || x.kind == STORE;
  if (x.kind == PRODUCT ? other > 7 : other != 0) x.kind = UNKNOWN;
  if (!in_memory && (high_base || high_index)) x.kind = UNKNOWN;
  if (in_memory && x.kind != UNKNOWN) read_place(x, code + 4, 8 * high_index, 8 * high_base, registers);
  return x;
}

}  // namespace
