// The center-loss loops on exactly sized heap arrays, under AddressSanitizer and UndefinedBehaviorSanitizer: rows in
// their own order and by class, left-out rows, classes of several pieces, every dtype and kind of attention, the
// island; compared with double-precision loops. Built and run by test_sanitized.py; "ok" means that all held.
#include <cmath>
#include <vector>

#include "../../csrc/cpu/center_loss_pieces.h"
#include "sanitized.h"

using namespace dlkernels;

namespace dlkernels {
CenterLossKernels DL_TABLE();
}

namespace {

enum Weigh { kNone, kAttention, kLogits };

struct Setting {
  Float type, centers;
  Weigh weigh;
  int64_t n, k, d;
  bool past_caches, one_class;
};

template <class I>
std::vector<I> draw_labels(const Setting& s) {
  std::vector<I> y(s.n);
  for (auto& v : y) v = static_cast<I>(s.one_class ? s.k - 1 : integer(-1, s.k - 1));
  if (s.n > 3) y[3] = static_cast<I>(77'000);  // the ignored one, beyond the classes
  return y;
}

template <class I>
void center_case(const CenterLossKernels& k, const Setting& s, CenterSums mode) {
  std::snprintf(where, sizeof(where), "type %d/%d weigh %d n %ld k %ld d %ld mode %d", static_cast<int>(s.type),
                static_cast<int>(s.centers), s.weigh, long(s.n), long(s.k), long(s.d), static_cast<int>(mode));
  const int64_t ignore = 77'000;
  const std::vector<I> y = draw_labels<I>(s);
  const Float acc = accumulate(s.type);
  const Place place = s.past_caches ? Place::kLine : Place::kHeap;
  const bool weighs = s.weigh != kNone, by_class = mode != CenterSums::kNone || s.one_class;
  Array x(s.type, s.n * s.d), c(s.centers, s.k * s.d), a(s.type, weighs ? s.n * s.d : 0), g(acc, s.n);
  Array dx(s.type, s.n * s.d, place), da(s.type, weighs ? s.n * s.d : 0, place), loss(acc, s.n);
  Array dc(s.centers, s.k * s.d), old(s.centers, s.k * s.d);
  x.fill(-2, 2), c.fill(-2, 2), a.fill(0, 1), g.fill(-1, 1);
  for (int64_t i = 0; i < s.k * s.d; ++i) old.set(i, c.get(i)), dc.set(i, 0);
  const CenterPieces grouped(group_by_class(y.data(), s.n, s.k, ignore), mode == CenterSums::kNone);
  Array sums(acc, grouped.slots * s.d);

  CenterLossArgs args{};
  args.dtype = s.type, args.center_dtype = s.centers, args.attention_dtype = s.type;
  args.features = x.data(), args.labels = y.data(), args.centers = c.data();
  args.attention = weighs ? a.data() : nullptr;
  args.narrow = sizeof(I) == 4, args.logits = s.weigh == kLogits;
  args.n = s.n, args.k = s.k, args.d = s.d, args.ignore_index = ignore;
  args.loss = loss.data(), args.dx = dx.data(), args.dattention = weighs ? da.data() : nullptr;
  args.grad_scale = 0.5, args.attention_scale = 0.25;
  args.grad_output = g.data(), args.grad_output_step = 1;
  args.stream = s.past_caches;
  args.mode = mode;
  args.order = grouped.by_class.order.data();
  args.pieces = grouped.pieces.data(), args.classes = grouped.classes.data();
  args.sums = sums.data(), args.dcenters = dc.data();
  args.alpha = 0.25, args.ema = s.d % 2 == 0;
  const int64_t scratch = kCenterScratch * s.d * (acc == Float::kFloat64 ? 8 : 4);
  if (by_class) {
    in_parts(static_cast<int64_t>(grouped.pieces.size()), scratch,
             [&](int64_t begin, int64_t end, void* p) { k.pieces(args, begin, end, p); });
    k.merge(args, 0, static_cast<int64_t>(grouped.classes.size()));
    k.left_out(args, 0, s.n);
  } else {
    in_parts((s.n + kBlockRows - 1) / kBlockRows, scratch, [&](int64_t begin, int64_t end, void* p) {
      check(k.blocks(args, begin, end, p), "attention is in range", 0, 1);
    });
  }

  std::vector<double> pulls(s.k * s.d), sizes(s.k * s.d), counts(s.k);
  for (int64_t i = 0; i < s.n; ++i) {
    const int64_t label = y[i];
    const bool counted = label >= 0 && label != ignore;
    if (counted) counts[label] += 1;
    double total = 0;
    for (int64_t j = 0; j < s.d; ++j) {
      const int64_t at = i * s.d + j, of = label * s.d + j;
      const double difference = counted ? x.get(at) - old.get(of) : 0, by = 0.5 * g.get(i);
      double weight = weighs ? a.get(at) : 1;
      if (s.weigh == kLogits) weight = 1 / (1 + std::exp(-weight));
      total += 0.5 * weight * difference * difference;
      close(dx, at, weight * difference * by, std::fabs(by) * 4, "dx");
      const double slope = s.weigh == kLogits ? weight * (1 - weight) : 1;
      if (weighs) close(da, at, 0.25 * difference * difference * by * slope, std::fabs(by) * 8, "dattention");
      if (!counted) continue;
      const double pull = weight * difference * (mode == CenterSums::kGradient ? g.get(i) : 1);
      pulls[of] += pull, sizes[of] += std::fabs(pull) + 4;
    }
    close(loss, i, total, static_cast<double>(s.d), "loss");
  }
  for (int64_t i = 0; i < s.k * s.d; ++i) {
    const double n = counts[i / s.d];
    if (mode == CenterSums::kGradient) close(dc, i, -pulls[i], sizes[i], "dcenters");
    const double step = n == 0 ? 0 : args.alpha * pulls[i] / (args.ema ? n : 1 + n);
    const bool moved = mode == CenterSums::kUpdate;
    close(c, i, old.get(i) + (moved ? step : 0), 4 + (n > 0 ? sizes[i] / n : 0), "centers");
  }
  for (size_t q = 0; mode == CenterSums::kNone && by_class && q < grouped.classes.size(); ++q)
    for (int64_t j = 0; j < s.d; ++j) {
      const int64_t of = grouped.classes[q].label * s.d + j;
      close(sums, grouped.classes[q].slot * s.d + j, pulls[of], sizes[of], "sums");
    }
}

// An attention out of range is found wherever it stands, but not where the row is left out.
void range_case(const CenterLossKernels& k, Float type, int64_t d) {
  const int64_t n = 9;
  std::vector<int64_t> y(n, 0);
  y[4] = -1;
  Array x(type, n * d), c(type, d), a(type, n * d);
  x.fill(0, 1), c.fill(0, 1), a.fill(0, 1);
  CenterLossArgs args{};
  args.dtype = args.center_dtype = args.attention_dtype = type;
  args.features = x.data(), args.labels = y.data(), args.centers = c.data(), args.attention = a.data();
  args.n = n, args.k = 1, args.d = d, args.ignore_index = -100, args.grad_scale = args.attention_scale = 1;
  for (const double bad : {-0.5, 1.5})
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < d; ++j) {
        const double before = a.get(i * d + j);
        a.set(i * d + j, bad);
        check(k.in_range(args, 0, n) == (i == 4), "in_range", static_cast<double>(i), static_cast<double>(j));
        a.set(i * d + j, before);
      }
}

void island_case(const CenterLossKernels& k, Float type, int64_t rows, int64_t d) {
  std::snprintf(where, sizeof(where), "island type %d k %ld d %ld", static_cast<int>(type), long(rows), long(d));
  const Float acc = accumulate(type);
  const int64_t blocks = (rows + kIslandBlock - 1) / kIslandBlock;
  Array c(type, rows * d), old(type, rows * d), inverse(acc, rows), partial(acc, blocks * d), total(acc, d);
  Array sums(acc, 2 * d), out(type, rows * d);
  c.fill(-2, 2), sums.fill(-1, 1);
  for (int64_t j = 0; j < d; ++j) c.set(rows / 2 * d + j, 0);
  for (int64_t i = 0; i < rows * d; ++i) old.set(i, c.get(i));
  IslandArgs args{};
  args.dtype = type, args.centers = c.data(), args.k = rows, args.d = d;
  args.inverse_norms = inverse.data(), args.partial = partial.data();
  k.island_sums(args, 0, blocks / 2), k.island_sums(args, blocks / 2, blocks);
  std::vector<double> norms(rows), s(d);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < d; ++j) norms[i] += old.get(i * d + j) * old.get(i * d + j);
    norms[i] = std::sqrt(norms[i]);
    close(inverse, i, norms[i] > 0 ? 1 / norms[i] : 0, 1, "inverse norm");
    for (int64_t j = 0; j < d && norms[i] > 0; ++j) s[j] += old.get(i * d + j) / norms[i];
  }
  for (int64_t j = 0; j < d; ++j) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += partial.get(b * d + j);
    total.set(j, sum);
    close(total, j, s[j], static_cast<double>(rows), "total");
  }
  args.total = total.data();
  const CenterClass classes[] = {{0, 0, 1, 3}, {rows - 1, 1, 1, 2}};
  for (const bool update : {false, true}) {
    args.out = update ? c.data() : out.data();
    args.scale = 0.75, args.alpha = 0.5;
    args.classes = classes, args.present = update && rows > 1 ? 2 : 0, args.sums = sums.data();
    k.island_apply(args, 0, rows / 3), k.island_apply(args, rows / 3, rows);
    for (int64_t i = 0; i < rows; ++i) {
      double dot = 0;
      for (int64_t j = 0; j < d && norms[i] > 0; ++j) dot += old.get(i * d + j) / norms[i] * s[j];
      for (int64_t j = 0; j < d; ++j) {
        const double v = old.get(i * d + j), n = norms[i] > 0 ? v / norms[i] : 0;
        double want = norms[i] > 0 ? 0.75 * (s[j] - dot * n) / norms[i] : 0;
        if (update) want += v;
        if (args.present && i == 0) want += 0.5 / 4 * sums.get(j);
        if (args.present && i == rows - 1) want += 0.5 / 3 * sums.get(d + j);
        const double size = norms[i] > 0 ? static_cast<double>(rows) / norms[i] : 1;
        close(update ? c : out, i * d + j, want, size + 4, update ? "moved" : "direction");
      }
    }
  }
}

}  // namespace

