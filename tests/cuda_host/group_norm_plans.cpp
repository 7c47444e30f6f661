// Plans of GroupNorm for the machine and the shapes on standard input, one to a line: see test_group_norm_plans.py.
#include "../../csrc/cuda/group_norm_plan.h"

#include <cstdio>

int main() {
  using namespace dlkernels;
  Machine m;
  long long l2, n, c, s, groups;
  int itemsize, arrays, backward, last, packs, most;
  if (std::scanf("%d %d %d %d %d %lld", &m.arch, &m.multiprocessors, &m.shared_per_block, &m.shared_per_multiprocessor,
                 &m.threads_per_multiprocessor, &l2) != 6)
    return 1;
  m.l2 = l2;
  while (std::scanf("%lld %lld %lld %lld %d %d %d %d %d %d", &n, &c, &s, &groups, &itemsize, &arrays, &backward, &last,
                    &packs, &most) == 10) {
    const GroupNormPlan p =
        plan_group_norm(m, {n, c, s, groups, itemsize, arrays, backward != 0, last != 0, packs != 0}, most);
    std::printf("%d %d %u %u %u %u %u %u %u %u %u %u %u %u %u %u\n", p.served, p.split, p.cluster, p.team, p.teams,
                p.tile_groups, p.tiles, p.channel_parts, p.position_parts, p.channels, p.positions, p.batch, p.lanes,
                p.chunks, p.chunk, p.shared);
  }
}
