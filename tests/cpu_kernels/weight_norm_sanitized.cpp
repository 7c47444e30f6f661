// The weight-norm loops on exactly sized heap arrays, under AddressSanitizer and UndefinedBehaviorSanitizer: rows,
// columns and what lies between, whole and in steps, every dtype, rows of zeros and of extreme size, compared with
// double-precision loops. Built and run by test_sanitized.py; "ok" means that all held.
#include <cmath>
#include <memory>
#include <vector>

#include "../../csrc/cpu/weight_norm_kernel.h"
#include "sanitized.h"

using namespace dlkernels;

namespace dlkernels {
WeightNormKernels DL_TABLE();
}

namespace {

// In three steps, with scratch of exactly the size that the plan names.
void steps(const WeightNormKernels& k, WeightNormArgs a) {
  const size_t each = a.plan.columns && a.dtype != Float::kFloat64 ? 4 : 8;
  const int64_t width = a.plan.columns ? a.rows * a.inner : 0;
  std::unique_ptr<char[]> partial(new char[a.plan.slots * each]), spread(new char[2 * width * each + 1]);
  std::vector<double> factors(3 * a.rows);
  a.partial = partial.get(), a.factors = factors.data(), a.spread = spread.get();
  k.sum(a, 0, a.plan.pieces / 2);
  k.sum(a, a.plan.pieces / 2, a.plan.pieces);
  k.factor(a, 0, a.rows);
  k.apply(a, 0, a.plan.pieces / 2);
  k.apply(a, a.plan.pieces / 2, a.plan.pieces);
}

void norm_case(const WeightNormKernels& k, Float type, Float g_type, int64_t A, int64_t K, int64_t B, bool whole,
               bool past_caches) {
  const int64_t n = A * K * B;
  const Float acc = accumulate(type);
  Array v(type, n), dw(type, n), w(type, n), dv(type, n), g(g_type, K), dg(g_type, K), norm(acc, K);
  // Row 1 holds zeros, row 2 what float32 cannot square (in the types that hold it).
  const auto row = [&](int64_t i) { return i / B % K; };
  const double huge = type == Float::kFloat16 ? 1 : 1e30;
  for (int64_t i = 0; i < n; ++i) {
    v.set(i, row(i) == 1 ? 0 : uniform(-2, 3) * (row(i) == 2 ? huge : 1));
    dw.set(i, uniform(-1, 2));
  }
  for (int64_t i = 0; i < K; ++i) g.set(i, uniform(-2, 3));
  WeightNormArgs a{};
  a.dtype = type, a.g_dtype = g_type;
  a.v = v.data(), a.g = g.data(), a.norm = norm.data(), a.out = w.data();
  a.outer = A, a.rows = K, a.inner = B;
  a.plan = weight_norm_plan(A, K, B);
  WeightNormArgs b = a;
  b.grad_output = dw.data(), b.out = dv.data(), b.dg = dg.data(), b.stream = past_caches;
  for (const WeightNormArgs& args : {a, b}) {
    if (!whole || a.plan.columns) {
      steps(k, args);
    } else {
      k.rows(args, 0, K / 2);
      k.rows(args, K / 2, K);
    }
  }
  std::vector<double> squares(K), dots(K), sizes(K);
  for (int64_t i = 0; i < n; ++i) {
    squares[row(i)] += v.get(i) * v.get(i);
    dots[row(i)] += v.get(i) * dw.get(i);
    sizes[row(i)] += dw.get(i) * dw.get(i);
  }
  const double eps = by_type(type, 1e-13, 1e-5, 1e-2, 1e-2);
  const double quantum = type == Float::kFloat16 ? 6e-8 : 0;  // between its smallest numbers
  for (int64_t r = 0; r < K; ++r) {
    const double length = std::sqrt(squares[r]), want = length == 0 ? 0 : dots[r] / length;
    check(std::fabs(norm.get(r) - length) <= (acc == Float::kFloat32 ? 1e-5 : 1e-13) * length, "norm", norm.get(r),
          length);
    check(std::fabs(dg.get(r) - want) <= eps * (1 + std::sqrt(sizes[r])), "dg", dg.get(r), want);
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t r = row(i);
    const double length = std::sqrt(squares[r]), f = length == 0 ? 0 : g.get(r) / length;
    const double want_w = f * v.get(i), want = length == 0 ? 0 : f * (dw.get(i) - dots[r] / squares[r] * v.get(i));
    check(std::fabs(w.get(i) - want_w) <= eps * std::fabs(want_w) + quantum, "w", w.get(i), want_w);
    check(std::fabs(dv.get(i) - want) <= eps * std::fabs(f) * (2 + std::sqrt(sizes[r])) + quantum, "dv", dv.get(i),
          want);
  }
}

}  // namespace

int main() {
  const WeightNormKernels k = DL_TABLE();
  struct Shape {
    int64_t A, K, B;
  };
  const Shape shapes[] = {{1, 1, 1},     {1, 5, 1},     {1, 4, 7},  {1, 7, 16},    {1, 3, 65},    {1, 4, 1001},
                          {1, 3, 33001}, {2, 3, 20001}, {9, 1, 1},  {9, 17, 1},    {70, 64, 1},   {33, 130, 1},
                          {5, 3, 4},     {6, 5, 63},    {3, 4, 64}, {300, 3, 100}, {2000, 20, 1}, {35, 1100, 1}};
  for (const Float type : {Float::kFloat32, Float::kFloat16, Float::kBFloat16, Float::kFloat64})
    for (const Float g_type : {type, type == Float::kFloat64 ? type : Float::kFloat32})
      for (const Shape& s : shapes)
        for (const bool whole : {true, false})
          for (const bool past_caches : {true, false}) norm_case(k, type, g_type, s.A, s.K, s.B, whole, past_caches);
  return finish();
}
