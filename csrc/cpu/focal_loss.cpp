// The focal-loss family on CPU tensors: label checks, divisors, threads; then the registration of the operators.
// The loops are in focal_loss_kernel.cpp, once per instruction set.
#include "focal_loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>

#include "../common/host.h"
#include "focal_loss_kernel.h"

namespace dlkernels {
namespace {

const FocalLossKernels& kernels() {
  static const FocalLossKernels table = DL_KERNELS_OF_THIS_MACHINE(focal_loss_kernels);
  return table;
}

Target target_kind(const at::Tensor& target, const at::Tensor& input) {
  switch (target.scalar_type()) {
    case at::kBool:
    case at::kByte: return Target::kUInt8;
    case at::kInt: return Target::kInt32;
    case at::kLong: return Target::kInt64;
    default: break;
  }
  if (target.scalar_type() == input.scalar_type()) return Target::kFloat;
  TORCH_CHECK_TYPE(target.scalar_type() == at::kFloat && input.scalar_type() != at::kDouble,
                   "`target` must be of the input's dtype, float32, bool, uint8, int32 or int64, got ",
                   target.scalar_type());
  return Target::kFloat32;
}

// Labels of `target` in [low, high) or ignore_index, else IndexError. Calls f(label) for each that counts.
template <class I, class F>
void for_each_label(const I* target, int64_t n, int64_t low, int64_t high, int64_t ignore_index, F f) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = static_cast<int64_t>(target[i]);
    if (t == ignore_index) continue;
    TORCH_CHECK_INDEX(t >= low && t < high, "targets must be in [", low, ", ", high, ") or ignore_index, got ", t);
    f(t);
  }
}

template <class F>
void for_each_label(const at::Tensor& target, int64_t low, int64_t high, int64_t ignore_index, F f) {
  const int64_t n = target.numel();
  switch (target.scalar_type()) {
    case at::kByte: return for_each_label(target.const_data_ptr<uint8_t>(), n, low, high, ignore_index, f);
    case at::kInt: return for_each_label(target.const_data_ptr<int32_t>(), n, low, high, ignore_index, f);
    default: return for_each_label(target.const_data_ptr<int64_t>(), n, low, high, ignore_index, f);
  }
}

// How many labels count, with the same check; written so that the loop vectorises.
template <class I>
int64_t count_labels(const I* target, int64_t n, int64_t low, int64_t high, int64_t ignore_index) {
  using W = std::conditional_t<sizeof(I) == 8, int64_t, int32_t>;
  const W first = static_cast<W>(low), last = static_cast<W>(high), ignored = static_cast<W>(ignore_index);
  const bool some_ignored = static_cast<int64_t>(ignored) == ignore_index;
  int64_t counted = 0;
  for (int64_t begin = 0; begin < n; begin += 4096) {
    const int64_t end = std::min(n, begin + 4096);
    W left_out = 0, bad = 0;
    for (int64_t i = begin; i < end; ++i) {
      const W t = static_cast<W>(target[i]);
      const W skip = some_ignored & (t == ignored);
      left_out += skip;
      bad |= (skip ^ 1) & ((t < first) | (t >= last));
    }
    if (bad) for_each_label(target + begin, end - begin, low, high, ignore_index, [](int64_t) {});  // raises
    counted += end - begin - left_out;
  }
  return counted;
}

int64_t count_labels(const at::Tensor& target, int64_t low, int64_t high, int64_t ignore_index) {
  const int64_t n = target.numel();
  switch (target.scalar_type()) {
    case at::kByte: return count_labels(target.const_data_ptr<uint8_t>(), n, low, high, ignore_index);
    case at::kInt: return count_labels(target.const_data_ptr<int32_t>(), n, low, high, ignore_index);
    default: return count_labels(target.const_data_ptr<int64_t>(), n, low, high, ignore_index);
  }
}

