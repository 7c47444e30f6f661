// The center-loss family on CPU tensors: label checks, the rows by class, threads; then the registration of the
// operators. The loops are in center_loss_kernel.cpp, once per instruction set.
#include "center_loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <atomic>

#include "../common/host.h"
#include "../common/layer.h"
#include "../common/segments.h"
#include "center_loss_kernel.h"
#include "center_loss_pieces.h"

namespace dlkernels {
namespace {

const CenterLossKernels& kernels() {
  static const CenterLossKernels table = DL_KERNELS_OF_THIS_MACHINE(center_loss_kernels);
  return table;
}

void check_attention(bool in_range) {
  TORCH_CHECK_VALUE(in_range, "`attention` must be in [0, 1]; pass attention_logits=True if these are logits");
}

// The rows of a call, with their labels checked; then by class where a class's rows are needed together.
struct CenterProblem {
  CenterLossArgs args{};
  int64_t counted = 0;
  CenterPieces cut;
  c10::DataPtr sums;
  c10::SmallVector<double, 64> partial;
  int64_t item_size = 4;  // of sums and losses

  explicit CenterProblem(const CenterLossInputs& in) {
    args.dtype = float_kind("features", in.features);
    args.center_dtype = float_kind("centers", in.centers);
    args.features = in.features.const_data_ptr();
    args.labels = in.labels.const_data_ptr();
    args.centers = const_cast<void*>(in.centers.const_data_ptr());  // written in an update only
    args.attention = data_or_null(in.attention);
    if (in.attention.defined()) args.attention_dtype = float_kind("attention", in.attention);
    args.narrow = in.labels.scalar_type() == at::kInt;
    args.logits = in.logits;
    args.n = in.features.size(0), args.k = in.centers.size(0), args.d = in.features.size(1);
    args.ignore_index = in.ignore_index;
    args.grad_scale = args.attention_scale = 1.0;
    item_size = args.dtype == Float::kFloat64 ? 8 : 4;
    const auto count = [&](const auto* y) { return count_labels(y, args.n, args.k, in.ignore_index); };
    const LabelCount found = with_labels(in.labels, count);
    counted = found.counted;
    if (found.bad < 0) return;
    const int64_t bad = with_labels(in.labels, [&](const auto* y) -> int64_t { return y[found.bad]; });
    TORCH_CHECK_INDEX(false, "labels must be in [0, ", args.k, "), negative or ignore_index, got ", bad);
  }

  // Rows in their own order.
  void run_blocks() {
    const int64_t blocks = (args.n + kBlockRows - 1) / kBlockRows;
    sum_losses_of(blocks);
    std::atomic<bool> fine{true};
    at::parallel_for(0, blocks, grain(args.d * kBlockRows), [&](int64_t begin, int64_t end) {
      if (!kernels().blocks(args, begin, end, scratch().get())) fine = false;
    });
    check_attention(fine);
  }

  c10::DataPtr scratch() const { return c10::GetCPUAllocator()->allocate(kCenterScratch * args.d * item_size); }

  // Where rows are not asked for one by one: partial sums of `parts` blocks or pieces.
  void sum_losses_of(int64_t parts) {
    if (args.loss) return;
    partial.resize(parts);
    args.partial = partial.data();
  }
  double loss_sum() const { return sum_in_order(partial.data(), static_cast<int64_t>(partial.size())); }

  // Sort the rows. all: every class keeps its sum, also one that is done with at once.
  void group(const at::Tensor& labels, bool all) {
    TORCH_CHECK_VALUE(args.n <= INT32_MAX && args.k <= UINT32_MAX, "more than 2^31 rows or 2^32 classes");
    const auto grouped = [&](const auto* y) { return group_by_class(y, args.n, args.k, args.ignore_index); };
    cut = CenterPieces(with_labels(labels, grouped), all);
    sums = c10::GetCPUAllocator()->allocate(cut.slots * args.d * item_size);
    args.sums = sums.get();
    args.order = cut.by_class.order.data();
    args.pieces = cut.pieces.data();
    args.classes = cut.classes.data();
  }

  void run_by_class() {
    sum_losses_of(static_cast<int64_t>(cut.pieces.size()));
    const int64_t count = static_cast<int64_t>(cut.pieces.size());
    const int64_t rows = count == 0 ? 1 : (counted + count - 1) / count;
    at::parallel_for(0, count, grain(args.d * rows),
                     [&](int64_t begin, int64_t end) { kernels().pieces(args, begin, end, scratch().get()); });
    at::parallel_for(0, static_cast<int64_t>(cut.classes.size()), grain(args.d),
                     [&](int64_t begin, int64_t end) { kernels().merge(args, begin, end); });
    if (counted < args.n && (args.loss || args.dx || args.dattention)) kernels().left_out(args, 0, args.n);
  }

