// The GCCS loss on CPU tensors: label checks, rows grouped by class, threads; then the registration of the operators.
// The loops are in gccs_loss_kernel.cpp, once per instruction set.
#include "gccs_loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/host.h"
#include "../common/segments.h"
#include "gccs_loss_kernel.h"

namespace dlkernels {
namespace {

const GccsLossKernels& kernels() {
  static const GccsLossKernels table = DL_KERNELS_OF_THIS_MACHINE(gccs_loss_kernels);
  return table;
}

struct Problem {
  at::Tensor features, labels;
  Segments groups;
  GccsArgs args{};
  int64_t rows, classes;

  Problem(const at::Tensor& z, const at::Tensor& y, const GccsOptions& options)
      : features(z), labels(y), rows(z.size(0)), classes(z.size(1)) {
    TORCH_CHECK_VALUE(rows <= INT32_MAX, "`features` must have less than 2^31 rows, got ", rows);
    with_labels(labels, [&](const auto* label) { group(label, options.ignore_index); });
    args.dtype = float_kind("features", features);
    args.features = features.const_data_ptr();
    args.order = groups.order.data();
    args.segments = groups.segments.data();
    args.present = present();
    args.classes = classes;
    args.target_mean = options.target_mean;
    args.target_std = options.target_std;
    args.eps = options.eps;
    args.kurtosis_weight = options.kurtosis_weight;
    args.grad_scale = 1.0;
  }

  int64_t present() const { return static_cast<int64_t>(groups.segments.size()); }
  int64_t tasks() const { return present() * args.slabs(); }

  void write_grad_to(const at::Tensor& grad, double scale) {
    args.grad = grad.mutable_data_ptr();
    args.grad_scale = scale;
    // Short rows that share a cache line would each write a part of it past the caches: slower than through them.
    const int64_t row_bytes = classes * grad.element_size();
    args.stream = static_cast<int64_t>(grad.nbytes()) > kStreamBytes && (row_bytes % 64 == 0 || row_bytes >= 1536);
  }

  void run() const {
    const int64_t elements = static_cast<int64_t>(groups.order.size()) * classes;
    at::parallel_for(0, tasks(), grain(elements / std::max<int64_t>(1, tasks())),
                     [&](int64_t begin, int64_t end) { kernels().run(args, begin, end); });
    if (args.grad == nullptr || static_cast<int64_t>(groups.order.size()) == rows) return;
    // The gradient of what was left out.
    std::vector<char> counts(rows, 0);
    for (const int32_t row : groups.order) counts[row] = 1;
    const int64_t bytes = classes * features.element_size();
    at::parallel_for(0, rows, grain(classes), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        if (!counts[row]) std::memset(static_cast<char*>(args.grad) + row * bytes, 0, bytes);
    });
  }

 private:
  template <class I>
  void group(const I* y, int64_t ignore_index) {
    const LabelCount count = count_labels(y, rows, classes, ignore_index);
    TORCH_CHECK_INDEX(count.bad < 0, "`labels` must be below ", classes, ", negative or ignore_index, got ",
                      y[count.bad]);
    groups = group_by_class(y, rows, classes, ignore_index);
  }
};

}  // namespace

LossResult gccs_loss_forward(const at::Tensor& features, const at::Tensor& labels, const GccsOptions& options,
                             int64_t reduction, bool need_grad) {
  Problem problem(features, labels, options);
  const int64_t slabs = problem.args.slabs();
  // The mean over no class is 0.
  LossResult result{{}, {}, reduction == kMean ? static_cast<double>(std::max<int64_t>(1, problem.present())) : 1.0};
  std::vector<double> partial(problem.tasks());
  problem.args.partial = partial.data();
  if (need_grad && reduction != kNone) {
    result.grad = at::empty_like(features);
    problem.write_grad_to(result.grad, stored_scale(features, result.divisor));
  }
  problem.run();
  if (reduction != kNone) {
    result.loss = scalar(sum_in_order(partial.data(), problem.tasks()) / result.divisor, features);
    return result;
  }
  result.loss = at::zeros({problem.classes}, features.options().dtype(accumulate_type(features)));
  const auto fill = [&](auto* loss) {
    for (int64_t i = 0; i < problem.present(); ++i)
      loss[problem.groups.segments[i].label] = sum_in_order(partial.data() + i * slabs, slabs);
  };
  result.loss.scalar_type() == at::kDouble ? fill(result.loss.mutable_data_ptr<double>())
                                           : fill(result.loss.mutable_data_ptr<float>());
  return result;
}

at::Tensor gccs_loss_backward(const at::Tensor& grad_output, const at::Tensor& features, const at::Tensor& labels,
                              const GccsOptions& options) {
  Problem problem(features, labels, options);
  const at::Tensor grad = at::empty_like(features);
  const at::Tensor g = read_grad_output(problem.args, grad_output, features);
  problem.write_grad_to(grad, 1.0);
  problem.run();
  return grad;
}

// Operators: contiguous in, contiguous out
// ------------------------------------------------------------------------------

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> gccs_loss_fwd(const at::Tensor& features, const at::Tensor& labels,
                                                             double target_mean, double target_std, double eps,
                                                             double kurtosis_weight, int64_t ignore_index,
                                                             int64_t reduction, bool need_grad, bool) {
  const at::Tensor z = features.contiguous();
  const LossResult r = gccs_loss_forward(
      z, labels.contiguous(), {target_mean, target_std, eps, kurtosis_weight, ignore_index}, reduction, need_grad);
  return {r.loss, r.grad.defined() ? r.grad : at::empty({0}, z.options()), scalar(r.divisor, z)};
}

at::Tensor gccs_loss_bwd(const at::Tensor& grad_output, const at::Tensor& features, const at::Tensor& labels,
                         double target_mean, double target_std, double eps, double kurtosis_weight,
                         int64_t ignore_index) {
  return gccs_loss_backward(grad_output, features.contiguous(), labels.contiguous(),
                            {target_mean, target_std, eps, kurtosis_weight, ignore_index});
}

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("gccs_loss_fwd", gccs_loss_fwd);
  m.impl("gccs_loss_bwd", gccs_loss_bwd);
}

}  // namespace dlkernels
