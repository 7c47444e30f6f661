// Weight normalisation on CUDA tensors: outputs, plans and registration. The kernels are in weight_norm_kernel.cu and
// weight_norm_shared_kernel.cu.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/cuda_call.h"
#include "../common/cuda_dtype.h"
#include "weight_norm_kernel.h"

namespace dlkernels {
namespace {

using Pair = std::tuple<at::Tensor, at::Tensor>;
using Lists = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;

// One weight in one direction; contiguous tensors, which it holds.
struct Problem {
  bool backward = false;
  at::Tensor v, g, x, norm;  // x: the gradient of w, undefined forward
  at::Tensor out, dg;        // dg: backward
  Float dtype{};
  WeightNormTiling tiling;

  Pair result() const { return backward ? Pair{out, dg} : Pair{out, norm}; }
};

Problem forward_problem(const at::Tensor& v, const at::Tensor& g) {
  Problem p;
  p.v = v.contiguous(), p.g = g.contiguous();
  p.out = at::empty_like(p.v), p.norm = at::empty({v.size(1)}, v.options().dtype(at::kFloat));
  p.dtype = float_kind("v", v);
  return p;
}

Problem backward_problem(const at::Tensor& grad_output, const at::Tensor& v, const at::Tensor& g,
                         const at::Tensor& norm) {
  Problem p;
  p.backward = true;
  p.v = v.contiguous(), p.g = g.contiguous(), p.x = grad_output.contiguous(), p.norm = norm.contiguous();
  p.out = at::empty_like(p.v), p.dg = at::empty_like(p.g);
  p.dtype = float_kind("v", v);
  return p;
}

// CUDA C++ counts packs of a row in 32 bits.
bool fits(const at::Tensor& v) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  const int64_t row = v.size(0) * v.size(2);
  return v.size(0) < kLimit && v.size(1) < kLimit && v.size(2) < kLimit && row < kLimit;
}

// False where there is nothing to launch: the outputs are complete.
bool has_work(const Problem& p) {
  if (p.v.numel() > 0) return true;
  (p.backward ? p.dg : p.norm).zero_();
  return false;
}

void plan(Problem& p, unsigned max_cluster) {
  const int64_t element_bytes = size_of(p.dtype);
  const bool packs = aligned(p.v.const_data_ptr(), p.out.const_data_ptr(), p.backward ? p.x.const_data_ptr() : nullptr);
  p.tiling = weight_norm_tiling(machine_of(p.v), p.v.size(0), p.v.size(1), p.v.size(2), static_cast<int>(element_bytes),
                                packs, max_cluster);
}

unsigned portable_cluster(const Machine& machine) { return machine.clusters() ? 8 : 1; }

WeightNormLayer layer_of(const Problem& p) {
  WeightNormLayer a{};
  a.v = p.v.const_data_ptr();
  a.x = p.backward ? p.x.const_data_ptr() : a.v;
  a.g = p.g.const_data_ptr();
  a.norm = static_cast<float*>(p.backward ? const_cast<void*>(p.norm.const_data_ptr()) : p.norm.mutable_data_ptr());
  a.out = p.out.mutable_data_ptr();
  a.dg = p.backward ? p.dg.mutable_data_ptr() : nullptr;
  a.outer = static_cast<unsigned>(p.v.size(0));
  a.rows = static_cast<unsigned>(p.v.size(1));
  a.inner = static_cast<unsigned>(p.v.size(2));
  a.lanes = static_cast<uint16_t>(p.tiling.lanes);
  a.across = static_cast<uint16_t>(p.tiling.across);
  a.tile = static_cast<uint16_t>(p.tiling.tile);
  a.columns = p.tiling.columns;
  a.packs = p.tiling.packs;
  a.g_is_float = p.g.scalar_type() == at::kFloat;
  return a;
}

// One weight ----------------------------------------------------------------------------------------------------------

// Fills in p.tiling.
void run(const char* op, Problem& p) {
  const CudaCall call(op, p.v);
  plan(p, portable_cluster(*call.queue.machine));
  if (p.tiling.sharing == WeightNormSharing::kSplit && call.queue.machine->clusters() && p.tiling.parts <= 16)
    plan(p, weight_norm_max_cluster(call.queue, p.dtype, p.backward));
  WeightNormLayer layer = layer_of(p);
  const WeightNormTiling& t = p.tiling;
  TORCH_CHECK(static_cast<int64_t>(t.units) * t.parts < int64_t{1} << 31, op, ": more blocks than a grid may have");
  if (t.sharing == WeightNormSharing::kWhole)
    return launch_weight_norm(call.queue, p.dtype, p.backward, &layer, &t.units, 1);
  WeightNormParts parts{t.parts, t.part, nullptr, nullptr, nullptr};
  if (t.sharing == WeightNormSharing::kCluster)
    return launch_weight_norm_clusters(call.queue, p.dtype, p.backward, layer, parts, t.units);
  const int64_t tile = t.columns ? t.tile : 1, partial = int64_t{2} * t.units * t.parts * tile;
  const at::Tensor scratch = at::empty({partial + 3 * p.v.size(1)}, p.v.options().dtype(at::kDouble));
  const Counters counters = zeroed_counters(call.queue, t.units);
  parts.partial = scratch.mutable_data_ptr<double>();
  parts.factors = parts.partial + partial;
  parts.counters = counters.data;
  launch_weight_norm_split(call.queue, p.dtype, p.backward, layer, parts, t.units);
}

Pair weight_norm_fwd(const at::Tensor& v, const at::Tensor& g) {
  if (!served(v) || !fits(v)) return find_in_triton<decltype(weight_norm_fwd)>("weight_norm_fwd").call(v, g);
  Problem p = forward_problem(v, g);
  if (has_work(p)) run("weight_norm_fwd", p);
  return p.result();
}

Pair weight_norm_bwd(const at::Tensor& grad_output, const at::Tensor& v, const at::Tensor& g, const at::Tensor& norm) {
  if (!served(v) || !fits(v))
    return find_in_triton<decltype(weight_norm_bwd)>("weight_norm_bwd").call(grad_output, v, g, norm);
  Problem p = backward_problem(grad_output, v, g, norm);
  if (has_work(p)) run("weight_norm_bwd", p);
  return p.result();
}

// The weights of a model ----------------------------------------------------------------------------------------------

// Every weight whose units are a block's each goes in one launch of its dtype, the others in calls of their own.
void run_all(const char* op, std::vector<Problem>& problems) {
  constexpr Float kDtypes[] = {Float::kFloat32, Float::kFloat16, Float::kBFloat16};
  std::array<std::vector<WeightNormLayer>, 3> layers;
  std::array<std::vector<unsigned>, 3> units;
  for (Problem& p : problems) {
    if (!has_work(p)) continue;
    plan(p, portable_cluster(machine_of(p.v)));
    if (p.tiling.sharing != WeightNormSharing::kWhole) {
      run(op, p);
      continue;
    }
    const auto i = std::find(std::begin(kDtypes), std::end(kDtypes), p.dtype) - std::begin(kDtypes);
    layers[i].push_back(layer_of(p));
    units[i].push_back(p.tiling.units);
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].empty()) continue;
    const CudaCall call(op, problems[0].v);
    launch_weight_norm(call.queue, kDtypes[i], problems[0].backward, layers[i].data(), units[i].data(),
                       static_cast<int64_t>(layers[i].size()));
  }
}

