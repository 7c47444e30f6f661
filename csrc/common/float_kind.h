// The floating storage types, named: what the host side tells the loops of each instruction set.
#pragma once

namespace dlkernels {

enum class Float : int { kFloat32, kFloat16, kBFloat16, kFloat64 };

}  // namespace dlkernels
