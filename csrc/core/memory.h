// memory.h: recycled buffers for large outputs.
//
// A fresh page costs more than the arithmetic on it: the kernel must find, clear and map it. Measured
// on a 103 MB output, that is several times the batch norm itself. So whoever makes arrays on our
// side (the NumPy adapter) takes them from here and gives them back when they die.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
namespace fusebn {

struct PoolStatistics {
  int64_t in_use;   // bytes that are handed out
  int64_t cached;   // bytes that wait to be handed out again
  int64_t limit;    // most bytes that may wait
  int64_t recycled, fresh;  // how many buffers came from the cache, how many from the system
};

// A buffer of at least that many bytes, aligned to 2 MiB, its content undefined; null if the system
// has none. Any thread may call, and any thread may give it back.
void* take_buffer(int64_t bytes);
void give_back_buffer(void* buffer, int64_t bytes);

// Asks the system to back what it has not mapped yet of [data, data + bytes) by pages of 2 MiB: for
// outputs that somebody else has allocated. A hint; what is mapped stays as it is.
void want_huge_pages(void* data, int64_t bytes);

PoolStatistics pool_statistics();
void set_pool_limit(int64_t bytes);  // what waits beyond it is returned to the system
void empty_pool();

}  // namespace fusebn
#pragma GCC visibility pop