  void write_grads_to(const at::Tensor& dx, const at::Tensor& dattention) {
    args.dx = written(dx);
    args.dattention = written(dattention);
    args.stream = dx.defined() && static_cast<int64_t>(dx.nbytes()) > kStreamLayerBytes;
  }
};

// The island: S, the norms, and what is made of them.
struct IslandProblem {
  IslandArgs args{};
  at::Tensor total, inverse_norms;

  explicit IslandProblem(const at::Tensor& centers) {
    args.dtype = float_kind("centers", centers);
    args.centers = centers.const_data_ptr();
    args.k = centers.size(0), args.d = centers.size(1);
  }

  void sums(const at::Tensor& centers) {
    const auto options = centers.options().dtype(accumulate_type(centers));
    const int64_t blocks = (args.k + kIslandBlock - 1) / kIslandBlock;
    total = at::empty({args.d}, options);
    inverse_norms = at::empty({args.k}, options);
    const at::Tensor partial = at::empty({blocks, args.d}, options);
    args.inverse_norms = inverse_norms.mutable_data_ptr();
    args.partial = partial.mutable_data_ptr();
    at::parallel_for(0, blocks, grain(args.d * kIslandBlock),
                     [&](int64_t begin, int64_t end) { kernels().island_sums(args, begin, end); });
    const auto add = [&](auto* sum, const auto* part) {
      for (int64_t j = 0; j < args.d; ++j) {
        double s = 0;
        for (int64_t b = 0; b < blocks; ++b) s += static_cast<double>(part[b * args.d + j]);
        sum[j] = s;
      }
    };
    total.scalar_type() == at::kDouble ? add(total.mutable_data_ptr<double>(), partial.const_data_ptr<double>())
                                       : add(total.mutable_data_ptr<float>(), partial.const_data_ptr<float>());
    args.total = total.const_data_ptr();
  }

  // ||S||^2 - K' + K (K - 1).
  double pairs() const {
    if (args.k <= 1) return 0;
    double squares = 0, some = 0;
    const auto add = [&](const auto* s, const auto* inverse) {
      for (int64_t j = 0; j < args.d; ++j) squares += static_cast<double>(s[j]) * static_cast<double>(s[j]);
      for (int64_t k = 0; k < args.k; ++k) some += inverse[k] != 0;
    };
    total.scalar_type() == at::kDouble ? add(total.const_data_ptr<double>(), inverse_norms.const_data_ptr<double>())
                                       : add(total.const_data_ptr<float>(), inverse_norms.const_data_ptr<float>());
    return squares - some + static_cast<double>(args.k) * static_cast<double>(args.k - 1);
  }

