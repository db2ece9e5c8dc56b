// Memory for numbers: it begins where a cache line does, and vectors may read a little beyond its end.
#pragma once
#include <memory>

#include "isa/simd.h"

namespace {

// Numbers that begin where a cache line does.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n = 0) : held_(new T[n + LINE + 3 * W]) {
    void* start = held_.get();
    size_t room = (n + LINE + 2 * W) * sizeof(T);
    at_ = static_cast<T*>(std::align(64, (n + 2 * W) * sizeof(T), start, room));
  }
  operator T*() const { return at_; }

 private:
  static constexpr size_t LINE = 64 / sizeof(T);
  std::unique_ptr<T[]> held_;
  T* at_;
};

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

}  // namespace
