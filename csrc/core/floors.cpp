// floors.cpp: what the memory of this machine allows, measured with the walk and the threads of the
// kernels and none of their arithmetic. The benchmark divides by these.
//
//   read     reads a                 copy     out = a                  stream   out = a, past the cache
//   read2    reads a and b           copy2    out = a + b              stream2  the same, past the cache
#include "walks.h"

namespace fusebn::FUSEBN_TARGET {

void floor(Floor kind, const float* a, const float* b, float* out, int64_t n, int64_t ahead,
           Executor& executor) {
  using V = Vec<float>;
  constexpr int64_t kLanes = V::kLanes;
  const bool two = kind == Floor::read2 || kind == Floor::copy2 || kind == Floor::stream2;
  const bool streaming = kind == Floor::stream || kind == Floor::stream2;
  const bool reading = kind == Floor::read || kind == Floor::read2;
  const int64_t vectors = n / kLanes, per_task = kMapElements / kLanes;
  const auto task = [&](int64_t index) {
    const int64_t begin = index * per_task, end = least(begin + per_task, vectors);
    V sums[4] = {splat<float>(0), splat<float>(0), splat<float>(0), splat<float>(0)};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t e = i * kLanes;
      if (ahead) {
        __builtin_prefetch(a + e + ahead, 0, 2);
        if (two) __builtin_prefetch(b + e + ahead, 0, 2);
      }
      V v = load(a + e, Full{});
      if (two) v = v + load(b + e, Full{});
      if (reading)
        sums[i % 4] = sums[i % 4] + v;
      else if (streaming)
        stream(out + e, v);
      else
        store(out + e, v, Full{});
    }
    if (streaming) fence();
    // A result nobody can foresee, so that the reads are not optimized away.
    const V total = sums[0] + sums[1] + sums[2] + sums[3];
    if (reading && sum(total) == 1.2345678e30f) store(out, total, Full{});
  };
  executor.run(ceil_div(vectors, per_task), Task::of(task));
}

}  // namespace fusebn::FUSEBN_TARGET
