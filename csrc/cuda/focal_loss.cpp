// Sigmoid focal loss on CUDA tensors: targets, divisors, outputs; then the registration. The kernels are in
// focal_loss_kernel.cu; the softmax losses are Triton's.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "../common/cuda_call.h"
#include "../common/loss.h"
#include "focal_loss_kernel.h"

namespace dlkernels {
namespace {

using Optional = std::optional<at::Tensor>;
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// What forward and backward read alike.
struct Problem {
  at::Tensor x, target;
  SigmoidFocalArgs args{};
  bool skips = false;  // a label can be left out

  Problem(const at::Tensor& input, const at::Tensor& labels, double alpha, double gamma, int64_t ignore_index)
      : x(input.contiguous()), target(labels.contiguous()) {
    const auto type = target.scalar_type();
    args.dtype = float_kind("input", x);
    args.x = x.const_data_ptr();
    args.target = target.const_data_ptr();
    args.numel = x.numel();
    args.labels = target.numel();
    args.alpha_1 = alpha < 0 ? 1.0f : static_cast<float>(alpha);
    args.alpha_0 = alpha < 0 ? 1.0f : static_cast<float>(1.0 - alpha);
    args.gamma = static_cast<float>(gamma);
    args.known = 1.0f;
    args.ignore_index = type == at::kBool ? -1 : ignore_index;
    if (target.is_floating_point()) {
      args.target_dtype = float_kind("target", target);
      TORCH_CHECK_TYPE(args.target_dtype == args.dtype || args.target_dtype == Float::kFloat32,
                       "`target` must be of the input's dtype, float32, bool, uint8, int32 or int64, got ", type);
      return;
    }
    args.label_bytes = static_cast<int>(target.element_size());
    if (target.sizes() != x.sizes()) args.classes = static_cast<int>(x.size(-1));
    skips = type == at::kLong || (type == at::kInt ? args.ignore_index == static_cast<int32_t>(args.ignore_index)
                                                   : args.ignore_index == static_cast<uint8_t>(args.ignore_index));
  }
};

// Classes and packs are counted in 32 bits, with room to add a grid's stride.
bool serves(const at::Tensor& input, const at::Tensor& target) {
  return served(input) && input.numel() <= int64_t{1} << 33 &&
         (target.sizes() == input.sizes() || input.size(-1) <= std::numeric_limits<int32_t>::max() / 2);
}

// No rows: empty losses, a sum of 0, a mean of 0 / 0.
Outputs nothing(const at::Tensor& loss, const at::Tensor& grad, const at::Tensor& divisor, const Optional& normalizer,
                int64_t reduction) {
  if (normalizer.has_value()) divisor.copy_(*normalizer);
  else divisor.fill_(reduction == kMean ? 0.0 : 1.0);
  if (reduction != kNone) loss.zero_().div_(divisor);
  return {loss, grad, divisor};
}

Outputs sigmoid_focal_loss_fwd(const at::Tensor& input, const at::Tensor& target, const Optional& normalizer,
                               double alpha, double gamma, int64_t ignore_index, int64_t reduction, bool need_grad,
                               bool higher_order) {
  if (!serves(input, target))
    return find_in_triton<decltype(sigmoid_focal_loss_fwd)>("sigmoid_focal_loss_fwd")
        .call(input, target, normalizer, alpha, gamma, ignore_index, reduction, need_grad, higher_order);
  const CudaCall call("sigmoid_focal_loss_fwd", input);
  const auto numbers = input.options().dtype(at::kFloat);
  const bool stored = need_grad && reduction != kNone;
  const at::Tensor loss = at::empty(reduction == kNone ? input.sizes() : at::IntArrayRef{}, numbers);
  const at::Tensor grad = at::empty(stored ? input.sizes() : at::IntArrayRef{0}, input.options());
  const at::Tensor divisor = at::empty({}, numbers);
  if (input.numel() == 0) return nothing(loss, grad, divisor, normalizer, reduction);

  Problem problem(input, target, alpha, gamma, ignore_index);
  SigmoidFocalArgs& args = problem.args;
  const auto grid = static_cast<int64_t>(sigmoid_focal_grid(*call.queue.machine, args.dtype, args.numel, false));
  args.divisor = divisor.mutable_data_ptr<float>();
  if (stored) args.dx = grad.mutable_data_ptr();
  // float16 stores its gradient undivided: 1 / N would underflow before a loss scale can help.
  args.fold = stored && args.dtype != Float::kFloat16;
  (reduction == kNone ? args.loss : args.total) = loss.mutable_data_ptr<float>();

  // The divisor. A gradient that is divided waits for the count of labels; a sum of losses does not.
  at::Tensor given, counts;
  if (reduction != kMean) {
    if (normalizer.has_value()) given = normalizer->to(at::kFloat);
  } else if (!problem.skips) {
    args.known = static_cast<float>(args.numel);
  } else if (!args.fold) {
    args.divisor_from = Divisor::kCountAlong;
    if (grid > 1) counts = at::empty({grid}, input.options().dtype(at::kLong));
    args.left_out = grid > 1 ? counts.mutable_data_ptr<int64_t>() : nullptr;
  } else if (args.labels * args.label_bytes <= kCountHereBytes) {
    args.divisor_from = Divisor::kCountHere;
  } else {
    const unsigned blocks = count_labels_grid(*call.queue.machine, args.labels, args.label_bytes);
    counts = at::empty({static_cast<int64_t>(blocks)}, input.options().dtype(at::kLong));
    const Counters counter = zeroed_counters(call.queue, 1);
    launch_count_labels(call.queue,
                        {args.target, args.label_bytes, args.labels, args.ignore_index, args.numel / args.labels,
                         counts.mutable_data_ptr<int64_t>(), counter.data, args.divisor});
    given = divisor;
    args.overlap = true;
  }
  if (given.defined()) {
    args.divisor_from = Divisor::kRead;
    args.normalizer = given.const_data_ptr<float>();
  }

  at::Tensor partial;
  Counters counter{};
  if (reduction != kNone && grid > 1) {
    partial = at::empty({grid}, numbers);
    counter = zeroed_counters(call.queue, 1);
    args.partial = partial.mutable_data_ptr<float>();
    args.counter = counter.data;
  }
  launch_sigmoid_focal_loss(call.queue, args);
  return {loss, grad, divisor};
}

at::Tensor sigmoid_focal_loss_bwd(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                                  double alpha, double gamma, int64_t ignore_index) {
  if (!serves(input, target))
    return find_in_triton<decltype(sigmoid_focal_loss_bwd)>("sigmoid_focal_loss_bwd")
        .call(grad_output, input, target, alpha, gamma, ignore_index);
  const CudaCall call("sigmoid_focal_loss_bwd", input);
  const at::Tensor dx = at::empty(input.sizes(), input.options());
  if (input.numel() == 0) return dx;
  Problem problem(input, target, alpha, gamma, ignore_index);
  SigmoidFocalArgs& args = problem.args;
  at::Tensor g = grad_output.to(at::kFloat).expand(input.sizes());
  const bool one = std::all_of(g.strides().begin(), g.strides().end(), [](int64_t stride) { return stride == 0; });
  if (!one) g = g.contiguous();
  (one ? args.grad_one : args.grad_each) = g.const_data_ptr<float>();
  args.dx = dx.mutable_data_ptr();
  launch_sigmoid_focal_loss(call.queue, args);
  return dx;
}

}  // namespace

DL_CUDA_LIBRARY(m) {
  m.impl("sigmoid_focal_loss_fwd", sigmoid_focal_loss_fwd);
  m.impl("sigmoid_focal_loss_bwd", sigmoid_focal_loss_bwd);
}

}  // namespace dlkernels
