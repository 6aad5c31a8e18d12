// dispatch.cpp: which build of the kernels runs.
//
// moments.cpp, normalize.cpp, backward.cpp and floors.cpp are compiled once for each target, inside a
// namespace of that name. The best one that the machine can run is chosen when the library is loaded.
#include <atomic>
#include <cstring>

#include "batch_norm.h"

namespace fusebn {

// The targets of this build, best first: `each(namespace, name, whether this machine runs it)`.
#ifdef __x86_64__
#define FUSEBN_TARGETS(each)                                                                   \
  each(x86_64_v4, "x86-64-v4", __builtin_cpu_supports("x86-64-v4"))                            \
  each(x86_64_v3, "x86-64-v3", __builtin_cpu_supports("x86-64-v3"))                            \
  each(x86_64_v2, "x86-64-v2", true)
#else
#define FUSEBN_TARGETS(each) each(baseline, "baseline", true)
#endif

#define FUSEBN_DECLARE(target, name, runs)                                                        \
  namespace target {                                                                              \
  template <class T>                                                                              \
  double moments(const T*, Block, const Stat<T>*, double*, double*, Executor&);                   \
  template <class T>                                                                              \
  void normalize(const T*, Block, const Normalization<T>&, T*, Executor&);                        \
  template <class T>                                                                              \
  void backward_sums(const T*, const T*, Block, const Normalization<T>&, double*, double*, T*,    \
                     Executor&);                                                                  \
  template <class T>                                                                              \
  void backward(const T*, const T*, Block, const Normalization<T>&, const StatisticsGradient*, \
                const Stat<T>*, T*, T*, Executor&);                                               \
  void floor(Floor, const float*, const float*, float*, int64_t, int64_t, Executor&);             \
  template <class T>                                                                              \
  constexpr Verbs<T> kVerbs{moments<T>, normalize<T>, backward_sums<T>, backward<T>};             \
  }
FUSEBN_TARGETS(FUSEBN_DECLARE)

namespace {

#define FUSEBN_NAME(target, name, runs) name,
#define FUSEBN_VERBS(target, name, runs) &target::kVerbs<T>,
#define FUSEBN_FLOOR(target, name, runs) target::floor,

constexpr const char* kNames[] = {FUSEBN_TARGETS(FUSEBN_NAME)};
template <class T>
constexpr const Verbs<T>* kVerbsOf[] = {FUSEBN_TARGETS(FUSEBN_VERBS)};
constexpr decltype(&floor) kFloorOf[] = {FUSEBN_TARGETS(FUSEBN_FLOOR)};
constexpr int kTargets = sizeof kNames / sizeof *kNames;

// The names of the targets that this machine runs, ending in null.
struct Available {
  const char* names[kTargets + 1] = {};

  Available() {
    int n = 0;
#ifdef __x86_64__
    __builtin_cpu_init();
#endif
#define FUSEBN_ADD(target, name, runs) \
  if (runs) names[n++] = name;
    FUSEBN_TARGETS(FUSEBN_ADD)
  }
};

int index_of(const char* name) {
  int i = 0;
  while (std::strcmp(kNames[i], name) != 0) ++i;
  return i;
}

const Available available;
std::atomic<int> chosen{index_of(available.names[0])};

}  // namespace

template <class T>
const Verbs<T>& verbs() {
  return *kVerbsOf<T>[chosen.load(std::memory_order_relaxed)];
}

void floor(Floor kind, const float* a, const float* b, float* out, int64_t n, int64_t ahead,
           Executor& executor) {
  kFloorOf[chosen.load(std::memory_order_relaxed)](kind, a, b, out, n, ahead, executor);
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

const char* instruction_set() { return kNames[chosen.load(std::memory_order_relaxed)]; }

bool choose_instruction_set(const char* name) {
  for (const char* const* known = available.names; *known; ++known)
    if (std::strcmp(*known, name) == 0) {
      chosen.store(index_of(*known), std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace fusebn
