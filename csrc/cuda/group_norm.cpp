// GroupNorm on CUDA tensors: plans, outputs, workspaces, registration. The kernels are in group_norm_*kernel.cu.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include "../common/cuda_call.h"
#include "../common/cuda_dtype.h"
#include "../common/layer.h"
#include "group_norm_kernel.h"

namespace dlkernels {
namespace {

using Results3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Results6 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Undefined tensors stand for what is not given; everything contiguous.
struct Tensors {
  at::Tensor x, weight, bias, residual, scale, shift;
  Tensors(const at::Tensor& input, const Optional& weight_, const Optional& bias_, const Optional& residual_,
          const Optional& scale_, const Optional& shift_)
      : x(input.contiguous()),
        weight(contiguous(weight_)),
        bias(contiguous(bias_)),
        residual(contiguous(residual_)),
        scale(contiguous(scale_)),
        shift(contiguous(shift_)) {}
};

GroupNormParameter parameter(const at::Tensor& x) {
  return x.defined() ? GroupNormParameter{x.const_data_ptr(), float_kind("parameter", x)} : GroupNormParameter{};
}

float* floats(const at::Tensor& x) { return x.mutable_data_ptr<float>(); }

at::Tensor workspace(const at::Tensor& like, int64_t floats) {
  return at::empty({floats}, like.options().dtype(at::kFloat));
}

GroupNormCall call_of(const Tensors& t, int64_t groups, double eps, int64_t activation, bool channels_last) {
  const Rows rows = rows_of(t.x, channels_last);
  GroupNormCall a{};
  a.x = t.x.const_data_ptr();
  a.residual = data_or_null(t.residual);
  a.weight = parameter(t.weight), a.bias = parameter(t.bias);
  a.scale = parameter(t.scale), a.shift = parameter(t.shift);
  a.n = rows.n, a.c = rows.c, a.s = rows.s;
  a.groups = static_cast<unsigned>(groups), a.d = static_cast<unsigned>(rows.c / groups);
  a.eps = static_cast<float>(eps);
  a.activation = static_cast<int>(activation);
  a.dtype = float_kind("input", t.x);
  return a;
}

// Chooses the plan and gives back whether the kernels see channels innermost. One position lies in memory as channels
// do, which fill packs then.
bool make_plan(const Queue& queue, GroupNormCall& a, bool channels_last, bool aligned) {
  const int64_t itemsize = size_of(a.dtype), pack = 16 / itemsize;
  const int64_t arrays = !a.backward ? 1 : a.residual != nullptr && a.activation != 0 ? 3 : 2;
  constexpr int64_t kMost = int64_t{1} << 31;  // indices of channels, positions and groups are 32 bits wide
  if (a.n * a.groups >= kMost || a.c >= kMost || a.s >= kMost) return false;
  bool last = channels_last || a.s == 1;
  for (;; last = false) {
    const bool packs = aligned && (last ? a.c : a.s) % pack == 0;
    for (int most = 16;; most = static_cast<int>(a.plan.cluster) / 2) {
      a.plan = plan_group_norm(
          *queue.machine,
          {a.n, a.c, a.s, a.groups, static_cast<int>(itemsize), static_cast<int>(arrays), a.backward, last, packs},
          most);
      if (a.plan.cluster == 1) break;
      if (last ? group_norm_last_clusters_run(queue, a) : group_norm_clusters_run(queue, a)) break;
    }
    if (a.plan.served || a.s != 1 || !last) return last;
  }
}

void run(const Queue& queue, const GroupNormCall& a, bool last) {
  if (last) launch_group_norm_last(queue, a);
  else launch_group_norm(queue, a);
}

// What a split needs beside the tensors.
struct SplitMemory {
  at::Tensor floats_;
  Counters counters{};
  SplitMemory(const Queue& queue, const at::Tensor& x, GroupNormCall& a) {
    if (!a.plan.split) return;
    const int64_t terms = int64_t{2} * a.plan.tiles * a.plan.tile_groups;
    floats_ = workspace(x, terms * (a.plan.parts + 1));
    a.terms = floats(floats_);
    a.parts = a.terms + terms;
    counters = zeroed_counters(queue, a.plan.tiles);
    a.counters = counters.data;
  }
};

Results3 group_norm_fwd(const at::Tensor& input, const Optional& weight, const Optional& bias, const Optional& residual,
                        const Optional& scale, const Optional& shift, int64_t num_groups, double eps,
                        int64_t activation, bool channels_last) {
  const auto in_triton = [&] {
    return find_in_triton<decltype(group_norm_fwd)>("group_norm_fwd")
        .call(input, weight, bias, residual, scale, shift, num_groups, eps, activation, channels_last);
  };
  if (!served(input)) return in_triton();
  const CudaCall call("group_norm_fwd", input);
  const Tensors t(input, weight, bias, residual, scale, shift);
  const auto options = t.x.options().dtype(at::kFloat);
  const auto outputs = [&] {
    return Results3{at::empty_like(t.x), at::empty({t.x.size(0), num_groups}, options),
                    at::empty({t.x.size(0), num_groups}, options)};
  };
  if (t.x.numel() == 0) return outputs();
  GroupNormCall a = call_of(t, num_groups, eps, activation, channels_last);
  // Outputs of the allocator are aligned.
  const bool last = make_plan(call.queue, a, channels_last, aligned(a.x, a.residual));
  if (!a.plan.served) return in_triton();
  const Results3 out = outputs();
  const auto& [y, mean, rstd] = out;
  a.y = y.mutable_data_ptr();
  a.mean = floats(mean), a.rstd = floats(rstd);
  {
    const SplitMemory memory(call.queue, t.x, a);
    run(call.queue, a, last);
  }
  return out;
}

// How many blocks share the samples of a channel: as many as fill the machine, each with a hundred rows to add up.
int64_t splits_of(const Machine& machine, const GroupNormParameterGrads& a) {
  const int64_t blocks = ceil_div<int64_t>(a.c, kGroupNormGradChannels), rows = a.n * a.position_parts;
  return std::max<int64_t>(1, std::min({int64_t{machine.multiprocessors} / blocks, rows / 128, a.n}));
}

void parameter_grads(const Queue& queue, const GroupNormCall& a, const Tensors& t, const at::Tensor& dweight,
                     const at::Tensor& dbias, const at::Tensor& dscale, const at::Tensor& dshift) {
  GroupNormParameterGrads to{};
  to.weight = written(dweight), to.bias = written(dbias), to.scale = written(dscale), to.shift = written(dshift);
  to.sums = a.sums;
  to.given_weight = a.weight, to.given_bias = a.bias, to.given_scale = a.scale;
  to.shift_dtype = a.shift.dtype;
  to.n = a.n, to.c = a.c;
  to.position_parts = a.plan.position_parts;
  if (to.scale == nullptr && to.shift == nullptr) {  // nobody asks for one sample: parts are as good as samples
    to.n *= to.position_parts;
    to.position_parts = 1;
  }
  to.splits = static_cast<unsigned>(splits_of(*queue.machine, to));
  at::Tensor partial;
  Counters counters{};
  if (to.splits > 1) {
    partial = workspace(t.x, int64_t{2} * to.splits * a.c);
    counters = zeroed_counters(queue, ceil_div<int64_t>(a.c, kGroupNormGradChannels));
    to.partial = floats(partial);
    to.counters = counters.data;
  }
  launch_group_norm_parameter_grads(queue, to);
}

Results6 group_norm_bwd(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                        const at::Tensor& rstd, const Optional& weight, const Optional& bias, const Optional& residual,
                        const Optional& scale, const Optional& shift, int64_t num_groups, double eps,
                        int64_t activation, bool channels_last) {
  const auto in_triton = [&] {
    return find_in_triton<decltype(group_norm_bwd)>("group_norm_bwd")
        .call(grad_output, input, mean, rstd, weight, bias, residual, scale, shift, num_groups, eps, activation,
              channels_last);
  };
  if (!served(input)) return in_triton();
  const CudaCall call("group_norm_bwd", input);
  const Tensors t(input, weight, bias, residual, scale, shift);
  if (t.x.numel() == 0) {
    const auto zeros = [&](const at::Tensor& x) { return x.defined() ? at::zeros_like(x) : at::Tensor(); };
    return {at::empty_like(t.x),
            given(zeros(t.weight), t.x),
            given(zeros(t.bias), t.x),
            given(empty_or_undefined(t.residual), t.x),
            given(empty_or_undefined(t.scale), t.x),
            given(empty_or_undefined(t.shift), t.x)};
  }
  const at::Tensor dy = grad_output.contiguous(), means = mean.contiguous(), rstds = rstd.contiguous();
  GroupNormCall a = call_of(t, num_groups, eps, activation, channels_last);
  a.backward = true;
  a.dy = dy.const_data_ptr();
  const bool last = make_plan(call.queue, a, channels_last, aligned(a.x, a.dy, a.residual));
  if (!a.plan.served) return in_triton();
  const at::Tensor dx = at::empty_like(t.x);
  // Without an activation the residual's gradient is grad_output: the operator promises a tensor of its own.
  at::Tensor dresidual;
  if (t.residual.defined())
    dresidual = activation != 0 ? at::empty_like(t.x) : grad_output.clone(at::MemoryFormat::Contiguous);
  a.mean = const_cast<float*>(means.const_data_ptr<float>());
  a.rstd = const_cast<float*>(rstds.const_data_ptr<float>());
  a.dx = dx.mutable_data_ptr();
  a.dresidual = activation != 0 ? written(dresidual) : nullptr;
  const bool wants_sums = t.weight.defined() || t.bias.defined() || t.scale.defined() || t.shift.defined();
  const at::Tensor sums = wants_sums ? workspace(t.x, int64_t{2} * a.n * a.plan.position_parts * a.c) : at::Tensor();
  a.sums = static_cast<float*>(written(sums));
  {
    const SplitMemory memory(call.queue, t.x, a);
    run(call.queue, a, last);
  }
  const at::Tensor dweight = empty_or_undefined(t.weight), dbias = empty_or_undefined(t.bias);
  const at::Tensor dscale = empty_or_undefined(t.scale), dshift = empty_or_undefined(t.shift);
  if (wants_sums) parameter_grads(call.queue, a, t, dweight, dbias, dscale, dshift);
  return {dx, given(dweight, dx), given(dbias, dx), given(dresidual, dx), given(dscale, dx), given(dshift, dx)};
}

}  // namespace

DL_CUDA_LIBRARY(m) {
  m.impl("group_norm_fwd", group_norm_fwd);
  m.impl("group_norm_bwd", group_norm_bwd);
}

}  // namespace dlkernels
