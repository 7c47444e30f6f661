// Squeeze-and-excitation in two sweeps: the sums of the backward pass.
#include "squeeze_excite_walk.h"

namespace dlkernels {

void launch_squeeze_excite_sums_grad(const Queue& queue, const SqueezeExciteArgs& a) {
  using squeeze_excite::Pass;
  if (a.dresidual != nullptr) return squeeze_excite::launch_sums<Pass::kGradAct>(queue, a);
  squeeze_excite::launch_sums<Pass::kGrad>(queue, a);
}

}  // namespace dlkernels