int main() {
  const CenterLossKernels k = DL_TABLE();
  for (const Float type : {Float::kFloat32, Float::kFloat16, Float::kBFloat16, Float::kFloat64})
    for (const Float centers : {type, type == Float::kFloat64 ? type : Float::kFloat32})
      for (const Weigh weigh : {kNone, kAttention, kLogits})
        for (const int64_t d : {1, 7, 16, 33, 128})
          for (const int64_t n : {1, 6, 70})
            for (const CenterSums mode : {CenterSums::kNone, CenterSums::kUpdate, CenterSums::kGradient}) {
              const Setting s{type, centers, weigh, n, 5, d, d == 128, false};
              center_case<int64_t>(k, s, mode);
              if (d == 33) center_case<int32_t>(k, s, mode);
            }
  for (const CenterSums mode : {CenterSums::kNone, CenterSums::kUpdate, CenterSums::kGradient})
    center_case<int64_t>(k, {Float::kFloat32, Float::kFloat32, kNone, 600, 3, 20, false, true}, mode);
  for (const Float type : {Float::kFloat32, Float::kBFloat16, Float::kFloat64}) {
    for (const int64_t d : {1, 16, 19}) range_case(k, type, d);
    for (const int64_t d : {1, 5, 16, 35})
      for (const int64_t rows : {1, 2, 7, 300}) island_case(k, type, rows, d);
  }
  return finish();
}
