// The squeeze-and-excitation loops on exactly sized heap arrays, under AddressSanitizer and
// UndefinedBehaviorSanitizer: ragged channels, hidden layers and positions, one or several samples at a time, every
// dtype, both layouts, every activation and gate, past the caches or not, compared with double-precision loops. Built
// and run by test_sanitized.py; "ok" means that all held.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../../csrc/cpu/squeeze_excite_kernel.h"
#include "sanitized.h"

using namespace dlkernels;

namespace dlkernels {
SqueezeExciteKernels DL_TABLE();
}

namespace {

struct Shape {
  int64_t n, c, s, r;
};

// Gates by the codes of dlkernels/reference/_activation.py: sigmoid, hard sigmoid, relu.
constexpr int kGates = 3;
double gate_of(int kind, double z) {
  if (kind == 1) return std::min(6.0, std::max(0.0, z + 3)) / 6;
  return kind == 2 ? std::max(0.0, z) : 1 / (1 + std::exp(-z));
}
double gate_slope_of(int kind, double z) {
  const double e = gate_of(kind, z);
  if (kind == 1) return std::fabs(z) < 3 ? 1.0 / 6 : 0;
  return kind == 2 ? (z > 0 ? 1 : 0) : e * (1 - e);
}
bool gate_at_kink(int kind, double z, double size, Float type) {
  if (kind == 1) return at_kink(1, z + 3, size + 3, type) || at_kink(1, z - 3, size + 3, type);
  return kind == 2 && at_kink(1, z, size, type);
}

// A value and what its terms add up to without their signs.
struct Sum {
  double value = 0, size = 0;
  void add(double x) { value += x, size += std::fabs(x); }
  void add(double factor, const Sum& x) { value += factor * x.value, size += std::fabs(factor) * x.size; }
};
using Sums = std::vector<Sum>;

void close(const Array& got, const Sums& want, const char* what) {
  for (size_t i = 0; i < got.n; ++i) close(got, i, want[i].value, want[i].size, what);
}

struct Layer {
  const Shape& shape;
  Float type;
  bool channels_last;
  int activation, gate, residual_activation;
  Array x, residual, w1, b1, w2, b2;  // of no elements where they are not given
  Sums mean, z1, hidden, z2, e, z;    // forward; hidden is activated
  Sums dz, dz2, dz1, dx;              // backward

  int64_t at(int64_t n, int64_t c, int64_t i) const {
    return channels_last ? (n * shape.s + i) * shape.c + c : (n * shape.c + c) * shape.s + i;
  }
  template <class F>
  void for_elements(F f) const {  // f(nc, index)
    for (int64_t n = 0; n < shape.n; ++n)
      for (int64_t c = 0; c < shape.c; ++c)
        for (int64_t i = 0; i < shape.s; ++i) f(n * shape.c + c, at(n, c, i));
  }
  // out[n][o] = sum_i w[o][i] v[n][i] + bias[o], or with the rows and columns of w exchanged.
  Sums product(const Array& w, const Sums& v, const Array& bias, int64_t outputs, int64_t inputs, bool transposed) {
    Sums out(shape.n * outputs);
    for (int64_t n = 0; n < shape.n; ++n)
      for (int64_t o = 0; o < outputs; ++o) {
        Sum& to = out[n * outputs + o];
        for (int64_t i = 0; i < inputs; ++i)
          to.add(w.get(transposed ? i * outputs + o : o * inputs + i), v[n * inputs + i]);
        if (bias.n) to.add(bias.get(o));
      }
    return out;
  }

  // False where rounding would decide on which side of a kink a value of the two layers lies.
  bool forward() {
    const int64_t inner = shape.r ? shape.r : shape.c;
    mean.assign(shape.n * shape.c, {});
    for_elements([&](int64_t nc, int64_t i) { mean[nc].add(x.get(i) / static_cast<double>(shape.s)); });
    bool clear = true;
    if (shape.r) {
      hidden = z1 = product(w1, mean, b1, shape.r, shape.c, false);
      for (Sum& h : hidden) {
        clear = clear && !at_kink(activation, h.value, h.size, type);
        h.value = activated(activation, h.value);
      }
    }
    e = z2 = product(w2, shape.r ? hidden : mean, b2, shape.c, inner, false);
    for (Sum& g : e) {
      clear = clear && !gate_at_kink(gate, g.value, g.size, type);
      g.value = gate_of(gate, g.value);
    }
    z.assign(x.n, {});
    for_elements([&](int64_t nc, int64_t i) {
      z[i].add(x.get(i), e[nc]);
      if (residual.n) z[i].add(residual.get(i));
    });
    return clear;
  }

