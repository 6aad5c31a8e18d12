// fused.cpp: forward and gradient, the two compositions of the four verbs.
//
//   forward:   moments -> the statistics returned -> normalize
//   gradient:  backward_sums -> dscale, doffset, those of the given statistics -> backward
//
// What lies between is arithmetic on vectors of [channels], in double, rounded once when stored.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "batch_norm.h"

namespace fusebn {
namespace {

constexpr double kUndefined = std::numeric_limits<double>::quiet_NaN();

// Scratch: some vectors of [channels].
class Vectors {
 public:
  Vectors(int64_t count, int64_t channels)
      : channels_(channels), data_(new double[count * channels]) {}
  double* operator[](int64_t i) { return data_.get() + i * channels_; }

 private:
  int64_t channels_;
  std::unique_ptr<double[]> data_;
};

// Returns `to`, filled with factor * from; null if `from` is.
template <class S>
const double* scaled(const S* from, double factor, int64_t n, double* to) {
  if (!from) return nullptr;
  for (int64_t i = 0; i < n; ++i) to[i] = factor * double(from[i]);
  return to;
}

}  // namespace

void to_rstd(const double* variance, double epsilon, int64_t n, double* rstd) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const double shifted = variance[i] + epsilon;
    rstd[i] = shifted == 0 ? 0 : 1 / std::sqrt(shifted);
  }
}

template <class T>
double forward(const Forward<T>& f, Executor& executor) {
  using S = Stat<T>;
  const int64_t channels = f.block.channels;
  if (!f.training || f.factor != 1)
    for (int64_t c = 0; c < channels; ++c)
      if (f.variance[c] < 0) return -1;
  Vectors scratch(3, channels);
  double *const mean = scratch[0], *const variance = scratch[1], *const rstd = scratch[2];

  double count = 0;
  const T* x = f.x;
  if (f.training) {
    double* const m2 = variance;
    count = verbs<T>().moments(x, f.block, f.weights, mean, m2, executor);
    const double unbiased = count > f.correction ? count - f.correction : count;
    const double kept = count > 0 ? 1 - f.factor : 1, taken = count > 0 ? f.factor : 0;
    const auto returned = [&](const S* given, int64_t c, double found) {
      if (count == 0) found = kUndefined;
      if (f.factor == 1) return S(found);
      return S(kept * given[c] + (taken ? taken * found : 0));
    };
    if (f.mean_out)
      for (int64_t c = 0; c < channels; ++c) f.mean_out[c] = returned(f.mean, c, mean[c]);
    if (f.variance_out)
      for (int64_t c = 0; c < channels; ++c)
        f.variance_out[c] = returned(f.variance, c, m2[c] / unbiased);
    for (int64_t c = 0; c < channels; ++c) variance[c] = count > 0 ? m2[c] / count : kUndefined;
  } else {
    scaled(f.mean, 1, channels, mean);
    scaled(f.variance, 1, channels, variance);
    if (f.mean_out) std::copy_n(f.mean, channels, f.mean_out);
    if (f.variance_out) std::copy_n(f.variance, channels, f.variance_out);
  }
  to_rstd(variance, f.epsilon, channels, rstd);
  const bool lost = f.training && count == 0;
  if (f.batch) {
    std::copy_n(mean, channels, f.batch);
    if (lost) std::fill_n(f.batch, channels, kUndefined);
    std::copy_n(variance, channels, f.batch + channels);
  }
  if (lost) {
    // y = activation(offset + residual), whatever x holds: normalize zeros, in place.
    std::memset(static_cast<void*>(f.y), 0, sizeof(T) * f.block.elements());
    std::fill_n(rstd, channels, 0);
    x = f.y;
  }
  const Normalization<T> normalization{mean, rstd, f.scale, f.offset, f.residual, f.activation};
  verbs<T>().normalize(x, f.block, normalization, f.y, executor);
  return count;
}