double reduction_divisor(int64_t reduction, double mean_divisor, std::optional<double> normalizer) {
  if (reduction == kMean) return mean_divisor;
  return normalizer.value_or(1.0);
}

// A mean over nothing has zero gradients.
double stored_scale(const at::Tensor& input, int64_t reduction, double divisor) {
  return reduction == kMean && divisor == 0 ? 0.0 : dlkernels::stored_scale(input, divisor);
}

// Sigmoid
// --------------------------------------------------------------------------------------------------------------

// One element after another in memory, in the same order for input and target.
bool elementwise(const at::Tensor& input, const at::Tensor& target) {
  return target.sizes() == input.sizes() && input.is_non_overlapping_and_dense() && input.strides() == target.strides();
}

struct SigmoidProblem {
  at::Tensor input, target;
  SigmoidArgs args{};
  double valid = 0;  // elements that are not left out

  SigmoidProblem(const at::Tensor& x, const at::Tensor& t, const SigmoidOptions& options) {
    const bool classes = t.sizes() != x.sizes();
    const bool in_order = !classes && elementwise(x, t);
    input = in_order ? x : x.contiguous();
    target = in_order ? t : t.contiguous();
    args.dtype = float_kind("input", input);
    args.target_kind = target_kind(target, input);
    args.input = input.const_data_ptr();
    args.target = target.const_data_ptr();
    args.count = input.numel();
    args.classes = classes ? input.size(-1) : 0;
    args.alpha = options.alpha;
    args.gamma = options.gamma;
    args.ignore_index = target.scalar_type() == at::kBool ? INT64_MIN : options.ignore_index;
    args.grad_scale = 1.0;
    valid = static_cast<double>(args.count);
    if (target.is_floating_point() || target.scalar_type() == at::kBool) return;
    const int64_t counted = count_labels(target, classes ? -1 : 0, classes ? args.classes : 2, options.ignore_index);
    valid = static_cast<double>(counted * (classes ? args.classes : 1));
  }

  bool may_stream(int64_t) const { return true; }

  int64_t blocks() const { return (args.count + kSigmoidBlock - 1) / kSigmoidBlock; }

  void run() const {
    at::parallel_for(0, blocks(), grain(kSigmoidBlock),
                     [&](int64_t begin, int64_t end) { kernels().sigmoid(args, begin, end); });
  }
};

// Softmax
// --------------------------------------------------------------------------------------------------------------

struct SoftmaxProblem {
  at::Tensor input, target;
  SoftmaxArgs args{};
  double valid = 0;  // the mean's divisor

  SoftmaxProblem(const at::Tensor& x, const at::Tensor& t, const at::Tensor& weight, const SoftmaxOptions& options) {
    const bool probabilities = t.is_floating_point();
    const bool rows_last = channels_last(x) && (!probabilities || t.strides() == x.strides());
    input = rows_last ? x : x.contiguous();
    target = rows_last && probabilities ? t : t.contiguous();
    args.dtype = float_kind("input", input);
    args.target_kind = target_kind(target, input);
    args.input = input.const_data_ptr();
    args.target = target.const_data_ptr();
    args.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
    args.classes = input.size(1);
    const int64_t rows = args.classes > 0 ? input.numel() / args.classes : 0;
    args.outer = rows_last ? rows : input.size(0);
    args.inner = rows_last || args.outer == 0 ? 1 : rows / args.outer;
    args.gamma = options.gamma;
    args.label_smoothing = options.label_smoothing;
    args.ignore_index = options.ignore_index;
    args.grad_scale = 1.0;
    if (probabilities) {
      valid = static_cast<double>(rows);
    } else if (options.mean_of_weights && weight.defined()) {
      const auto sum = [&](const auto* w) {
        for_each_label(target, 0, args.classes, options.ignore_index,
                       [&](int64_t y) { valid += static_cast<double>(w[y]); });
      };
      weight.scalar_type() == at::kDouble ? sum(weight.const_data_ptr<double>()) : sum(weight.const_data_ptr<float>());
    } else {
      valid = static_cast<double>(count_labels(target, 0, args.classes, options.ignore_index));
    }
  }

