// fused.cpp: forward and gradient, the two compositions of the four verbs.
//
//   forward:   moments -> the statistics returned -> normalize
//   gradient:  backward_sums -> dscale, doffset, those of the given statistics -> backward
//
// What lies between is arithmetic on vectors of [channels], in double, rounded once when stored.
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "batch_norm.h"

namespace fusebn {
namespace {

constexpr double kUndefined = std::numeric_limits<double>::quiet_NaN();

// Statistics nobody gave, for a batch that has none: every x is as good as the mean.
constexpr double kNoVariance = std::numeric_limits<double>::infinity();

// Returns `to`, filled with factor * from; null if `from` is.
template <class S>
const double* scaled(const S* from, double factor, int64_t n, double* to) {
  if (!from) return nullptr;
  for (int64_t i = 0; i < n; ++i) to[i] = factor * double(from[i]);
  return to;
}

}  // namespace

template <class T>
double forward(const Forward<T>& f, Executor& executor) {
  using S = Stat<T>;
  const int64_t channels = f.block.channels;
  if (!f.training || f.factor != 1)
    for (int64_t c = 0; c < channels; ++c)
      if (f.variance[c] < 0) return -1;
  std::unique_ptr<double[]> statistics(new double[2 * channels]);
  double* const mean = statistics.get();
  double* const variance = mean + channels;  // m2, until it is divided

  double count = 0;
  const T* x = f.x;
  if (f.training) {
    count = verbs<T>().moments(x, f.block, f.weights, mean, variance, executor);
    const double unbiased = count > f.correction ? count - f.correction : count;
    for (int64_t c = 0; c < channels; ++c) {
      const double m2 = variance[c];
      variance[c] = count > 0 ? m2 / count : kUndefined;
      if (count == 0) mean[c] = kUndefined;
      if (f.batch) f.batch[c] = mean[c], f.batch[channels + c] = variance[c];
      double returned_mean = mean[c], returned_variance = count > 0 ? m2 / unbiased : kUndefined;
      if (f.factor != 1) {
        const double kept = count > 0 ? 1 - f.factor : 1, taken = count > 0 ? f.factor : 0;
        returned_mean = kept * f.mean[c] + (taken ? taken * returned_mean : 0);
        returned_variance = kept * f.variance[c] + (taken ? taken * returned_variance : 0);
      }
      if (f.mean_out) f.mean_out[c] = S(returned_mean);
      if (f.variance_out) f.variance_out[c] = S(returned_variance);
    }
    if (count == 0) {
      // y = activation(offset + residual), whatever x holds: normalize zeros, in place.
      std::memset(static_cast<void*>(f.y), 0, sizeof(T) * f.block.elements());
      for (int64_t c = 0; c < channels; ++c) mean[c] = 0, variance[c] = kNoVariance;
      x = f.y;
    }
  } else {
    scaled(f.mean, 1, channels, mean);
    scaled(f.variance, 1, channels, variance);
    for (int64_t c = 0; c < channels; ++c) {
      if (f.mean_out) f.mean_out[c] = f.mean[c];
      if (f.variance_out) f.variance_out[c] = f.variance[c];
      if (f.batch) f.batch[c] = mean[c], f.batch[channels + c] = variance[c];
    }
  }
  const Normalization<T> normalization{mean,    variance, f.epsilon,   f.scale,
                                       f.offset, f.residual, f.activation};
  verbs<T>().normalize(x, f.block, normalization, f.y, executor);
  return count;
}

template <class T>
void gradient(const Gradient<T>& f, Executor& executor) {
  using S = Stat<T>;
  const int64_t channels = f.block.channels, positions = f.block.positions();
  std::unique_ptr<double[]> scratch(new double[6 * channels]);
  double* const sum_g = scratch.get();
  double* const sum_g_x = sum_g + channels;

  double count = double(positions);
  if (f.weights) {
    count = 0;
    for (int64_t p = 0; p < positions; ++p) count += double(f.weights[p]);
  }
  Normalization<T> normalization = f.normalization;
  if (f.training && count == 0) {
    double* const mean = sum_g_x + channels;
    double* const variance = mean + channels;
    for (int64_t c = 0; c < channels; ++c) mean[c] = 0, variance[c] = kNoVariance;
    normalization.mean = mean;
    normalization.variance = variance;
  }

  const bool through_statistics = f.training && count > 0;
  const bool into_given = !f.training && (f.dgiven_mean || f.dgiven_variance);
  if (through_statistics || into_given || f.dscale || f.doffset)
    verbs<T>().backward_sums(f.dy, f.x, f.block, normalization, sum_g, sum_g_x, executor);
  // The share of the given statistics in the returned ones.
  const double kept = !f.training ? 1 : count > 0 || f.factor == 1 ? 1 - f.factor : 1;
  for (int64_t c = 0; c < channels; ++c) {
    const double rstd = rstd_of(normalization.variance[c], normalization.epsilon);
    if (f.dscale) f.dscale[c] = S(rstd * sum_g_x[c]);
    if (f.doffset) f.doffset[c] = S(sum_g[c]);
    const double slope = (normalization.scale ? double(normalization.scale[c]) : 1) * rstd;
    if (f.dgiven_mean) {
      const double direct = into_given ? slope * sum_g[c] : 0;
      f.dgiven_mean[c] = S(kept * (f.dmean ? double(f.dmean[c]) : 0) - direct);
    }
    if (f.dgiven_variance) {
      const double direct = into_given ? slope * rstd * rstd / 2 * sum_g_x[c] : 0;
      f.dgiven_variance[c] = S(kept * (f.dvariance ? double(f.dvariance[c]) : 0) - direct);
    }
  }

  // Of what flows into the returned statistics, this much flows on into the batch's.
  const double unbiased = count > f.correction ? count / (count - f.correction) : 1;
  double* const dmean = sum_g_x + 3 * channels;
  const StatisticsGradient statistics{
      count, sum_g, sum_g_x, scaled(f.dmean, f.factor, channels, dmean),
      scaled(f.dvariance, f.factor * unbiased, channels, dmean + channels)};
  verbs<T>().backward(f.dy, f.x, f.block, normalization, through_statistics ? &statistics : nullptr,
                      f.weights, f.dx, f.dresidual, executor);
}

#define FUSEBN_INSTANTIATE(T)                               \
  template double forward<T>(const Forward<T>&, Executor&); \
  template void gradient<T>(const Gradient<T>&, Executor&);
FUSEBN_INSTANTIATE(float16)
FUSEBN_INSTANTIATE(bfloat16)
FUSEBN_INSTANTIATE(float)
FUSEBN_INSTANTIATE(double)

}  // namespace fusebn