  void backward(const Array& dy) {
    const Array none(type, 0);
    dz.assign(x.n, {}), dz2.assign(e.size(), {}), dx.assign(x.n, {});
    for_elements([&](int64_t nc, int64_t i) {
      const bool plain = residual_activation == 0;
      dz[i] = {dy.get(i) * activation_slope(residual_activation, z[i].value),
               std::fabs(dy.get(i)) * (plain ? 1 : 1 + z[i].size)};
      dz2[nc].add(x.get(i), dz[i]);
    });
    for (size_t i = 0; i < dz2.size(); ++i)
      dz2[i] = {dz2[i].value * gate_slope_of(gate, z2[i].value), dz2[i].size * (1 + z2[i].size)};
    Sums ds;
    if (shape.r) {
      dz1 = product(w2, dz2, none, shape.r, shape.c, true);
      for (size_t i = 0; i < dz1.size(); ++i)
        dz1[i] = {dz1[i].value * activation_slope(activation, z1[i].value), dz1[i].size * (1 + z1[i].size)};
      ds = product(w1, dz1, none, shape.c, shape.r, true);
    } else {
      ds = product(w2, dz2, none, shape.c, shape.c, true);
    }
    for_elements([&](int64_t nc, int64_t i) {
      const double s = static_cast<double>(shape.s);
      dx[i] = {dz[i].value * e[nc].value + ds[nc].value / s,
               dz[i].size * std::fabs(e[nc].value) + std::fabs(dz[i].value) * e[nc].size + ds[nc].size / s};
    });
  }
};

// sum_n u[n] v[n]^T, or sum_n u[n] without v, of [N, outputs] and [N, inputs].
void outer_case(const SqueezeExciteKernels& k, Float parameter_type, const Array& got_u, const Sums& u,
                const Array& got_v, const Sums& v, int64_t n, const char* what) {
  const int64_t outputs = static_cast<int64_t>(u.size()) / n, inputs = static_cast<int64_t>(v.size()) / n;
  const int64_t columns = inputs ? inputs : 1;
  Array out(parameter_type, outputs * columns);
  const OuterSum sum{got_u.data(), inputs ? got_v.data() : nullptr, n, outputs, inputs, out.data(), parameter_type};
  k.outer_sum(got_u.type, sum, 0, outputs / 3);
  k.outer_sum(got_u.type, sum, outputs / 3, outputs);
  Sums want(out.n);
  for (int64_t b = 0; b < n; ++b)
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t i = 0; i < columns; ++i) {
        const Sum &p = u[b * outputs + o], q = inputs ? v[b * inputs + i] : Sum{1, 1};
        Sum& to = want[o * columns + i];
        to.value += p.value * q.value;
        to.size += p.size * std::fabs(q.value) + std::fabs(p.value) * q.size;
      }
  close(out, want, what);
}

