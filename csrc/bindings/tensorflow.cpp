// tensorflow.cpp: the core as three TensorFlow ops for the CPU.
//
//   FusebnBatchNorm      forward; one op for training and inference, told apart when it runs
//   FusebnBatchNormGrad  its gradient, told apart the same way
//   FusebnMoments        count, mean and m2 over a set of axes
//
// src/fusebn/tensorflow/_ops.py calls them and holds the gradients. An absent argument is an empty
// list of inputs. A real number is a string attribute: TensorFlow's float attributes have 32 bits.
//
// Shapes. What is known of the inputs when a graph is built is checked in Python, in the words of
// _spec.py; what becomes known when it runs is checked here. A shape function of the C API reads no
// attribute but types, so it takes the number of channels from the vectors among the inputs.
#include <algorithm>
#include <cfenv>
#include <charconv>
#include <cstdio>
#include <exception>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "batch_norm.h"
#include "tensorflow_c_api.h"

namespace {

using namespace fusebn;
using Shape = std::vector<int64_t>;

// ---- errors: thrown inside, handed to TensorFlow at the border ----

struct Failure {
  TF_Code code;
  std::string message;
};

class Status {
 public:
  Status() : status_(TF_NewStatus()) {}
  Status(const Status&) = delete;
  ~Status() { TF_DeleteStatus(status_); }
  operator TF_Status*() const { return status_; }
  void check() const {
    if (TF_GetCode(status_) != TF_OK) throw Failure{TF_GetCode(status_), TF_Message(status_)};
  }

