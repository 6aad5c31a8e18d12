// memory.cpp: a bounded cache of buffers, for any number of threads.
//
// Method. Buffers are whole 2 MiB pages (one page fault instead of 512, where the system has them).
// One that comes back waits in the cache, the most recent last; one that is asked for is the most
// recent of its size, or fresh. Beyond the limit the oldest go to the system.
//
// Safety. A buffer is either handed out or in the cache, and changes sides under the mutex. Across a
// fork the mutex is held, so the child finds the cache whole: its pages are its own copies.
#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <mutex>
#include <vector>

namespace fusebn {

namespace {
constexpr int64_t kPage = 2 << 20;
}

void want_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

namespace {

struct Waiting {
  void* buffer;
  int64_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Waiting> waiting;  // oldest first; a few dozen at most, so a scan is fine
  PoolStatistics statistics{0, 0, 0, 0, 0};
};

Pool& pool() {
  // Never destroyed: arrays may die after everything else.
  static Pool* const the_pool = [] {
    Pool* fresh = new Pool;
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                   [] { pool().mutex.unlock(); });
    return fresh;
  }();
  return *the_pool;
}

int64_t whole_pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

void* map_pages(int64_t bytes) {
  // Asks for a page more and cuts off what is not aligned.
  char* const mapped = static_cast<char*>(
      mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (mapped == MAP_FAILED) return nullptr;
  const int64_t head = (kPage - int64_t(reinterpret_cast<uintptr_t>(mapped) % kPage)) % kPage;
  if (head) munmap(mapped, head);
  if (head != kPage) munmap(mapped + head + bytes, kPage - head);
  want_huge_pages(mapped + head, bytes);
  return mapped + head;
}

// Takes the oldest out of the cache until it keeps the limit. The mutex is held; the caller unmaps
// what is returned after releasing it.
std::vector<Waiting> shrink(Pool& p, int64_t limit) {
  size_t count = 0;
  for (; p.statistics.cached > limit; ++count) p.statistics.cached -= p.waiting[count].bytes;
  std::vector<Waiting> gone(p.waiting.begin(), p.waiting.begin() + count);
  p.waiting.erase(p.waiting.begin(), p.waiting.begin() + count);
  return gone;
}

void unmap(const std::vector<Waiting>& gone) {
  for (const Waiting& w : gone) munmap(w.buffer, w.bytes);
}

}  // namespace

void* take_buffer(int64_t bytes) {
  bytes = whole_pages(bytes);
  Pool& p = pool();
  {
    std::lock_guard lock(p.mutex);
    for (size_t i = p.waiting.size(); i-- > 0;) {
      const Waiting found = p.waiting[i];
      if (found.bytes != bytes) continue;
      p.waiting.erase(p.waiting.begin() + i);
      p.statistics.cached -= bytes;
      p.statistics.in_use += bytes;
      ++p.statistics.recycled;
      return found.buffer;
    }
  }
  void* const buffer = map_pages(bytes);
  if (buffer) {
    std::lock_guard lock(p.mutex);
    p.statistics.in_use += bytes;
    ++p.statistics.fresh;
  }
  return buffer;
}

void give_back_buffer(void* buffer, int64_t bytes) {
  bytes = whole_pages(bytes);
  Pool& p = pool();
  std::vector<Waiting> gone;
  {
    std::lock_guard lock(p.mutex);
    p.statistics.in_use -= bytes;
    p.statistics.cached += bytes;
    p.waiting.push_back({buffer, bytes});
    gone = shrink(p, p.statistics.limit);
  }
  unmap(gone);
}

PoolStatistics pool_statistics() {
  std::lock_guard lock(pool().mutex);
  return pool().statistics;
}

void set_pool_limit(int64_t bytes) {
  std::vector<Waiting> gone;
  {
    std::lock_guard lock(pool().mutex);
    pool().statistics.limit = bytes;
    gone = shrink(pool(), bytes);
  }
  unmap(gone);
}

void empty_pool() {
  std::vector<Waiting> gone;
  {
    std::lock_guard lock(pool().mutex);
    gone = shrink(pool(), 0);
  }
  unmap(gone);
}

}  // namespace fusebn
