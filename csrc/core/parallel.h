// parallel.h: how the core runs independent tasks on several threads.
//
// The verbs ask an Executor, so that a framework with threads of its own can lend them. Ours is
// `pool()`. It is not OpenMP: one that stands still for a busy core, or hangs after a fork, is enough.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
namespace fusebn {

// A callable of one index, borrowed for the time of a call.
struct Task {
  const void* context;
  void (*call)(const void* context, int64_t index);

  template <class F>
  static Task of(const F& f) {
    return {&f, [](const void* context, int64_t i) { (*static_cast<const F*>(context))(i); }};
  }
  void operator()(int64_t index) const { call(context, index); }
};

struct Executor {
  // Calls task(i) for every i in [0, count), in any order and on any thread; returns when all are
  // done. The task must not throw.
  virtual void run(int64_t count, Task task) = 0;

 protected:
  ~Executor() = default;
};

// Our own threads. They are started when first needed and survive a fork (the child starts anew).
Executor& pool();

// The threads of an OpenMP runtime that a framework brought: `parallel` is its GOMP_parallel, which
// GCC's, LLVM's and Intel's all have. After a loop of the framework they spin for milliseconds on
// the very cores that ours would be woken for, so beside them the work is theirs.
using ForkJoin = void (*)(void (*)(void*), void* context, unsigned threads, unsigned flags);
void lend_threads(ForkJoin parallel);

// Those that were lent; `pool()` if none were, after a fork, and where they lately kept us waiting.
Executor& lent_threads();

// How many threads share the work, the calling one included. At first: as many as the process may
// run on (its affinity).
int get_num_threads();
void set_num_threads(int count);

}  // namespace fusebn
#pragma GCC visibility pop