  int64_t rows() const { return args.outer * args.inner; }

  // Short rows that share a cache line would each write a part of it past the caches: slower than through them.
  bool may_stream(int64_t element_size) const {
    const int64_t row_bytes = args.classes * element_size;
    return row_bytes % 64 == 0 || row_bytes >= 1536;
  }

  void run() const {
    if (rows() == 0) return;
    const int64_t tiles = kernels().softmax_tiles(args), bytes = kernels().softmax_scratch_bytes(args);
    at::parallel_for(0, tiles, grain(rows() / tiles * args.classes), [&](int64_t begin, int64_t end) {
      const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(bytes);
      kernels().softmax(args, begin, end, scratch.get());
    });
  }
};

template <class Problem>
void write_grad_to(Problem& problem, const at::Tensor& grad, double scale) {
  problem.args.grad = grad.mutable_data_ptr();
  problem.args.grad_scale = scale;
  problem.args.stream = static_cast<int64_t>(grad.nbytes()) > kStreamBytes && problem.may_stream(grad.element_size());
}

// A gradient of the losses as the kernels read it: one value for all when it is expanded, else in the order of `like`.
template <class Problem>
at::Tensor read_grad_output_from(Problem& problem, const at::Tensor& grad_output, const at::Tensor& like) {
  at::Tensor g = grad_output.to(accumulate_type(problem.input));
  const bool one = std::all_of(g.strides().begin(), g.strides().end(), [](int64_t s) { return s == 0; });
  if (!one && g.strides() != like.strides()) g = at::empty_like(like, g.options()).copy_(g);
  problem.args.grad_output = g.const_data_ptr();
  problem.args.grad_output_step = one ? 0 : 1;
  return g;
}

}  // namespace

LossResult sigmoid_focal_loss_forward(const at::Tensor& input, const at::Tensor& target, const SigmoidOptions& options,
                                      int64_t reduction, std::optional<double> normalizer, bool need_grad) {
  SigmoidProblem problem(input, target, options);
  const auto options_loss = input.options().dtype(accumulate_type(input));
  const double divisor = reduction_divisor(reduction, problem.valid, normalizer);
  LossResult result{{}, {}, divisor};
  if (reduction == kNone) {
    result.loss = at::empty_like(problem.input, options_loss);
    problem.args.loss = result.loss.mutable_data_ptr();
    problem.run();
    return result;
  }
  c10::SmallVector<double, 64> partial(problem.blocks());
  problem.args.partial = partial.data();
  if (need_grad) {
    result.grad = at::empty_like(problem.input);
    write_grad_to(problem, result.grad, stored_scale(input, reduction, divisor));
  }
  problem.run();
  result.loss = scalar(sum_in_order(partial.data(), problem.blocks()) / divisor, input);
  return result;
}

at::Tensor sigmoid_focal_loss_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                                       const SigmoidOptions& options) {
  SigmoidProblem problem(input, target, options);
  const at::Tensor grad = at::empty_like(problem.input);
  const at::Tensor g = read_grad_output_from(problem, grad_output.expand(input.sizes()), problem.input);
  write_grad_to(problem, grad, 1.0);
  problem.run();
  return grad;
}

