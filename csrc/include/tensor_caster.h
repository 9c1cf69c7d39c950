// How a torch.Tensor becomes a TensorView without linking to torch: the caster reads address, shape, dtype, layout and
// device through Python attributes and refuses what does not fit (dtype, rank, contiguity, device), so the C++
// signature of a binding is also its run-time check. The device is the CPU unless TRELLIS_TENSORS_ON_CUDA is defined.
#pragma once
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <type_traits>

#include "tensor_view.h"

namespace trellis {

template <class T>
struct DType;
template <>
struct DType<float> {
  static constexpr char name[] = "float32";
};
template <>
struct DType<double> {
  static constexpr char name[] = "float64";
};
template <>
struct DType<uint8_t> {
  static constexpr char name[] = "uint8";
};
template <>
struct DType<int32_t> {
  static constexpr char name[] = "int32";
};
template <>
struct DType<int64_t> {
  static constexpr char name[] = "int64";
};

}  // namespace trellis

namespace pybind11::detail {

#ifdef TRELLIS_TENSORS_ON_CUDA
inline constexpr char kIsOnDevice[] = "is_cuda";
inline constexpr auto kDeviceText = const_name("-d, contiguous, on a GPU]");
#else
inline constexpr char kIsOnDevice[] = "is_cpu";
inline constexpr auto kDeviceText = const_name("-d, contiguous, on the CPU]");
#endif

// Attribute names and the torch dtype, looked up once. Holding them in a plain function-local static would take the
// static's lock while importing torch under the GIL: two threads could wait for each other.
struct TensorAttributes {
  PyObject *dtype, *shape, *is_on_device, *is_contiguous, *data_ptr;
};

inline const TensorAttributes& tensor_attributes() {
  PYBIND11_CONSTINIT static gil_safe_call_once_and_store<TensorAttributes> storage;
  return storage
      .call_once_and_store_result([] {
        const auto intern = [](const char* text) { return PyUnicode_InternFromString(text); };
        return TensorAttributes{intern("dtype"), intern("shape"), intern(kIsOnDevice), intern("is_contiguous"),
                                intern("data_ptr")};
      })
      .get_stored();
}

template <class Scalar>
inline PyObject* torch_dtype() {
  PYBIND11_CONSTINIT static gil_safe_call_once_and_store<object> storage;
  return storage
      .call_once_and_store_result([] { return object(module_::import("torch").attr(trellis::DType<Scalar>::name)); })
      .get_stored()
      .ptr();
}

template <class T, int Rank>
struct type_caster<trellis::TensorView<T, Rank>> {
  using View = trellis::TensorView<T, Rank>;
  using Scalar = std::remove_const_t<T>;
  PYBIND11_TYPE_CASTER(View, const_name("Tensor[") + const_name(trellis::DType<Scalar>::name) + const_name(", ") +
                                 const_name<Rank>() + kDeviceText);

  bool load(handle src, bool) {
    const TensorAttributes& name = tensor_attributes();
    const object dtype = get(src, name.dtype);
    if (!dtype || dtype.ptr() != torch_dtype<Scalar>()) return false;
    const object shape = get(src, name.shape);
    if (!shape || !PyTuple_Check(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) != Rank) return false;
    for (int dim = 0; dim < Rank; ++dim) {
      value.shape[dim] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), dim));
      if (value.shape[dim] < 0) return cleared();
    }
    const object is_on_device = get(src, name.is_on_device);
    if (!is_on_device || is_on_device.ptr() != Py_True) return false;
    const object contiguous = call(src, name.is_contiguous);
    if (!contiguous || contiguous.ptr() != Py_True) return false;
    const object address = call(src, name.data_ptr);
    if (!address) return false;
    value.data = static_cast<T*>(PyLong_AsVoidPtr(address.ptr()));
    if (PyErr_Occurred()) return cleared();
    return value.data != nullptr || value.numel() == 0;
  }

 private:
  static bool cleared() {
    PyErr_Clear();
    return false;
  }
  static object get(handle src, PyObject* name) {
    PyObject* result = PyObject_GetAttr(src.ptr(), name);
    if (!result) PyErr_Clear();
    return reinterpret_steal<object>(result);
  }
  static object call(handle src, PyObject* name) {
    PyObject* result = PyObject_CallMethodNoArgs(src.ptr(), name);
    if (!result) PyErr_Clear();
    return reinterpret_steal<object>(result);
  }
};

}  // namespace pybind11::detail