void excite_case(const SqueezeExciteKernels& k, Float type, const Shape& s, bool channels_last, int residual_activation,
                 bool residual) {
  // What is not looped over varies from case to case: activation and gate, biases, streaming, where arrays begin.
  const uint32_t bits = rng();
  const auto chosen = [&](int i) { return (bits >> i & 1) != 0; };
  const Place place = chosen(0) ? Place::kLine : Place::kBesideLine;
  const Float acc = accumulate(type), parameter_type = chosen(1) ? type : acc;
  const int64_t size = s.n * s.c * s.s, inner = s.r ? s.r : s.c;
  Layer l{s,
          type,
          channels_last,
          static_cast<int>((bits >> 8) % kActivations),
          static_cast<int>((bits >> 16) % kGates),
          residual_activation,
          Array(type, size, place),
          Array(type, residual ? size : 0, place),
          Array(acc, s.r * s.c),
          Array(acc, chosen(2) ? s.r : 0),
          Array(acc, s.c * inner),
          Array(acc, chosen(3) ? s.c : 0),
          {},
          {},
          {},
          {},
          {},
          {},
          {},
          {},
          {},
          {}};
  std::snprintf(where, sizeof where,
                "(N %ld C %ld S %ld R %ld, dtype %d, last %d, act %d, gate %d, then %d, residual %d, bits %x)",
                static_cast<long>(s.n), static_cast<long>(s.c), static_cast<long>(s.s), static_cast<long>(s.r),
                static_cast<int>(type), channels_last, l.activation, l.gate, residual_activation, residual,
                bits & 0xff);
  l.residual.fill(-2, 2);
  do {
    l.x.fill(-2, 4);
    l.w1.fill(-2 / std::sqrt(s.c), 2 / std::sqrt(s.c)), l.b1.fill(-1, 1);
    l.w2.fill(-3 / std::sqrt(inner), 3 / std::sqrt(inner)), l.b2.fill(-4, 4);
  } while (!l.forward());

  Array y(type, size, place), mean(acc, s.n * s.c), hidden(acc, s.n * s.r), gate(acc, s.n * s.c);
  const auto given = [](const Array& a) { return a.n ? a.data() : nullptr; };
  SqueezeExciteArgs a{};
  a.dtype = type, a.n = s.n, a.c = s.c, a.s = s.s, a.r = s.r;
  a.channels_last = channels_last;
  a.activation = l.activation, a.gate = l.gate, a.residual_activation = residual_activation;
  a.w1 = given(l.w1), a.b1 = given(l.b1), a.w2 = l.w2.data(), a.b2 = given(l.b2);
  a.x = l.x.data(), a.residual = given(l.residual);
  a.mean = mean.data(), a.hidden = hidden.data(), a.gate_value = gate.data(), a.y = y.data();
  a.stream = chosen(4);
  const int64_t per = k.samples_per_item(a);
  check(per >= 1 && per <= 8, "samples per item", static_cast<double>(per), 8);
  const auto run = [&](auto loop) {
    in_parts((s.n + per - 1) / per, k.scratch_bytes(a), [&](int64_t begin, int64_t end, void* scratch) {
      if (begin < end) loop(a, begin, end, scratch);
    });
  };
  run(k.forward);
  close(mean, l.mean, "mean");
  close(hidden, l.z1, "hidden");
  close(gate, l.e, "gate");
  for (int64_t i = 0; i < size; ++i) close(y, i, activated(residual_activation, l.z[i].value), l.z[i].size, "y");

  const bool writes_residual = residual && residual_activation != 0 && !(chosen(5) && chosen(6));
  Array dy(type, size, place), dx(type, size, place), dresidual(type, writes_residual ? size : 0, place);
  Array dz2(acc, s.n * s.c), dz1(acc, s.n * s.r), activated_hidden(acc, s.n * s.r);
  for (int64_t i = 0; i < size; ++i)
    dy.set(i, at_kink(residual_activation, l.z[i].value, l.z[i].size, type) ? 0 : uniform(-1, 2));
  a.y = nullptr;
  a.dy = dy.data(), a.dx = dx.data(), a.dresidual = given(dresidual);
  a.dz2 = dz2.data(), a.dz1 = dz1.data(), a.activated = activated_hidden.data();
  run(k.backward);
  l.backward(dy);
  close(dresidual, l.dz, "dresidual");
  close(dz2, l.dz2, "dz2");
  close(dz1, l.dz1, "dz1");
  close(activated_hidden, l.hidden, "activated");
  close(dx, l.dx, "dx");
  const Array none(acc, 0);
  if (s.r) {
    outer_case(k, parameter_type, dz1, l.dz1, mean, l.mean, s.n, "dw1");
    outer_case(k, parameter_type, dz1, l.dz1, none, {}, s.n, "db1");
  }
  outer_case(k, parameter_type, dz2, l.dz2, s.r ? activated_hidden : mean, s.r ? l.hidden : l.mean, s.n, "dw2");
  outer_case(k, parameter_type, dz2, l.dz2, none, {}, s.n, "db2");
}

}  // namespace

int main() {
  const SqueezeExciteKernels k = DL_TABLE();
  // The last of each row of samples: one layer.
  const Shape small[] = {{1, 1, 1, 1},   {1, 37, 1, 5},  {1, 64, 32, 16}, {1, 5, 7, 0},    //
                         {3, 3, 17, 1},  {3, 16, 16, 4}, {3, 33, 5, 17},  {3, 20, 1, 0},   //
                         {8, 4, 65, 2},  {8, 17, 3, 9},  {8, 32, 8, 33},  {8, 19, 2, 0},   //
                         {9, 6, 33, 3},  {9, 70, 2, 1},  {9, 31, 4, 8},   {9, 32, 32, 0},  //
                         {13, 2, 64, 1}, {13, 18, 9, 7}, {13, 64, 1, 20}, {13, 9, 31, 0}};
  // Beyond a chunk of positions, beyond blocks of rows; one, two and three samples at a time; long sums over samples.
  const Shape large[] = {{2, 2, 4099, 1}, {1, 3, 8256, 0},  {2, 5, 1100, 2}, {3, 64, 1088, 4},
                         {3, 64, 512, 4}, {13, 35, 625, 3}, {300, 3, 2, 2},  {600, 5, 1, 0}};
  for (const Float type : {Float::kFloat32, Float::kFloat16, Float::kBFloat16, Float::kFloat64})
    for (const bool channels_last : {false, true})
      for (int activation = 0; activation < kActivations; ++activation)
        for (const bool residual : {false, true})
          for (const Shape& s : small) excite_case(k, type, s, channels_last, activation, residual);
  for (const Float type : {Float::kFloat32, Float::kFloat16, Float::kBFloat16, Float::kFloat64})
    for (const bool channels_last : {false, true})
      for (const Shape& s : large) {
        excite_case(k, type, s, channels_last, 0, false);
        excite_case(k, type, s, channels_last, 1, true);
      }
  return finish();
}
