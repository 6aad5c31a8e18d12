// job.h: tasks that several threads claim one by one, so that nobody waits for a thread in vain.
//
// Method. A job is a counter of tasks. Whoever works on it, the caller included, claims the next
// index until none is left; the caller then waits only for indices that somebody has claimed. A
// helper that has not woken up has claimed nothing, so a busy machine costs its share of the work
// and no more. (A static split behind a barrier stalls for a whole scheduling slice, 8 ms and up,
// whenever another process holds one of the cores.)
//
// Safety. `task` lives on the caller's stack and is called only between a claim and its
// completion, while the caller waits. The job itself is shared, since a helper may look at it after
// the caller has left.
#pragma once
#include <atomic>
#include <chrono>

#include "parallel.h"

namespace fusebn {

// How long a thread looks for what it waits for before it sleeps: about what it costs to wake it
// (measured in a virtual machine: 35 to 60 us, and 16 of whoever does it), what a task takes at most,
// and what a caller may do between two jobs (40 us, an interpreter whose code has left the cache). So
// looking in vain costs hardly more than it could have saved.
inline constexpr auto kLooking = std::chrono::microseconds(100);

template <class F>
void look_for(F found) {
  using Clock = std::chrono::steady_clock;
  for (const auto end = Clock::now() + kLooking; !found() && Clock::now() < end;) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
  }
}

struct Job {
  Job(int64_t count, Task task) : count(count), task(task) {}

  // Works on the job until no index is left to claim.
  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      task(i);
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == count) done.notify_all();
    }
  }

  void wait() {
    look_for([this] { return done.load(std::memory_order_acquire) == count; });
    for (int64_t seen; (seen = done.load(std::memory_order_acquire)) < count;) done.wait(seen);
  }

  bool exhausted() const { return next.load(std::memory_order_relaxed) >= count; }

  const int64_t count;
  const Task task;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
};

}  // namespace fusebn
