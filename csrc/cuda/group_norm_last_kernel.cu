#include "group_norm_kernel.h"
namespace dlkernels {
bool group_norm_last_clusters_run(const Queue&, const GroupNormCall&) { return false; }
void launch_group_norm_last(const Queue&, const GroupNormCall&) { throw std::runtime_error("channels_last"); }
}  // namespace dlkernels
