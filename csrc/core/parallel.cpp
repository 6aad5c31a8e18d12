// parallel.cpp: a pool of threads that nobody ever waits for in vain.
//
// A job (job.h) stands in a queue once for each worker it can use. The pool is never destroyed: at
// exit its threads sleep on memory that stays. After a fork the child has no workers and perhaps a
// locked mutex, so it forgets the pool it inherited and builds another when it needs one. It forgets
// lent threads, too: a parent's OpenMP hangs in the child.
//
// Lent threads claim the tasks of a job in the same way, but their runtime has all of them meet at a
// barrier. Where another process holds a core, the caller waits there for a scheduling slice. So
// whoever was kept waiting leaves them alone for a while.
#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "job.h"

namespace fusebn {
namespace {

int cores_we_may_use() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

using Clock = std::chrono::steady_clock;

class Pool final : public Executor {
 public:
  void run(int64_t count, Task task) override {
    const int helpers = int(std::min<int64_t>(count, get_num_threads())) - 1;
    if (helpers <= 0) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    auto job = std::make_shared<Job>(count, task);
    {
      std::lock_guard lock(mutex_);
      start_workers(helpers);
      for (int i = 0; i < std::min(helpers, workers_); ++i) queue_.push_back(job);
      waiting_.store(int(queue_.size()), std::memory_order_relaxed);
    }
    wake_.notify_all();
    job->work();
    job->wait();
  }

 private:
  // Called with the mutex held. A thread that cannot be started is work the others do.
  void start_workers(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  void serve() {
    for (;;) {
      look_for([this] { return is_wanted(); });
      std::shared_ptr<Job> job;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [this] { return !queue_.empty(); });
        job = std::move(queue_.front());
        queue_.pop_front();
        waiting_.store(int(queue_.size()), std::memory_order_relaxed);
      }
      if (!job->exhausted()) job->work();
    }
  }

  bool is_wanted() const { return waiting_.load(std::memory_order_relaxed) != 0; }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> queue_;  // a job stands here once for each helper it can use
  std::atomic<int> waiting_{0};             // its length, to look at without the mutex
  int workers_ = 0;
};

std::atomic<Pool*> current_pool{nullptr};
std::atomic<int> num_threads{0};  // 0: not decided yet

// The others' last tasks take a fraction of this; a scheduling slice is 3 ms or more.
constexpr Clock::duration kPatience = std::chrono::milliseconds(2);
// For so long own threads serve whoever lost patience: a stall costs some percent of it.
constexpr Clock::duration kResentment = std::chrono::milliseconds(200);

class Team final : public Executor {
 public:
  void lend(ForkJoin parallel) {
    parallel_.store(parallel, std::memory_order_release);
    avoided_until_.store(Clock::duration::min(), std::memory_order_relaxed);
  }

  void run(int64_t count, Task task) override {
    const ForkJoin parallel = parallel_.load(std::memory_order_acquire);
    const int threads = get_num_threads();
    if (!parallel || count < 2 || threads < 2 ||
        Clock::now().time_since_epoch() < avoided_until_.load(std::memory_order_relaxed))
      return pool().run(count, task);

    Share share{Job(count, task), std::this_thread::get_id(), {}};
    const auto start = Clock::now();
    // All its threads, however few the tasks: a smaller team would end the ones it leaves out.
    parallel([](void* context) { static_cast<Share*>(context)->work(); }, &share, threads, 0);
    const auto now = Clock::now();
    if (now - start - share.working > kPatience)
      avoided_until_.store((now + kResentment).time_since_epoch(), std::memory_order_relaxed);
  }

 private:
  struct Share {
    Job job;
    const std::thread::id caller;
    Clock::duration working;  // the caller's; the rest it waited, at one end or the other

    void work() {
      const auto start = Clock::now();
      job.work();
      if (std::this_thread::get_id() == caller) working += Clock::now() - start;
    }
  };

  std::atomic<ForkJoin> parallel_{nullptr};
  std::atomic<Clock::duration> avoided_until_{Clock::duration::min()};
};

Team team;

}  // namespace

Executor& pool() {
  Pool* pool = current_pool.load(std::memory_order_acquire);
  if (pool) return *pool;
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr, std::memory_order_release); });
  (void)registered;
  Pool* fresh = new Pool;
  if (current_pool.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;
  return *pool;
}

void lend_threads(ForkJoin parallel) {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { team.lend(nullptr); });
  (void)registered;
  team.lend(parallel);
}

Executor& lent_threads() { return team; }

int get_num_threads() {
  int count = num_threads.load(std::memory_order_relaxed);
  if (count == 0) {
    count = cores_we_may_use();
    num_threads.store(count, std::memory_order_relaxed);
  }
  return count;
}

void set_num_threads(int count) { num_threads.store(count, std::memory_order_relaxed); }

}  // namespace fusebn
