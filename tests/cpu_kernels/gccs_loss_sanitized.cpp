// The grouping of rows and the GCCS loops on exactly sized heap arrays, under AddressSanitizer and
// UndefinedBehaviorSanitizer: every dtype, one slab and several, classes of one row and of many, losses and gradients
// compared with double-precision loops. Built and run by test_sanitized.py; "ok" means that all held.
#include <cmath>
#include <memory>
#include <vector>

#include "../../csrc/cpu/gccs_loss_kernel.h"
#include "sanitized.h"

using namespace dlkernels;

namespace dlkernels {
GccsLossKernels DL_TABLE();
}

namespace {

// Labels in which some classes are missing, some rows are left out, and the last class has most rows.
template <class I>
std::vector<I> labels_of(int64_t n, int64_t classes, int64_t ignore_index) {
  std::vector<I> y(n);
  for (auto& label : y) {
    label = static_cast<I>(integer(0, 2) ? integer(0, classes - 1) : classes - 1);
    if (integer(0, 6) == 0) label = static_cast<I>(-integer(1, 200));
    if (ignore_index <= INT32_MAX && integer(0, 6) == 0) label = static_cast<I>(ignore_index);
  }
  return y;
}

template <class I>
void groups_case(int64_t n, int64_t classes, int64_t ignore_index) {
  std::vector<I> y = labels_of<I>(n, classes, ignore_index);
  y.shrink_to_fit();
  const Segments groups = group_by_class(y.data(), n, classes, ignore_index);
  const LabelCount count = count_labels(y.data(), n, classes, ignore_index);
  int64_t counted = 0, at = 0, before = -1;
  for (const I label : y) counted += label >= 0 && label != ignore_index;
  check(count.bad == -1 && count.counted == counted, "count", static_cast<double>(count.counted), counted);
  check(static_cast<int64_t>(groups.order.size()) == counted, "rows", groups.order.size(), counted);
  for (const Segment& s : groups.segments) {
    check(s.begin == at && s.end > s.begin && s.label > before, "segment", s.begin, at);
    for (int64_t i = s.begin; i < s.end; ++i) {
      check(y[groups.order[i]] == s.label, "label", y[groups.order[i]], s.label);
      check(i == s.begin || groups.order[i] > groups.order[i - 1], "order", groups.order[i], i);
    }
    at = s.end, before = s.label;
  }
  check(at == counted, "segments", at, counted);
  if (n < 3 || ignore_index == classes) return;
  y[n / 2] = y[n - 1] = static_cast<I>(classes);
  const int64_t bad = count_labels(y.data(), n, classes, ignore_index).bad;
  check(bad == n / 2, "bad label", bad, n / 2);
}

struct Sums {
  double mean = 0, v = 0, m3 = 0, m4 = 0;
};

void loss_case(const GccsLossKernels& k, Float type, int64_t n, int64_t classes, bool kurtosis, bool backward,
               bool past_caches) {
  const std::vector<int64_t> y = labels_of<int64_t>(n, classes, -100);
  const Segments groups = group_by_class(y.data(), n, classes, -100);
  const int64_t present = static_cast<int64_t>(groups.segments.size());
  Array z(type, n * classes), dz(type, n * classes), g(accumulate(type), classes);
  z.fill(-2, 3);
  g.fill(0.5, 1.5);
  GccsArgs a{};
  a.dtype = type, a.features = z.data(), a.order = groups.order.data(), a.segments = groups.segments.data();
  a.present = present, a.classes = classes;
  a.target_mean = 2.5, a.target_std = 1.25, a.eps = 1e-2, a.kurtosis_weight = kurtosis ? 0.7 : 0;
  a.grad = dz.data(), a.grad_scale = 0.5, a.stream = past_caches;
  std::vector<double> partial(present * a.slabs());
  a.partial = backward ? nullptr : partial.data();
  if (backward) a.grad_output = g.data(), a.grad_output_step = 1;
  k.run(a, 0, present * a.slabs() / 2);
  k.run(a, present * a.slabs() / 2, present * a.slabs());

  const double s2 = a.target_std * a.target_std, w = a.kurtosis_weight / static_cast<double>(classes);
  const double eps = by_type(type, 1e-12, 2e-5, 2e-3, 2e-2), quantum = type == Float::kFloat16 ? 6e-8 : 0;
  for (int64_t i = 0; i < present; ++i) {
    const Segment& s = groups.segments[i];
    const double rows = static_cast<double>(s.end - s.begin), scale = 0.5 / rows * (backward ? g.get(s.label) : 1);
    double loss = 0, got = 0;
    for (int64_t c = 0; c < classes; ++c) {
      Sums m;
      const auto each = [&](auto f) {
        for (int64_t r = s.begin; r < s.end; ++r) f(z.get(groups.order[r] * classes + c));
      };
      each([&](double x) { m.mean += x / rows; });
      each([&](double x) {
        const double d = x - m.mean;
        m.v += d * d / rows, m.m3 += d * d * d / rows, m.m4 += d * d * d * d / rows;
      });
      const double t = m.mean - (c == s.label ? a.target_mean : 0), u = m.v + a.eps, kurt = m.m4 / (u * u);
      const bool several = rows > 1;
      loss += 0.5 * t * t / s2;
      if (several) loss += 0.5 * (std::log(s2 / u) - 1 + m.v / s2) + w * std::fabs(kurt - 3);
      const double sign = several ? w * (kurt > 3 ? 1 : -1) * 4 : 0;
      for (int64_t r = s.begin; r < s.end; ++r) {
        const int64_t at = groups.order[r] * classes + c;
        const double d = z.get(at) - m.mean;
        double want = t / s2;
        if (several) want += d * (1 / s2 - 1 / u) + sign * ((d * d * d - m.m3) / (u * u) - m.m4 * d / (u * u * u));
        // The third and fourth moments over u^2 and u^3, with u down to eps.
        const double size = 1 + std::fabs(t) + (several ? std::fabs(d) / u * (1 + std::fabs(sign) * 20 * kurt) : 0);
        check(std::fabs(dz.get(at) - want * scale) <= eps * size * scale + quantum, "gradient", dz.get(at),
              want * scale);
      }
    }
    for (int64_t slab = 0; slab < a.slabs(); ++slab) got += partial[i * a.slabs() + slab];
    if (!backward)
      check(std::fabs(got - loss) <= (type == Float::kFloat64 ? 1e-12 : 1e-5) * (1 + loss), "loss", got, loss);
  }
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < classes && y[r] < 0; ++c)
      check(std::isnan(dz.get(r * classes + c)), "row left out", dz.get(r * classes + c), 0);
}

}  // namespace

int main() {
  for (const int64_t n : {0, 1, 5, 100, 5000})
    for (const int64_t classes : {1, 2, 7, 2048, 2049, 1000000, 5000000})
      for (const int64_t ignore_index : {int64_t{-100}, int64_t{0}, classes, int64_t{1} << 40}) {
        groups_case<int64_t>(n, classes, ignore_index);
        groups_case<int32_t>(n, classes, ignore_index);
      }
  const GccsLossKernels k = DL_TABLE();
  struct Shape {
    int64_t n, classes;
  };
  const Shape shapes[] = {{1, 1}, {7, 1}, {5, 3}, {40, 16}, {90, 17}, {300, 5}, {30, 256}, {21, 300}, {13, 530}};
  for (const Float type : {Float::kFloat32, Float::kFloat16, Float::kBFloat16, Float::kFloat64})
    for (const Shape& s : shapes)
      for (const bool kurtosis : {false, true})
        for (const bool backward : {false, true}) loss_case(k, type, s.n, s.classes, kurtosis, backward, backward);
  return finish();
}
