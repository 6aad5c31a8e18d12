// python.cpp: the core as a Python module over the buffer protocol. No arithmetic, no rules: those
// for arguments live in src/fusebn/_spec.py, and every array that arrives here is dense, aligned,
// of the stated type and size.
//
// An array is taken by its address. NumPy's bfloat16 (ml_dtypes) exports neither DLPack nor a buffer
// with a format, but it does export one without: so the element type travels as a number.
//
// What is named `_of_tensors` or `_of_arrays` is the short way of an adapter: it recognizes what
// nearly every call brings, and does nothing about anything else, which is left to Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>
#include <limits>
#include <vector>

#include "arrays.h"
#include "batch_norm.h"
#include "memory.h"
#include "tensors.h"

namespace nb = nanobind;

namespace {

// The address of an array, held for the time of the call; None is null.
template <bool writable>
struct Address {
  void* data = nullptr;
  template <class T>
  auto as() const {
    if constexpr (writable)
      return static_cast<T*>(data);
    else
      return static_cast<const T*>(data);
  }
};
using In = Address<false>;
using Out = Address<true>;

}  // namespace

namespace nanobind::detail {

template <bool writable>
struct type_caster<Address<writable>> {
  NB_TYPE_CASTER(Address<writable>, const_name("array, address or None"))

  bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
    if (source.is_none()) return true;
    if (PyLong_CheckExact(source.ptr())) {  // an address already: a PyTorch tensor's data_ptr()
      value.data = PyLong_AsVoidPtr(source.ptr());
      return true;
    }
    if (PyObject_GetBuffer(source.ptr(), &view, PyBUF_STRIDES | (writable ? PyBUF_WRITABLE : 0))) {
      PyErr_Clear();
      return false;
    }
    held = true;
    value.data = view.buf;
    return true;
  }
  ~type_caster() {
    if (held) PyBuffer_Release(&view);
  }

  Py_buffer view;
  bool held = false;
};

}  // namespace nanobind::detail

