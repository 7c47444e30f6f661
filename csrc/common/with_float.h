// From a named storage type to the C++ type, inside files compiled once per instruction set.
#pragma once

#include "float_kind.h"
#include "simd.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// f(T{}) with T the storage type.
template <class F>
auto with_float(Float dtype, F f) {
  switch (dtype) {
    case Float::kFloat16: return f(float16{});
    case Float::kBFloat16: return f(bfloat16{});
    case Float::kFloat64: return f(double{});
    default: return f(float{});
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
