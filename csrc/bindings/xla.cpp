// xla.cpp: the core as XLA's custom calls for the CPU, by the header of jaxlib alone.
//
//   fusebn_forward, fusebn_gradient                               the two compositions
//   fusebn_moments, fusebn_normalize, fusebn_backward_sums, fusebn_backward    the four verbs
//
// src/fusebn/jax/_calls.py makes the calls, and checks what is known when a program is traced.
//
// Shapes. Every array begins with an axis of problems, which are solved one after another: x is
// [problems, outer, channels, inner], a vector [problems, channels]. An operand that the problems
// share has length 1 there.
//
// Doubles. JAX knows no float64 unless it is told to, so a statistic that must not be rounded is two
// numbers of the statistics' type, high + low: `batch`, the mean and biased variance that normalized
// x, is [problems, 2, 2, channels]. With float64 low is 0.
#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "batch_norm.h"
#include "job.h"
#include "memory.h"
#include "xla/ffi/api/ffi.h"

namespace {

using namespace fusebn;
namespace ffi = xla::ffi;

// ---- threads ----

// XLA's threads flush subnormal numbers to zero, ours do not: one result must not have both.
class GradualUnderflow {
 public:
  GradualUnderflow() {
    std::fegetenv(&theirs_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~GradualUnderflow() { std::fesetenv(&theirs_); }

 private:
  std::fenv_t theirs_;
};

// XLA's threads, lent for a call. The caller, who may be one of them, works too. As fast as our own
// pool (forward, 32x28x28x512 and 32x112x112x64), and no more threads than XLA was given.
class Lent final : public Executor {
 public:
  explicit Lent(ffi::ThreadPool& threads)
      : threads_(threads), most_(std::min<int64_t>(threads.num_threads() + 1, get_num_threads())) {}

  void run(int64_t count, Task task) override {
    const auto job = std::make_shared<Job>(count, task);
    for (int64_t helper = 1; helper < std::min(count, most_); ++helper)
      threads_.Schedule([job] {
        const GradualUnderflow environment;
        if (!job->exhausted()) job->work();
      });
    job->work();
    job->wait();
  }

 private:
  ffi::ThreadPool& threads_;
  const int64_t most_;
};

// ---- calls ----

// All that a call may bring or take, in the order of _calls.py.
enum Item {
  x, dy, residual, scale, offset, mean, variance, weights, training, batch, count, sum_g, sum_g_x,
  dmean, dvariance, y, dx, dresidual, dscale, doffset
};

struct Failure {
  ffi::ErrorCode code;
  std::string message;
};

template <class T>
T checked(ffi::ErrorOr<T> value) {
  if (value.has_error()) throw Failure{ffi::ErrorCode::kInternal, value.error().message()};
  return *value;
}

struct Call {
  Executor& executor;
  ffi::RemainingArgs arguments;
  ffi::RemainingRets returned;
  int64_t operands, results;  // bit i: item i is there
  Activation activation;
  double epsilon, correction, factor;

  // Null for an item that is absent.
  template <class T>
  const T* in(Item item, int64_t problem) const {
    if (!(operands >> item & 1)) return nullptr;
    return of<const T>(checked(arguments.get<ffi::AnyBuffer>(place(operands, item))), problem);
  }
  template <class T>
  T* out(Item item, int64_t problem) const {
    if (!(results >> item & 1)) return nullptr;
    const ffi::AnyBuffer buffer = *checked(returned.get<ffi::AnyBuffer>(place(results, item)));
    // XLA asks the system for fresh memory again and again, and small pages cost more than we do.
    if (problem == 0) want_huge_pages(buffer.untyped_data(), int64_t(buffer.size_bytes()));
    return of<T>(buffer, problem);
  }

  ffi::AnyBuffer input() const {
    return checked(arguments.get<ffi::AnyBuffer>(place(operands, x)));
  }
  Block block() const {
    const ffi::AnyBuffer buffer = input();
    const auto shape = buffer.dimensions();
    return {shape[1], shape[2], shape[3]};
  }
  int64_t problems() const {
    return checked(returned.get<ffi::AnyBuffer>(0))->dimensions()[0];
  }

 private:
  static size_t place(int64_t items, Item item) {
    return std::popcount(uint64_t(items) & ((uint64_t(1) << item) - 1));
  }
  template <class T>
  static T* of(const ffi::AnyBuffer& buffer, int64_t problem) {
    const int64_t problems = buffer.dimensions()[0];
    const int64_t step = problems > 1 ? int64_t(buffer.element_count()) / problems : 0;
    return static_cast<T*>(buffer.untyped_data()) + problem * step;
  }
};

// Weights, checked one by one.
template <class T>
const Stat<T>* checked_weights(const char* operation, const Call& call, int64_t problem) {
  const auto* const values = call.in<Stat<T>>(weights, problem);
  for (int64_t i = 0, n = values ? call.block().positions() : 0; i < n; ++i)
    if (!(values[i] >= 0 && values[i] <= std::numeric_limits<Stat<T>>::max()))
      throw Failure{ffi::ErrorCode::kInvalidArgument,
                    std::string(operation) + ": `weights` must be finite and not negative; got " +
                        std::to_string(values[i]) + "."};
  return values;
}

// ---- doubles as two numbers ----

template <class S>
void split(const double* from, int64_t n, S* high, S* low) {
  for (int64_t i = 0; i < n; ++i) {
    high[i] = S(from[i]);
    low[i] = std::isfinite(high[i]) ? S(from[i] - double(high[i])) : S(0);
  }
}

using Doubles = std::vector<double>;

template <class S>
Doubles joined(const S* high, const S* low, int64_t n) {
  Doubles values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = double(high[i]) + double(low[i]);
  return values;
}

template <class S>
Doubles widened(const S* from, int64_t n) {
  return from ? Doubles(from, from + n) : Doubles();
}

const double* or_null(const Doubles& values) { return values.empty() ? nullptr : values.data(); }

// The mean and variance of a batch.
template <class S>
void store(const double* mean, const double* variance, int64_t channels, S* batch) {
  if (!batch) return;
  split(mean, channels, batch, batch + channels);
  split(variance, channels, batch + 2 * channels, batch + 3 * channels);
}

template <class S>
struct Batch {
  Batch(const S* batch, int64_t channels)
      : mean(joined(batch, batch + channels, channels)),
        variance(joined(batch + 2 * channels, batch + 3 * channels, channels)) {}
  Doubles mean, variance;
};

// ---- the two compositions ----

struct ForwardCall {
  template <class T>
  static void solve(const Call& call, int64_t problem) {
    using S = Stat<T>;
    const int64_t channels = call.block().channels;
    Doubles normalized_by(2 * channels);
    const double counted = forward<T>(
        {.block = call.block(),
         .x = call.in<T>(x, problem),
         .training = *call.in<bool>(training, problem),
         .mean = call.in<S>(mean, problem),
         .variance = call.in<S>(variance, problem),
         .weights = checked_weights<T>("fused_batch_norm", call, problem),
         .scale = call.in<S>(scale, problem),
         .offset = call.in<S>(offset, problem),
         .residual = call.in<T>(residual, problem),
         .activation = call.activation,
         .epsilon = call.epsilon,
         .correction = call.correction,
         .factor = call.factor,
         .y = call.out<T>(y, problem),
         .mean_out = call.out<S>(mean, problem),
         .variance_out = call.out<S>(variance, problem),
         .batch = normalized_by.data()},
        call.executor);
    if (counted < 0)
      throw Failure{ffi::ErrorCode::kInvalidArgument,
                    "fused_batch_norm: `variance` must not be negative; got a negative value."};
    store(normalized_by.data(), normalized_by.data() + channels, channels,
          call.out<S>(batch, problem));
    *call.out<S>(count, problem) = S(counted);
  }
};

struct GradientCall {
  template <class T>
  static void solve(const Call& call, int64_t problem) {
    using S = Stat<T>;
    const Batch<S> batch(call.in<S>(Item::batch, problem), call.block().channels);
    gradient<T>({.block = call.block(),
                 .dy = call.in<T>(dy, problem),
                 .x = call.in<T>(x, problem),
                 .training = *call.in<bool>(training, problem),
                 .mean = batch.mean.data(),
                 .variance = batch.variance.data(),
                 .weights = call.in<S>(weights, problem),
                 .scale = call.in<S>(scale, problem),
                 .offset = call.in<S>(offset, problem),
                 .residual = call.in<T>(residual, problem),
                 .activation = call.activation,
                 .epsilon = call.epsilon,
                 .dmean = call.in<S>(dmean, problem),
                 .dvariance = call.in<S>(dvariance, problem),
                 .correction = call.correction,
                 .factor = call.factor,
                 .dx = call.out<T>(dx, problem),
                 .dresidual = call.out<T>(dresidual, problem),
                 .dscale = call.out<S>(dscale, problem),
                 .doffset = call.out<S>(doffset, problem),
                 .dgiven_mean = call.out<S>(mean, problem),
                 .dgiven_variance = call.out<S>(variance, problem)},
                call.executor);
  }
};

// ---- the four verbs, for those who bring devices together between them ----

struct MomentsCall {
  template <class T>
  static void solve(const Call& call, int64_t problem) {
    using S = Stat<T>;
    const int64_t channels = call.block().channels;
    Doubles mean(channels), variance(channels);
    const double counted = verbs<T>().moments(call.in<T>(x, problem), call.block(),
                                              checked_weights<T>("moments", call, problem),
                                              mean.data(), variance.data(), call.executor);
    if (counted > 0)
      for (double& m2 : variance) m2 /= counted;
    store(mean.data(), variance.data(), channels, call.out<S>(batch, problem));
    *call.out<S>(count, problem) = S(counted);
  }
};

// What the other three normalize by, and its owner.
template <class T>
struct Constants {
  using S = Stat<T>;

  Constants(const Call& call, int64_t problem)
      : batch(call.in<S>(Item::batch, problem), call.block().channels),
        rstd(call.block().channels),
        normalization{batch.mean.data(),
                      rstd.data(),
                      call.in<S>(scale, problem),
                      call.in<S>(offset, problem),
                      call.in<T>(residual, problem),
                      call.activation} {
    to_rstd(batch.variance.data(), call.epsilon, call.block().channels, rstd.data());
  }

  Batch<S> batch;
  Doubles rstd;
  Normalization<T> normalization;
};

struct NormalizeCall {
  template <class T>
  static void solve(const Call& call, int64_t problem) {
    const Constants<T> constants(call, problem);
    verbs<T>().normalize(call.in<T>(x, problem), call.block(), constants.normalization,
                         call.out<T>(y, problem), call.executor);
  }
};

struct BackwardSumsCall {
  template <class T>
  static void solve(const Call& call, int64_t problem) {
    using S = Stat<T>;
    const int64_t channels = call.block().channels;
    const Constants<T> constants(call, problem);
    Doubles g(channels), g_x(channels);
    verbs<T>().backward_sums(call.in<T>(dy, problem), call.in<T>(x, problem), call.block(),
                             constants.normalization, g.data(), g_x.data(), nullptr, call.executor);
    std::copy(g.begin(), g.end(), call.out<S>(sum_g, problem));
    std::copy(g_x.begin(), g_x.end(), call.out<S>(sum_g_x, problem));
  }
};

struct BackwardCall {
  template <class T>
  static void solve(const Call& call, int64_t problem) {
    using S = Stat<T>;
    const int64_t channels = call.block().channels;
    const Constants<T> constants(call, problem);
    const auto vector = [&](Item item) { return widened(call.in<S>(item, problem), channels); };
    const Doubles g = vector(sum_g), g_x = vector(sum_g_x);
    const Doubles into_mean = vector(dmean), into_variance = vector(dvariance);
    const StatisticsGradient statistics{double(*call.in<S>(count, problem)), g.data(), g_x.data(),
                                        or_null(into_mean), or_null(into_variance)};
    verbs<T>().backward(call.in<T>(dy, problem), call.in<T>(x, problem), call.block(),
                        constants.normalization, statistics.count > 0 ? &statistics : nullptr,
                        call.in<S>(weights, problem), call.out<T>(dx, problem),
                        call.out<T>(dresidual, problem), call.executor);
  }
};

// ---- the border ----

// Calls solve.operator()<T>() for the element type of x.
template <class F>
void with_type(ffi::DataType type, F solve) {
  switch (type) {
    case ffi::DataType::F16: return solve.template operator()<float16>();
    case ffi::DataType::BF16: return solve.template operator()<bfloat16>();
    case ffi::DataType::F32: return solve.template operator()<float>();
    case ffi::DataType::F64: return solve.template operator()<double>();
    default:
      throw Failure{ffi::ErrorCode::kInvalidArgument, "fusebn: x has a type without kernels"};
  }
}

// Runs f; what it throws becomes XLA's error.
template <class F>
ffi::Error guarded(F f) {
  try {
    f();
    return ffi::Error::Success();
  } catch (const Failure& failure) {
    return ffi::Error(failure.code, failure.message);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "fusebn: out of memory");
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, error.what());
  }
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<int64_t>("operands")
      .Attr<int64_t>("results")
      .Attr<int64_t>("activation")
      .Attr<double>("epsilon")
      .Attr<double>("correction")
      .Attr<double>("factor");
}

// Solves the problems of a call one by one.
template <class Solve>
ffi::Error handle(ffi::ThreadPool threads, ffi::RemainingArgs arguments,
                  ffi::RemainingRets returned, int64_t operands, int64_t results,
                  int64_t activation, double epsilon, double correction, double factor) {
  const GradualUnderflow environment;
  return guarded([&] {
    Lent executor(threads);
    const Call call{executor, arguments,  returned,   operands,
                    results,  Activation(activation), epsilon, correction, factor};
    with_type(call.input().element_type(), [&]<class T>() {
      for (int64_t i = 0, n = call.problems(); i < n; ++i) Solve::template solve<T>(call, i);
    });
  });
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(fusebn_forward, handle<ForwardCall>, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(fusebn_gradient, handle<GradientCall>, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(fusebn_moments, handle<MomentsCall>, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(fusebn_normalize, handle<NormalizeCall>, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(fusebn_backward_sums, handle<BackwardSumsCall>, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(fusebn_backward, handle<BackwardCall>, binding());
#pragma GCC visibility pop
