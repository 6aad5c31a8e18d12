// backward.cpp: the gradient of normalize and of the statistics behind it, in two passes.
//
//   z  = (x - mean) * scale * rstd + offset + residual          recomputed, not stored
//   g  = dy * activation'(z)                                    this is dresidual, too
//   sum_g = sum of g,   sum_g_x = sum of g * (x - mean)         backward_sums
//   dx = a * g + w * (p + q * (x - mean))                       backward, with a = scale * rstd and
//   p  = (dmean - a * sum_g) / count
//   q  = (2 * dvariance - a * rstd^2 * sum_g_x) / count
//
// (Ioffe and Szegedy 2015, section 3, with their sums taken out; w is the weight of the position.)
// Between the two verbs several devices may add their sums.
//
// Safety. Both centre x by the rounded mean m and correct the sums by mean - m (affine.h). The sums
// of a run stay in the lanes and are joined in double, as in moments.cpp. a * g is rounded before the
// rest is added, so that a batch of one, where they cancel, gives 0. Where dy is 0, x adds nothing to
// the sums, whatever it holds: the gradient of a masked position may sit beside a NaN.
#include "affine.h"

namespace fusebn::FUSEBN_TARGET {
namespace {

template <class T, Activation A>
struct Sums {
  using S = Stat<T>;
  using V = Vec<T>;
  struct Constants {
    V m, a, b;
  };

  const T* dy;
  const T* x;
  const T* residual;
  const S* m;  // of all channels, like a and b: see in_lanes
  const S* a;
  const S* b;
  double* sum_g;    // of the task's channels, in the same order
  double* sum_g_x;  // with x - m
  T* g_out;         // null: not wanted
  bool two_streams, streaming;

  void begin(int64_t, int64_t) {}

  FUSEBN_INLINE Constants constants(int64_t c) const {
    return {load_lanes<T>(m + c), load_lanes<T>(a + c), load_lanes<T>(b + c)};
  }
  FUSEBN_INLINE Constants constant(int64_t c) const {
    return {splat<T>(m[c]), splat<T>(a[c]), splat<T>(b[c])};
  }

  FUSEBN_INLINE void prefetch(int64_t e) const {
    __builtin_prefetch(x + e, 0, 2);
    __builtin_prefetch(dy + e, 0, 2);
  }

  template <bool rows, class L>
  FUSEBN_INLINE void terms(int64_t e, int64_t, const Constants& k, L lanes, V& u, V& v) const {
    V g = load(dy + e, lanes);  // 0 in dead lanes, and so is what is added
    const V centred = where_zero(g, splat<T>(0), load(x + e, lanes) - k.m);
    if constexpr (A != Activation::identity)
      g = chain<A>(g, preactivation(centred, k.a, k.b, residual, e, lanes));
    if (g_out) write(g_out + e, g, lanes, streaming);
    u = u + g;
    v = fma(g, centred, v);
  }

  FUSEBN_INLINE void join(int64_t n, const S* u, const S* v) {
    double *const to_u = sum_g, *const to_v = sum_g_x;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      to_u[j] += u[j];
      to_v[j] += v[j];
    }
  }
};

template <class T, Activation A>
void sums_of(const T* dy, const T* x, const T* residual, Block b, const Stat<T>* m, const Stat<T>* a,
             const Stat<T>* offset, double* sum_g, double* sum_g_x, T* g, Executor& executor) {
  const int64_t channels = b.channels, padded = in_lanes<T>(b, channels);
  const Cut cut(b);
  const bool two_streams = in_two_streams<T>(b);
  // The vectors of `reduce` begin with a row or a plane: these have to keep g aligned.
  const int64_t line = b.inner == 1 ? channels : b.inner;
  const bool streaming = g && b.elements() * int64_t(sizeof(T)) >= streaming_bytes() &&
                         line % Vec<T>::kLanes == 0 && uintptr_t(g) % 64 == 0;
  Scratch<double> partial_g(cut.chunks * padded), partial_g_x(cut.chunks * padded);
  const auto task = [&](int64_t index) {
    const int64_t chunk = index / cut.groups, c0 = index % cut.groups * cut.group;
    const int64_t c1 = least(c0 + cut.group, channels), n = in_lanes<T>(b, c1 - c0);
    double task_g[kRowGroup], task_g_x[kRowGroup];  // on the stack: see moments.cpp
    for (int64_t c = 0; c < n; ++c) task_g[c] = task_g_x[c] = 0;
    Sums<T, A> sums{dy, x, residual, m, a, offset, task_g, task_g_x, g, two_streams, streaming};
    reduce<T>(sums, b, chunk * cut.chunk, least((chunk + 1) * cut.chunk, b.positions()), c0, c1);
    __builtin_memcpy(partial_g + (chunk * padded + c0), task_g, n * sizeof(double));
    __builtin_memcpy(partial_g_x + (chunk * padded + c0), task_g_x, n * sizeof(double));
    if (streaming) fence();
  };
  executor.run(cut.chunks * cut.groups, Task::of(task));
  // The first chunk receives the others.
  for (int64_t chunk = 1; chunk < cut.chunks; ++chunk)
    for (int64_t c = 0; c < padded; ++c) {
      partial_g[c] += partial_g[chunk * padded + c];
      partial_g_x[c] += partial_g_x[chunk * padded + c];
    }
  to_channels<T>(b, static_cast<const double*>(partial_g), channels, sum_g);
  to_channels<T>(b, static_cast<const double*>(partial_g_x), channels, sum_g_x);
}

template <class T, Activation A>
struct Backward {
  using S = Stat<T>;
  using V = Vec<T>;
  const T* dy;
  const T* x;
  const T* residual;
  const S* weights;
  T* out;  // dx
  T* dresidual;
  bool training, streaming, streaming_residual;

