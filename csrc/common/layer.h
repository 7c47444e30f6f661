// How layers see an input (N, C, d1, ...): three dimensions in memory order, (N, C, S) or channels_last (N, S, C).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

namespace dlkernels {

struct Rows {
  int64_t n = 0, c = 0, s = 1;
  bool channels_last = false;
  bool dense = false;  // false: in neither order, so that a copy is needed
};

// The channels innermost, everything else as if contiguous.
inline bool is_channels_last(const at::Tensor& x) {
  int64_t expected = 1;
  for (int64_t i = x.dim(); i-- > 1;) {
    const int64_t d = i == x.dim() - 1 ? 1 : i + 1;  // channels, then the positions from the last to the first
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return x.size(0) == 1 || x.stride(0) == expected;
}

// x (N, C, d1, ...), of at least two dimensions.
inline Rows rows_of(const at::Tensor& x) {
  Rows rows{x.size(0), x.size(1)};
  for (int64_t d = 2; d < x.dim(); ++d) rows.s *= x.size(d);
  const bool contiguous = x.is_contiguous();
  rows.channels_last = x.dim() > 2 && !contiguous;
  rows.dense = contiguous || (x.dim() > 2 && is_channels_last(x));
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

// `x` in the very strides of `like`: itself, or a copy.
inline at::Tensor in_layout_of(const at::Tensor& x, const at::Tensor& like) {
  if (x.strides() == like.strides() || x.numel() == 0) return x;
  return at::empty_like(like, like.options().dtype(x.scalar_type())).copy_(x);
}

// A parameter of a layer: its shape, and the dtype of the input or float32 beside half precision; contiguous.
inline bool fits_parameter(const at::Tensor& p, const at::Tensor& x, at::IntArrayRef sizes) {
  const bool half = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  return (p.scalar_type() == x.scalar_type() || (half && p.scalar_type() == at::kFloat)) && p.sizes() == sizes &&
         p.is_contiguous();
}

}  // namespace dlkernels
