// moments.cpp: count, mean and m2 of every channel of a block.
//
//   count = sum of w        mean[c] = sum of w x / count        m2[c] = sum of w (x - mean[c])^2
//
// Method. One pass. Within a run (walks.h) the lanes sum d = x - origin and d^2, where the origin is
// the mean of all that the task has read before; the run's own m2 is then sum(d^2) - sum(d)^2 / k. A
// run of k at distance d from the n before it subtracts k d^2, and adds n k / (n + k) d^2 to the
// total. Since n >= k, that is at most twice what is added, whatever the data: the subtraction costs
// one bit. The origin of a task's first run is the mean of its first quarter, which is read twice: a
// quarter that is d away from the mean of its run adds k / 3 d^2, so there it is three times, or two
// bits. Runs, then tasks, are joined in double by the pairwise
// update of Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983. All means are
// kept as distances from the first value of the channel, the base: 10000 +- 0.1 then loses no digits
// to the 10000, in double either.
//
// m2 is a sum of terms that are not negative, so a variance never is; a constant channel gives
// d = 0 throughout, hence its own value and exactly 0.
#include "walks.h"

namespace fusebn::FUSEBN_TARGET {
namespace {

// Joins, for each channel, k elements of mean `mean_k` and `m2_k` to n elements of `mean` and `m2`.
void join(int64_t channels, double n, double* mean, double* m2, double k, const double* mean_k,
          const double* m2_k) {
  if (k == 0) return;
  const double share = k / (n + k), cross = n * share;
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = mean_k[c] - mean[c];
    mean[c] += delta * share;
    m2[c] += m2_k[c] + delta * delta * cross;
  }
}

template <class S>
S total_weight(const S* weights, int64_t n) {
  constexpr int kLanes = Vec<S>::kLanes;
  Vec<S> total = splat<S>(0);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total = total + load(weights + i, Full{});
  if (i < n) total = total + load(weights + i, Part{n - i});
  return sum(total);
}

// The values at position p of the channels c0 .. c1; in rows, in the order of the lanes.
template <class T>
void read_position(const T* x, Block b, int64_t p, int64_t c0, int64_t c1, Stat<T>* out) {
  constexpr int kLanes = Vec<T>::kLanes;
  const T* at = x + p / b.inner * b.channels * b.inner + p % b.inner;
  int64_t c = c0;
  if (b.inner == 1) {
    for (; c + kLanes <= c1; c += kLanes) store_lanes(out + c - c0, load(at + c, Full{}));
    if (c < c1) store_lanes(out + c - c0, load(at + c, Part{c1 - c}));
  } else {
    for (; c < c1; ++c) out[c - c0] = value(at + c * b.inner);
  }
}

template <class T>
struct Sums {
  using S = Stat<T>;
  using V = Vec<T>;
  struct Constants {
    V origin;
  };

  const T* x;
  const S* weights;
  const S* base;  // of the task's channels, like the four below: see in_lanes
  S* origin;
  double* mean;  // of what was joined so far, as a distance from base
  double* m2;
  int64_t c0;
  bool two_streams;
  bool finds_origin = false;    // join() only moves the origin to the mean of the run
  double count = 0;             // weight joined so far, this run included
  double inverse = 0, share = 0, cross = 0;  // of this run: 1 / k, k / count, n k / count

  void begin(int64_t p, int64_t n) {
    const double k = weights ? double(total_weight(weights + p, n)) : double(n), before = count;
    count = before + k;
    inverse = k > 0 ? 1 / k : 0;
    share = k > 0 ? k / count : 0;
    cross = before * share;
  }

  FUSEBN_INLINE Constants constants(int64_t c) const { return {load_lanes<T>(origin + c - c0)}; }
  FUSEBN_INLINE Constants constant(int64_t c) const { return {splat<T>(origin[c - c0])}; }

  FUSEBN_INLINE void prefetch(int64_t e) const {
    __builtin_prefetch(x + e, 0, 2);
  }

  template <bool rows, class L>
  FUSEBN_INLINE void terms(int64_t e, int64_t p, const Constants& k, L lanes, V& u, V& v) const {
    V d = load(x + e, lanes) - k.origin, wd;
    if (weights) {
      V w;
      if constexpr (rows)
        w = splat<T>(weights[p]);
      else
        w = load_in_order<T>(weights + p, lanes);
      const V zero = splat<T>(0);
      d = where_less(zero, w, d, zero);  // weight 0 hides a NaN, too
      wd = w * d;
    } else {
      if constexpr (!rows) d = keep(d, lanes);
      wd = d;
    }
    u = u + wd;
    v = fma(wd, d, v);
  }

  FUSEBN_INLINE void join(int64_t n, const S* u, const S* v) {
    const S* const from = base;
    S* const o = origin;
    double *const m = mean, *const q = m2;
    if (finds_origin) {
      for (int64_t j = 0; j < n; ++j) o[j] = S(o[j] + u[j] * inverse);
      return;
    }
    // `join` above, with the factors that all channels share taken out, so that it vectorizes.
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      const double d = u[j] * inverse, run_m2 = v[j] - u[j] * d;
      const double delta = (double(o[j]) - from[j]) + d - m[j];
      const double joined = m[j] + delta * share;
      m[j] = joined;
      q[j] += (run_m2 < 0 ? 0 : run_m2) + delta * delta * cross;  // rounding may leave -1e-20
      o[j] = S(from[j] + joined);
    }
  }
};

