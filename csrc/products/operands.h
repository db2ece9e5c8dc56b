// What products read, C = or += A B: a left operand A number by number (or in tiles), a right one B along its rows.
#pragma once
#include <cstdint>

namespace {

// Of the inner dimension of a product, a step is a number, or a pair. Numbers that are sums of several bf16 lie in as many
// operands of the same form, `part` from one to the next, the largest first.
template <class E>
struct Left {
  const E* at;
  int64_t row, step, part;  // from one row to the next, from one step to the next
  Left down(int64_t rows) const { return {at + rows * row, row, step, part}; }
  Left along(int64_t steps) const { return {at + steps * step, row, step, part}; }
};
template <class E>
struct Right {
  const E* at;
  int64_t row, part;  // from one step to the next
  Right down(int64_t steps) const { return {at + steps * row, row, part}; }
  Right along(int64_t columns) const { return {at + columns, row, part}; }
};

inline int64_t multiple(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

}  // namespace
