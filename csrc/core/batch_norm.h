// batch_norm.h: everything the CPU core offers. Plain C++20: no Python, no framework.
//
// Arrays. x, y, dy, dx and residual are contiguous blocks [outer, channels, inner]: any dense array
// with a channel axis is one without moving a byte (NCHW is [N, C, H*W], NHWC is [N*H*W, C, 1]).
// Weights are [outer, inner]: one non-negative real a position, shared by the channels; a position
// of weight 0 is ignored by the statistics, whatever x holds there. Everything else is [channels].
// The caller allocates; the core fills every element. y may be x, dx may be dy or x.
//
// Types. T is the element type. Parameters are Stat<T>: float, or double when T is. Statistics
// travel inside the core in double and are rounded once, at the door.
//
// Optional. A null scale is 1, a null offset or residual is 0, null weights are 1: no dummy arrays.
//
// Bits. The result depends on the arguments and on the shape, never on the number of threads.
#pragma once
#include <cstdint>
#include <type_traits>

#include "half.h"
#include "parallel.h"

// What the shared library shows; it hides all else. The pragma does not reach templates.
#define FUSEBN_API __attribute__((visibility("default")))
#pragma GCC visibility push(default)
namespace fusebn {

struct Block {
  int64_t outer, channels, inner;
  int64_t positions() const { return outer * inner; }  // elements that share a channel
  int64_t elements() const { return outer * channels * inner; }
};

template <class T>
using Stat = std::conditional_t<std::is_same_v<T, double>, double, float>;

enum class Activation { identity, relu, relu6, leaky_relu, silu, gelu };

// What normalize does to x:
//   y = activation((x - mean) * scale * rstd + offset + residual)
template <class T>
struct Normalization {
  const double* mean;
  const double* rstd;  // see to_rstd
  const Stat<T>* scale;
  const Stat<T>* offset;
  const T* residual;
  Activation activation;
};

// 1 / sqrt(variance + epsilon), and 0 where variance + epsilon is 0.
void to_rstd(const double* variance, double epsilon, int64_t n, double* rstd);

// What flows back into the statistics of a batch; all of it is [channels].
struct StatisticsGradient {
  double count;             // sum of the weights, n without them
  const double* sum_g;      // from backward_sums
  const double* sum_g_x;    // from backward_sums
  const double* dmean;      // gradient of the batch's mean; null is 0
  const double* dvariance;  // gradient of its biased variance; null is 0
};

// The four verbs, on one element type.
template <class T>
struct Verbs {
  // count = sum of weights; mean = sum of weight * x / count; m2 = sum of weight * (x - mean)^2.
  // An empty batch gives 0, 0, 0. A channel that holds a NaN or an infinity gives NaN, NaN.
  double (*moments)(const T* x, Block, const Stat<T>* weights, double* mean, double* m2, Executor&);

  void (*normalize)(const T* x, Block, const Normalization<T>&, T* y, Executor&);

  // g = dy * activation'(what activation saw); sum_g = sum of g; sum_g_x = sum of g * (x - mean).
  // Then doffset = sum_g and dscale = rstd * sum_g_x. Several devices may add their sums here.
  // g itself is written where there is a place for it; null: not wanted.
  void (*backward_sums)(const T* dy, const T* x, Block, const Normalization<T>&, double* sum_g,
                        double* sum_g_x, T* g, Executor&);

  // dx = scale * rstd * (g - weight / count * (sum_g + (x - mean) * rstd^2 * sum_g_x))
  //      + weight / count * (dmean + 2 * (x - mean) * dvariance)          dresidual = g
  // Without `statistics` mean and variance were given: dx = scale * rstd * g. dresidual may be null.
  void (*backward)(const T* dy, const T* x, Block, const Normalization<T>&,
                   const StatisticsGradient* statistics, const Stat<T>* weights, T* dx,
                   T* dresidual, Executor&);
};

// The verbs compiled for the chosen instruction set.
template <class T>
FUSEBN_API const Verbs<T>& verbs();

// What the memory allows: see floors.cpp. Arrays of n floats, 64-byte aligned; n a multiple of 16. What
// is read is asked for `ahead` elements early, or with 0 not at all.
enum class Floor { read, copy, stream, read2, copy2, stream2 };
void floor(Floor, const float* a, const float* b, float* out, int64_t n, int64_t ahead, Executor&);

// Outputs of at least this many bytes are written past the cache: they would not stay in it, and a
// plain store first reads what it overwrites. To be set to this process's share of the last-level
// cache for an output: see cache_share in _info.py.
int64_t streaming_bytes();
void set_streaming_bytes(int64_t bytes);

// The instruction sets this machine can run, best first, ending in null; and the chosen one.
// `choose_instruction_set` returns false for a name that is not among them.
const char* const* instruction_sets();
const char* instruction_set();
bool choose_instruction_set(const char* name);

// forward: moments, what lies between, normalize. The one composition every framework needs.
template <class T>
struct Forward {
  Block block;
  const T* x;
  bool training;  // normalize with the batch's statistics, or with the given ones?
  const Stat<T>* mean;      // the given statistics: read when not training, and when mixing
  const Stat<T>* variance;
  const Stat<T>* weights;
  const Stat<T>* scale;
  const Stat<T>* offset;
  const T* residual;
  Activation activation;
  double epsilon;
  double correction;  // returned variance = m2 / (count - correction); count where that is not > 0
  double factor;      // returned = (1 - factor) * given + factor * batch; 1 ignores the given ones
  T* y;
  Stat<T>* mean_out;      // null: not wanted
  Stat<T>* variance_out;
  double* batch;  // [2, channels]: mean and variance that normalized x, for backward; or null
};

// Returns the count of the batch (0 when not training: nothing was counted), or -1, with nothing
// done, if a given variance that would be used is negative. A batch of count 0
// has no statistics: NaN is returned for them (the given ones where factor is not 1), and y is
// activation(offset + residual).
template <class T>
FUSEBN_API double forward(const Forward<T>&, Executor&);

// gradient: backward_sums, what lies between, backward.
//
// dmean and dvariance are what flows into the statistics that forward returned, so `correction` and
// `factor` are forward's; 0 and 1 say that they flow into the batch's own mean and biased variance.
// The given statistics have gradients of their own, added to what passes through to the returned:
//   not training: dgiven_mean = dmean - scale * rstd * sum_g
//                 dgiven_variance = dvariance - scale * rstd^3 / 2 * sum_g_x
//   training:     (1 - factor) * dmean, (1 - factor) * dvariance
template <class T>
struct Gradient {
  Block block;
  const T* dy;
  const T* x;
  bool training;
  const double* mean;  // what normalized x
  const double* variance;
  const Stat<T>* weights;
  const Stat<T>* scale;
  const Stat<T>* offset;
  const T* residual;
  Activation activation;
  double epsilon;
  const Stat<T>* dmean;     // null is 0
  const Stat<T>* dvariance;
  double correction;
  double factor;
  T* dx;            // null: not wanted, and dresidual neither
  T* dresidual;     // null: not wanted
  Stat<T>* dscale;  // null: not wanted, as all that follow
  Stat<T>* doffset;
  Stat<T>* dgiven_mean;
  Stat<T>* dgiven_variance;
};

template <class T>
FUSEBN_API void gradient(const Gradient<T>&, Executor&);

}  // namespace fusebn
#pragma GCC visibility pop