// Returns the count; `base` receives the first counted value of each channel, `mean` the distance
// of the mean from it.
template <class T>
double moments_from_base(const T* x, Block b, const Stat<T>* weights, Stat<T>* base, double* mean,
                         double* m2, Executor& executor) {
  using S = Stat<T>;
  const int64_t channels = b.channels, positions = b.positions(), padded = in_lanes<T>(b, channels);
  int64_t first = 0;
  while (weights && first < positions && weights[first] == 0) ++first;
  if (first == positions) first = 0;
  Scratch<S> bases(padded);
  read_position(x, b, first, 0, channels, bases);

  const Cut cut(b);
  const bool two_streams = in_two_streams<T>(b);
  Scratch<double> counts(cut.chunks), means(cut.chunks * padded), m2s(cut.chunks * padded);
  const auto task = [&](int64_t index) {
    const int64_t chunk = index / cut.groups, c0 = index % cut.groups * cut.group;
    const int64_t c1 = least(c0 + cut.group, channels), n = in_lanes<T>(b, c1 - c0);
    int64_t p = chunk * cut.chunk;
    const int64_t end = least(p + cut.chunk, positions);
    // The first origin must be a value that counts.
    while (weights && p < end && weights[p] == 0) ++p;
    alignas(64) S origin[kRowGroup];
    // On the stack: every run joins them. Side by side with another task's they would share lines of the
    // cache, which travel between the cores at each run: a third of the time, on two.
    alignas(64) double task_mean[kRowGroup], task_m2[kRowGroup];
    for (int64_t c = 0; c < n; ++c) task_mean[c] = task_m2[c] = 0;
    Sums<T> sums{x, weights, bases + c0, origin, task_mean, task_m2, c0, two_streams};
    if (p < end) {
      read_position(x, b, p, c0, c1, origin);
      const int64_t quarter = run_length(b, p, end - p, longest_run(b) / 4);
      sums.finds_origin = true;
      reduce<T>(sums, b, p, p + quarter, c0, c1);
      sums.finds_origin = false;
      sums.count = 0;
      reduce<T>(sums, b, p, end, c0, c1);
    }
    __builtin_memcpy(means + (chunk * padded + c0), task_mean, n * sizeof(double));
    __builtin_memcpy(m2s + (chunk * padded + c0), task_m2, n * sizeof(double));
    if (c0 == 0) counts[chunk] = sums.count;
  };
  executor.run(cut.chunks * cut.groups, Task::of(task));

  // The first chunk receives the others.
  double count = counts[0];
  for (int64_t chunk = 1; chunk < cut.chunks; ++chunk) {
    join(padded, count, means, m2s, counts[chunk], means + chunk * padded, m2s + chunk * padded);
    count += counts[chunk];
  }
  to_channels<T>(b, static_cast<const S*>(bases), channels, base);
  to_channels<T>(b, static_cast<const double*>(means), channels, mean);
  to_channels<T>(b, static_cast<const double*>(m2s), channels, m2);
  return count;
}

}  // namespace

template <class T>
double moments(const T* x, Block b, const Stat<T>* weights, double* mean, double* m2,
               Executor& executor) {
  using S = Stat<T>;
  for (int64_t c = 0; c < b.channels; ++c) mean[c] = m2[c] = 0;
  if (b.elements() == 0) return 0;

  Scratch<S> base(b.channels);
  const Folded<T> folded(b);
  double count = 0;
  if (weights || folded.fold == 1) {
    count = moments_from_base(x, b, weights, base, mean, m2, executor);
  } else {
    const int64_t channels = b.channels, copies = folded.main.channels;
    Scratch<S> bases(copies);
    Scratch<double> means(copies), m2s(copies);
    // Joins the copies of each channel, one after the other, relative to the first one's base.
    const auto join_copies = [&](int64_t at, Block part, int64_t fold) {
      moments_from_base<T>(x + at, part, nullptr, bases, means, m2s, executor);
      if (at == 0)
        for (int64_t c = 0; c < channels; ++c) base[c] = bases[c];
      for (int64_t copy = 0; copy < fold; ++copy) {
        double* const copy_mean = means + copy * channels;
        const S* const copy_base = bases + copy * channels;
        for (int64_t c = 0; c < channels; ++c) copy_mean[c] += double(copy_base[c]) - double(base[c]);
        join(channels, count, mean, m2, double(part.outer), copy_mean, m2s + copy * channels);
        count += double(part.outer);
      }
    };
    join_copies(0, folded.main, folded.fold);
    if (folded.rest.outer) join_copies(folded.rest_at, folded.rest, 1);
  }

  for (int64_t c = 0; c < b.channels; ++c) {
    if (count > 0) mean[c] += double(base[c]);
    // An infinity gives NaN wherever it stands; only a sum of squares may overflow on its own.
    if (mean[c] - mean[c] != 0 || m2[c] != m2[c]) mean[c] = m2[c] = __builtin_nan("");
  }
  return count;
}

#define FUSEBN_INSTANTIATE(T)                                                                     \
  template double moments<T>(const T*, Block, const Stat<T>*, double*, double*, Executor&);
FUSEBN_INSTANTIATE(float16)
FUSEBN_INSTANTIATE(bfloat16)
FUSEBN_INSTANTIATE(float)
FUSEBN_INSTANTIATE(double)

}  // namespace fusebn::FUSEBN_TARGET
