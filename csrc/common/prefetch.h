// Asking for memory ahead of time: torch-free, once per instruction set.
#pragma once

#include <cstdint>

#include "simd.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// Hardware prefetchers stop where a page of memory ends: this goes on. Past the end of an array it does nothing.
template <class T>
DL_INLINE void prefetch_page_ahead(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + 4096));
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
