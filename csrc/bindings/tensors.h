// tensors.h: tensors as they lie, by the C exchange API of DLPack (https://github.com/dmlc/dlpack,
// version 1.2), which tells all of a PyTorch tensor in the time in which Python asks for its address.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace fusebn {

using Tensor = nanobind::dlpack::dltensor;

// What `type(tensor).__dlpack_c_exchange_api__` points to; only what is used of it.
struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  ExchangeApi* previous;
  void* others[3];
  int (*tensor_of)(void* object, Tensor* out);  // borrowed; not 0 and a Python error if it fails
};

// Fills `out` if the object is a tensor in the memory of the CPU.
inline bool look_at(const ExchangeApi& api, nanobind::handle object, Tensor& out) {
  if (api.tensor_of(object.ptr(), &out)) {
    PyErr_Clear();
    return false;
  }
  out.data = static_cast<char*>(out.data) + out.byte_offset;
  return out.device.device_type == nanobind::device::cpu::value;
}

// The number of the element type, as _spec.ELEMENT_TYPES has it; -1 for any other.
inline int element_type(const Tensor& t) {
  using nanobind::dlpack::dtype_code;
  if (t.dtype.lanes != 1) return -1;
  if (t.dtype.code == uint8_t(dtype_code::Bfloat)) return t.dtype.bits == 16 ? 1 : -1;
  if (t.dtype.code != uint8_t(dtype_code::Float)) return -1;
  return t.dtype.bits == 16 ? 0 : t.dtype.bits == 32 ? 2 : t.dtype.bits == 64 ? 3 : -1;
}

inline int64_t elements(const Tensor& t) {
  int64_t n = 1;
  for (int i = 0; i < t.ndim; ++i) n *= t.shape[i];
  return n;
}

// Whether two tensors have one type and shape, and the same order in memory.
inline bool lies_as(const Tensor& a, const Tensor& b) {
  if (a.ndim != b.ndim || element_type(a) != element_type(b)) return false;
  for (int i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i] || (a.shape[i] > 1 && a.strides[i] != b.strides[i])) return false;
  }
  return true;
}

// Fills the address of an optional vector if it is one of n contiguous elements of that type.
template <class Address>
bool vector_of(const ExchangeApi& api, nanobind::handle object, int type, int64_t n, Address& out) {
  if (object.is_none()) return true;
  Tensor t;
  if (!look_at(api, object, t) || element_type(t) != type || t.ndim != 1) return false;
  out.data = t.data;
  return t.shape[0] == n && (n == 1 || t.strides[0] == 1);
}

}  // namespace fusebn
