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

#include "parallel.h"

namespace fusebn {

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
    for (int64_t seen; (seen = done.load(std::memory_order_acquire)) < count;) done.wait(seen);
  }

  bool exhausted() const { return next.load(std::memory_order_relaxed) >= count; }

  const int64_t count;
  const Task task;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
};

}  // namespace fusebn
