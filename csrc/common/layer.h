// How layers see an input (N, C, d1, ...): three dimensions in memory order, (N, C, S) or channels_last (N, S, C).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <optional>

#include "host.h"

namespace dlkernels {

struct Rows {
  int64_t n = 0, c = 0, s = 1;
  bool channels_last = false;
  bool dense = false;  // false: in neither order, so that a copy is needed
};

// x (N, C, d1, ...), of at least two dimensions.
inline Rows rows_of(const at::Tensor& x) {
  Rows rows{x.size(0), x.size(1)};
  for (int64_t d = 2; d < x.dim(); ++d) rows.s *= x.size(d);
  rows.channels_last = channels_last(x);
  rows.dense = rows.channels_last || x.is_contiguous();
  return rows;
}

// The rows of an operator's input, which has three dimensions already.
inline Rows rows_of(const at::Tensor& x, bool channels_last) {
  return {x.size(0), x.size(channels_last ? 2 : 1), x.size(channels_last ? 1 : 2), channels_last, true};
}

// A view of a dense x as an operator sees it, differentiable.
inline at::Tensor as_rows(const at::Tensor& x, const Rows& rows) {
  if (rows.channels_last) return x.movedim(1, -1).reshape({rows.n, rows.s, rows.c});
  return x.reshape({rows.n, rows.c, rows.s});
}

// The way back, to the shape of `like`.
inline at::Tensor from_rows(const at::Tensor& y, const at::Tensor& like, const Rows& rows) {
  if (!y.defined() || !rows.channels_last) return y.defined() ? y.reshape(like.sizes()) : y;
  at::DimVector sizes(like.sizes());
  sizes.erase(sizes.begin() + 1);
  sizes.push_back(rows.c);
  return y.reshape(sizes).movedim(-1, 1);
}

// A parameter of a layer: its shape, and the dtype of the input or float32 beside half precision; contiguous.
inline bool fits_parameter(const at::Tensor& p, const at::Tensor& x, at::IntArrayRef sizes) {
  const bool half = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  return (p.scalar_type() == x.scalar_type() || (half && p.scalar_type() == at::kFloat)) && p.sizes() == sizes &&
         p.is_contiguous();
}

// Optional tensors: undefined stands for what is not given.
using Optional = std::optional<at::Tensor>;
inline at::Tensor contiguous(const Optional& x) {
  return x.has_value() && x->defined() ? x->contiguous() : at::Tensor();
}
inline const void* data_or_null(const at::Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }
inline void* written(const at::Tensor& x) { return x.defined() ? x.mutable_data_ptr() : nullptr; }
inline at::Tensor empty_or_undefined(const at::Tensor& like) {
  return like.defined() ? at::empty_like(like) : at::Tensor();
}
// What an operator returns for a gradient that there is none of.
inline at::Tensor given(const at::Tensor& x, const at::Tensor& like) {
  return x.defined() ? x : at::empty({0}, like.options());
}

}  // namespace dlkernels
