// The center-loss family on CUDA tensors: outputs, scratch, plans, registration. The kernels are in
// center_loss_*_kernel.cu; the island's pairs, and an update with the island's term, are Triton's.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "../common/cuda_call.h"
#include "../common/loss.h"
#include "center_loss_kernel.h"

namespace dlkernels {
namespace {

using std::optional;

// Offsets within a row, and sorted rows, are 32 bits.
constexpr int64_t kMostInRow = int64_t{1} << 30, kMostSorted = int64_t{1} << 30;

// Contiguous forms of an operator's tensors, for the time of a call.
struct Dense {
  at::Tensor x, labels, centers, attention;
  CenterLossTensors tensors{};

  Dense(const at::Tensor& features, const at::Tensor& y, const at::Tensor& c, const optional<at::Tensor>& a,
        bool logits, int64_t ignore_index)
      : x(features.contiguous()), labels(y.contiguous()), centers(c.contiguous()) {
    if (a.has_value() && a->defined()) attention = a->contiguous();
    tensors.dtype = float_kind("features", x);
    tensors.center_dtype = float_kind("centers", centers);
    tensors.attention_dtype = attention.defined() ? float_kind("attention", attention) : tensors.dtype;
    tensors.x = x.const_data_ptr();
    tensors.labels = labels.const_data_ptr();
    tensors.centers = centers.const_data_ptr();
    tensors.attention = attention.defined() ? attention.const_data_ptr() : nullptr;
    tensors.narrow = labels.scalar_type() == at::kInt;
    tensors.logits = logits;
    tensors.n = x.size(0), tensors.k = centers.size(0), tensors.d = x.size(1);
    tensors.ignore_index = ignore_index;
  }
  const at::Tensor& like() const { return attention.defined() ? attention : x; }
};

bool takes(const at::Tensor& features, const at::Tensor& centers) {
  return served(features) && features.size(1) <= kMostInRow && features.size(0) <= kMostSorted &&
         centers.size(0) <= kMostSorted;
}

at::Tensor floats(at::IntArrayRef shape, const at::Tensor& like) {
  return at::empty(shape, like.options().dtype(at::kFloat));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> center_loss_fwd(
    const at::Tensor& features, const at::Tensor& labels, const at::Tensor& centers,
    const optional<at::Tensor>& attention, bool logits, int64_t ignore_index, int64_t reduction, bool need_grad,
    bool higher_order) {
  if (!takes(features, centers))
    return find_in_triton<decltype(center_loss_fwd)>("center_loss_fwd")
        .call(features, labels, centers, attention, logits, ignore_index, reduction, need_grad, higher_order);
  const Dense dense(features, labels, centers, attention, logits, ignore_index);
  const CenterLossTensors& t = dense.tensors;
  const bool reduced = reduction != kNone, weighed = t.attention != nullptr;
  at::Tensor dx = need_grad ? at::empty_like(dense.x) : at::empty({0}, dense.x.options());
  at::Tensor dattention =
      need_grad && weighed ? at::empty_like(dense.attention) : at::empty({0}, dense.like().options());
  if (t.n == 0) {
    const at::Tensor divisor = floats({}, dense.x).fill_(1.0);
    return {reduced ? floats({}, dense.x).zero_() : floats({0}, dense.x), dx, dattention, divisor};
  }
  const CudaCall call("center_loss_fwd", dense.x);
  at::Tensor loss = reduced ? floats({}, dense.x) : floats({t.n}, dense.x), divisor = floats({}, dense.x);
  CenterRowsArgs args{};
  args.t = t;
  args.dx = need_grad ? dx.mutable_data_ptr() : nullptr;
  args.dattention = need_grad && weighed ? dattention.mutable_data_ptr() : nullptr;
  (reduced ? args.loss : args.row_loss) = loss.mutable_data_ptr<float>();
  args.divisor = divisor.mutable_data_ptr<float>();
  const CenterRowsPlan plan =
      plan_center_rows(*call.queue.machine, t, center_rows_in_packs(args), reduction == kMean, need_grad);
  at::Tensor scratch;
  Counters counters{};
  if (reduced) {
    const int64_t counted = plan.divisor == CenterDivisor::kLater    ? plan.blocks
                            : plan.divisor == CenterDivisor::kBefore ? center_count_blocks(t.n)
                                                                     : 0;
    scratch = at::empty({plan.blocks + counted}, dense.x.options().dtype(at::kInt));
    args.counted = scratch.mutable_data_ptr<int>() + plan.blocks;
    args.partial = reinterpret_cast<float*>(scratch.mutable_data_ptr<int>());
    counters = zeroed_counters(call.queue, 2);
    args.counter = counters.data;
  }
  launch_center_rows(call.queue, plan, args);
  return {loss, dx, dattention, divisor};
}

// The rows' gradients of their own losses, `grad` apart; held while the kernel is launched.
template <class Args>
at::Tensor give_grad(Args& args, const at::Tensor& grad_output) {
  const at::Tensor grad = grad_output.to(at::kFloat);
  args.grad = grad.const_data_ptr<float>();
  args.grad_step = grad.stride(0);
  return grad;
}

// What is summed over classes: the rows sorted, then their sums. Two launches where one block sorts.
void launch_by_class(const Queue& queue, const at::Tensor& like, CenterSumsArgs& args) {
  const CenterLossTensors& t = args.t;
  const bool packs = center_sums_in_packs(args);
  const CenterSortPlan sort = plan_center_sort(*queue.machine, t.n, t.k);
  const CenterSumsPlan sums = plan_center_sums(*queue.machine, t.n, t.d, packs);
  const int64_t others = sort.blocks > 1 ? t.n + (int64_t{1} << sort.bits) * sort.blocks : 0;
  const int64_t unfinished = sums.blocks > 1 ? 2 * int64_t{sums.blocks} : 0;
  const at::Tensor rows = at::empty({2 * t.n + others}, like.options().dtype(at::kInt));
  const at::Tensor partial = at::empty({unfinished, t.d}, like.options().dtype(at::kFloat));
  const at::Tensor slots = at::empty({sums.slabs * unfinished * 2}, like.options().dtype(at::kInt));
  const Counters counters = zeroed_counters(queue, 1 + sums.slabs);
  int* order = rows.mutable_data_ptr<int>();
  CenterSortArgs by_class{t.labels,       t.narrow,     static_cast<int>(t.n), static_cast<int>(t.k),
                          t.ignore_index, order,        order + t.n,           nullptr,
                          nullptr,        counters.data};
  if (sort.blocks > 1) by_class.other_order = order + 2 * t.n, by_class.offsets = order + 3 * t.n;
  launch_center_sort(queue, sort, by_class);
  args.order = by_class.order;
  args.sorted = by_class.sorted;
  args.partial = partial.mutable_data_ptr<float>();
  args.slots = slots.mutable_data_ptr<int>();
  args.counter = counters.data + 1;
  launch_center_sums(queue, sums, args);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> center_loss_bwd(const at::Tensor& grad_output,
                                                               const at::Tensor& features, const at::Tensor& labels,
                                                               const at::Tensor& centers,
                                                               const optional<at::Tensor>& attention, bool logits,
                                                               int64_t ignore_index, bool need_centers) {
  if (!takes(features, centers))
    return find_in_triton<decltype(center_loss_bwd)>("center_loss_bwd")
        .call(grad_output, features, labels, centers, attention, logits, ignore_index, need_centers);
  const Dense dense(features, labels, centers, attention, logits, ignore_index);
  const CenterLossTensors& t = dense.tensors;
  const bool weighed = t.attention != nullptr;
  at::Tensor dx = at::empty_like(dense.x);
  at::Tensor dattention = weighed ? at::empty_like(dense.attention) : at::empty({0}, dense.x.options());
  const CudaCall call("center_loss_bwd", dense.x);
  at::Tensor dcenters = need_centers ? at::zeros_like(dense.centers) : at::empty({0}, dense.centers.options());
  if (dx.numel() == 0) return {dx, dcenters, dattention};
  void* in_attention = weighed ? dattention.mutable_data_ptr() : nullptr;
  if (need_centers) {  // one read of the features for all gradients
    CenterSumsArgs args{};
    args.t = t;
    const at::Tensor grad = give_grad(args, grad_output);
    args.out = dcenters.mutable_data_ptr();
    args.gradient = true;
    args.dx = dx.mutable_data_ptr();
    args.dattention = in_attention;
    launch_by_class(call.queue, dense.x, args);
  } else {
    CenterRowsArgs args{};
    args.t = t;
    const at::Tensor grad = give_grad(args, grad_output);
    args.dx = dx.mutable_data_ptr();
    args.dattention = in_attention;
    launch_center_rows(call.queue, plan_center_rows(*call.queue.machine, t, center_rows_in_packs(args), false, true),
                       args);
  }
  return {dx, dcenters, dattention};
}

void update_centers_(at::Tensor& centers, const at::Tensor& features, const at::Tensor& labels,
                     const optional<at::Tensor>& attention, bool logits, double alpha, bool ema, double island_weight,
                     int64_t ignore_index) {
  // The island's term is made of all centers as they are: none may move before all are read.
  const bool island = island_weight != 0 && centers.size(0) != 1;
  if (island || !takes(features, centers))
    return find_in_triton<decltype(update_centers_)>("update_centers_")
        .call(centers, features, labels, attention, logits, alpha, ema, island_weight, ignore_index);
  TORCH_CHECK_VALUE(centers.is_contiguous(), "`centers` must be contiguous to be changed in place, got strides ",
                    centers.strides());
  if (centers.numel() == 0 || features.numel() == 0) return;
  const Dense dense(features, labels, centers, attention, logits, ignore_index);
  const CudaCall call("update_centers_", dense.x);
  CenterSumsArgs args{};
  args.t = dense.tensors;
  args.out = centers.mutable_data_ptr();
  args.alpha = static_cast<float>(alpha);
  args.ema = ema;
  launch_by_class(call.queue, dense.x, args);
}

}  // namespace

DL_CUDA_LIBRARY(m) {
  m.impl("center_loss_fwd", center_loss_fwd);
  m.impl("center_loss_bwd", center_loss_bwd);
  m.impl("update_centers_", update_centers_);
}

}  // namespace dlkernels
