// The SGDW loops on exactly sized heap arrays, under AddressSanitizer and UndefinedBehaviorSanitizer: every pair of
// types, with and without a momentum, Nesterov's or not, master copies, averages, stochastic rounding, ragged sizes,
// pieces and shards, compared with double-precision loops. Built and run by test_sanitized.py; "ok" means that all
// held.
#include "../../csrc/cpu/sgdw_kernel.h"

#include <cmath>

#include "optimizer_sanitized.h"

using namespace dlkernels;

namespace dlkernels {
SgdwKernels DL_TABLE();
}

namespace {

struct Options {
  bool momentum, nesterov, master, average, rounding;
};

// All arrays of one parameter.
struct State {
  Array param, grad, m, master, average;
  State(const Types& t, int64_t n, const Options& o)
      : param(t.param, n),
        grad(t.param, n),
        m(t.slot, o.momentum ? n : 0),
        master(accumulate(t.param), o.master ? n : 0),
        average(accumulate(t.param), o.average ? n : 0) {
    param.fill(-2, 2), grad.fill(-3, 3), m.fill(-1, 1), master.fill(-2, 2), average.fill(-2, 2);
    grad.set(n / 2, 0);
  }
  State(const State& s)
      : param(copy_of(s.param)),
        grad(copy_of(s.grad)),
        m(copy_of(s.m)),
        master(copy_of(s.master)),
        average(copy_of(s.average)) {}
  bool operator==(const State& s) const {
    return same_bytes(param, s.param) && same_bytes(grad, s.grad) && same_bytes(m, s.m) &&
           same_bytes(master, s.master) && same_bytes(average, s.average);
  }
  StepTensor tensor() const {
    StepTensor t{};
    t.param = param.data(), t.grad = grad.data(), t.slots[0] = m.n ? m.data() : nullptr;
    t.master = master.n ? master.data() : nullptr, t.average = average.n ? average.data() : nullptr;
    t.numel = static_cast<int64_t>(param.n), t.dtype = param.type, t.slot_dtype = m.type;
    t.index = (int64_t{1} << 31) + 3;
    return t;
  }
};

void sgdw_case(const SgdwKernels& k, const Types& types, int64_t n, const Options& o, const Shard& shard) {
  std::snprintf(where, sizeof where,
                "types %d %d n %d momentum %d nesterov %d master %d average %d rounding %d offset %lld",
                static_cast<int>(types.param), static_cast<int>(types.slot), static_cast<int>(n), o.momentum,
                o.nesterov, o.master, o.average, o.rounding, static_cast<long long>(shard.offset));
  const State before(types, n, o);
  State s = before, whole = before;
  StepTensor t = s.tensor(), one = whole.tensor();
  place(t, shard), place(one, shard);
  SgdwScalars c{};
  c.multiplier = -0.37, c.keep = 0.93, c.momentum = 0.8, c.gain = 0.3, c.rate = 0.7, c.nesterov = o.nesterov;
  c.average_decay = 0.75;
  c.rounding = {o.rounding, 0xfedcba9876543210ull, 5};
  in_pieces(n, [&](int64_t begin, int64_t end) { k.step(t, c, begin, end); });
  k.step(one, c, 0, n);
  check(s == whole, "one piece as several", 0, 1);
  check(same_bytes(s.grad, before.grad), "grad untouched", 0, 1);

  const bool round_slot = o.rounding && types.slot == Float::kBFloat16;
  const bool round_param = o.rounding && types.param == Float::kBFloat16 && !o.master;
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = [&](bool used, int stream) { return used ? random_bits(t, c.rounding, stream, i) : 0; };
    const double g = before.grad.get(i) * c.multiplier, old_m = o.momentum ? c.momentum * before.m.get(i) : 0;
    const double m = old_m + c.gain * g, m_size = std::fabs(old_m) + std::fabs(c.gain * g);
    if (o.momentum) check_stored(s.m, i, m, m_size, round_slot, bits(round_slot, 1), "m");
    const double d = o.nesterov ? g + c.momentum * m : m;
    const double d_size = o.nesterov ? std::fabs(g) + c.momentum * m_size : m_size;
    const double old = c.keep * (o.master ? before.master : before.param).get(i), theta = old - c.rate * d;
    const double size = std::fabs(old) + c.rate * d_size;
    check_stored(s.param, i, theta, size, round_param, bits(round_param, 0), "param");
    if (o.master) {
      check_stored(s.master, i, theta, size, false, 0, "master");
      check(s.param.get(i) == stored(types.param, s.master.get(i), false, 0), "param of master", s.param.get(i),
            s.master.get(i));
    }
    if (o.average) {
      const double now = (o.master ? s.master : s.param).get(i), mean = before.average.get(i);
      check_stored(s.average, i, mean + (1 - c.average_decay) * (now - mean), std::fabs(now) + std::fabs(mean), false,
                   0, "average");
    }
  }
}

// Infinities and NaN in the gradient stay where they are.
void odd_case(const SgdwKernels& k, const Types& types, bool nesterov, bool rounding) {
  const int64_t n = 37;
  State s(types, n, {true, nesterov, false, true, rounding});
  for (int64_t i = 0; i < n; ++i)
    if (i % 3 == 2) s.grad.set(i, INFINITY);
    else if (i % 3 == 0) set_nan(s.grad, i);
  StepTensor t = s.tensor();
  place(t, kShards[0]);
  const SgdwScalars c{1, 1, 0.9, 1, 0.1, nesterov, 0.9, {rounding, 1, 1}};
  k.step(t, c, 0, n);
  std::snprintf(where, sizeof where, "types %d %d nesterov %d rounding %d", static_cast<int>(types.param),
                static_cast<int>(types.slot), nesterov, rounding);
  for (int64_t i = 0; i < n; ++i)
    for (const Array* a : {&s.param, &s.m, &s.average}) {
      const double x = a->get(i), want = a == &s.m ? INFINITY : -INFINITY;
      if (i % 3 == 0) check_nan(*a, i, rounding);
      else check(i % 3 == 1 ? std::isfinite(x) : x == want, "infinite", x, i % 3 == 1 ? 0 : want);
    }
}

}  // namespace

int main() {
  const SgdwKernels k = DL_TABLE();
  check_philox();
  check_squares(k.squares);
  for (const Types& types : kTypes) {
    for (int flags = 0; flags < 32; ++flags) {
      const Options o{(flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0, (flags & 8) != 0, (flags & 16) != 0};
      for (const int64_t n : kSizes) {
        if (!o.rounding) sgdw_case(k, types, n, o, kShards[0]);
        else
          for (const Shard& shard : kShards) sgdw_case(k, types, n, o, shard);
      }
    }
    for (const bool nesterov : {false, true})
      for (const bool rounding : {false, true}) odd_case(k, types, nesterov, rounding);
  }
  return finish();
}
