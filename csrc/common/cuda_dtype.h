// From what is known at run time to template arguments: dtypes, and whether packs of 16 bytes fit.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda_math.h"
#include "float_kind.h"

namespace dlkernels {

// f(a value of the storage type).
template <class F>
void with_dtype(Float dtype, F f) {
  switch (dtype) {
    case Float::kFloat32: return f(float{});
    case Float::kFloat16: return f(float16{});
    case Float::kBFloat16: return f(bfloat16{});
    default: return;  // float64 is Triton's
  }
}

// Whether every pointer (nullptr included) is a multiple of 16 bytes.
template <class... P>
bool aligned(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// f(integral constant): the elements of 16 bytes, or 1.
template <class T, class F>
void with_pack(bool packs, F f) {
  if (packs) return f(std::integral_constant<int, 16 / static_cast<int>(sizeof(T))>{});
  f(std::integral_constant<int, 1>{});
}

template <class F>
void with_bool(bool value, F f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace dlkernels
