// The center-loss family on CPU tensors, below autograd: what the operators and the eager entry share.
#pragma once

#include "../common/loss.h"

namespace dlkernels {

struct CenterLossInputs {
  const at::Tensor &features, &labels, &centers, &attention;  // dense; attention may be undefined
  bool logits;
  int64_t ignore_index;
};

struct CenterUpdate {
  double alpha;
  bool ema;
  double island_weight;
};

struct CenterLossResult {
  at::Tensor loss, dx, dattention;  // the gradients are undefined where they were not asked for
  double divisor;
};

// With `update` the centers move after the loss and the gradients have seen them.
CenterLossResult center_loss_forward(const CenterLossInputs& in, int64_t reduction, bool need_grad,
                                     const CenterUpdate* update);

struct CenterLossGrads {
  at::Tensor dx, dcenters, dattention;  // undefined where there is none
};
CenterLossGrads center_loss_backward(const at::Tensor& grad_output, const CenterLossInputs& in, bool need_centers);

void update_centers(const CenterLossInputs& in, const CenterUpdate& update);

}  // namespace dlkernels