// f(i) makes the i-th problem, and one(i) serves what CUDA C++ does not.
template <class F, class G>
Lists run_list(const char* op, at::TensorList v, F problem, G one) {
  Lists results{std::vector<at::Tensor>(v.size()), std::vector<at::Tensor>(v.size())};
  std::vector<Problem> problems;
  for (size_t i = 0; i < v.size(); ++i) {
    TORCH_CHECK_VALUE(v[i].device() == v[0].device(), op, ": all weights must be on one device");
    if (served(v[i]) && fits(v[i])) {
      problems.push_back(problem(i));
      std::tie(std::get<0>(results)[i], std::get<1>(results)[i]) = problems.back().result();
    } else {
      std::tie(std::get<0>(results)[i], std::get<1>(results)[i]) = one(i);
    }
  }
  run_all(op, problems);
  return results;
}

Lists weight_norm_multi_fwd(at::TensorList v, at::TensorList g) {
  return run_list(
      "weight_norm_multi_fwd", v, [&](size_t i) { return forward_problem(v[i], g[i]); },
      [&](size_t i) { return weight_norm_fwd(v[i], g[i]); });
}

Lists weight_norm_multi_bwd(at::TensorList grad_output, at::TensorList v, at::TensorList g, at::TensorList norm) {
  return run_list(
      "weight_norm_multi_bwd", v, [&](size_t i) { return backward_problem(grad_output[i], v[i], g[i], norm[i]); },
      [&](size_t i) { return weight_norm_bwd(grad_output[i], v[i], g[i], norm[i]); });
}

}  // namespace

DL_CUDA_LIBRARY(m) {
  m.impl("weight_norm_fwd", weight_norm_fwd);
  m.impl("weight_norm_bwd", weight_norm_bwd);
  m.impl("weight_norm_multi_fwd", weight_norm_multi_fwd);
  m.impl("weight_norm_multi_bwd", weight_norm_multi_bwd);
}

}  // namespace dlkernels
