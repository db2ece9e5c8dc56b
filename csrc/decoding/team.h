// Threads that go through many short phases of one job together, without falling asleep between them.
#pragma once
#include <sched.h>

#include "threads.h"

namespace {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// In each phase the next free thread takes what comes next, and nobody goes on before all of it is done. However few threads
// come, they get through; what is computed does not depend on who does it.
class Team {
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0}, done{0};
  };

 public:
  Team(int64_t phases, int64_t threads) : phases_(phases), threads_(threads) {}

  // Of items 0 to n: `run(first, end)`, at least `least` at a time, more in the beginning.
  template <class F>
  void go(int64_t number, int64_t n, int64_t least, F run) {
    Phase& phase = phases_[number];
    int64_t mine = 0;
    for (int64_t at = phase.next.load(std::memory_order_relaxed); at < n;) {
      const int64_t share = (n - at) / (2 * threads_) / least * least, size = std::min(std::max(share, least), n - at);
      if (!phase.next.compare_exchange_weak(at, at + size, std::memory_order_relaxed)) continue;
      run(at, at + size);
      mine += size;
      at = phase.next.load(std::memory_order_relaxed);
    }
    phase.done.fetch_add(mine, std::memory_order_acq_rel);
    for (int64_t looks = 0; phase.done.load(std::memory_order_acquire) < n; ++looks) {
      if (failed_.load(std::memory_order_relaxed)) throw std::bad_alloc();  // whoever failed took items that nobody will do
      looks < PATIENCE ? pause() : void(sched_yield());
    }
  }

  // `work()` of every thread, which goes through all phases.
  template <class Work>
  void run(Work work) {
    together(threads_, [&] {
      try {
        work();
      } catch (...) {  // an exception must not leave a thread
        failed_ = true;
      }
    });
    if (failed_) throw std::bad_alloc();
  }

 private:
  static constexpr int64_t PATIENCE = 4096;  // looks; then others may need the processor
  std::vector<Phase> phases_;
  int64_t threads_;
  std::atomic<bool> failed_{false};
};

}  // namespace
