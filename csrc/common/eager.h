// What the eager entries of every family share: reading Python arguments without conversions, and calling back.
//
// An entry takes only what needs no conversion and no error message; for the rest it answers None and Python's path,
// which checks, converts and explains, goes on.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <initializer_list>
#include <optional>

#include "gpu.h"
#include "layer.h"

namespace dlkernels {

// True when a call may go to a compiled eager node: no transform, mode or tracer in the way; a plain CPU tensor.
bool plain_eager();
bool plain_cpu(const at::Tensor& x);

inline bool plain_here(const at::Tensor& x) { return plain_cpu(x) || plain_gpu(x); }

inline at::Tensor tensor_or_undefined(PyObject* object) {
  return THPVariable_CheckExact(object) ? THPVariable_Unpack(object) : at::Tensor();
}

inline std::optional<double> number(PyObject* object) {
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  if (PyLong_CheckExact(object)) return PyLong_AsDouble(object);
  return std::nullopt;
}

// An int, and no error left behind where it does not fit.
inline std::optional<int64_t> integer(PyObject* object) {
  if (!PyLong_CheckExact(object)) return std::nullopt;
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    return std::nullopt;
  }
  return value;
}

inline bool wants_grad(const at::Tensor& x) { return x.defined() && x.requires_grad() && at::GradMode::is_enabled(); }

inline bool floating_input(const at::Tensor& x) {
  const auto t = x.scalar_type();
  return t == at::kFloat || t == at::kBFloat16 || t == at::kHalf || t == at::kDouble;
}

// A plain floating CPU tensor without a forward-mode tangent; the second one takes GPU tensors too.
inline bool plain_floating(const at::Tensor& x) {
  return x.defined() && plain_cpu(x) && floating_input(x) && !x._fw_grad(/*level=*/0).defined();
}
inline bool plain_floating_here(const at::Tensor& x) {
  return x.defined() && plain_here(x) && floating_input(x) && !x._fw_grad(/*level=*/0).defined();
}

inline std::optional<at::Tensor> optional(const at::Tensor& x) {
  return x.defined() ? std::make_optional(x) : std::nullopt;
}

inline at::Tensor value_or_undefined(const std::optional<at::Tensor>& x) { return x.value_or(at::Tensor()); }

// The place of a string in a list of names, or none. `None` itself stands for the empty name.
inline std::optional<int64_t> code_of(PyObject* object, std::initializer_list<const char*> names) {
  int64_t code = 0;
  for (const char* name : names) {
    if (object == Py_None ? *name == 0
                          : PyUnicode_CheckExact(object) && PyUnicode_CompareWithASCIIString(object, name) == 0)
      return code;
    ++code;
  }
  return std::nullopt;
}

// The codes of csrc/common/loss.h.
inline std::optional<int64_t> reduction_code(PyObject* object) { return code_of(object, {"none", "mean", "sum"}); }

// The codes of csrc/common/activation.h.
inline std::optional<int64_t> activation_code(PyObject* object) {
  return code_of(object, {"", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh"});
}

// An optional parameter of a layer, or an optional tensor like x. False: not for the eager entry.
inline bool take_parameter(PyObject* object, const at::Tensor& x, at::IntArrayRef sizes, at::Tensor& into) {
  if (object == Py_None) return true;
  into = tensor_or_undefined(object);
  return plain_floating_here(into) && into.device() == x.device() && fits_parameter(into, x, sizes);
}
inline bool take_like(PyObject* object, const at::Tensor& x, at::Tensor& into) {
  if (object == Py_None) return true;
  into = tensor_or_undefined(object);
  return plain_floating_here(into) && into.device() == x.device() && into.scalar_type() == x.scalar_type() &&
         into.sizes() == x.sizes() && into.strides() == x.strides();
}

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

inline pybind11::object none() { return pybind11::none(); }

// The tensor that `compute` returns, as a Python object; other Python threads run meanwhile.
template <class F>
pybind11::object without_gil(F compute) {
  at::Tensor result;
  {
    pybind11::gil_scoped_release release;
    result = compute();
  }
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(result));
}

}  // namespace dlkernels
