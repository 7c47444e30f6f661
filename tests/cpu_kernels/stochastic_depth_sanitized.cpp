// The stochastic-depth loops on exactly sized heap arrays, under AddressSanitizer and UndefinedBehaviorSanitizer:
// ragged sizes and offsets, every dtype, with and without a residual, past the caches or not, compared with
// double-precision loops. What is dropped is NaN and must not show. Built and run by test_sanitized.py; "ok" means that
// all held.
#include <cmath>

#include "../../csrc/cpu/stochastic_depth_kernel.h"
#include "sanitized.h"

using namespace dlkernels;

namespace dlkernels {
StochasticDepthKernels DL_TABLE();
}

namespace {

void depth_case(const StochasticDepthKernels& k, Float type, Float noise_type, int64_t rows, int64_t count,
                bool residual, bool past_caches) {
  const int64_t n = rows * count;
  Array x(type, n), r(type, residual ? n : 0), y(type, n), f(noise_type, rows);
  for (int64_t i = 0; i < rows; ++i) f.set(i, i % 3 == 1 ? 0 : uniform(0.5, 2));
  for (int64_t i = 0; i < n; ++i)
    if (i / count % 3 != 1) x.set(i, uniform(-3, 3));
  for (int64_t i = 0; residual && i < n; ++i) r.set(i, uniform(-3, 3));
  StochasticDepthArgs a{};
  a.dtype = type, a.noise_dtype = noise_type;
  a.input = x.data(), a.noise = f.data(), a.residual = residual ? r.data() : nullptr;
  a.out = y.data();
  a.rows = rows, a.count = count, a.stream = past_caches;
  k.forward(a, 0, n / 3);
  k.forward(a, n / 3, n);
  const double tol = by_type(type, 1e-15, 3e-7, 1e-2, 1e-2);
  for (int64_t i = 0; i < n; ++i) {
    const double factor = f.get(i / count);
    const double want = (residual ? r.get(i) : 0) + (factor == 0 ? 0 : factor * x.get(i));
    check(std::fabs(y.get(i) - want) <= tol * (1 + std::fabs(want)), "y", y.get(i), want);
  }
}

}  // namespace

int main() {
  const StochasticDepthKernels k = DL_TABLE();
  for (const Float type : {Float::kFloat32, Float::kFloat16, Float::kBFloat16, Float::kFloat64})
    for (const Float noise : {type, type == Float::kFloat64 ? type : Float::kFloat32})
      for (const bool residual : {false, true})
        for (const bool past_caches : {false, true})
          for (const int64_t count : {1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 1001})
            for (const int64_t rows : {1, 2, 5, 8}) depth_case(k, type, noise, rows, count, residual, past_caches);
  return finish();
}
