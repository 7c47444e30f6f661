// The stochastic-depth loops on exactly sized heap arrays, under AddressSanitizer and UndefinedBehaviorSanitizer:
// ragged sizes and offsets, every dtype, with and without a residual, past the caches or not, compared with
// double-precision loops. What is dropped is NaN and must not show. Built and run by test_sanitized.py; "ok" means that
// all held.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "../../csrc/cpu/stochastic_depth_kernel.h"

using namespace dlkernels;

namespace dlkernels {
StochasticDepthKernels DL_TABLE();
}

namespace {

std::mt19937 rng(0);
double uniform(double a, double b) { return std::uniform_real_distribution<double>(a, b)(rng); }

int failures = 0;
void check(bool ok, const char* what, double got, double want) {
  if (ok) return;
  if (++failures <= 10) std::printf("FAILED %s: got %g, expected %g\n", what, got, want);
}

size_t size_of(Float t) { return t == Float::kFloat64 ? 8 : t == Float::kFloat32 ? 4 : 2; }

// An array of exactly n elements of a storage type; values are rounded to it when they are set.
struct Array {
  Float type;
  std::unique_ptr<char[]> data;
  Array(Float t, size_t n) : type(t), data(new char[n * size_of(t) + (n == 0)]) {
    std::memset(data.get(), 0xff, n * size_of(t));  // NaN in every type: an unwritten output shows
  }
  void set(size_t i, double v) {
    if (type == Float::kFloat64) reinterpret_cast<double*>(data.get())[i] = v;
    if (type == Float::kFloat32) reinterpret_cast<float*>(data.get())[i] = static_cast<float>(v);
    if (type == Float::kFloat16) reinterpret_cast<_Float16*>(data.get())[i] = static_cast<_Float16>(v);
    if (type == Float::kBFloat16) {
      const float f = static_cast<float>(v);
      std::memcpy(data.get() + 2 * i, reinterpret_cast<const char*>(&f) + 2, 2);
    }
  }
  double get(size_t i) const {
    if (type == Float::kFloat64) return reinterpret_cast<const double*>(data.get())[i];
    if (type == Float::kFloat32) return reinterpret_cast<const float*>(data.get())[i];
    if (type == Float::kFloat16) return static_cast<double>(reinterpret_cast<const _Float16*>(data.get())[i]);
    float f = 0;
    std::memcpy(reinterpret_cast<char*>(&f) + 2, data.get() + 2 * i, 2);
    return f;
  }
};

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
  a.input = x.data.get(), a.noise = f.data.get(), a.residual = residual ? r.data.get() : nullptr;
  a.out = y.data.get();
  a.rows = rows, a.count = count, a.stream = past_caches;
  k.forward(a, 0, n / 3);
  k.forward(a, n / 3, n);
  const double tol = type == Float::kFloat64 ? 1e-15 : type == Float::kFloat32 ? 3e-7 : 1e-2;
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
  if (failures) return std::printf("%d failures\n", failures), 1;
  std::puts("ok");
  return 0;
}
