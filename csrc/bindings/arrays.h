// arrays.h: NumPy's arrays as they lie, and new ones, by NumPy's C interface, declared by hand.
//
// NumPy keeps it binary compatible (numpy/ndarraytypes.h, __multiarray_api.h): what is used here is
// the same in versions 1 and 2, so the binding is compiled without NumPy and serves both. An array
// is read in a few cache lines, where Python's way to the same facts goes through hundreds: beside
// large tensors none of these is cached, and a small call is mostly waiting for them.
#pragma once
#include <nanobind/nanobind.h>

#include <algorithm>

namespace fusebn {

// PyArrayObject_fields, as far as it is used.
struct Array {
  PyObject_HEAD
  char* data;
  int rank;
  const Py_ssize_t* shape;
  const Py_ssize_t* strides;
  PyObject* base;
  PyObject* dtype;
  int flags;

  int64_t elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
};

// NPY_ARRAY_C_CONTIGUOUS and _ALIGNED; _WRITEABLE; _WARN_ON_WRITE.
constexpr int kDense = 0x0001 | 0x0100, kWritable = 0x0400, kWarns = int(1u << 31);

// The objects that arguments are compared with, as Python hands them over once, and what NumPy's
// table of functions offers. All is owned forever.
struct Numpy {
  struct Format {
    int rank, axis;
  };
  static constexpr int kTypes = 4, kMost = 16;

