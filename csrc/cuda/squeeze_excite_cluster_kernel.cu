// Squeeze-and-excitation in one launch: forward.
#include "squeeze_excite_cluster.h"

namespace dlkernels {

bool launch_squeeze_excite_cluster(const Queue& queue, const SqueezeExciteArgs& a) {
  return squeeze_excite::launch_cluster<squeeze_excite::Pass::kForward>(queue, a);
}

}  // namespace dlkernels
