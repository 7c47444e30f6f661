// Squeeze-and-excitation on CUDA tensors: outputs, regimes and registration. Kernels are in squeeze_excite_*_kernel.cu.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <tuple>

#include "../common/cuda_call.h"
#include "../common/cuda_dtype.h"
#include "../common/layer.h"
#include "squeeze_excite_plan.h"

namespace dlkernels {
namespace {

using Regime = SqueezeExcitePlan::Regime;

// Products of matrices inside of an operator: no history, no autocast.
struct PlainProducts {
  at::AutoDispatchBelowADInplaceOrView no_history;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

struct Tensors {
  at::Tensor x, w1, b1, w2, b2, residual;

  Tensors(const at::Tensor& input, const Optional& w1_, const Optional& b1_, const at::Tensor& w2_, const Optional& b2_,
          const Optional& residual_)
      : x(input.contiguous()),
        w1(contiguous(w1_)),
        b1(contiguous(b1_)),
        w2(w2_.contiguous()),
        b2(contiguous(b2_)),
        residual(contiguous(residual_)) {}
};

SqueezeExciteWeight weight(const at::Tensor& w) {
  return {data_or_null(w), w.defined() && w.scalar_type() == at::kFloat};
}

SqueezeExciteArgs arguments(const Tensors& t, const Rows& rows, int64_t activation, int64_t gate,
                            int64_t residual_activation) {
  SqueezeExciteArgs a{};
  a.dtype = float_kind("x", t.x);
  a.n = rows.n, a.s = rows.s, a.c = static_cast<int>(rows.c);
  a.r = t.w1.defined() ? static_cast<int>(t.w1.size(0)) : 0;
  a.last = rows.channels_last || rows.s == 1;  // one position: the same memory, and channels fill the packs
  a.activation = static_cast<int>(activation), a.gate = static_cast<int>(gate);
  a.residual_activation = t.residual.defined() ? static_cast<int>(residual_activation) : 0;
  a.w1 = weight(t.w1), a.b1 = weight(t.b1), a.w2 = weight(t.w2), a.b2 = weight(t.b2);
  a.x = t.x.const_data_ptr();
  a.residual = data_or_null(t.residual);
  a.samples = a.n;
  return a;
}

SqueezeExciteProblem problem(const SqueezeExciteArgs& a, int64_t tensors) {
  return {a.n,
          a.c,
          a.s,
          a.r,
          size_of(a.dtype),
          a.last,
          aligned(a.x, a.residual, a.y, a.dy, a.dx, a.dresidual, a.gate_value),
          tensors};
}

// A weight as a matrix of float32.
at::Tensor matrix(const at::Tensor& w) { return w.reshape({w.size(0), -1}).to(at::kFloat); }

// out = x w^T (+ b), in float32.
void linear(const at::Tensor& x, const at::Tensor& w, const at::Tensor& b, at::Tensor out) {
  if (b.defined()) at::addmm_out(out, b.to(at::kFloat), x, matrix(w).t());
  else at::mm_out(out, x, matrix(w).t());
}

void point(const Queue& queue, SqueezeExcitePoint kind, int code, const at::Tensor& a, const at::Tensor& b,
           const at::Tensor& out) {
  if (a.numel() == 0) return;
  launch_squeeze_excite_point(queue, kind, code, a.const_data_ptr<float>(),
                              b.defined() ? b.const_data_ptr<float>() : nullptr, out.mutable_data_ptr<float>(),
                              a.numel());
}

// The sums and the scale, batch by batch, or with layers() between them.
template <class Sums, class Layers, class Scale>
void sweep(const Queue& queue, SqueezeExciteArgs& a, const at::TensorOptions& options, Sums sums, Layers layers,
           Scale scale) {
  at::Tensor partial;
  Counters counters;
  if (a.plan.regime == Regime::kWalk || a.plan.chunks > 1) {
    partial = at::empty({a.plan.batch, a.plan.chunks, a.c}, options);
    counters = zeroed_counters(queue, a.plan.batch);
    a.partial = partial.mutable_data_ptr<float>(), a.counters = counters.data;
  }
  for (a.first_n = 0; a.first_n < a.n; a.first_n += a.samples) {
    a.samples = std::min(a.plan.batch, a.n - a.first_n);
    sums(queue, a);
    if (a.plan.regime == Regime::kMatmul) layers();
    scale(queue, a);
  }
}

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Forward squeeze_excite_fwd(const at::Tensor& input, const Optional& w1, const Optional& b1, const at::Tensor& w2,
                           const Optional& b2, const Optional& residual, int64_t activation, int64_t gate,
                           int64_t residual_activation, bool channels_last) {
  if (!served(input))
    return find_in_triton<decltype(squeeze_excite_fwd)>("squeeze_excite_fwd")
        .call(input, w1, b1, w2, b2, residual, activation, gate, residual_activation, channels_last);
  const CudaCall call("squeeze_excite_fwd", input);
  const Tensors t(input, w1, b1, w2, b2, residual);
  SqueezeExciteArgs a = arguments(t, rows_of(t.x, channels_last), activation, gate, residual_activation);
  const auto options = t.x.options().dtype(at::kFloat);
  const at::Tensor y = at::empty_like(t.x), mean = at::empty({a.n, a.c}, options),
                   hidden = at::empty({a.n, a.r}, options), e = at::empty({a.n, a.c}, options);
  const Forward out{y, mean, hidden, e};
  if (t.x.numel() == 0) return out;
  a.y = y.mutable_data_ptr();
  a.mean = a.pooled = mean.mutable_data_ptr<float>();
  a.hidden = hidden.mutable_data_ptr<float>();
  a.gate_value = e.mutable_data_ptr<float>();
  const SqueezeExciteProblem p = problem(a, 1);
  const Machine& machine = *call.queue.machine;
  a.plan = squeeze_excite_plan(p, machine);
  if (a.plan.regime == Regime::kCluster) {
    if (launch_squeeze_excite_cluster(call.queue, a)) return out;
    a.plan = squeeze_excite_sweeps(p, machine, true);
  }
  sweep(
      call.queue, a, options, launch_squeeze_excite_sums,
      [&] {
        const PlainProducts plain;
        at::Tensor v = mean;
        if (t.w1.defined()) {
          linear(mean, t.w1, t.b1, hidden);
          v = at::empty_like(hidden);
          point(call.queue, SqueezeExcitePoint::kActivate, a.activation, hidden, {}, v);
        }
        linear(v, t.w2, t.b2, e);
        point(call.queue, SqueezeExcitePoint::kGate, a.gate, e, {}, e);
      },
      launch_squeeze_excite_scale);
  return out;
}

// sum_n u[n] v[n]^T, like the weight.
at::Tensor weight_gradient(const at::Tensor& u, const at::Tensor& v, const at::Tensor& w) {
  return at::mm(u.t(), v).to(w.scalar_type()).reshape(w.sizes());
}
at::Tensor bias_gradient(const at::Tensor& u, const at::Tensor& b) { return u.sum(0).to(b.scalar_type()); }

using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Backward squeeze_excite_bwd(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& saved_mean,
                            const at::Tensor& saved_hidden, const at::Tensor& gate_value, const Optional& w1,
                            const Optional& b1, const at::Tensor& w2, const Optional& b2, const Optional& residual,
                            int64_t activation, int64_t gate, int64_t residual_activation, bool channels_last) {
  if (!served(input))
    return find_in_triton<decltype(squeeze_excite_bwd)>("squeeze_excite_bwd")
        .call(grad_output, input, saved_mean, saved_hidden, gate_value, w1, b1, w2, b2, residual, activation, gate,
              residual_activation, channels_last);
  const CudaCall call("squeeze_excite_bwd", input);
  const PlainProducts plain;
  const Tensors t(input, w1, b1, w2, b2, residual);
  const at::Tensor dy = grad_output.contiguous(), mean = saved_mean.contiguous(), hidden = saved_hidden.contiguous(),
                   e = gate_value.contiguous();
  SqueezeExciteArgs a = arguments(t, rows_of(t.x, channels_last), activation, gate, residual_activation);
  const at::Tensor dx = at::empty_like(t.x);
  at::Tensor dresidual;
  if (a.residual_activation != 0) dresidual = at::empty_like(t.x);
  else if (t.residual.defined()) dresidual = grad_output.clone(at::MemoryFormat::Contiguous);
  const auto zeros = [](const at::Tensor& w) { return w.defined() ? at::zeros_like(w) : at::Tensor(); };
  if (t.x.numel() == 0)
    return {dx,          given(zeros(t.w1), t.x), given(zeros(t.b1), t.x),
            zeros(t.w2), given(zeros(t.b2), t.x), given(dresidual, t.x)};
  const at::Tensor dz2 = at::empty_like(e), dz1 = at::empty_like(hidden), activated = at::empty_like(hidden);
  at::Tensor ds;
  a.gate_value = const_cast<float*>(e.const_data_ptr<float>());
  a.hidden = const_cast<float*>(hidden.const_data_ptr<float>());
  a.dy = dy.const_data_ptr();
  a.dx = dx.mutable_data_ptr();
  a.dresidual = a.residual_activation != 0 ? written(dresidual) : nullptr;
  a.dz2 = dz2.mutable_data_ptr<float>(), a.dz1 = dz1.mutable_data_ptr<float>();
  a.activated = activated.mutable_data_ptr<float>();
  const SqueezeExciteProblem p = problem(a, a.dresidual != nullptr ? 3 : 2);
  const Machine& machine = *call.queue.machine;
  a.plan = squeeze_excite_plan(p, machine);
  if (a.plan.regime == Regime::kCluster && !launch_squeeze_excite_cluster_grad(call.queue, a))
    a.plan = squeeze_excite_sweeps(p, machine, true);
  if (a.plan.regime != Regime::kCluster) {
    ds = at::empty_like(e);
    a.ds = a.pooled = ds.mutable_data_ptr<float>();  // the gate's gradient goes where the mean's will be
    sweep(
        call.queue, a, e.options(), launch_squeeze_excite_sums_grad,
        [&] {
          point(call.queue, SqueezeExcitePoint::kGateGrad, a.gate, ds, e, dz2);
          at::Tensor dz = dz2;
          if (t.w1.defined()) {
            point(call.queue, SqueezeExcitePoint::kActivate, a.activation, hidden, {}, activated);
            const at::Tensor da = at::mm(dz2, matrix(t.w2));
            point(call.queue, SqueezeExcitePoint::kActivateGrad, a.activation, da, hidden, dz1);
            dz = dz1;
          }
          at::addmm_out(ds, ds, dz, matrix(t.w1.defined() ? t.w1 : t.w2), 0, 1.0 / static_cast<double>(a.s));
        },
        launch_squeeze_excite_scale_grad);
  }
  return {dx,
          t.w1.defined() ? weight_gradient(dz1, mean, t.w1) : given({}, t.x),
          t.b1.defined() ? bias_gradient(dz1, t.b1) : given({}, t.x),
          weight_gradient(dz2, t.w1.defined() ? activated : mean, t.w2),
          t.b2.defined() ? bias_gradient(dz2, t.b2) : given({}, t.x),
          given(dresidual, t.x)};
}

}  // namespace

DL_CUDA_LIBRARY(m) {
  m.impl("squeeze_excite_fwd", squeeze_excite_fwd);
  m.impl("squeeze_excite_bwd", squeeze_excite_bwd);
}

}  // namespace dlkernels
