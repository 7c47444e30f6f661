// The focal-loss loops on exactly sized heap arrays, under AddressSanitizer and UndefinedBehaviorSanitizer: ragged
// sizes, every dtype, target kind and layout, compared with double-precision loops written from the formulas. Built and
// run by test_sanitized.py; exit code 0 and the line "ok" mean that all held.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/focal_loss_kernel.h"
#include "sanitized.h"

using namespace dlkernels;

namespace dlkernels {
FocalLossKernels DL_TABLE();
}

namespace {

void close(const Array& got, size_t i, double want, const char* what) {
  const double g = got.get(i), tol = by_type(got.type, 1e-12, 2e-5, 1e-2, 1e-2);
  check(std::fabs(g - want) <= tol * (1 + std::fabs(want)), what, g, want);
}

double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

void sigmoid_case(const FocalLossKernels& k, Float type, int kind, int64_t rows, int64_t classes, double gamma) {
  const int64_t n = rows * classes, ignore = -7;
  Array x(type, n), loss(accumulate(type), n), grad(type, n);
  std::vector<double> y(n), used(n, 1.0);
  for (int64_t i = 0; i < n; ++i) x.set(i, uniform(-6, 6));
  Array floats(kind == 1 && type != Float::kFloat64 ? Float::kFloat32 : type, kind <= 1 ? n : 0);
  std::vector<int64_t> labels(kind == 2 ? n : rows);
  std::vector<uint8_t> bytes(n);
  std::vector<int32_t> ints(kind == 4 ? rows : n);
  for (int64_t i = 0; i < n && kind <= 1; ++i) {
    floats.set(i, integer(0, 2) == 0 ? uniform(0.1, 0.9) : static_cast<double>(integer(0, 1)));
    y[i] = floats.get(i);
  }
  for (int64_t i = 0; i < n && (kind == 2 || kind == 3); ++i) {
    const int64_t t = kind == 2 ? integer(-1, 1) : integer(0, 1);
    labels.resize(n);
    labels[i] = t < 0 ? ignore : t;
    bytes[i] = static_cast<uint8_t>(t);
    used[i] = t >= 0, y[i] = t > 0;
  }
  for (int64_t r = 0; r < rows && kind == 4; ++r) {
    const int64_t t = integer(-2, classes - 1);
    ints[r] = static_cast<int32_t>(t == -2 ? ignore : t);
    for (int64_t c = 0; c < classes; ++c) used[r * classes + c] = t != -2, y[r * classes + c] = c == t;
  }
  SigmoidArgs a{};
  a.dtype = type;
  const Target kinds[] = {Target::kFloat, floats.type == type ? Target::kFloat : Target::kFloat32, Target::kInt64,
                          Target::kUInt8, Target::kInt32};
  a.target_kind = kinds[kind];
  const void* targets[] = {floats.data(), floats.data(), labels.data(), bytes.data(), ints.data()};
  a.target = targets[kind];
  a.input = x.data();
  a.count = n;
  a.classes = kind == 4 ? classes : 0;
  a.alpha = 0.25, a.gamma = gamma, a.ignore_index = ignore, a.grad_scale = 0.5;
  a.loss = loss.data();
  a.grad = grad.data();
  const int64_t blocks = (n + kSigmoidBlock - 1) / kSigmoidBlock;
  std::vector<double> partial(blocks);
  a.partial = partial.data();
  k.sigmoid(a, 0, blocks);
  double total = 0, sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double z = x.get(i), t = y[i], p = 1 / (1 + std::exp(-z)), ce = softplus(z) - t * z;
    const double v = p + t - 2 * p * t, at = 0.25 * t + 0.75 * (1 - t), vg = std::pow(v, gamma);
    const double slope = gamma == 0 ? 0 : gamma * std::pow(v, gamma - 1) * (1 - 2 * t) * p * (1 - p) * ce;
    close(loss, i, used[i] * at * vg * ce, "sigmoid loss");
    close(grad, i, used[i] * 0.5 * at * (vg * (p - t) + slope), "sigmoid grad");
    total += loss.get(i);
  }
  for (const double s : partial) sum += s;
  check(std::fabs(sum - total) <= 1e-5 * (1 + std::fabs(total)), "sigmoid sum", sum, total);
}

