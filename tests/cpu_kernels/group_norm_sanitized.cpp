// The GroupNorm loops on exactly sized heap arrays, under AddressSanitizer and UndefinedBehaviorSanitizer: ragged
// channels, groups and positions, every dtype, both layouts, every activation, with and without each parameter, past
// the caches or not, compared with double-precision loops. Built and run by test_sanitized.py; "ok" means that all
// held.
#include <cmath>
#include <vector>

#include "../../csrc/cpu/group_norm_kernel.h"
#include "sanitized.h"

using namespace dlkernels;

namespace dlkernels {
GroupNormKernels DL_TABLE();
}

namespace {

struct Shape {
  int64_t n, c, s, groups;
};

// Group norm as the formulas have it. A `size` is what the terms of a value add up to without their signs.
struct Expected {
  std::vector<double> hat, z, size_hat, size_z;  // like x, in the order of its memory
  std::vector<double> a, b;                      // [N, C]
  std::vector<double> mean, rstd, size_mean;     // [N, G]
  std::vector<double> da, db, size_da, size_db;  // [N, C]
};

struct Layer {
  const Shape& shape;
  Float type;
  bool channels_last;
  int activation;
  double eps;
  Array x, residual, weight, bias, scale, shift;  // of no elements where they are not given
  Expected e;

  int64_t d() const { return shape.c / shape.groups; }
  int64_t at(int64_t n, int64_t c, int64_t i) const {
    return channels_last ? (n * shape.s + i) * shape.c + c : (n * shape.c + c) * shape.s + i;
  }
  // f(n, c, nc, ng, index) for every element.
  template <class F>
  void for_elements(F f) const {
    for (int64_t n = 0; n < shape.n; ++n)
      for (int64_t c = 0; c < shape.c; ++c)
        for (int64_t i = 0; i < shape.s; ++i) f(n, c, n * shape.c + c, n * shape.groups + c / d(), at(n, c, i));
  }