template <class T>
void gradient(const Gradient<T>& f, Executor& executor) {
  using S = Stat<T>;
  const int64_t channels = f.block.channels, positions = f.block.positions();
  Vectors scratch(6, channels);
  double *const sum_g = scratch[0], *const sum_g_x = scratch[1], *const rstd = scratch[2];

  double count = double(positions);
  if (f.weights) {
    count = 0;
    for (int64_t p = 0; p < positions; ++p) count += double(f.weights[p]);
  }
  Normalization<T> normalization{f.mean, rstd, f.scale, f.offset, f.residual, f.activation};
  to_rstd(f.variance, f.epsilon, channels, rstd);
  const T* x = f.x;
  std::unique_ptr<T[]> zeros;
  if (f.training && count == 0) {  // as in forward, whatever x holds
    zeros.reset(new T[f.block.elements()]());
    x = zeros.get();
    std::fill_n(rstd, channels, 0);
    std::fill_n(scratch[5], channels, 0);
    normalization.mean = scratch[5];
  }

  const bool through_statistics = f.training && count > 0;
  const bool into_given = !f.training && (f.dgiven_mean || f.dgiven_variance);
  const bool sums_wanted = through_statistics || into_given || f.dscale || f.doffset;
  // Who sums g up knows dresidual. Written then, it spares the second pass the residual and the
  // activation, and so a read of an array. But not where rounding g would show in dx.
  const bool exact = std::is_same_v<T, S> || f.activation == Activation::relu ||
                     f.activation == Activation::relu6;
  const bool g_first =
      sums_wanted && f.dresidual && f.activation != Activation::identity && exact;
  if (sums_wanted)
    verbs<T>().backward_sums(f.dy, x, f.block, normalization, sum_g, sum_g_x,
                             g_first ? f.dresidual : nullptr, executor);
  if (f.dscale)
    for (int64_t c = 0; c < channels; ++c) f.dscale[c] = S(rstd[c] * sum_g_x[c]);
  if (f.doffset)
    for (int64_t c = 0; c < channels; ++c) f.doffset[c] = S(sum_g[c]);

  // The given statistics: their share in the returned ones, and what normalizes by them.
  const double kept = !f.training ? 1 : count > 0 || f.factor == 1 ? 1 - f.factor : 1;
  const auto slope = [&](int64_t c) { return f.scale ? double(f.scale[c]) * rstd[c] : rstd[c]; };
  if (f.dgiven_mean)
    for (int64_t c = 0; c < channels; ++c) {
      const double direct = into_given ? slope(c) * sum_g[c] : 0;
      f.dgiven_mean[c] = S(kept * (f.dmean ? double(f.dmean[c]) : 0) - direct);
    }
  if (f.dgiven_variance)
    for (int64_t c = 0; c < channels; ++c) {
      const double direct = into_given ? slope(c) * rstd[c] * rstd[c] / 2 * sum_g_x[c] : 0;
      f.dgiven_variance[c] = S(kept * (f.dvariance ? double(f.dvariance[c]) : 0) - direct);
    }

  if (!f.dx) return;
  // Of what flows into the returned statistics, this much flows on into the batch's.
  const double unbiased = count > f.correction ? count / (count - f.correction) : 1;
  const StatisticsGradient statistics{
      count, sum_g, sum_g_x, scaled(f.dmean, f.factor, channels, scratch[3]),
      scaled(f.dvariance, f.factor * unbiased, channels, scratch[4])};
  if (g_first) {
    normalization.activation = Activation::identity;
    normalization.residual = nullptr;
  }
  verbs<T>().backward(g_first ? f.dresidual : f.dy, x, f.block, normalization,
                      through_statistics ? &statistics : nullptr, f.weights, f.dx,
                      g_first ? nullptr : f.dresidual, executor);
}

#define FUSEBN_INSTANTIATE(T)                               \
  template double forward<T>(const Forward<T>&, Executor&); \
  template void gradient<T>(const Gradient<T>&, Executor&);
FUSEBN_INSTANTIATE(float16)
FUSEBN_INSTANTIATE(bfloat16)
FUSEBN_INSTANTIATE(float)
FUSEBN_INSTANTIATE(double)

}  // namespace fusebn
