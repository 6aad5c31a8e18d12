// python.cpp: the core as a Python module over the buffer protocol. No arithmetic, no checks: the
// rules for arguments live in src/fusebn/_spec.py, and every array that arrives here is dense,
// aligned, of the stated type and size.
//
// An array is taken by its address. NumPy's bfloat16 (ml_dtypes) exports neither DLPack nor a buffer
// with a format, but it does export one without: so the element type travels as a number.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

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

// A one-dimensional array of bytes whose memory goes back to the pool when the last view of it dies,
// on whatever thread that happens.
nb::ndarray<nb::numpy, uint8_t> py_empty(int64_t bytes) {
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
  return {buffer->data, {size_t(bytes)}, owner};
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