  void forward() {
    const double count = static_cast<double>(d() * shape.s);
    e.hat.resize(x.n), e.z.resize(x.n), e.size_hat.resize(x.n), e.size_z.resize(x.n);
    e.mean.resize(shape.n * shape.groups), e.rstd = e.size_mean = e.mean;
    e.a.resize(shape.n * shape.c), e.b = e.a;
    for_elements([&](int64_t, int64_t, int64_t, int64_t ng, int64_t i) {
      e.mean[ng] += x.get(i) / count, e.size_mean[ng] += std::fabs(x.get(i)) / count;
    });
    for_elements([&](int64_t, int64_t, int64_t, int64_t ng, int64_t i) {
      e.rstd[ng] += (x.get(i) - e.mean[ng]) * (x.get(i) - e.mean[ng]) / count;
    });
    for (double& v : e.rstd) v = 1 / std::sqrt(v + eps);
    for_elements([&](int64_t, int64_t c, int64_t nc, int64_t ng, int64_t i) {
      const double factor = 1 + (scale.n ? scale.get(nc) : 0);
      const double a = e.a[nc] = (weight.n ? weight.get(c) : 1) * factor;
      const double b = e.b[nc] = (bias.n ? bias.get(c) : 0) * factor + (shift.n ? shift.get(nc) : 0);
      const double r = residual.n ? residual.get(i) : 0;
      e.hat[i] = (x.get(i) - e.mean[ng]) * e.rstd[ng];
      e.z[i] = e.hat[i] * a + b + r;
      e.size_hat[i] = (std::fabs(x.get(i)) + e.size_mean[ng]) * e.rstd[ng];
      e.size_z[i] = e.size_hat[i] * std::fabs(a) + std::fabs(b) + std::fabs(r);
    });
  }
};

void check_forward(const Layer& l, const Array& y, const Array& mean, const Array& rstd) {
  for (size_t i = 0; i < mean.n; ++i) {
    close(mean, i, l.e.mean[i], l.e.size_mean[i], "mean");
    close(rstd, i, l.e.rstd[i], 0, "rstd");
  }
  for (size_t i = 0; i < y.n; ++i) close(y, i, activated(l.activation, l.e.z[i]), l.e.size_z[i], "y");
}

void check_backward(Layer& l, const Array& dy, const Array& dx, const Array& dresidual, const Array& da,
                    const Array& db) {
  Expected& e = l.e;
  std::vector<double> dz(dy.n), size_dz(dy.n);
  std::vector<double> group_da(e.mean.size()), group_db = group_da, group_size_da = group_da, group_size_db = group_da;
  e.da.assign(da.n, 0), e.db = e.size_da = e.size_db = e.da;
  l.for_elements([&](int64_t, int64_t, int64_t nc, int64_t ng, int64_t i) {
    dz[i] = dy.get(i) * activation_slope(l.activation, e.z[i]);
    size_dz[i] = std::fabs(dy.get(i)) * (l.activation == 0 ? 1 : 1 + e.size_z[i]);
    e.da[nc] += dz[i] * e.hat[i], e.size_da[nc] += size_dz[i] * e.size_hat[i];
    e.db[nc] += dz[i], e.size_db[nc] += size_dz[i];
    group_da[ng] += e.a[nc] * dz[i] * e.hat[i], group_size_da[ng] += std::fabs(e.a[nc]) * size_dz[i] * e.size_hat[i];
    group_db[ng] += e.a[nc] * dz[i], group_size_db[ng] += std::fabs(e.a[nc]) * size_dz[i];
  });
  for (size_t i = 0; i < da.n; ++i) {
    close(da, i, e.da[i], e.size_da[i], "da");
    close(db, i, e.db[i], e.size_db[i], "db");
  }
  const double count = static_cast<double>(l.d() * l.shape.s);
  l.for_elements([&](int64_t, int64_t, int64_t nc, int64_t ng, int64_t i) {
    const double want = e.a[nc] * dz[i] - (group_db[ng] + e.hat[i] * group_da[ng]) / count;
    const double size =
        std::fabs(e.a[nc]) * size_dz[i] + (group_size_db[ng] + e.size_hat[i] * group_size_da[ng]) / count;
    close(dx, i, e.rstd[ng] * want, e.rstd[ng] * size, "dx");
    if (dresidual.n) close(dresidual, i, dz[i], size_dz[i], "dresidual");
  });
}

void check_parameter_grads(const GroupNormKernels& k, const GroupNormArgs& args, const Layer& l) {
  const Shape& s = l.shape;
  Array dw(l.weight.type, l.weight.n), dbias(l.bias.type, l.bias.n), dscale(l.scale.type, l.scale.n),
      dshift(l.shift.type, l.shift.n);
  const auto written = [](const Array& a) { return a.n ? a.data() : nullptr; };
  const GroupNormParameterGrads to{written(dw), written(dbias), written(dscale), written(dshift)};
  k.parameter_grads(args, to, 0, s.c / 3);
  k.parameter_grads(args, to, s.c / 3, s.c);
  const Expected& e = l.e;
  for (int64_t c = 0; c < s.c; ++c) {
    double w = 0, b = 0, size_w = 0, size_b = 0;
    const double weight = l.weight.n ? l.weight.get(c) : 1, bias = l.bias.n ? l.bias.get(c) : 0;
    for (int64_t n = 0; n < s.n; ++n) {
      const int64_t nc = n * s.c + c;
      const double factor = 1 + (l.scale.n ? l.scale.get(nc) : 0);
      w += factor * e.da[nc], size_w += std::fabs(factor) * e.size_da[nc];
      b += factor * e.db[nc], size_b += std::fabs(factor) * e.size_db[nc];
      const double size = std::fabs(weight) * e.size_da[nc] + std::fabs(bias) * e.size_db[nc];
      if (dscale.n) close(dscale, nc, weight * e.da[nc] + bias * e.db[nc], size, "dscale");
      if (dshift.n) close(dshift, nc, e.db[nc], e.size_db[nc], "dshift");
    }
    if (dw.n) close(dw, c, w, size_w, "dweight");
    if (dbias.n) close(dbias, c, b, size_b, "dbias");
  }
}

void norm_case(const GroupNormKernels& k, Float type, const Shape& s, bool channels_last, int activation,
               bool residual) {
  // What is not looped over varies from case to case: the parameters, streaming, where arrays begin, the threads.
  const uint32_t bits = rng();
  const auto chosen = [&](int i) { return (bits >> i & 1) != 0; };
  const Place place = chosen(0) ? Place::kLine : Place::kBesideLine;
  const Float parameter_type = chosen(1) ? type : accumulate(type), acc = accumulate(type);
  const auto parameter = [&](int i, int64_t count) { return Array(parameter_type, chosen(i) ? count : 0); };
  const int64_t size = s.n * s.c * s.s, wanted[] = {1, 2, 5, 32};
  std::snprintf(where, sizeof where, "(N %ld C %ld S %ld G %ld, dtype %d, last %d, act %d, residual %d, bits %x)",
                static_cast<long>(s.n), static_cast<long>(s.c), static_cast<long>(s.s), static_cast<long>(s.groups),
                static_cast<int>(type), channels_last, activation, residual, bits & 0x3ff);
  Layer l{s,
          type,
          channels_last,
          activation,
          1e-3,
          Array(type, size, place),
          Array(type, residual ? size : 0, place),
          parameter(2, s.c),
          parameter(3, s.c),
          parameter(4, s.n * s.c),
          parameter(5, s.n * s.c),
          {}};
  l.x.fill(-2, 4);
  l.residual.fill(-2, 2);
  l.weight.fill(-1, 2), l.bias.fill(-1, 1), l.scale.fill(-0.5, 1), l.shift.fill(-1, 1);
  Array y(type, size, place), mean(acc, s.n * s.groups), rstd(acc, s.n * s.groups);
  const auto given = [](const Array& a) { return a.n ? a.data() : nullptr; };
  GroupNormArgs a{};
  a.dtype = type, a.n = s.n, a.c = s.c, a.s = s.s, a.groups = s.groups;
  a.channels_last = channels_last, a.eps = l.eps, a.activation = activation;
  a.weight = {given(l.weight), parameter_type}, a.bias = {given(l.bias), parameter_type};
  a.scale = {given(l.scale), parameter_type}, a.shift = {given(l.shift), parameter_type};
  a.x = l.x.data(), a.residual = given(l.residual);
  a.mean = mean.data(), a.rstd = rstd.data(), a.y = y.data();
  a.stream = chosen(6), a.wanted_items = wanted[bits >> 7 & 3];
  const auto run = [&](auto loop) {
    in_parts(k.items(a), k.scratch_bytes(a), [&](int64_t begin, int64_t end, void* scratch) {
      if (begin < end) loop(a, begin, end, scratch);
    });
  };
  run(k.forward);
  l.forward();
  check_forward(l, y, mean, rstd);

  const bool writes_residual = residual && activation != 0 && !(chosen(9) && chosen(1));
  Array dy(type, size, place), dx(type, size, place), dresidual(type, writes_residual ? size : 0, place);
  Array da(acc, s.n * s.c), db(acc, s.n * s.c);
  for (int64_t i = 0; i < size; ++i) dy.set(i, at_kink(activation, l.e.z[i], l.e.size_z[i], type) ? 0 : uniform(-1, 2));
  a.y = nullptr;
  a.dy = dy.data(), a.dx = dx.data(), a.dresidual = given(dresidual), a.da = da.data(), a.db = db.data();
  run(k.backward);
  check_backward(l, dy, dx, dresidual, da, db);
  check_parameter_grads(k, a, l);
}

}  // namespace

