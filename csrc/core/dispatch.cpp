// dispatch.cpp: which build of the kernels runs.
//
// moments.cpp, normalize.cpp and backward.cpp are compiled once for each instruction set in
// FUSEBN_TARGETS, best first, each inside a namespace of that name. The best one that the machine
// can run is chosen when first asked for.
#include <atomic>
#include <cstring>

#include "batch_norm.h"

namespace fusebn {

#define FUSEBN_DECLARE(target)                                                                    \
  namespace target {                                                                              \
  template <class T>                                                                              \
  double moments(const T*, Block, const Stat<T>*, double*, double*, Executor&);                   \
  template <class T>                                                                              \
  void normalize(const T*, Block, const Normalization<T>&, T*, Executor&);                        \
  template <class T>                                                                              \
  void backward_sums(const T*, const T*, Block, const Normalization<T>&, double*, double*,        \
                     Executor&);                                                                  \
  template <class T>                                                                              \
  void backward(const T*, const T*, Block, const Normalization<T>&, const StatisticsGradient<T>*, \
                const Stat<T>*, T*, T*, Executor&);                                               \
  void floor(Floor, const float*, const float*, float*, int64_t, Executor&);                      \
  template <class T>                                                                              \
  constexpr Verbs<T> kVerbs{moments<T>, normalize<T>, backward_sums<T>, backward<T>};             \
  }

#ifdef __x86_64__
FUSEBN_DECLARE(x86_64_v4)
FUSEBN_DECLARE(x86_64_v3)
FUSEBN_DECLARE(x86_64_v2)
#else
FUSEBN_DECLARE(baseline)
#endif

namespace {

// The names of the targets this machine runs, best first, ending in null.
struct Available {
  const char* names[4] = {};

  Available() {
    int n = 0;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) names[n++] = "x86-64-v4";
    if (__builtin_cpu_supports("x86-64-v3")) names[n++] = "x86-64-v3";
    names[n++] = "x86-64-v2";
#else
    names[n++] = "baseline";
#endif
  }
};

const Available available;
std::atomic<const char*> chosen{available.names[0]};

}  // namespace

template <class T>
const Verbs<T>& verbs() {
#ifdef __x86_64__
  switch (chosen.load(std::memory_order_relaxed)[sizeof "x86-64-v" - 1]) {
    case '4': return x86_64_v4::kVerbs<T>;
    case '3': return x86_64_v3::kVerbs<T>;
    default: return x86_64_v2::kVerbs<T>;
  }
#else
  return baseline::kVerbs<T>;
#endif
}

void floor(Floor kind, const float* a, const float* b, float* out, int64_t n, Executor& executor) {
#ifdef __x86_64__
  switch (chosen.load(std::memory_order_relaxed)[sizeof "x86-64-v" - 1]) {
    case '4': return x86_64_v4::floor(kind, a, b, out, n, executor);
    case '3': return x86_64_v3::floor(kind, a, b, out, n, executor);
    default: return x86_64_v2::floor(kind, a, b, out, n, executor);
  }
#else
  return baseline::floor(kind, a, b, out, n, executor);
#endif
}

namespace {
std::atomic<int64_t> least_streamed{8 << 20};  // until told better
}
int64_t streaming_bytes() { return least_streamed.load(std::memory_order_relaxed); }
void set_streaming_bytes(int64_t bytes) {
  least_streamed.store(bytes, std::memory_order_relaxed);
}

template const Verbs<float16>& verbs<float16>();
template const Verbs<bfloat16>& verbs<bfloat16>();
template const Verbs<float>& verbs<float>();
template const Verbs<double>& verbs<double>();

const char* const* instruction_sets() { return available.names; }

const char* instruction_set() { return chosen.load(std::memory_order_relaxed); }

bool choose_instruction_set(const char* name) {
  for (const char* const* known = available.names; *known; ++known)
    if (std::strcmp(*known, name) == 0) {
      chosen.store(*known, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace fusebn
