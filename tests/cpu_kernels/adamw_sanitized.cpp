// The AdamW loops on exactly sized heap arrays, under AddressSanitizer and UndefinedBehaviorSanitizer: every pair of
// types, amsgrad, master copies, averages, stochastic rounding, ragged sizes, pieces and shards, compared with
// double-precision loops. Built and run by test_sanitized.py; "ok" means that all held.
#include "../../csrc/cpu/adamw_kernel.h"

#include <cmath>

#include "optimizer_sanitized.h"

using namespace dlkernels;

namespace dlkernels {
AdamWKernels DL_TABLE();
}

namespace {

struct Options {
  bool amsgrad, master, average, rounding;
};

// All arrays of one parameter.
struct State {
  Array param, grad, m, v, largest, master, average;
  State(const Types& t, int64_t n, const Options& o)
      : param(t.param, n),
        grad(t.param, n),
        m(t.slot, n),
        v(t.slot, n),
        largest(t.slot, o.amsgrad ? n : 0),
        master(accumulate(t.param), o.master ? n : 0),
        average(accumulate(t.param), o.average ? n : 0) {
    param.fill(-2, 2), grad.fill(-3, 3), m.fill(-1, 1), v.fill(0, 1);
    largest.fill(0, 1), master.fill(-2, 2), average.fill(-2, 2);
    grad.set(n / 2, 0);
    m.set(n / 3, 0), v.set(n / 3, 0);
  }
  State(const State& s)
      : param(copy_of(s.param)),
        grad(copy_of(s.grad)),
        m(copy_of(s.m)),
        v(copy_of(s.v)),
        largest(copy_of(s.largest)),
        master(copy_of(s.master)),
        average(copy_of(s.average)) {}
  bool operator==(const State& s) const {
    return same_bytes(param, s.param) && same_bytes(grad, s.grad) && same_bytes(m, s.m) && same_bytes(v, s.v) &&
           same_bytes(largest, s.largest) && same_bytes(master, s.master) && same_bytes(average, s.average);
  }
  StepTensor tensor() const {
    StepTensor t{};
    t.param = param.data(), t.grad = grad.data();
    t.slots[0] = m.data(), t.slots[1] = v.data(), t.slots[2] = largest.n ? largest.data() : nullptr;
    t.master = master.n ? master.data() : nullptr, t.average = average.n ? average.data() : nullptr;
    t.numel = static_cast<int64_t>(param.n), t.dtype = param.type, t.slot_dtype = m.type;
    t.index = 23;
    return t;
  }
};

void adamw_case(const AdamWKernels& k, const Types& types, int64_t n, const Options& o, const Shard& shard) {
  std::snprintf(where, sizeof where, "types %d %d n %d amsgrad %d master %d average %d rounding %d offset %lld",
                static_cast<int>(types.param), static_cast<int>(types.slot), static_cast<int>(n), o.amsgrad, o.master,
                o.average, o.rounding, static_cast<long long>(shard.offset));
  const State before(types, n, o);
  State s = before, whole = before;
  StepTensor t = s.tensor(), one = whole.tensor();
  place(t, shard), place(one, shard);
  AdamWScalars c{};
  c.multiplier = -0.37, c.keep = 0.93, c.step_size = 0.11, c.beta1 = 0.8, c.beta2 = 0.9, c.eps = 1e-3;
  c.inv_sqrt_correction2 = 1.7, c.average_decay = 0.75;
  c.rounding = {o.rounding, 0xfedcba9876543210ull, (int64_t{1} << 32) + 5};
  in_pieces(n, [&](int64_t begin, int64_t end) { k.step(t, c, begin, end); });
  k.step(one, c, 0, n);
  check(s == whole, "one piece as several", 0, 1);
  check(same_bytes(s.grad, before.grad), "grad untouched", 0, 1);

  const bool round_slots = o.rounding && types.slot == Float::kBFloat16;
  const bool round_param = o.rounding && types.param == Float::kBFloat16 && !o.master;
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = [&](bool used, int stream) { return used ? random_bits(t, c.rounding, stream, i) : 0; };
    const double g = before.grad.get(i) * c.multiplier;
    const double m = c.beta1 * before.m.get(i) + (1 - c.beta1) * g;
    const double v = c.beta2 * before.v.get(i) + (1 - c.beta2) * g * g;
    const double m_size = std::fabs(c.beta1 * before.m.get(i)) + std::fabs((1 - c.beta1) * g);
    check_stored(s.m, i, m, m_size, round_slots, bits(round_slots, 1), "m");
    check_stored(s.v, i, v, v, round_slots, bits(round_slots, 2), "v");
    double used = v;
    if (o.amsgrad) {
      used = std::fmax(before.largest.get(i), round_slots ? s.v.get(i) : v);
      check_stored(s.largest, i, used, used, false, 0, "largest");
    }
    const double slope = c.step_size / (std::sqrt(used) * c.inv_sqrt_correction2 + c.eps);
    const double theta = c.keep * (o.master ? before.master : before.param).get(i);
    const double size = std::fabs(theta) + slope * m_size;
    check_stored(s.param, i, theta - slope * m, size, round_param, bits(round_param, 0), "param");
    if (o.master) {
      check_stored(s.master, i, theta - slope * m, size, false, 0, "master");
      check(s.param.get(i) == stored(types.param, s.master.get(i), false, 0), "param of master", s.param.get(i),
            s.master.get(i));
    }
    if (o.average) {
      const double now = (o.master ? s.master : s.param).get(i), old = before.average.get(i);
      check_stored(s.average, i, old + (1 - c.average_decay) * (now - old), std::fabs(now) + std::fabs(old), false, 0,
                   "average");
    }
  }
}

// Not a number in the gradient: it must reach everything, the largest second moment too.
void nan_case(const AdamWKernels& k, const Types& types, bool rounding) {
  const int64_t n = 37;
  State s(types, n, {true, false, true, rounding});
  for (int64_t i = 0; i < n; i += 3) set_nan(s.grad, i);
  StepTensor t = s.tensor();
  place(t, kShards[0]);
  AdamWScalars c{1, 1, 0.1, 0.9, 0.99, 1e-8, 1, 0.9, {rounding, 1, 1}};
  k.step(t, c, 0, n);
  std::snprintf(where, sizeof where, "types %d %d rounding %d", static_cast<int>(types.param),
                static_cast<int>(types.slot), rounding);
  for (int64_t i = 0; i < n; ++i)
    for (const Array* a : {&s.param, &s.m, &s.v, &s.largest, &s.average}) {
      if (i % 3 == 0) check_nan(*a, i, rounding && a != &s.largest);
      else check(std::isfinite(a->get(i)), "finite", a->get(i), 0);
    }
}

}  // namespace

int main() {
  const AdamWKernels k = DL_TABLE();
  check_philox();
  check_squares(k.squares);
  for (const Types& types : kTypes) {
    for (int flags = 0; flags < 16; ++flags) {
      const Options o{(flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0, (flags & 8) != 0};
      for (const int64_t n : kSizes) {
        if (!o.rounding) adamw_case(k, types, n, o, kShards[0]);
        else
          for (const Shard& shard : kShards) adamw_case(k, types, n, o, shard);
      }
    }
    for (const bool rounding : {false, true}) nan_case(k, types, rounding);
  }
  return finish();
}