int main() {
  const GroupNormKernels k = DL_TABLE();
  const Shape small[] = {{1, 1, 1, 1},   {2, 3, 1, 3},   {3, 6, 1, 2},   {2, 4, 7, 2},    {2, 5, 16, 5},
                         {3, 12, 33, 3}, {1, 10, 65, 1}, {2, 15, 64, 3}, {2, 64, 9, 4},   {1, 130, 5, 13},
                         {2, 96, 20, 3}, {2, 32, 64, 8}, {3, 40, 31, 5}, {1, 128, 32, 2}, {2, 160, 6, 10}};
  // Beyond a chunk of positions or of rows, and more channels than a chunk has rows for.
  const Shape large[] = {{1, 2, 4099, 1}, {1, 4, 4160, 2}, {2, 8, 1100, 2}, {1, 1100, 37, 4}, {1, 2080, 19, 130}};
  for (const Float type : {Float::kFloat32, Float::kFloat16, Float::kBFloat16, Float::kFloat64}) {
    for (const bool channels_last : {false, true})
      for (const bool residual : {false, true}) {
        for (int activation = 0; activation < kActivations; ++activation)
          for (const Shape& s : small)
            for (int i = 0; i < 2; ++i) norm_case(k, type, s, channels_last, activation, residual);
        for (const int activation : {0, 1, 3})
          for (const Shape& s : large) norm_case(k, type, s, channels_last, activation, residual);
      }
    // dz in scratch to its last value, beyond what scratch takes, and beyond what is kept in dx.
    const bool half = type == Float::kFloat16 || type == Float::kBFloat16;
    if (half) norm_case(k, type, {1, 2, 65536, 1}, false, 1, true);
    if (half) norm_case(k, type, {1, 64, 4096, 2}, true, 1, true);
    if (half) norm_case(k, type, {1, 2, 66000, 1}, false, 1, true);
    if (half) norm_case(k, type, {1, 16, 8193, 1}, true, 1, true);
    if (type == Float::kFloat32) norm_case(k, type, {1, 2, 1048583, 1}, false, 1, false);
    if (type == Float::kFloat32) norm_case(k, type, {1, 32, 65537, 1}, true, 1, false);
  }
  return finish();
}
