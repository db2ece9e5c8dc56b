// Work for several threads: torch's own where they can be had, else ours; who does what changes no result.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <thread>
#include <vector>

namespace {

// How threads are started: with a function that has OpenMP's `GOMP_parallel` for its form (torch's own threads: they are
// warm, and would spin beside ours), or by us. After a fork only the second way is left.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
struct Threads {
  Parallel start = nullptr;
  pid_t process = 0;
};
inline Threads& starter() {
  static Threads threads;
  return threads;
}

template <class Work>
void together(int64_t threads, const Work& work) {
  if (threads < 2) return work();
  if (starter().start && starter().process == getpid()) {
    const auto call = [](void* given) { (*static_cast<const Work*>(given))(); };
    return starter().start(call, const_cast<Work*>(&work), unsigned(threads), 0);
  }
  std::vector<std::thread> others;
  try {
    for (int64_t t = 1; t < threads; ++t) others.emplace_back(work);
  } catch (...) {  // no more threads are to be had: those that are there do it
  }
  work();
  for (auto& thread : others) thread.join();
}

// Run `make()(i)` for every i < n, the next free thread taking the next i: what i computes must not depend on who does.
template <class Make>
void each(int64_t n, int64_t threads, Make make) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};  // an exception must not leave a thread
  together(std::min(threads, n), [&] {
    try {
      if (next.load(std::memory_order_relaxed) >= n) return;
      auto run = make();
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n && !failed;) run(i);
    } catch (...) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

}  // namespace