  PyTypeObject* ndarray = nullptr;  // null: arrays are not known, and no argument is plain
  PyObject* (*new_array)(PyTypeObject*, PyObject* dtype, int rank, const Py_ssize_t* shape,
                         const Py_ssize_t* strides, void* data, int flags, PyObject* like);
  int (*set_base)(PyObject* array, PyObject* base);
  PyObject* dtypes[kTypes];  // in the order of _spec.ELEMENT_TYPES
  PyObject* format_names[kMost];
  Format formats[kMost];
  PyObject* activations[kMost];
  int format_count, activation_count;
  PyObject* forward_result;  // the named tuples that are returned
  PyObject* gradient_result;
  int64_t least_recycled;  // bytes of an array that comes from the pool
};
inline Numpy numpy;

// Where an object, or its equal, stands among others; -1 if it does not.
inline int find(PyObject* const* known, int n, PyObject* object) {
  for (int i = 0; i < n; ++i)
    if (known[i] == object) return i;
  for (int i = 0; i < n; ++i) {
    const int same = PyObject_RichCompareBool(known[i], object, Py_EQ);
    if (same > 0) return i;
    if (same < 0) PyErr_Clear();
  }
  return -1;
}

// The same for a name or None. What else might be equal, an array for one, is not asked.
inline int find_name(PyObject* const* known, int n, nanobind::handle object) {
  if (!object.is_none() && !PyUnicode_CheckExact(object.ptr())) return -1;
  return find(known, n, object.ptr());
}

// The array, if its type is no subclass and its elements lie one after the other, aligned.
inline const Array* plain_array(nanobind::handle object) {
  if (Py_TYPE(object.ptr()) != numpy.ndarray) return nullptr;
  const Array* array = reinterpret_cast<const Array*>(object.ptr());
  return (array->flags & kDense) == kDense ? array : nullptr;
}

inline bool is_writable(const Array& a) { return (a.flags & (kWritable | kWarns)) == kWritable; }

// The number of the element type; -1 for any other, and for another order of bytes. A dtype that
// came out of a pickle is equal, but not identical.
inline int element_type(const Array& a) { return find(numpy.dtypes, Numpy::kTypes, a.dtype); }

inline bool has_type(const Array& a, int type) {
  return a.dtype == numpy.dtypes[type] || element_type(a) == type;
}

inline bool is_like(const Array& a, const Array& x, int type) {
  return a.rank == x.rank && std::equal(a.shape, a.shape + a.rank, x.shape) && has_type(a, type);
}

inline bool is_apart(const Array& a, const Array& b, int64_t bytes) {
  return a.data + bytes <= b.data || b.data + bytes <= a.data;
}

// The arguments, one function a kind. False for what is unusual, and for what is wrong.

// None, or n elements of that type.
template <class Address>
bool vector_of(nanobind::handle object, int type, int64_t n, Address& out) {
  if (object.is_none()) return true;
  const Array* array = plain_array(object);
  if (!array || array->rank != 1 || array->shape[0] != n || !has_type(*array, type)) return false;
  out.data = array->data;
  return true;
}

// None, or an array of the type and shape of x.
inline bool like_x(nanobind::handle object, const Array& x, int type, const Array*& out) {
  if (object.is_none()) return true;
  out = plain_array(object);
  return out && is_like(*out, x, type);
}

inline bool flag_of(nanobind::handle object, bool& out) {
  out = object.ptr() == Py_True;
  return out || object.ptr() == Py_False;
}

inline bool number_of(nanobind::handle object, double most, double& out) {
  if (PyFloat_CheckExact(object.ptr())) {
    out = PyFloat_AsDouble(object.ptr());
  } else if (PyLong_CheckExact(object.ptr())) {
    out = PyLong_AsDouble(object.ptr());
    if (out == -1 && PyErr_Occurred()) PyErr_Clear();
  } else {
    return false;
  }
  return out >= 0 && out <= most;
}

inline bool axis_of(nanobind::handle data_format, nanobind::handle axis, const Array& x, int& out) {
  if (axis.is_none()) {
    const int i = find_name(numpy.format_names, numpy.format_count, data_format);
    if (i < 0 || numpy.formats[i].rank != x.rank) return false;
    out = numpy.formats[i].axis;
    return true;
  }
  if (!PyLong_CheckExact(axis.ptr())) return false;
  int overflow;
  const long index = PyLong_AsLongAndOverflow(axis.ptr(), &overflow);
  if (overflow || index < -x.rank || index >= x.rank) return false;
  out = int(index < 0 ? index + x.rank : index);
  return true;
}

inline bool activation_of(nanobind::handle object, int& out) {
  out = find_name(numpy.activations, numpy.activation_count, object);
  return out >= 0;
}

// A new array of that dtype; its memory is `data` if that is given, and lives as long as `owner`.
inline nanobind::object new_array(PyObject* dtype, int rank, const Py_ssize_t* shape,
                                  void* data = nullptr, nanobind::handle owner = {}) {
  Py_INCREF(dtype);  // which is taken
  const int flags = data ? kDense | kWritable : 0;
  const nanobind::object array = nanobind::steal(
      numpy.new_array(numpy.ndarray, dtype, rank, shape, nullptr, data, flags, nullptr));
  if (!array) throw nanobind::python_error();
  if (owner && numpy.set_base(array.ptr(), owner.inc_ref().ptr())) throw nanobind::python_error();
  return array;
}

inline nanobind::object new_vector(int type, int64_t n) {
  const Py_ssize_t shape[] = {Py_ssize_t(n)};
  return new_array(numpy.dtypes[type], 1, shape);
}

inline char* data_of(nanobind::handle array) {
  return reinterpret_cast<const Array*>(array.ptr())->data;
}

// A named tuple of these: by tuple's own __new__, as a named tuple's does it, but without a frame.
inline nanobind::object named_tuple(PyObject* type, nanobind::handle fields) {
  static const auto make = newfunc(PyType_GetSlot(&PyTuple_Type, Py_tp_new));
  const nanobind::object arguments = nanobind::steal(PyTuple_Pack(1, fields.ptr()));
  PyObject* made = make(reinterpret_cast<PyTypeObject*>(type), arguments.ptr(), nullptr);
  if (!made) throw nanobind::python_error();
  return nanobind::steal(made);
}

// The table of functions that NumPy offers; null if it is not where it was in versions 1 and 2.
inline void** numpy_table() {
  for (const char* name : {"numpy._core._multiarray_umath", "numpy.core._multiarray_umath"}) {
    const nanobind::object module = nanobind::steal(PyImport_ImportModule(name));
    const nanobind::object capsule =
        nanobind::steal(module ? PyObject_GetAttrString(module.ptr(), "_ARRAY_API") : nullptr);
    void* table = capsule ? PyCapsule_GetPointer(capsule.ptr(), nullptr) : nullptr;
    if (table) return static_cast<void**>(table);
    PyErr_Clear();
  }
  return nullptr;
}

// Learns to know NumPy; false, and nothing is plain, if it is not as it was in versions 1 and 2.
// `probe` is an array [2, 3] of dtypes[2] at that address.
inline bool know_numpy(nanobind::handle ndarray, nanobind::handle dtypes, nanobind::handle formats,
                       nanobind::handle activations, nanobind::handle forward_result,
                       nanobind::handle gradient_result, int64_t least_recycled,
                       nanobind::handle probe, uintptr_t address) {
  namespace nb = nanobind;
  numpy.ndarray = nullptr;
  void** const table = numpy_table();
  if (!table) return false;
  const unsigned version = reinterpret_cast<unsigned (*)()>(table[0])();
  if ((version != 0x01000009 && version != 0x02000000) || table[2] != ndarray.ptr()) return false;
  if (nb::cast<size_t>(ndarray.attr("__basicsize__")) < sizeof(Array)) return false;

  if (nb::len(dtypes) != Numpy::kTypes || nb::len(formats) > Numpy::kMost ||
      nb::len(activations) > Numpy::kMost)
    return false;
  Numpy known;
  known.new_array = reinterpret_cast<decltype(known.new_array)>(table[94]);
  known.set_base = reinterpret_cast<decltype(known.set_base)>(table[282]);
  const auto keep = [](nb::handle object) { return object.inc_ref().ptr(); };
  int i = 0;
  for (nb::handle dtype : dtypes) known.dtypes[i++] = keep(dtype);
  known.format_count = known.activation_count = 0;
  for (nb::handle item : formats.attr("items")()) {
    known.format_names[known.format_count] = keep(item[0]);
    known.formats[known.format_count++] = {nb::cast<int>(item[1][0]), nb::cast<int>(item[1][1])};
  }
  for (nb::handle name : activations) known.activations[known.activation_count++] = keep(name);
  known.forward_result = keep(forward_result);
  known.gradient_result = keep(gradient_result);
  known.least_recycled = least_recycled;

  known.ndarray = reinterpret_cast<PyTypeObject*>(ndarray.ptr());
  numpy = known;
  const Array* seen = plain_array(probe.ptr());
  const bool right = seen && seen->data == reinterpret_cast<char*>(address) && seen->rank == 2 &&
                     seen->shape[0] == 2 && seen->shape[1] == 3 &&
                     seen->dtype == known.dtypes[2] && is_writable(*seen);
  if (!right) numpy.ndarray = nullptr;
  return right;
}

}  // namespace fusebn