void softmax_case(const FocalLossKernels& k, Float type, bool soft, int64_t outer, int64_t C, int64_t inner,
                  double gamma, double eps, bool weighted, bool past_caches) {
  const int64_t rows = outer * inner, n = rows * C, ignore = C > 2 ? 1 : -100;
  Array x(type, n), q(type, soft ? n : 0), w(accumulate(type), weighted ? C : 0), loss(accumulate(type), rows);
  Array grad(type, n), g(accumulate(type), rows);
  std::vector<int64_t> labels(rows);
  for (int64_t i = 0; i < n; ++i) x.set(i, uniform(-5, 5));
  for (int64_t i = 0; i < n && soft; ++i) q.set(i, uniform(0, 2.0 / C));
  for (int64_t c = 0; c < C && weighted; ++c) w.set(c, uniform(0, 1));
  for (int64_t r = 0; r < rows; ++r) labels[r] = integer(0, C - 1), g.set(r, uniform(0.5, 1.5));
  SoftmaxArgs a{};
  a.dtype = type;
  a.target_kind = soft ? Target::kFloat : Target::kInt64;
  a.input = x.data();
  a.target = soft ? static_cast<const void*>(q.data()) : labels.data();
  a.weight = weighted ? w.data() : nullptr;
  a.outer = outer, a.classes = C, a.inner = inner;
  a.gamma = gamma, a.label_smoothing = eps, a.ignore_index = ignore;
  a.loss = loss.data();
  a.grad = grad.data();
  a.grad_output = g.data();
  a.grad_output_step = 1;
  a.grad_scale = 1.0;
  a.stream = past_caches;
  const int64_t tiles = k.softmax_tiles(a);
  const size_t bytes = k.softmax_scratch_bytes(a);
  void* scratch = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  std::memset(scratch, 0xff, bytes);
  k.softmax(a, 0, tiles / 2, scratch);
  k.softmax(a, tiles / 2, tiles, scratch);
  std::free(scratch);
  std::vector<double> p(C), h(C);
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t s = 0; s < inner; ++s) {
      const int64_t r = o * inner + s;
      const auto at = [&](int64_t c) { return (o * C + c) * inner + s; };
      const bool left_out = !soft && labels[r] == ignore;
      double m = -INFINITY, total = 0, want = 0, sum_h = 0;
      for (int64_t c = 0; c < C; ++c) m = std::fmax(m, x.get(at(c)));
      for (int64_t c = 0; c < C; ++c) total += p[c] = std::exp(x.get(at(c)) - m);
      for (int64_t c = 0; c < C; ++c) {
        p[c] /= total;
        const double hard = soft ? q.get(at(c)) : labels[r] == c,
                     t = (weighted ? w.get(c) : 1) * ((1 - eps) * hard + eps / C);
        const double ell = -(x.get(at(c)) - m - std::log(total)), u = C == 1 ? 0 : 1 - p[c];
        const double focus = gamma == 0 ? 1 : std::pow(u, gamma);
        want += t == 0 ? 0 : t * focus * ell;
        sum_h += h[c] = t * (gamma == 0 ? 1 : u == 0 ? 0 : focus + gamma * std::pow(u, gamma - 1) * p[c] * ell);
      }
      close(loss, r, left_out ? 0 : want, "softmax loss");
      for (int64_t c = 0; c < C; ++c)
        close(grad, at(c), left_out ? 0 : g.get(r) * (p[c] * sum_h - h[c]), "softmax grad");
    }
}

}  // namespace

int main() {
  const FocalLossKernels k = DL_TABLE();
  for (const Float type : {Float::kFloat32, Float::kFloat16, Float::kBFloat16, Float::kFloat64}) {
    for (int kind = 0; kind < 5; ++kind)
      for (const double gamma : {0.0, 0.5, 2.0}) {
        sigmoid_case(k, type, kind, 1, 1, gamma);
        sigmoid_case(k, type, kind, 3, 37, gamma);
        sigmoid_case(k, type, kind, 23, 91, gamma);
        sigmoid_case(k, type, kind, 70, 64, gamma);
      }
    for (const bool soft : {false, true})
      for (const double gamma : {0.0, 0.5, 2.0})
        for (const double eps : {0.0, 0.1})
          for (const bool weighted : {false, true}) {
            for (const int64_t C : {1, 2, 5, 16, 31, 32, 33, 47, 64, 100, 257}) {
              softmax_case(k, type, soft, 3, C, 1, gamma, eps, weighted, C % 2 == 1);
              softmax_case(k, type, soft, 67, C, 1, gamma, eps, weighted, C % 2 == 0);
            }
            softmax_case(k, type, soft, 2, 21, 131, gamma, eps, weighted, false);
            softmax_case(k, type, soft, 5, 7, 3, gamma, eps, weighted, true);
            softmax_case(k, type, soft, 1, 1100, 19, gamma, eps, weighted, false);
            softmax_case(k, type, soft, 2, 4099, 1, gamma, eps, weighted, true);
          }
  }
  return finish();
}
