// Squeeze-and-excitation in one launch: backward.
#include "squeeze_excite_cluster.h"

namespace dlkernels {

bool launch_squeeze_excite_cluster_grad(const Queue& queue, const SqueezeExciteArgs& a) {
  using squeeze_excite::Pass;
  if (a.dresidual != nullptr) return squeeze_excite::launch_cluster<Pass::kGradAct>(queue, a);
  return squeeze_excite::launch_cluster<Pass::kGrad>(queue, a);
}

}  // namespace dlkernels
