// Rows that lie in memory, and calling for those that are read soon.
#pragma once
#include "isa/simd.h"

namespace {

// Rows of numbers: where the first is, and from one to the next.
template <class B>
struct Rows {
  const B* at;
  int64_t step;
};

// From a number to the one that is called for when it is read, into the second cache: some rows further on.
template <class B>
inline int64_t further(Rows<B> rows, int64_t width) {
  constexpr int64_t FURTHER = 8192;
  const int64_t bytes = width * sizeof(B);
  return (FURTHER + bytes - 1) / bytes * rows.step;
}
template <int NUMBERS, class B>
TM_INLINE void call_for(const B* at) {
  constexpr int LINE = 64 / sizeof(B);
#pragma GCC unroll 8
  for (int i = 0; i < NUMBERS; i += LINE) __builtin_prefetch(at + i, 0, 2);
}

// What is called for with each step of a product: the same numbers of rows that are further on, unless `away` is 0.
struct Beside {
  int64_t away;
  template <int NUMBERS, class B>
  TM_INLINE void call(const B* at) {
    if (away) call_for<NUMBERS>(at + away);
  }
};

// Or so many rows in the order in which they lie, spread over all steps: where rows are read part by part, those parts
// would come in no order that memory is quick in, and where rows are read again, nothing would come meanwhile.
template <class B>
class Spread {
 public:
  Spread(Rows<B> rows, int64_t width)
      : away_(further(rows, width)), line_end_((width + LINE - 1) / LINE * LINE), gap_(rows.step - line_end_) {}
  TM_INLINE void begin(const B* now, int64_t rows, int64_t steps) {
    at_ = now + away_, left_ = line_end_, due_ = 0, steps_ = steps, lines_ = rows * line_end_ / LINE;
  }
  template <int>
  TM_INLINE void call(const B*) {
    for (due_ += lines_; due_ >= steps_; due_ -= steps_) {
      __builtin_prefetch(at_, 0, 2);
      at_ += LINE, left_ -= LINE;
      if (left_ == 0) at_ += gap_, left_ = line_end_;
    }
  }

 private:
  static constexpr int64_t LINE = 64 / sizeof(B);
  int64_t away_, line_end_, gap_;  // numbers; from the end of a row's last line to the next row
  const B* at_ = nullptr;
  int64_t left_ = 0, due_ = 0, steps_ = 1, lines_ = 0;  // numbers of the row; lines times steps; steps and lines in all
};

}  // namespace