LossResult softmax_focal_loss_forward(const at::Tensor& input, const at::Tensor& target, const at::Tensor& weight,
                                      const SoftmaxOptions& options, int64_t reduction,
                                      std::optional<double> normalizer, bool need_grad) {
  SoftmaxProblem problem(input, target, weight, options);
  const auto options_loss = input.options().dtype(accumulate_type(input));
  const double divisor = reduction_divisor(reduction, problem.valid, normalizer);
  LossResult result{{}, {}, divisor};
  at::DimVector shape(input.sizes());
  shape.erase(shape.begin() + 1);
  const at::Tensor rows = at::empty(shape, options_loss);
  problem.args.loss = rows.mutable_data_ptr();
  if (need_grad && reduction != kNone) {
    result.grad = at::empty_like(problem.input);
    write_grad_to(problem, result.grad, stored_scale(input, reduction, divisor));
  }
  problem.run();
  if (reduction == kNone) {
    result.loss = rows;
  } else {
    const double sum = rows.scalar_type() == at::kDouble ? sum_in_order(rows.const_data_ptr<double>(), rows.numel())
                                                         : sum_in_order(rows.const_data_ptr<float>(), rows.numel());
    result.loss = scalar(sum / divisor, input);
  }
  return result;
}

at::Tensor softmax_focal_loss_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                                       const at::Tensor& weight, const SoftmaxOptions& options) {
  SoftmaxProblem problem(input, target, weight, options);
  const at::Tensor grad = at::empty_like(problem.input);
  at::DimVector shape(input.sizes());
  shape.erase(shape.begin() + 1);
  const at::Tensor like = at::empty(shape, input.options().device(at::kMeta));
  const at::Tensor g = read_grad_output_from(problem, grad_output.expand(shape), like);
  write_grad_to(problem, grad, 1.0);
  problem.run();
  return grad;
}

// Operators: contiguous in, contiguous out
// ------------------------------------------------------------------------------

namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Outputs outputs(const LossResult& r, const at::Tensor& input) {
  return {r.loss, r.grad.defined() ? r.grad : at::empty({0}, input.options()), scalar(r.divisor, input)};
}

Outputs sigmoid_focal_loss_fwd(const at::Tensor& input, const at::Tensor& target,
                               const std::optional<at::Tensor>& normalizer, double alpha, double gamma,
                               int64_t ignore_index, int64_t reduction, bool need_grad, bool) {
  const at::Tensor x = input.contiguous();
  return outputs(sigmoid_focal_loss_forward(x, target.contiguous(), {alpha, gamma, ignore_index}, reduction,
                                            value_of(normalizer), need_grad),
                 x);
}

at::Tensor sigmoid_focal_loss_bwd(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                                  double alpha, double gamma, int64_t ignore_index) {
  return sigmoid_focal_loss_backward(grad_output, input.contiguous(), target.contiguous(),
                                     {alpha, gamma, ignore_index});
}

Outputs softmax_focal_loss_fwd(const at::Tensor& input, const at::Tensor& target,
                               const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& normalizer,
                               double gamma, double label_smoothing, int64_t ignore_index, bool mean_of_weights,
                               int64_t reduction, bool need_grad, bool) {
  const at::Tensor x = input.contiguous(), w = weight.has_value() ? weight->contiguous() : at::Tensor();
  return outputs(
      softmax_focal_loss_forward(x, target.contiguous(), w, {gamma, label_smoothing, ignore_index, mean_of_weights},
                                 reduction, value_of(normalizer), need_grad),
      x);
}

at::Tensor softmax_focal_loss_bwd(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                                  const std::optional<at::Tensor>& weight, double gamma, double label_smoothing,
                                  int64_t ignore_index) {
  const at::Tensor w = weight.has_value() ? weight->contiguous() : at::Tensor();
  return softmax_focal_loss_backward(grad_output, input.contiguous(), target.contiguous(), w,
                                     {gamma, label_smoothing, ignore_index, false});
}

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("sigmoid_focal_loss_fwd", sigmoid_focal_loss_fwd);
  m.impl("sigmoid_focal_loss_bwd", sigmoid_focal_loss_bwd);
  m.impl("softmax_focal_loss_fwd", softmax_focal_loss_fwd);
  m.impl("softmax_focal_loss_bwd", softmax_focal_loss_bwd);
}

}  // namespace dlkernels