namespace {

using namespace fusebn;

// Whose threads a call runs on.
Executor& threads_of(bool lent) { return lent ? lent_threads() : pool(); }

// Calls f.operator()<T>() for the element type of that number: _spec.ELEMENT_TYPES has the order.
template <class F>
auto with_type(int type, F f) {
  switch (type) {
    case 0: return f.template operator()<float16>();
    case 1: return f.template operator()<bfloat16>();
    case 2: return f.template operator()<float>();
    default: return f.template operator()<double>();
  }
}

double py_moments(int type, int64_t outer, int64_t channels, int64_t inner, In x, In weights,
                  Out mean, Out m2, bool lent) {
  nb::gil_scoped_release released;
  return with_type(type, [&]<class T>() {
    return verbs<T>().moments(x.as<T>(), {outer, channels, inner}, weights.as<Stat<T>>(),
                              mean.as<double>(), m2.as<double>(), threads_of(lent));
  });
}

double py_forward(int type, int64_t outer, int64_t channels, int64_t inner, In x, bool training,
                  In mean, In variance, In weights, In scale, In offset, In residual,
                  int activation, double epsilon, double correction, double factor, Out y,
                  Out mean_out, Out variance_out, Out batch, bool lent) {
  nb::gil_scoped_release released;
  return with_type(type, [&]<class T>() {
    using S = Stat<T>;
    return forward<T>({.block = {outer, channels, inner},
                       .x = x.as<T>(),
                       .training = training,
                       .mean = mean.as<S>(),
                       .variance = variance.as<S>(),
                       .weights = weights.as<S>(),
                       .scale = scale.as<S>(),
                       .offset = offset.as<S>(),
                       .residual = residual.as<T>(),
                       .activation = Activation(activation),
                       .epsilon = epsilon,
                       .correction = correction,
                       .factor = factor,
                       .y = y.as<T>(),
                       .mean_out = mean_out.as<S>(),
                       .variance_out = variance_out.as<S>(),
                       .batch = batch.as<double>()},
                      threads_of(lent));
  });
}

void py_gradient(int type, int64_t outer, int64_t channels, int64_t inner, In dy, In x,
                 bool training, In mean, In variance, In weights, In scale, In offset, In residual,
                 int activation, double epsilon, In dmean, In dvariance, double correction,
                 double factor, Out dx, Out dresidual, Out dscale, Out doffset, Out dgiven_mean,
                 Out dgiven_variance, bool lent) {
  nb::gil_scoped_release released;
  with_type(type, [&]<class T>() {
    using S = Stat<T>;
    gradient<T>({.block = {outer, channels, inner},
                 .dy = dy.as<T>(),
                 .x = x.as<T>(),
                 .training = training,
                 .mean = mean.as<double>(),
                 .variance = variance.as<double>(),
                 .weights = weights.as<S>(),
                 .scale = scale.as<S>(),
                 .offset = offset.as<S>(),
                 .residual = residual.as<T>(),
                 .activation = Activation(activation),
                 .epsilon = epsilon,
                 .dmean = dmean.as<S>(),
                 .dvariance = dvariance.as<S>(),
                 .correction = correction,
                 .factor = factor,
                 .dx = dx.as<T>(),
                 .dresidual = dresidual.as<T>(),
                 .dscale = dscale.as<S>(),
                 .doffset = doffset.as<S>(),
                 .dgiven_mean = dgiven_mean.as<S>(),
                 .dgiven_variance = dgiven_variance.as<S>()},
                threads_of(lent));
  });
}

// forward on tensors, for what nearly every call brings: x and y, dense and alike, lie in the memory
// of the CPU, the residual lies as they do, the rest are vectors of its statistics' type. None, and
// nothing is done, for anything else, and for a batch of no more than one value a channel.
// In training mean and variance are overwritten by what they are mixed into.
nb::object py_forward_of_tensors(nb::handle exchange_api, nb::handle x, nb::handle y, int axis,
                                 bool training, nb::handle mean, nb::handle variance,
                                 nb::handle scale, nb::handle offset, nb::handle residual,
                                 int activation, double epsilon, double correction, double factor,
                                 Out batch) {
  const auto* api = static_cast<const ExchangeApi*>(
      PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"));
  if (!api) PyErr_Clear();  // a later API may have another name: then the longer way is taken
  if (!api || api->version.major != 1) return nb::none();
  Tensor in, out, added;
  if (!look_at(*api, x, in) || !look_at(*api, y, out) || !lies_as(in, out)) return nb::none();
  if (!residual.is_none() && !(look_at(*api, residual, added) && lies_as(added, out)))
    return nb::none();
  const int type = element_type(in), stat = type == 3 ? 3 : 2;
  const int64_t channels = out.shape[axis], total = elements(out);
  if (type < 0 || total == 0 || (training && total == channels)) return nb::none();
  Out means, variances;
  In scales, offsets;
  if (!vector_of(*api, mean, stat, channels, means) ||
      !vector_of(*api, variance, stat, channels, variances) ||
      !vector_of(*api, scale, stat, channels, scales) ||
      !vector_of(*api, offset, stat, channels, offsets))
    return nb::none();
  if (!means.data != !variances.data || !(training || means.data)) return nb::none();

  const int64_t inner = channels > 1 ? out.strides[axis] : total;
  const Out none;
  return nb::float_(py_forward(
      type, total / (channels * inner), channels, inner, {in.data}, training, {means.data},
      {variances.data}, {}, scales, offsets, {residual.is_none() ? nullptr : added.data},
      activation, epsilon, correction, factor, {out.data}, training ? means : none,
      training ? variances : none, batch, true));
}

// Memory of the pool, and who gives it back when the last view of it dies, on whatever thread that
// happens.
struct Owned {
  nb::capsule owner;
  void* data;
};
Owned take_owned(int64_t bytes) {
  struct Buffer {
    void* data;
    int64_t bytes;
  };
  Buffer* const buffer = new Buffer{take_buffer(bytes), bytes};
  nb::capsule owner(buffer, [](void* p) noexcept {
    Buffer* const dead = static_cast<Buffer*>(p);
    if (dead->data) give_back_buffer(dead->data, dead->bytes);
    delete dead;
  });
  if (!buffer->data) throw std::bad_alloc();
  return {owner, buffer->data};
}

// A new array like x; where it lies is decided as by fusebn.memory.empty.
nb::object new_like(const Array& x, int64_t bytes) {
  if (bytes < numpy.least_recycled || !pool_statistics().limit)
    return new_array(x.dtype, x.rank, x.shape);
  const auto [owner, data] = take_owned(bytes);
  return new_array(x.dtype, x.rank, x.shape, data, owner);
}

// x as a block, and what its arrays have in common.
struct Plain {
  const Array* x;
  int type, stat;  // of the elements, of the statistics
  int64_t outer, channels, inner, bytes;

  // False if x is not plain, or empty.
  bool look_at(nb::handle object, nb::handle data_format, nb::handle along) {
    x = plain_array(object);
    int axis;
    if (!x || (type = element_type(*x)) < 0 || !axis_of(data_format, along, *x, axis)) return false;
    stat = type == 3 ? 3 : 2;
    const int64_t total = x->elements();
    channels = x->shape[axis];
    bytes = total * with_type(type, []<class T>() { return int64_t(sizeof(T)); });
    if (total == 0) return false;
    inner = 1;
    for (int i = axis + 1; i < x->rank; ++i) inner *= x->shape[i];
    if (channels == 1) inner = total;
    outer = total / (channels * inner);
    return true;
  }
  bool vector(nb::handle object, In& out) const { return vector_of(object, stat, channels, out); }
};

constexpr double kFinite = std::numeric_limits<double>::max();

// fused_batch_norm on arrays of NumPy: its arguments, and `of_layer`. Returns what that does; None,
// and nothing has been done, if anything is unusual.
//
// A layer wants y, the statistics that normalized x, in float64, [2, channels], and whether y lies
// where x did; its mean and variance are overwritten, in training, by what they are mixed into.
nb::object py_forward_of_arrays(nb::handle x_, nb::handle scale_, nb::handle offset_,
                                nb::handle mean_, nb::handle variance_, nb::handle epsilon_,
                                nb::handle data_format, nb::handle training_, nb::handle factor_,
                                nb::handle axis, nb::handle activation_, nb::handle residual_,
                                nb::handle weights, nb::handle correction_, nb::handle out_,
                                bool of_layer) {
  Plain p;
  bool training;
  double factor, epsilon, correction;
  int activation;
  if (!p.look_at(x_, data_format, axis) || !weights.is_none() || !flag_of(training_, training) ||
      !number_of(factor_, 1, factor) || !number_of(epsilon_, kFinite, epsilon) ||
      !number_of(correction_, kFinite, correction) || !activation_of(activation_, activation))
    return nb::none();

  In mean, variance, scale, offset;
  const bool mixed = !training || factor != 1;  // what is not mixed in is not looked at
  if (mixed || of_layer) {
    if (!p.vector(mean_, mean) || !p.vector(variance_, variance) || !mean.data || !variance.data)
      return nb::none();
  } else if (mean_.is_none() != variance_.is_none()) {
    return nb::none();
  }
  const Array *residual = nullptr, *out = nullptr;
  if (!p.vector(scale_, scale) || !p.vector(offset_, offset) ||
      !like_x(residual_, *p.x, p.type, residual) || !like_x(out_, *p.x, p.type, out))
    return nb::none();
  if (out && !(is_writable(*out) && (out->data == p.x->data || is_apart(*out, *p.x, p.bytes)) &&
               (!residual || is_apart(*out, *residual, p.bytes))))
    return nb::none();
  if (of_layer && training &&
      !(is_writable(*plain_array(mean_)) && is_writable(*plain_array(variance_))))
    return nb::none();

  const nb::object y = out ? nb::borrow(out_) : new_like(*p.x, p.bytes);
  nb::object first, second;
  std::vector<double> averages;
  Out mean_out, variance_out, batch;
  if (!of_layer) {
    first = new_vector(p.stat, p.channels), second = new_vector(p.stat, p.channels);
    mean_out.data = data_of(first), variance_out.data = data_of(second);
  } else {
    const Py_ssize_t shape[] = {2, Py_ssize_t(p.channels)};
    first = new_array(numpy.dtypes[3], 2, shape);
    batch.data = data_of(first);
    if (training) {  // written over the old ones when y is done: they may be part of x
      averages.resize(2 * p.channels);
      mean_out.data = averages.data(), variance_out.data = averages.data() + p.channels;
    }
  }
  const double count =
      py_forward(p.type, p.outer, p.channels, p.inner, {p.x->data}, training, mixed ? mean : In(),
                 mixed ? variance : In(), {}, scale, offset, {residual ? residual->data : nullptr},
                 activation, epsilon, correction, factor, {data_of(y)}, mean_out, variance_out,
                 batch, false);
  if (count < 0) return nb::none();
  if (of_layer) {
    const size_t bytes = p.channels * (p.stat == 3 ? sizeof(double) : sizeof(float));
    if (training) {
      std::memcpy(mean.data, mean_out.data, bytes);
      std::memcpy(variance.data, variance_out.data, bytes);
    }
    const bool overwritten = out && out->data == p.x->data;
    return nb::steal(PyTuple_Pack(3, y.ptr(), first.ptr(), overwritten ? Py_True : Py_False));
  }
  const nb::object fields = nb::steal(PyTuple_Pack(3, y.ptr(), first.ptr(), second.ptr()));
  return named_tuple(numpy.forward_result, fields);
}

// The statistics that normalized x, in double or in the type of x's statistics, as doubles.
const double* normalizer(nb::handle object, const Plain& p, std::vector<double>& widened) {
  In found;
  if (object.is_none()) return nullptr;
  if (vector_of(object, 3, p.channels, found)) return found.as<double>();
  if (!p.vector(object, found)) return nullptr;
  widened.assign(found.as<float>(), found.as<float>() + p.channels);
  return widened.data();
}

// The same for fused_batch_norm_grad.
nb::object py_gradient_of_arrays(nb::handle dy_, nb::handle x_, nb::handle scale_,
                                 nb::handle offset_, nb::handle mean_, nb::handle variance_,
                                 nb::handle epsilon_, nb::handle data_format, nb::handle training_,
                                 nb::handle axis, nb::handle activation_, nb::handle residual_,
                                 nb::handle weights, nb::handle dmean_, nb::handle dvariance_) {
  Plain p;
  bool training;
  double epsilon;
  int activation;
  const Array *dy = nullptr, *residual = nullptr;
  In scale, offset, dmean, dvariance;
  if (!p.look_at(x_, data_format, axis) || !weights.is_none() || !flag_of(training_, training) ||
      !number_of(epsilon_, kFinite, epsilon) || !activation_of(activation_, activation) ||
      !like_x(dy_, *p.x, p.type, dy) || !dy || !like_x(residual_, *p.x, p.type, residual) ||
      !p.vector(scale_, scale) || !p.vector(offset_, offset) || !p.vector(dmean_, dmean) ||
      !p.vector(dvariance_, dvariance) || (!training && (dmean.data || dvariance.data)))
    return nb::none();
  std::vector<double> wide_mean, wide_variance;
  const double* const mean = normalizer(mean_, p, wide_mean);
  const double* const variance = normalizer(variance_, p, wide_variance);
  if (!mean || !variance) return nb::none();
  for (int64_t c = 0; c < p.channels; ++c)
    if (variance[c] < 0) return nb::none();

  const nb::object dx = new_like(*p.x, p.bytes);
  nb::object dscale = nb::none(), doffset = nb::none(), dresidual = nb::none();
  Out to_dscale, to_doffset, to_dresidual;
  if (scale.data) dscale = new_vector(p.stat, p.channels), to_dscale.data = data_of(dscale);
  if (offset.data) doffset = new_vector(p.stat, p.channels), to_doffset.data = data_of(doffset);
  if (residual) dresidual = new_like(*p.x, p.bytes), to_dresidual.data = data_of(dresidual);
  py_gradient(p.type, p.outer, p.channels, p.inner, {dy->data}, {p.x->data}, training,
              {const_cast<double*>(mean)}, {const_cast<double*>(variance)}, {}, scale, offset,
              {residual ? residual->data : nullptr}, activation, epsilon, dmean, dvariance, 0, 1,
              {data_of(dx)}, to_dresidual, to_dscale, to_doffset, {}, {}, false);
  const nb::object fields =
      nb::steal(PyTuple_Pack(4, dx.ptr(), dscale.ptr(), doffset.ptr(), dresidual.ptr()));
  return named_tuple(numpy.gradient_result, fields);
}

// The verbs one by one, for those who bring devices together between them.

template <class T>
Normalization<T> constants(In mean, In rstd, In scale, In offset, In residual, int activation) {
  using S = Stat<T>;
  return {mean.as<double>(), rstd.as<double>(), scale.as<S>(), offset.as<S>(), residual.as<T>(),
          Activation(activation)};
}

void py_normalize(int type, int64_t outer, int64_t channels, int64_t inner, In x, In mean, In rstd,
                  In scale, In offset, In residual, int activation, Out y, bool lent) {
  nb::gil_scoped_release released;
  with_type(type, [&]<class T>() {
    const auto normalization = constants<T>(mean, rstd, scale, offset, residual, activation);
    verbs<T>().normalize(x.as<T>(), {outer, channels, inner}, normalization, y.as<T>(),
                         threads_of(lent));
  });
}

void py_backward_sums(int type, int64_t outer, int64_t channels, int64_t inner, In dy, In x,
                      In mean, In rstd, In scale, In offset, In residual, int activation, Out sum_g,
                      Out sum_g_x, bool lent) {
  nb::gil_scoped_release released;
  with_type(type, [&]<class T>() {
    const auto normalization = constants<T>(mean, rstd, scale, offset, residual, activation);
    verbs<T>().backward_sums(dy.as<T>(), x.as<T>(), {outer, channels, inner}, normalization,
                             sum_g.as<double>(), sum_g_x.as<double>(), nullptr,
                             threads_of(lent));
  });
}

void py_backward(int type, int64_t outer, int64_t channels, int64_t inner, In dy, In x, In mean,
                 In rstd, In weights, In scale, In offset, In residual, int activation,
                 double count, In sum_g, In sum_g_x, In dmean, In dvariance, Out dx,
                 Out dresidual, bool lent) {
  nb::gil_scoped_release released;
  with_type(type, [&]<class T>() {
    const auto normalization = constants<T>(mean, rstd, scale, offset, residual, activation);
    const StatisticsGradient statistics{count, sum_g.as<double>(), sum_g_x.as<double>(),
                                        dmean.as<double>(), dvariance.as<double>()};
    verbs<T>().backward(dy.as<T>(), x.as<T>(), {outer, channels, inner}, normalization,
                        sum_g.data ? &statistics : nullptr, weights.as<Stat<T>>(), dx.as<T>(),
                        dresidual.as<T>(), threads_of(lent));
  });
}

void py_floor(int kind, In a, In b, Out out, int64_t n, int64_t ahead) {
  nb::gil_scoped_release released;
  floor(Floor(kind), a.as<float>(), b.as<float>(), out.as<float>(), n, ahead, pool());
}

// A one-dimensional array of bytes.
nb::ndarray<nb::numpy, uint8_t> py_empty(int64_t bytes) {
  const auto [owner, data] = take_owned(bytes);
  return {data, {size_t(bytes)}, owner};
}

nb::dict py_pool_statistics() {
  const PoolStatistics s = pool_statistics();
  nb::dict d;
  d["in_use"] = s.in_use;
  d["cached"] = s.cached;
  d["limit"] = s.limit;
  d["recycled"] = s.recycled;
  d["fresh"] = s.fresh;
  return d;
}

nb::list py_instruction_sets() {
  nb::list names;
  for (const char* const* name = instruction_sets(); *name; ++name) names.append(nb::str(*name));
  return names;
}

}  // namespace

NB_MODULE(_core, m) {
  // None stands for null in every array argument.
  const auto array = [](const char* name) { return nb::arg(name).none(); };
  const auto lent = [] { return nb::arg("lent") = false; };
  m.def("moments", &py_moments, nb::arg("type"), nb::arg("outer"), nb::arg("channels"),
        nb::arg("inner"), array("x"), array("weights"), array("mean"), array("m2"), lent());
  m.def("forward", &py_forward, nb::arg("type"), nb::arg("outer"), nb::arg("channels"),
        nb::arg("inner"), array("x"), nb::arg("training"), array("mean"), array("variance"),
        array("weights"), array("scale"), array("offset"), array("residual"), nb::arg("activation"),
        nb::arg("epsilon"), nb::arg("correction"), nb::arg("factor"), array("y"),
        array("mean_out"), array("variance_out"), array("batch"), lent());
  m.def("forward_of_tensors", &py_forward_of_tensors, nb::arg("exchange_api"), nb::arg("x"),
        nb::arg("y"), nb::arg("axis"), nb::arg("training"), array("mean"), array("variance"),
        array("scale"), array("offset"), array("residual"), nb::arg("activation"),
        nb::arg("epsilon"), nb::arg("correction"), nb::arg("factor"), array("batch"));
  m.def("know_numpy", &know_numpy, nb::arg("ndarray"), nb::arg("dtypes"), nb::arg("formats"),
        nb::arg("activations"), nb::arg("forward_result"), nb::arg("gradient_result"),
        nb::arg("least_recycled"), nb::arg("probe"), nb::arg("address"));
  m.def("forward_of_arrays", &py_forward_of_arrays, array("x"), array("scale"), array("offset"),
        array("mean"), array("variance"), array("epsilon"), array("data_format"),
        array("training"), array("factor"), array("axis"), array("activation"), array("residual"),
        array("weights"), array("correction"), array("out"), nb::arg("of_layer"));
  m.def("gradient_of_arrays", &py_gradient_of_arrays, array("dy"), array("x"), array("scale"),
        array("offset"), array("mean"), array("variance"), array("epsilon"), array("data_format"),
        array("training"), array("axis"), array("activation"), array("residual"),
        array("weights"), array("dmean"), array("dvariance"));
  m.def("gradient", &py_gradient, nb::arg("type"), nb::arg("outer"), nb::arg("channels"),
        nb::arg("inner"), array("dy"), array("x"), nb::arg("training"), array("mean"),
        array("variance"), array("weights"), array("scale"), array("offset"), array("residual"),
        nb::arg("activation"), nb::arg("epsilon"), array("dmean"), array("dvariance"),
        nb::arg("correction"), nb::arg("factor"), array("dx"), array("dresidual"), array("dscale"),
        array("doffset"), array("dgiven_mean"), array("dgiven_variance"), lent());
  m.def("normalize", &py_normalize, nb::arg("type"), nb::arg("outer"), nb::arg("channels"),
        nb::arg("inner"), array("x"), array("mean"), array("rstd"), array("scale"),
        array("offset"), array("residual"), nb::arg("activation"), array("y"), lent());
  m.def("backward_sums", &py_backward_sums, nb::arg("type"), nb::arg("outer"),
        nb::arg("channels"), nb::arg("inner"), array("dy"), array("x"), array("mean"),
        array("rstd"), array("scale"), array("offset"), array("residual"), nb::arg("activation"),
        array("sum_g"), array("sum_g_x"), lent());
  m.def("backward", &py_backward, nb::arg("type"), nb::arg("outer"), nb::arg("channels"),
        nb::arg("inner"), array("dy"), array("x"), array("mean"), array("rstd"), array("weights"),
        array("scale"), array("offset"), array("residual"), nb::arg("activation"),
        nb::arg("count"), array("sum_g"), array("sum_g_x"), array("dmean"), array("dvariance"),
        array("dx"), array("dresidual"), lent());
  m.def("floor", &py_floor, nb::arg("kind"), array("a"), array("b"), array("out"), nb::arg("n"),
        nb::arg("ahead"));
  m.def("streaming_bytes", &streaming_bytes);
  m.def("set_streaming_bytes", &set_streaming_bytes, nb::arg("bytes"));
  m.def("empty", &py_empty, nb::arg("bytes"));
  m.def("pool_statistics", &py_pool_statistics);
  m.def("pool_limit", [] { return pool_statistics().limit; });
  m.def("set_pool_limit", &set_pool_limit, nb::arg("bytes"));
  m.def("empty_pool", &empty_pool);
  m.def("lend_threads", [](uintptr_t parallel) { lend_threads(ForkJoin(parallel)); },
        nb::arg("parallel"));
  m.def("get_num_threads", &get_num_threads);
  m.def("set_num_threads", &set_num_threads, nb::arg("count"));
  m.def("instruction_sets", &py_instruction_sets);
  m.def("instruction_set", &instruction_set);
  m.def("set_instruction_set", &choose_instruction_set, nb::arg("name"));
}