  FUSEBN_INLINE void prefetch(int64_t e) const {
    __builtin_prefetch(dy + e, 0, 2);
    __builtin_prefetch(x + e, 0, 2);
  }

  template <bool rows, class L>
  FUSEBN_INLINE void visit(int64_t e, int64_t position, const V (&k)[5], L lanes) const {
    const auto& [m, a, b, p, q] = k;
    V g = load(dy + e, lanes), centred;
    if (A != Activation::identity || training) centred = load(x + e, lanes) - m;
    if constexpr (A != Activation::identity) {
      const V seen = kSelects<A> ? centred : where_zero(g, splat<T>(0), centred);
      g = chain<A>(g, preactivation(seen, a, b, residual, e, lanes));
    }
    V result = a * g;
    if (training) {
      V through = fma(centred, q, p);
      if (weights) {
        V w;
        if constexpr (rows)
          w = splat<T>(weights[position]);
        else
          w = load_in_order<T>(weights + position, lanes);
        const V zero = splat<T>(0);
        through = where_less(zero, w, w * through, zero);
      }
      result = result + through;
    }
    write(out + e, result, lanes, streaming);
    if (dresidual) write(dresidual + e, g, lanes, streaming_residual);
  }
};

}  // namespace

template <class T>
void backward_sums(const T* dy, const T* x, Block b, const Normalization<T>& n, double* sum_g,
                   double* sum_g_x, T* g, Executor& executor) {
  using S = Stat<T>;
  const int64_t channels = b.channels;
  for (int64_t c = 0; c < channels; ++c) sum_g[c] = sum_g_x[c] = 0;
  if (b.elements() == 0) return;

  const Folded<T> folded(b);
  const int64_t copies = folded.main.channels, padded = in_lanes<T>(folded.main, copies);
  Scratch<S> m(padded), a(padded), offset(padded);
  for (int64_t c = 0; c < channels; ++c) {
    const Affine affine(n, c);
    m[c] = quiet(S(n.mean[c]));
    a[c] = quiet(S(affine.a));
    offset[c] = quiet(S(affine.b(n, c)));
  }
  for (S* const values : {&m[0], &a[0], &offset[0]}) {
    for (int64_t c = channels; c < padded; ++c) values[c] = values[c - channels];
    to_lanes<T>(folded.main, values, padded);
  }
  Scratch<double> part_g(copies), part_g_x(copies);
  with_activation(n.activation, [&]<Activation A>() {
    const auto add = [&](int64_t at, Block part, int64_t fold) {
      sums_of<T, A>(dy + at, x + at, n.residual ? n.residual + at : nullptr, part, m, a, offset,
                    part_g, part_g_x, g ? g + at : nullptr, executor);
      for (int64_t copy = 0; copy < fold; ++copy)
        for (int64_t c = 0; c < channels; ++c) {
          sum_g[c] += part_g[copy * channels + c];
          sum_g_x[c] += part_g_x[copy * channels + c];
        }
    };
    add(0, folded.main, folded.fold);
    if (folded.rest.outer) add(folded.rest_at, folded.rest, 1);
  });
  for (int64_t c = 0; c < channels; ++c) sum_g_x[c] -= Affine(n, c).m_low * sum_g[c];
}

template <class T>
void backward(const T* dy, const T* x, Block b, const Normalization<T>& n,
              const StatisticsGradient* statistics, const Stat<T>* weights, T* dx, T* dresidual,
              Executor& executor) {
  using S = Stat<T>;
  if (b.elements() == 0) return;
  // Nothing flows through the statistics of a batch of which nothing was counted.
  const bool training = statistics && statistics->count > 0;
  ChannelConstants<T, 5> constants(b);
  for (int64_t c = 0; c < b.channels; ++c) {
    const Affine affine(n, c);
    double p = 0, q = 0;
    if (training) {
      const auto& s = *statistics;
      const double dmean = s.dmean ? s.dmean[c] : 0;
      const double dvariance = s.dvariance ? s.dvariance[c] : 0;
      q = (2 * dvariance - affine.a * n.rstd[c] * n.rstd[c] * s.sum_g_x[c]) / s.count;
      // a as the lanes have it, so that a batch of one cancels exactly.
      p = (dmean - double(S(affine.a)) * s.sum_g[c]) / s.count - q * affine.m_low;
    }
    constants.set(c, {S(n.mean[c]), S(affine.a), S(affine.b(n, c)), S(p), S(q)});
  }
  constants.seal();
  const bool streaming = b.elements() * int64_t(sizeof(T)) >= streaming_bytes();
  // Both outputs are streamed if the vectors that are aligned for one are for the other.
  const bool together = streaming && (uintptr_t(dx) - uintptr_t(dresidual)) % 64 == 0;
  with_activation(n.activation, [&]<Activation A>() {
    map(Backward<T, A>{dy, x, n.residual, training ? weights : nullptr, dx, dresidual, training,
                       streaming, together},
        b, constants, training && weights, executor);
  });
}

#define FUSEBN_INSTANTIATE(T)                                                                      \
  template void backward_sums<T>(const T*, const T*, Block, const Normalization<T>&, double*,      \
                                 double*, T*, Executor&);                                          \
  template void backward<T>(const T*, const T*, Block, const Normalization<T>&,                    \
                            const StatisticsGradient*, const Stat<T>*, T*, T*, Executor&);
FUSEBN_INSTANTIATE(float16)
FUSEBN_INSTANTIATE(bfloat16)
FUSEBN_INSTANTIATE(float)
FUSEBN_INSTANTIATE(double)

}  // namespace fusebn::FUSEBN_TARGET
