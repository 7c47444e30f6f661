// Squeeze-and-excitation in two sweeps: the sums of the forward pass.
#include "squeeze_excite_walk.h"

namespace dlkernels {

void launch_squeeze_excite_sums(const Queue& queue, const SqueezeExciteArgs& a) {
  squeeze_excite::launch_sums<squeeze_excite::Pass::kForward>(queue, a);
}

}  // namespace dlkernels