  void apply() const {
    at::parallel_for(0, args.k, grain(args.d),
                     [&](int64_t begin, int64_t end) { kernels().island_apply(args, begin, end); });
  }
};

// The rows by class, and the centers' step after the rows have seen them.
void run_update(CenterProblem& problem, const CenterLossInputs& in, const CenterUpdate& update) {
  if (in.attention.defined() && !in.logits) {  // nothing may move before all is known to be in order
    std::atomic<bool> fine{true};
    at::parallel_for(0, problem.args.n, grain(problem.args.d), [&](int64_t begin, int64_t end) {
      if (!kernels().in_range(problem.args, begin, end)) fine = false;
    });
    check_attention(fine);
  }
  const bool island = update.island_weight != 0 && problem.args.k > 1;
  problem.args.alpha = update.alpha;
  problem.args.ema = update.ema;
  problem.args.mode = island ? CenterSums::kNone : CenterSums::kUpdate;
  problem.group(in.labels, island);
  problem.run_by_class();
  if (island) {
    IslandProblem pairs(in.centers);
    pairs.sums(in.centers);
    pairs.args.out = problem.args.centers;
    pairs.args.scale = -update.alpha * update.island_weight / static_cast<double>(problem.args.k - 1);
    pairs.args.classes = problem.cut.classes.data();
    pairs.args.present = static_cast<int64_t>(problem.cut.classes.size());
    pairs.args.sums = problem.args.sums;
    pairs.args.alpha = update.alpha;
    pairs.args.ema = update.ema;
    pairs.apply();
  }
}

}  // namespace

CenterLossResult center_loss_forward(const CenterLossInputs& in, int64_t reduction, bool need_grad,
                                     const CenterUpdate* update) {
  CenterProblem problem(in);
  const double divisor = reduction == kMean ? static_cast<double>(std::max<int64_t>(1, problem.counted)) : 1.0;
  CenterLossResult result{{}, {}, {}, divisor};
  if (reduction == kNone) {
    result.loss = at::empty({problem.args.n}, in.features.options().dtype(accumulate_type(in.features)));
    problem.args.loss = result.loss.mutable_data_ptr();
  }
  if (need_grad) {
    result.dx = at::empty_like(in.features);
    result.dattention = empty_or_undefined(in.attention);
    problem.write_grads_to(result.dx, result.dattention);
    problem.args.grad_scale = stored_scale(in.features, divisor);
    problem.args.attention_scale = in.attention.defined() ? stored_scale(in.attention, divisor) : 1.0;
  }
  update ? run_update(problem, in, *update) : problem.run_blocks();
  if (reduction != kNone) result.loss = scalar(problem.loss_sum() / divisor, in.features);
  return result;
}

CenterLossGrads center_loss_backward(const at::Tensor& grad_output, const CenterLossInputs& in, bool need_centers) {
  CenterProblem problem(in);
  CenterLossGrads grads{at::empty_like(in.features), {}, empty_or_undefined(in.attention)};
  problem.write_grads_to(grads.dx, grads.dattention);
  const at::Tensor g = read_grad_output(problem.args, grad_output, in.features);
  if (!need_centers) {
    problem.run_blocks();
    return grads;
  }
  grads.dcenters = at::zeros_like(in.centers);
  problem.args.dcenters = grads.dcenters.mutable_data_ptr();
  problem.args.mode = CenterSums::kGradient;
  problem.group(in.labels, false);
  problem.run_by_class();
  return grads;
}

void update_centers(const CenterLossInputs& in, const CenterUpdate& update) {
  CenterProblem problem(in);
  run_update(problem, in, update);
}

// Operators: contiguous in, contiguous out
// ------------------------------------------------------------------------------

namespace {

using std::optional;

// Holds contiguous forms of an operator's tensors for the time of a call.
struct Dense {
  at::Tensor features, labels, centers, attention;
  Dense(const at::Tensor& x, const at::Tensor& y, const at::Tensor& c, const optional<at::Tensor>& a)
      : features(x.contiguous()), labels(y.contiguous()), centers(c.contiguous()), attention(contiguous(a)) {}
  CenterLossInputs inputs(bool logits, int64_t ignore_index) const {
    return {features, labels, centers, attention, logits, ignore_index};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> center_loss_fwd(
    const at::Tensor& features, const at::Tensor& labels, const at::Tensor& centers,
    const optional<at::Tensor>& attention, bool logits, int64_t ignore_index, int64_t reduction, bool need_grad, bool) {
  const Dense dense(features, labels, centers, attention);
  const CenterLossResult r = center_loss_forward(dense.inputs(logits, ignore_index), reduction, need_grad, nullptr);
  const at::Tensor& like = dense.attention.defined() ? dense.attention : features;
  return {r.loss, given(r.dx, features), given(r.dattention, like), scalar(r.divisor, features)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> center_loss_bwd(const at::Tensor& grad_output,
                                                               const at::Tensor& features, const at::Tensor& labels,
                                                               const at::Tensor& centers,
                                                               const optional<at::Tensor>& attention, bool logits,
                                                               int64_t ignore_index, bool need_centers) {
  const Dense dense(features, labels, centers, attention);
  const CenterLossGrads g = center_loss_backward(grad_output, dense.inputs(logits, ignore_index), need_centers);
  const at::Tensor& like = dense.attention.defined() ? dense.attention : features;
  return {g.dx, given(g.dcenters, centers), given(g.dattention, like)};
}

void update_centers_(at::Tensor& centers, const at::Tensor& features, const at::Tensor& labels,
                     const optional<at::Tensor>& attention, bool logits, double alpha, bool ema, double island_weight,
                     int64_t ignore_index) {
  TORCH_CHECK_VALUE(centers.is_contiguous(), "`centers` must be contiguous to be changed in place");
  const Dense dense(features, labels, centers, attention);
  update_centers(dense.inputs(logits, ignore_index), {alpha, ema, island_weight});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> island_pairs_fwd(const at::Tensor& centers) {
  const at::Tensor c = centers.contiguous();
  IslandProblem problem(c);
  problem.sums(c);
  return {scalar(problem.pairs(), c), problem.total, problem.inverse_norms};
}

at::Tensor island_pairs_bwd(const at::Tensor& grad_output, const at::Tensor& centers, const at::Tensor& total,
                            const at::Tensor& inverse_norms) {
  const at::Tensor c = centers.contiguous(), s = total.contiguous(), inverse = inverse_norms.contiguous();
  const at::Tensor out = at::empty_like(c);
  IslandProblem problem(c);
  problem.args.total = s.const_data_ptr();
  problem.args.inverse_norms = const_cast<void*>(inverse.const_data_ptr());  // only read here
  problem.args.out = out.mutable_data_ptr();
  problem.args.scale = problem.args.k > 1 ? 2 * *value_of(grad_output.to(accumulate_type(c))) : 0;
  problem.apply();
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("center_loss_fwd", center_loss_fwd);
  m.impl("center_loss_bwd", center_loss_bwd);
  m.impl("update_centers_", update_centers_);
  m.impl("island_pairs_fwd", island_pairs_fwd);
  m.impl("island_pairs_bwd", island_pairs_bwd);
}

}  // namespace dlkernels
