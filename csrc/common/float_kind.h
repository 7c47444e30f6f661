// The floating storage types, named: what the host side tells the loops of each instruction set.
#pragma once

#include <cstdint>

namespace dlkernels {

enum class Float : int { kFloat32, kFloat16, kBFloat16, kFloat64 };

inline int64_t size_of(Float t) { return t == Float::kFloat64 ? 8 : t == Float::kFloat32 ? 4 : 2; }

#define DL_CONCAT_(a, b) a##b
#define DL_CONCAT(a, b) DL_CONCAT_(a, b)

}  // namespace dlkernels
