// The region-biased-loss loops on exactly sized heap arrays, under AddressSanitizer and UndefinedBehaviorSanitizer:
// ragged sizes, every dtype, with and without a softmax and a mask, compared with double-precision loops. What is
// masked is NaN and must not show. Built and run by test_sanitized.py; "ok" means that all held.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../../csrc/cpu/region_biased_loss_kernel.h"
#include "sanitized.h"

using namespace dlkernels;

namespace dlkernels {
RegionBiasedLossKernels DL_TABLE();
}

namespace {

struct Row {
  double loss = 0, gap = 0;
  std::vector<double> grad;
};

// One row by the formula; `part` says who takes part.
Row by_hand(const std::vector<double>& z, const std::vector<bool>& part, size_t origin, double margin, bool softmax) {
  Row row;
  row.grad.assign(z.size(), 0.0);
  double highest = -INFINITY, total = 0;
  for (size_t r = 0; r < z.size(); ++r)
    if (part[r]) highest = std::max(highest, z[r]);
  std::vector<double> mu(z.size(), 0.0);
  for (size_t r = 0; r < z.size(); ++r)
    if (part[r]) total += mu[r] = std::exp(z[r] - highest);
  for (size_t r = 0; r < z.size(); ++r) mu[r] = softmax ? mu[r] / total : part[r] ? z[r] : 0;
  size_t best = z.size();
  for (size_t r = 0; r < z.size(); ++r)
    if (r != origin && part[r] && (best == z.size() || z[r] > z[best])) best = r;
  if (best == z.size()) return row;
  row.gap = mu[best] - mu[origin];
  row.loss = std::max(0.0, margin - row.gap);
  for (size_t r = 0; r < z.size() && row.loss > 0; ++r) {
    const double in_mu = (r == origin) - static_cast<double>(r == best);
    row.grad[r] = softmax ? mu[r] * (in_mu + row.gap) : in_mu;
  }
  return row;
}

void loss_case(const RegionBiasedLossKernels& k, Float type, int64_t rows, int64_t regions, bool softmax, bool masked,
               bool with_grad, bool each) {
  std::snprintf(where, sizeof(where), "(type %d, %lld x %lld, softmax %d, mask %d)", static_cast<int>(type),
                static_cast<long long>(rows), static_cast<long long>(regions), softmax, masked);
  const Float acc = accumulate(type);
  Array x(type, rows * regions), loss(acc, rows), grad(type, with_grad ? rows * regions : 0), g(acc, each ? rows : 1);
  std::unique_ptr<uint8_t[]> mask(new uint8_t[rows * regions]);
  const int64_t origin = integer(0, regions - 1);
  x.fill(-1, 1), g.fill(0.5, 2);
  for (int64_t i = 0; i < rows * regions; ++i) {
    mask[i] = i / regions % 7 != 6 && uniform(0, 1) < 0.7;
    if (masked && !mask[i] && i % regions != origin) x.set(i, NAN);
  }
  RegionBiasedArgs a{};
  a.dtype = type, a.attention = x.data(), a.mask = masked ? mask.get() : nullptr;
  a.rows = rows, a.regions = regions, a.origin = origin, a.margin = 0.3, a.softmax = softmax;
  a.loss = loss.data(), a.grad = with_grad ? grad.data() : nullptr;
  a.grad_output = g.data(), a.grad_output_step = each, a.grad_scale = 0.5;
  in_parts(k.tiles(a), k.scratch_bytes(a), [&](int64_t b, int64_t e, void* scratch) { k.run(a, b, e, scratch); });
  for (int64_t n = 0; n < rows; ++n) {
    std::vector<double> z;
    std::vector<bool> part;
    for (int64_t r = 0; r < regions; ++r) {
      part.push_back(!masked || r == origin || mask[n * regions + r]);
      z.push_back(part.back() ? x.get(n * regions + r) : 0);
    }
    const Row want = by_hand(z, part, static_cast<size_t>(origin), a.margin, softmax);
    close(loss, n, want.loss, 2, "loss");
    if (!with_grad || std::fabs(a.margin - want.gap) < 1e-5) continue;  // rounding decides on the side of the kink
    for (int64_t r = 0; r < regions; ++r)
      close(grad, n * regions + r, want.grad[r] * 0.5 * g.get(each ? n : 0), 2, "gradient");
  }
}

}  // namespace

int main() {
  const RegionBiasedLossKernels k = DL_TABLE();
  for (const Float type : {Float::kFloat32, Float::kFloat16, Float::kBFloat16, Float::kFloat64})
    for (const bool softmax : {false, true})
      for (const bool masked : {false, true})
        for (const int64_t regions : {1, 2, 6, 15, 16, 17, 33, 140})
          for (const int64_t rows : {1, 7, 15, 16, 17, 50})
            for (const bool with_grad : {true, false})
              loss_case(k, type, rows, regions, softmax, masked, with_grad, rows % 2 == 1);
  return finish();
}