 private:
  TF_Status* status_;
};

// Calls a function of the C API whose last argument is a status, and throws what it reports.
template <class F, class... Arguments>
auto checked(F function, Arguments... arguments) {
  Status status;
  if constexpr (std::is_void_v<decltype(function(arguments..., status))>) {
    function(arguments..., status);
    status.check();
  } else {
    auto result = function(arguments..., status);
    status.check();
    return result;
  }
}

// Runs f; what it throws becomes the status given to `report`.
template <class F, class Report>
void guarded(F f, Report report) {
  Status status;
  try {
    return f();
  } catch (const Failure& failure) {
    TF_SetStatus(status, failure.code, failure.message.c_str());
  } catch (const std::bad_alloc&) {
    TF_SetStatus(status, TF_RESOURCE_EXHAUSTED, "out of memory");
  } catch (const std::exception& error) {
    TF_SetStatus(status, TF_INVALID_ARGUMENT, error.what());
  }
  report(status);
}

std::string text(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

// The voice of _spec.py: operation, argument, expected, got.
[[noreturn]] void fail(const char* operation, const char* argument, const std::string& expected,
                       const std::string& got) {
  const std::string what = std::string(operation) + ": `" + argument + "` must ";
  throw Failure{TF_INVALID_ARGUMENT, what + expected + "; got " + got + "."};
}

void check_shape(const char* operation, const char* argument, const Shape& got,
                 const Shape& expected, const char* why) {
  if (got != expected)
    fail(operation, argument, "have shape " + text(expected) + ", " + why, "shape " + text(got));
}

// ---- tensors ----

template <class T>
constexpr TF_DataType kType = TF_FLOAT;
template <>
constexpr TF_DataType kType<double> = TF_DOUBLE;
template <>
constexpr TF_DataType kType<bfloat16> = TF_BFLOAT16;
template <>
constexpr TF_DataType kType<float16> = TF_HALF;
template <>
constexpr TF_DataType kType<bool> = TF_BOOL;

class Tensor {
 public:
  explicit Tensor(TF_Tensor* tensor) : tensor_(tensor) {}
  Tensor() = default;
  Tensor(Tensor&& other) : tensor_(std::exchange(other.tensor_, nullptr)) {}
  ~Tensor() {
    if (tensor_) TF_DeleteTensor(tensor_);
  }

  // Null for an argument that is absent. The lists of optional inputs may hold any type, so this
  // is where a wrong one is found.
  template <class T>
  T* data() const {
    if (!tensor_) return nullptr;
    if (TF_TensorType(tensor_) != kType<T>)
      throw Failure{TF_INVALID_ARGUMENT, "fusebn: a parameter has not the type that x calls for"};
    return static_cast<T*>(TF_TensorData(tensor_));
  }
  explicit operator bool() const { return tensor_; }
  Shape shape() const {
    Shape shape(TF_NumDims(tensor_));
    for (size_t i = 0; i < shape.size(); ++i) shape[i] = TF_Dim(tensor_, int(i));
    return shape;
  }

 private:
  TF_Tensor* tensor_ = nullptr;
};

constexpr int kAbsent = -1;

Tensor input(TF_OpKernelContext* context, int index) {
  if (index == kAbsent) return Tensor();
  TF_Tensor* tensor = nullptr;
  checked(TF_GetInput, context, index, &tensor);
  return Tensor(tensor);
}

int64_t product(Shape::const_iterator begin, Shape::const_iterator end) {
  return std::accumulate(begin, end, int64_t(1), std::multiplies<int64_t>());
}

template <class T>
Tensor output(TF_OpKernelContext* context, int index, const Shape& shape) {
  const size_t bytes = sizeof(T) * product(shape.begin(), shape.end());
  return Tensor(checked(TF_AllocateOutput, context, index, kType<T>, shape.data(),
                        int(shape.size()), bytes));
}

template <class T>
void scalar_output(TF_OpKernelContext* context, int index, T value) {
  *output<T>(context, index, {}).template data<T>() = value;
}

// An output in the memory of one of the inputs [0, candidates), if nobody else needs that one.
// TensorFlow asks how many hold it: no Tensor of it may be alive.
Tensor forwarded_output(TF_OpKernelContext* context, int index, const Shape& shape,
                        int candidates) {
  const int inputs[] = {0, 1};
  int forwarded;
  return Tensor(checked(TF_ForwardInputOrAllocateOutput, context, inputs, candidates, index,
                        shape.data(), int(shape.size()), &forwarded));
}

// ---- attributes ----

std::string string_attribute(TF_OpKernelConstruction* context, const char* name) {
  int32_t list_size, size;
  checked(TF_OpKernelConstruction_GetAttrSize, context, name, &list_size, &size);
  std::string value(size, '\0');
  checked(TF_OpKernelConstruction_GetAttrString, context, name, value.data(), value.size());
  return value;
}

double real_attribute(TF_OpKernelConstruction* context, const char* name) {
  const std::string value = string_attribute(context, name);
  double number;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (error != std::errc() || end != value.data() + value.size())
    fail("fusebn", name, "be a real number", "'" + value + "'");
  return number;
}

int list_size(TF_OpKernelConstruction* context, const char* name) {
  int32_t size, total_size;
  checked(TF_OpKernelConstruction_GetAttrSize, context, name, &size, &total_size);
  return size;
}

// In the order of the core's Activation.
constexpr const char* kActivations[] = {"identity", "relu", "relu6", "leaky_relu", "silu", "gelu"};

Activation activation_attribute(TF_OpKernelConstruction* context) {
  const std::string name = string_attribute(context, "activation");
  for (int i = 0; i < int(std::size(kActivations)); ++i)
    if (name == kActivations[i]) return Activation(i);
  fail("fusebn", "activation", "be one of the core's", "'" + name + "'");
}

// Weights of that shape, checked one by one.
template <class S>
Tensor weights_input(TF_OpKernelContext* context, int index, const char* operation,
                     const Shape& shape) {
  Tensor weights = input(context, index);
  if (!weights) return weights;
  check_shape(operation, "weights", weights.shape(), shape, "one weight for each position");
  const S* const values = weights.data<S>();
  for (int64_t i = 0, n = product(shape.begin(), shape.end()); i < n; ++i)
    if (!(values[i] >= 0 && values[i] <= std::numeric_limits<S>::max()))
      fail(operation, "weights", "be finite and not negative", std::to_string(values[i]));
  return weights;
}

// ---- what forward and gradient share ----

// A kernel is made once for each node: its attributes, and where its optional inputs stand.
struct BatchNorm {
  const char* const operation;
  int64_t axis;
  Activation activation;
  double epsilon, correction, factor;
  int scale, offset, mean, variance, residual, weights;

  BatchNorm(TF_OpKernelConstruction* context, const char* operation, int required)
      : operation(operation),
        activation(activation_attribute(context)),
        epsilon(real_attribute(context, "epsilon")),
        correction(real_attribute(context, "correction")),
        factor(real_attribute(context, "exponential_avg_factor")) {
    checked(TF_OpKernelConstruction_GetAttrInt64, context, "axis", &axis);
    int next = required;
    const auto place = [&](const char* name, int length) {
      const int size = list_size(context, name);
      if (size != 0 && size != length)
        fail(operation, name, "be empty or have length " + std::to_string(length),
             "length " + std::to_string(size));
      return size ? std::exchange(next, next + length) : kAbsent;
    };
    scale = place("Scale", 1);
    offset = place("Offset", 1);
    mean = place("Given", 2);
    variance = mean == kAbsent ? kAbsent : mean + 1;
    residual = place("Residual", 1);
    weights = place("Weights", 1);
  }

  int64_t axis_of(const Shape& shape) const {
    const int64_t rank = int64_t(shape.size());
    if (axis < -rank || axis >= rank)
      fail(operation, "x", "have the channel axis " + std::to_string(axis), "shape " + text(shape));
    return axis < 0 ? axis + rank : axis;
  }

  bool training(TF_OpKernelContext* context, int index) const {
    const Tensor flag = input(context, index);
    check_shape(operation, "is_training", flag.shape(), {}, "a scalar");
    const bool training = *flag.data<bool>();
    if (mean == kAbsent && (!training || factor != 1))
      fail(operation, "mean",
           training ? "be given, and `variance`, with exponential_avg_factor != 1"
                    : "be given, and `variance`, with is_training=False",
           "None");
    return training;
  }

  Tensor vector(TF_OpKernelContext* context, int index, const char* argument, int64_t channels,
                const Shape& shape) const {
    Tensor vector = input(context, index);
    if (vector) {
      const std::string why = "one value per channel of x of shape " + text(shape);
      check_shape(operation, argument, vector.shape(), {channels}, why.c_str());
    }
    return vector;
  }

  Tensor residual_of(TF_OpKernelContext* context, const Shape& shape) const {
    Tensor tensor = input(context, residual);
    if (tensor) check_shape(operation, "residual", tensor.shape(), shape, "that of x");
    return tensor;
  }

  template <class S>
  Tensor weights_of(TF_OpKernelContext* context, Shape shape) const {
    shape[axis_of(shape)] = 1;
    return weights_input<S>(context, weights, operation, shape);
  }
};

Block block_of(const Shape& shape, int64_t axis) {
  return {product(shape.begin(), shape.begin() + axis), shape[axis],
          product(shape.begin() + axis + 1, shape.end())};
}

// ---- FusebnBatchNorm ----

struct ForwardKernel : BatchNorm {
  static constexpr int x = 0, is_training = 1;

  explicit ForwardKernel(TF_OpKernelConstruction* context)
      : BatchNorm(context, "fused_batch_norm", 2) {}

  template <class T>
  void compute(TF_OpKernelContext* context) const {
    using S = Stat<T>;
    const Shape shape = input(context, x).shape();
    const int64_t axis = axis_of(shape), channels = shape[axis];
    const bool training = this->training(context, is_training);
    const Tensor scale = vector(context, this->scale, "scale", channels, shape);
    const Tensor offset = vector(context, this->offset, "offset", channels, shape);
    const Tensor mean = vector(context, this->mean, "mean", channels, shape);
    const Tensor variance = vector(context, this->variance, "variance", channels, shape);
    const Tensor residual = residual_of(context, shape);
    const Tensor weights = weights_of<S>(context, shape);
    const Tensor y = forwarded_output(context, 0, shape, 1);
    const double count = forward<T>(
        {.block = block_of(shape, axis),
         .x = input(context, x).data<T>(),
         .training = training,
         .mean = mean.data<S>(),
         .variance = variance.data<S>(),
         .weights = weights.data<S>(),
         .scale = scale.data<S>(),
         .offset = offset.data<S>(),
         .residual = residual.data<T>(),
         .activation = activation,
         .epsilon = epsilon,
         .correction = correction,
         .factor = factor,
         .y = y.data<T>(),
         .mean_out = output<S>(context, 1, {channels}).template data<S>(),
         .variance_out = output<S>(context, 2, {channels}).template data<S>(),
         .batch = output<double>(context, 3, {2, channels}).template data<double>()},
        pool());
    if (count < 0) fail(operation, "variance", "not be negative", "a negative value");
    scalar_output(context, 4, count);
  }
};

// ---- FusebnBatchNormGrad ----

struct GradientKernel : BatchNorm {
  static constexpr int dy = 0, x = 1, batch = 2, is_training = 3, dmean = 4, dvariance = 5;

  explicit GradientKernel(TF_OpKernelConstruction* context)
      : BatchNorm(context, "fused_batch_norm_grad", 6) {}

  template <class T>
  void compute(TF_OpKernelContext* context) const {
    using S = Stat<T>;
    const Shape shape = input(context, x).shape();
    const int64_t axis = axis_of(shape), channels = shape[axis];
    check_shape(operation, "dy", input(context, dy).shape(), shape, "that of x");
    const bool training = this->training(context, is_training);
    const Tensor batch = input(context, this->batch);
    check_shape(operation, "batch", batch.shape(), {2, channels}, "a mean and a variance");
    const Tensor dmean = vector(context, this->dmean, "dmean", channels, shape);
    const Tensor dvariance = vector(context, this->dvariance, "dvariance", channels, shape);
    const Tensor scale = vector(context, this->scale, "scale", channels, shape);
    const Tensor offset = vector(context, this->offset, "offset", channels, shape);
    const Tensor residual = residual_of(context, shape);
    const Tensor weights = weights_of<S>(context, shape);

    const Tensor dx = forwarded_output(context, 0, shape, 2);
    int next = 1;
    const auto vector_output = [&](bool wanted) {
      return wanted ? output<S>(context, next++, {channels}) : Tensor();
    };
    const Tensor dscale = vector_output(bool(scale)), doffset = vector_output(bool(offset));
    const Tensor dgiven_mean = vector_output(mean != kAbsent);
    const Tensor dgiven_variance = vector_output(variance != kAbsent);
    const Tensor dresidual = residual ? output<T>(context, next++, shape) : Tensor();
    gradient<T>({.block = block_of(shape, axis),
                 .dy = input(context, dy).data<T>(),
                 .x = input(context, x).data<T>(),
                 .training = training,
                 .mean = batch.data<double>(),
                 .variance = batch.data<double>() + channels,
                 .weights = weights.data<S>(),
                 .scale = scale.data<S>(),
                 .offset = offset.data<S>(),
                 .residual = residual.data<T>(),
                 .activation = activation,
                 .epsilon = epsilon,
                 .dmean = dmean.data<S>(),
                 .dvariance = dvariance.data<S>(),
                 .correction = correction,
                 .factor = factor,
                 .dx = dx.data<T>(),
                 .dresidual = dresidual.data<T>(),
                 .dscale = dscale.data<S>(),
                 .doffset = doffset.data<S>(),
                 .dgiven_mean = dgiven_mean.data<S>(),
                 .dgiven_variance = dgiven_variance.data<S>()},
                pool());
  }
};

// ---- FusebnMoments ----

// Over all axes but those in [begin, end).
struct MomentsKernel {
  static constexpr const char* operation = "moments";
  static constexpr int x = 0;
  int64_t begin, end;
  int weights;

  explicit MomentsKernel(TF_OpKernelConstruction* context)
      : weights(list_size(context, "Weights") ? 1 : kAbsent) {
    checked(TF_OpKernelConstruction_GetAttrInt64, context, "begin", &begin);
    checked(TF_OpKernelConstruction_GetAttrInt64, context, "end", &end);
  }

  template <class T>
  void compute(TF_OpKernelContext* context) const {
    using S = Stat<T>;
    const Tensor x = input(context, this->x);
    Shape shape = x.shape();
    if (begin < 0 || begin > end || end > int64_t(shape.size()))
      fail(operation, "x", "have the axes from " + std::to_string(begin) + " to " +
           std::to_string(end), "shape " + text(shape));
    const auto first = shape.begin() + begin, last = shape.begin() + end;
    const Shape kept(first, last);
    const Block block{product(shape.begin(), first), product(first, last),
                      product(last, shape.end())};
    std::fill(first, last, 1);
    const Tensor weights = weights_input<S>(context, this->weights, operation, shape);
    const double count = verbs<T>().moments(
        x.data<T>(), block, weights.data<S>(), output<double>(context, 1, kept).data<double>(),
        output<double>(context, 2, kept).data<double>(), pool());
    scalar_output(context, 0, count);
  }
};

// ---- shapes ----

class Handle {
 public:
  explicit Handle(TF_ShapeHandle* handle = TF_NewShapeHandle()) : handle_(handle) {}
  Handle(const Handle&) = delete;
  ~Handle() { TF_DeleteShapeHandle(handle_); }
  TF_ShapeHandle* get() const { return handle_; }

 private:
  TF_ShapeHandle* handle_;
};

constexpr int64_t kUnknown = -1;  // also TensorFlow's own word for it

int64_t rank_of(TF_ShapeInferenceContext* context, TF_ShapeHandle* shape) {
  return TF_ShapeInferenceContextRankKnown(context, shape)
             ? TF_ShapeInferenceContextRank(context, shape)
             : kUnknown;
}

int64_t length_of(TF_ShapeInferenceContext* context, TF_ShapeHandle* vector) {
  const std::unique_ptr<TF_DimensionHandle, void (*)(TF_DimensionHandle*)> length(
      TF_NewDimensionHandle(), TF_DeleteDimensionHandle);
  TF_ShapeInferenceContextDim(context, vector, 0, length.get());
  return TF_DimensionHandleValueKnown(length.get()) ? TF_DimensionHandleValue(length.get())
                                                    : kUnknown;
}

void check_scalar(TF_ShapeInferenceContext* context, int index) {
  Handle flag;
  checked(TF_ShapeInferenceContextGetInput, context, index, flag.get());
  checked(TF_ShapeInferenceContextWithRank, context, flag.get(), int64_t(0), flag.get());
}

// y has the shape of x; the statistics have that of any vector among the inputs. Those come first
// in the lists, and where x has two axes or more nothing else there has rank 1.
void infer_forward(TF_ShapeInferenceContext* context) {
  Handle x;
  checked(TF_ShapeInferenceContextGetInput, context, ForwardKernel::x, x.get());
  check_scalar(context, ForwardKernel::is_training);
  int64_t channels = kUnknown;
  if (rank_of(context, x.get()) > 1)
    for (int i = 2; i < TF_ShapeInferenceContextNumInputs(context); ++i) {
      Handle vector;
      checked(TF_ShapeInferenceContextGetInput, context, i, vector.get());
      if (rank_of(context, vector.get()) != 1) break;
      const int64_t length = length_of(context, vector.get());
      if (length != kUnknown && channels != kUnknown && length != channels)
        fail("fused_batch_norm", "scale", "have the shape of offset, mean and variance",
             "lengths " + std::to_string(channels) + " and " + std::to_string(length));
      if (length != kUnknown) channels = length;
    }
  const Handle vector(TF_ShapeInferenceContextVectorFromSize(context, size_t(channels)));
  const Handle two(TF_ShapeInferenceContextVectorFromSize(context, 2));
  const Handle scalar(TF_ShapeInferenceContextScalar(context));
  Handle batch;
  checked(TF_ShapeInferenceContextConcatenateShapes, context, two.get(), vector.get(), batch.get());
  int index = 0;
  for (TF_ShapeHandle* shape : {x.get(), vector.get(), vector.get(), batch.get(), scalar.get()})
    checked(TF_ShapeInferenceContextSetOutput, context, index++, shape);
}

// A gradient has the shape of what it is of: dx that of x, the others those of the lists, in order.
void infer_gradient(TF_ShapeInferenceContext* context) {
  check_scalar(context, GradientKernel::is_training);
  Handle shape;
  checked(TF_ShapeInferenceContextGetInput, context, GradientKernel::x, shape.get());
  checked(TF_ShapeInferenceContextSetOutput, context, 0, shape.get());
  for (int i = 6; i < TF_ShapeInferenceContextNumInputs(context); ++i) {
    checked(TF_ShapeInferenceContextGetInput, context, i, shape.get());
    const Status no_such_output;  // the weights, which come last, have none
    TF_ShapeInferenceContextSetOutput(context, i - 5, shape.get(), no_such_output);
  }
}

// The count is a number; which axes are kept is an attribute, so Python says it.
void infer_moments(TF_ShapeInferenceContext* context) {
  checked(TF_ShapeInferenceContextSetUnknownShape, context);
  const Handle scalar(TF_ShapeInferenceContextScalar(context));
  checked(TF_ShapeInferenceContextSetOutput, context, 0, scalar.get());
}

// ---- registration ----

template <class Kernel>
void* create(TF_OpKernelConstruction* context) {
  void* kernel = nullptr;
  guarded([&] { kernel = new Kernel(context); },
          [&](TF_Status* status) { TF_OpKernelConstruction_Failure(context, status); });
  return kernel;
}

// TensorFlow's threads flush subnormal numbers to zero, ours do not: one result must not have both.
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

template <class Kernel, class T>
void compute(void* kernel, TF_OpKernelContext* context) {
  const GradualUnderflow environment;
  guarded([&] { static_cast<Kernel*>(kernel)->template compute<T>(context); },
          [&](TF_Status* status) { TF_OpKernelContext_Failure(context, status); });
}

template <class Kernel>
void destroy(void* kernel) {
  delete static_cast<Kernel*>(kernel);
}

template <class Kernel, class T>
void register_kernel(const char* op) {
  TF_KernelBuilder* const builder = TF_NewKernelBuilder(op, "CPU", create<Kernel>,
                                                        compute<Kernel, T>, destroy<Kernel>);
  checked(TF_KernelBuilder_TypeConstraint, builder, "T", kType<T>);
  checked(TF_RegisterKernelBuilder, op, builder);
}

using Specs = std::vector<std::string>;

template <class Kernel, void (*infer)(TF_ShapeInferenceContext*)>
void register_op(const char* op, const Specs& attributes, const Specs& inputs,
                 const Specs& outputs) {
  TF_OpDefinitionBuilder* const builder = TF_NewOpDefinitionBuilder(op);
  for (const auto& spec : attributes) TF_OpDefinitionBuilderAddAttr(builder, spec.c_str());
  for (const auto& spec : inputs) TF_OpDefinitionBuilderAddInput(builder, spec.c_str());
  for (const auto& spec : outputs) TF_OpDefinitionBuilderAddOutput(builder, spec.c_str());
  TF_OpDefinitionBuilderSetShapeInferenceFunction(
      builder, [](TF_ShapeInferenceContext* context, TF_Status* status) {
        guarded([&] { infer(context); },
                [&](TF_Status* failure) {
                  TF_SetStatus(status, TF_GetCode(failure), TF_Message(failure));
                });
      });
  checked(TF_RegisterOpDefinition, builder);
  register_kernel<Kernel, float16>(op);
  register_kernel<Kernel, bfloat16>(op);
  register_kernel<Kernel, float>(op);
  register_kernel<Kernel, double>(op);
}

void register_all() {
  std::string activations;
  for (const char* name : kActivations)
    activations += (activations.empty() ? "'" : ", '") + std::string(name) + "'";
  // What both batch-norm ops know. `given` is empty, or the mean and the variance.
  const Specs attributes{
      "T: {half, bfloat16, float, double}",
      "S: {float, double}",
      "Scale: list({float, double}) >= 0",
      "Offset: list({float, double}) >= 0",
      "Given: list({float, double}) >= 0",
      "Residual: list({half, bfloat16, float, double}) >= 0",
      "Weights: list({float, double}) >= 0",
      "axis: int",
      "activation: {" + activations + "}",
      "epsilon: string",
      "correction: string",
      "exponential_avg_factor: string",
  };
  register_op<ForwardKernel, infer_forward>(
      "FusebnBatchNorm", attributes,
      {"x: T", "is_training: bool", "scale: Scale", "offset: Offset", "given: Given",
       "residual: Residual", "weights: Weights"},
      {"y: T", "mean: S", "variance: S", "batch: double", "count: double"});
  register_op<GradientKernel, infer_gradient>(
      "FusebnBatchNormGrad", attributes,
      {"dy: T", "x: T", "batch: double", "is_training: bool", "dmean: S", "dvariance: S",
       "scale: Scale", "offset: Offset", "given: Given", "residual: Residual", "weights: Weights"},
      {"dx: T", "dscale: Scale", "doffset: Offset", "dgiven: Given", "dresidual: Residual"});
  register_op<MomentsKernel, infer_moments>(
      "FusebnMoments",
      {"T: {half, bfloat16, float, double}", "Weights: list({float, double}) >= 0", "begin: int",
       "end: int"},
      {"x: T", "weights: Weights"}, {"count: double", "mean: double", "m2: double"});
}

// Done when the library is loaded. What fails is missed by _ops.py, which then does without.
const bool registered = [] {
  bool done = true;
  guarded(register_all, [&](TF_Status* status) {
    std::fprintf(stderr, "fusebn: TensorFlow refuses the ops: %s\n", TF_Message(status));
    done = false;
  });
  return done;
}();

}  // namespace
