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
  const at::Tensor nothing = at::empty({0}, dense.x.options());
  at::Tensor dx = need_grad ? at::empty_like(dense.x) : nothing;
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

}  // namespace

DL_CUDA_LIBRARY(m) { m.impl("center_loss_fwd", center_loss_fwd); }

}  // namespace dlkernels
