// Memory for numbers: it begins where a cache line does, and vectors may read a little beyond its end.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "isa/simd.h"

namespace {

// Large memory, kept from call to call: pages that the system hands out anew, zeroed, cost more time than a sparse call
// computes. Little of it is kept, the most recent; whoever finds it locked (as for ever in a process forked meanwhile)
// goes to the system.
class Reserve {
 public:
  struct Block {
    void* at = nullptr;
    size_t bytes = 0;
  };
  static constexpr size_t LEAST = 128 << 10, KEPT = 64 << 20, HUGE = 2 << 20;  // bytes

  static Block take(size_t bytes) {
    Reserve& all = shared();
    const size_t unit = bytes < HUGE ? LEAST : HUGE;
    bytes = (bytes + unit - 1) / unit * unit;
    if (const std::unique_lock<std::mutex> held(all.lock_, std::try_to_lock); held)
      for (size_t i = all.free_.size(); i-- > 0;)
        if (const Block found = all.free_[i]; found.bytes >= bytes && found.bytes / 2 <= bytes) {
          all.free_.erase(all.free_.begin() + i), all.kept_ -= found.bytes;
          return found;
        }
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (unit == HUGE) madvise(at, bytes, MADV_HUGEPAGE);
#endif
    return {at, bytes};
  }

  static void give(Block block) {
    Reserve& all = shared();
    const std::unique_lock<std::mutex> held(all.lock_, std::try_to_lock);
    if (!held || block.bytes > KEPT) return void(munmap(block.at, block.bytes));
    all.free_.push_back(block), all.kept_ += block.bytes;
    for (; all.kept_ > KEPT; all.free_.erase(all.free_.begin())) {
      all.kept_ -= all.free_[0].bytes;
      munmap(all.free_[0].at, all.free_[0].bytes);
    }
  }

 private:
  Reserve() { free_.reserve(KEPT / LEAST + 1); }  // so that giving back never needs memory
  static Reserve& shared() {
    static Reserve* all = new Reserve;  // for ever: threads may end after what is static is gone
    return *all;
  }
  std::mutex lock_;
  std::vector<Block> free_;  // the most recent last
  size_t kept_ = 0;          // bytes
};

// Numbers that begin where a cache line does.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n = 0) {
    const size_t count = n + LINE + 3 * W, bytes = count * sizeof(T);
    if (KEEPS && bytes >= Reserve::LEAST) {
      const Reserve::Block block = Reserve::take(bytes);
      large_ = {block.at, {block.bytes}};
      at_ = static_cast<T*>(block.at);
      return;
    }
    small_.reset(new T[count]);
    void* start = small_.get();
    size_t room = (n + LINE + 2 * W) * sizeof(T);
    at_ = static_cast<T*>(std::align(64, (n + 2 * W) * sizeof(T), start, room));
  }
  operator T*() const { return at_; }

 private:
  static constexpr size_t LINE = 64 / sizeof(T);
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool KEEPS = false;  // it watches the ends of what `new` gives
#else
  static constexpr bool KEEPS = true;
#endif
  struct Give {
    size_t bytes = 0;
    void operator()(void* at) const { Reserve::give({at, bytes}); }
  };
  std::unique_ptr<T[]> small_;
  std::unique_ptr<void, Give> large_;
  T* at_;
};

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

}  // namespace
