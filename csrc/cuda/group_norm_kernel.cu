// GroupNorm of [N, C, S] on GPUs, forward and backward.
#include "group_norm_kernel.h"

#include "group_norm_pieces.h"

namespace dlkernels {
namespace {

// The part of a group that a team works on: channels by positions.
struct Piece {
  bool there;                             // false for teams beyond the last group
  unsigned n, group;                      // group: n G + g
  unsigned part, position_part, channel;  // the first channel, in its sample
  int64_t offset;                         // of the first element
  Rectangle r;
};

template <int N>
DL_DEVICE Piece own_piece(const GroupNormCall& a, const Team& team) {
  const GroupNormPlan& p = a.plan;
  Piece piece;
  const unsigned block = blockIdx.x / p.parts, tile = block * p.teams + team.index;
  piece.there = tile < a.tiles;
  piece.part = blockIdx.x - block * p.parts;
  piece.group = a.first_tile + (piece.there ? tile : 0);
  piece.n = quotient(piece.group, p.by_groups);
  const unsigned along_c = piece.part / p.position_parts;
  piece.position_part = piece.part - along_c * p.position_parts;
  const unsigned channel = along_c * p.channels, position = piece.position_part * p.positions;
  const auto s = static_cast<unsigned>(a.s);
  const unsigned channels = channel < a.d ? a.d - channel : 0, positions = position < s ? s - position : 0;
  piece.r.rows = !piece.there ? 0 : channels < p.channels ? channels : p.channels;
  piece.r.cols = positions < p.positions ? positions : p.positions;
  piece.r.runs = piece.r.cols / N;
  piece.r.stride = a.s;
  piece.r.by_runs = p.by_run[piece.r.cols < p.positions];
  if (piece.r.cols == 0) piece.r.rows = 0;
  piece.channel = (piece.group - piece.n * a.groups) * a.d + channel;
  piece.offset = (static_cast<int64_t>(piece.group) * a.d + channel) * a.s + position;
  return piece;
}

// Elements of another part of the same group.
DL_DEVICE float elements_of_part(const GroupNormCall& a, unsigned part) {
  const GroupNormPlan& p = a.plan;
  const unsigned along_c = part / p.position_parts, channel = along_c * p.channels;
  const unsigned position = (part - along_c * p.position_parts) * p.positions;
  const unsigned channels = a.d - channel < p.channels ? a.d - channel : p.channels;
  const auto left = static_cast<unsigned>(a.s) - position;
  return static_cast<float>(channels) * static_cast<float>(left < p.positions ? left : p.positions);
}

struct Statistics {
  float mean, rstd;
};

// Mean and m2 of a group from those of its parts, around the first one's mean: exact where all are equal.
DL_DEVICE Statistics merged(const GroupNormCall& a, const Piece& p, const Team& team, GroupNormShared& shared,
                            float count) {
  const float* parts = a.parts + int64_t{p.group} * a.plan.parts * 2;
  const float origin = load_one<Use::kAgain>(parts);
  float sum[1] = {0.0f}, m2[1] = {0.0f};
  for (unsigned i = team.thread; i < a.plan.parts; i += team.threads)
    sum[0] += elements_of_part(a, i) * (load_one<Use::kAgain>(parts + 2 * i) - origin);
  team_sum(sum, team, shared.sums[0]);
  const float mean = origin + sum[0] / count;
  for (unsigned i = team.thread; i < a.plan.parts; i += team.threads) {
    const float off = load_one<Use::kAgain>(parts + 2 * i) - mean;
    m2[0] += load_one<Use::kAgain>(parts + 2 * i + 1) + elements_of_part(a, i) * off * off;
  }
  team_sum(m2, team, shared.sums[1]);
  return {mean, reciprocal_std(m2[0], count, a.eps)};
}

DL_DEVICE void fill_table(const GroupNormCall& a, const Piece& p, const Team& team, AffineTerms* table) {
  for (unsigned row = team.thread; row < p.r.rows; row += team.threads) table[row] = affine_of(a, p.n, p.channel + row);
}

// Math      M = C/G * S values of a group;  mean = sum x / M, m2 = sum (x - mean)^2, rstd = 1 / sqrt(m2 / M + eps);
//           y = act((x - mean) rstd a[c] + b[c] + residual). The mean is corrected by what the second pass finds.
// Traffic   per element: read x (and residual), write y. Split: x is read again, from L2.
// Grid      groups / teams * parts blocks; a group's parts are the blocks of a cluster, or of both launches of a split.
// Requires  packs: S % N == 0 and 16-byte aligned x, residual, y; N = 1 else. Shared memory as planned.
// Result    bitwise reproducible: fixed trees, parts in the order of their index.
template <class T, int N>
DL_KERNEL(kGroupNormThreads, 2)
group_norm_fwd_kernel(DL_CONSTANT GroupNormCall a) {
  GroupNormShared& shared = *shared_memory<GroupNormShared>();
  const Team team = own_team(a.plan);
  const Piece p = own_piece<N>(a, team);
  unsigned char* room = room_of(a.plan, shared, team);
  auto* table = reinterpret_cast<AffineTerms*>(room + a.plan.table);
  T* x = fetch<N>(reinterpret_cast<T*>(room), static_cast<const T*>(a.x) + p.offset, p.r, team);
  close_copies();
  allow_next_kernel();
  if (a.stage != GroupNormStage::kSums) fill_table(a, p, team, table);
  copies_done();
  GROUP_NORM_TEAM_BARRIER(team);

  const unsigned packs = p.r.rows * p.r.runs;
  const float whole = static_cast<float>(a.d) * static_cast<float>(a.s);
  Statistics stats;
  if (a.stage == GroupNormStage::kRest) {
    wait_for_previous_kernel();
    stats = {load_one<Use::kAgain>(a.mean + p.group), load_one<Use::kAgain>(a.rstd + p.group)};
  } else {
    const float count = a.stage == GroupNormStage::kSums ? static_cast<float>(p.r.rows * p.r.cols) : whole;
    float sum[1] = {0.0f}, off[2] = {0.0f, 0.0f};
    for (unsigned i = team.thread; i < packs; i += team.threads) sum[0] += sum_of(held<N>(x + i * N));
    team_sum(sum, team, shared.sums[0]);
    cluster_sum_of_blocks(sum, shared.slots[0]);
    const float mean = sum[0] / count;
    for (unsigned i = team.thread; i < packs; i += team.threads) {
      Floats<N> v = held<N>(x + i * N), squares;
      DL_UNROLL
      for (int j = 0; j < N; ++j) v[j] -= mean, squares[j] = v[j] * v[j];
      off[0] += sum_of(v);
      off[1] += sum_of(squares);
    }
    team_sum(off, team, shared.sums[1]);
    cluster_sum_of_blocks(off, shared.slots[1]);
    if (cluster_size() > 1) cluster_arrive();
    const float m2 = not_below_zero(off[1] - off[0] * (off[0] / count));
    stats = {mean + off[0] / count, 0.0f};
    if (a.stage == GroupNormStage::kSums) {
      if (team.thread == 0) {
        float* part = a.parts + (int64_t{p.group} * a.plan.parts + p.part) * 2;
        store_one<Use::kAgain>(part, stats.mean);
        store_one<Use::kAgain>(part + 1, m2);
      }
      if (!last_block(a.counters + p.group, a.plan.parts, shared.last)) return;
      stats = merged(a, p, team, shared, whole);
    } else {
      stats.rstd = reciprocal_std(m2, count, a.eps);
    }
    if (p.there && team.thread == 0 && (p.part == 0 || a.stage == GroupNormStage::kSums)) {
      store_one<Use::kAgain>(a.mean + p.group, stats.mean);
      store_one<Use::kAgain>(a.rstd + p.group, stats.rstd);
    }
    if (a.stage == GroupNormStage::kSums) return;
  }

  const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + p.offset;
  T* y = static_cast<T*>(a.y) + p.offset;
  for (unsigned i = team.thread; i < packs; i += team.threads) {
    const unsigned row = quotient(i, p.r.by_runs);
    const int64_t at = row * p.r.stride + (i - row * p.r.runs) * N;
    const AffineTerms t = table[row];
    const ChannelMap<float> map{stats.mean, stats.rstd * t.a, t.b};
    Floats<N> z = held<N>(x + i * N);
    DL_UNROLL
    for (int j = 0; j < N; ++j) z[j] = group_norm_before_activation(z[j], map);
    if (residual != nullptr) {
      const Floats<N> r = load<N>(residual + at);
      DL_UNROLL
      for (int j = 0; j < N; ++j) z[j] += r[j];
    }
    activate_all(a.activation, z);
    if constexpr (N > 1) store<N>(y + at, z);
    else x[i] = from_float<T>(z[0]);
  }
  if constexpr (N == 1) {
    GROUP_NORM_TEAM_BARRIER(team);
    put_back(y, x, p.r, team);
  }
  if (cluster_size() > 1) cluster_wait();
}

// dz and x - mean of N values, from x, dy and the residual (nullptr where nothing needs it).
template <int N, class T>
DL_DEVICE void upstream(const T* x, const T* dy, const T* residual, const ChannelMap<float>& map, int activation,
                        Floats<N>& off, Floats<N>& dz) {
  off = held<N>(x);
  dz = held<N>(dy);
  if (activation != 0) {
    Floats<N> z;
    DL_UNROLL
    for (int j = 0; j < N; ++j) z[j] = group_norm_before_activation(off[j], map);
    if (residual != nullptr) {
      const Floats<N> r = held<N>(residual);
      DL_UNROLL
      for (int j = 0; j < N; ++j) z[j] += r[j];
    }
    times_slope(activation, dz, z);
  }
  DL_UNROLL
  for (int j = 0; j < N; ++j) off[j] -= map.mean;
}

// Math      dz = dy act'(z), z as in the forward pass;  da = sum dz x_hat, db = sum dz per channel;
//           dx = rstd (a dz - mean_g(a dz) - x_hat mean_g(a dz x_hat)),  dresidual = dz.
// Traffic   per element: read x, dy (and residual, with an activation), write dx (and dresidual). Split: x, dy and
//           residual are read again, from L2.
// Grid      as the forward pass.
// Requires  as the forward pass, for dy, dx and dresidual too.
// Result    bitwise reproducible; the sums of a channel's parts go to a.sums.
template <class T, int N>
DL_KERNEL(kGroupNormFewThreads, 3)
group_norm_bwd_kernel(DL_CONSTANT GroupNormCall a) {
  GroupNormShared& shared = *shared_memory<GroupNormShared>();
  const GroupNormPlan& plan = a.plan;
  const Team team = own_team(plan);
  const Piece p = own_piece<N>(a, team);
  unsigned char* room = room_of(plan, shared, team);
  auto* table = reinterpret_cast<AffineTerms*>(room + plan.table);
  auto* partial = reinterpret_cast<AffineTerms*>(room + plan.partial);  // sums of dz (x - mean), of dz
  const bool keeps_residual = a.residual != nullptr && a.activation != 0;
  T* x = fetch<N>(reinterpret_cast<T*>(room), static_cast<const T*>(a.x) + p.offset, p.r, team);
  T* dy = fetch<N>(reinterpret_cast<T*>(room + plan.array), static_cast<const T*>(a.dy) + p.offset, p.r, team);
  const T* residual = nullptr;
  if (keeps_residual)
    residual =
        fetch<N>(reinterpret_cast<T*>(room + 2 * plan.array), static_cast<const T*>(a.residual) + p.offset, p.r, team);
  close_copies();
  allow_next_kernel();
  const float mean = load_one(a.mean + p.group), rstd = load_one(a.rstd + p.group);
  fill_table(a, p, team, table);
  copies_done();
  GROUP_NORM_TEAM_BARRIER(team);

  float sums[2] = {0.0f, 0.0f};  // over the group: a dz x_hat, a dz
  if (a.stage == GroupNormStage::kRest) {
    wait_for_previous_kernel();
    sums[0] = load_one<Use::kAgain>(a.terms + int64_t{p.group} * 2);
    sums[1] = load_one<Use::kAgain>(a.terms + int64_t{p.group} * 2 + 1);
  } else {
    const unsigned worker = team.thread / plan.lanes, workers = team.threads / plan.lanes;
    const unsigned own = team.thread & (plan.lanes - 1), units = p.r.rows * plan.chunks;
    for (unsigned first = 0; first < plan.channels * plan.chunks; first += workers) {
      const unsigned unit = first + worker;
      float v[2] = {0.0f, 0.0f};
      if (unit < units) {
        const unsigned row = quotient(unit, plan.by_chunks), begin = (unit - row * plan.chunks) * plan.chunk;
        const unsigned end = begin + plan.chunk < p.r.runs ? begin + plan.chunk : p.r.runs;
        const AffineTerms t = table[row];
        const ChannelMap<float> map{mean, rstd * t.a, t.b};
        for (unsigned i = begin + own; i < end; i += plan.lanes) {
          const unsigned at = (row * p.r.runs + i) * N;
          Floats<N> off, dz;
          upstream(x + at, dy + at, residual == nullptr ? nullptr : residual + at, map, a.activation, off, dz);
          DL_UNROLL
          for (int j = 0; j < N; ++j) off[j] *= dz[j];
          v[0] += sum_of(off);
          v[1] += sum_of(dz);
        }
      }
      v[0] = warp_sum(v[0], static_cast<int>(plan.lanes));
      v[1] = warp_sum(v[1], static_cast<int>(plan.lanes));
      if (own == 0 && unit < units) partial[unit] = {v[0], v[1]};
    }
    GROUP_NORM_TEAM_BARRIER(team);
    for (unsigned row = team.thread; row < p.r.rows; row += team.threads) {
      float da = 0.0f, db = 0.0f;
      for (unsigned k = 0; k < plan.chunks; ++k) {
        da += partial[row * plan.chunks + k].a;
        db += partial[row * plan.chunks + k].b;
      }
      da *= rstd;
      if (a.sums != nullptr) {
        float* to = a.sums + (int64_t{p.n} * plan.position_parts + p.position_part) * a.c + p.channel + row;
        store_one<Use::kAgain>(to, da);
        store_one<Use::kAgain>(to + a.n * plan.position_parts * a.c, db);
      }
      sums[0] += table[row].a * da;
      sums[1] += table[row].a * db;
    }
    team_sum(sums, team, shared.sums[0]);
    if (a.stage == GroupNormStage::kSums) {
      float* parts = a.parts + int64_t{p.group} * plan.parts * 2;
      if (team.thread == 0) {
        store_one<Use::kAgain>(parts + 2 * p.part, sums[0]);
        store_one<Use::kAgain>(parts + 2 * p.part + 1, sums[1]);
      }
      if (!last_block(a.counters + p.group, plan.parts, shared.last)) return;
      sums[0] = sums[1] = 0.0f;
      for (unsigned i = team.thread; i < plan.parts; i += team.threads) {
        sums[0] += load_one<Use::kAgain>(parts + 2 * i);
        sums[1] += load_one<Use::kAgain>(parts + 2 * i + 1);
      }
      team_sum(sums, team, shared.sums[1]);
      if (team.thread == 0) {
        store_one<Use::kAgain>(a.terms + int64_t{p.group} * 2, sums[0]);
        store_one<Use::kAgain>(a.terms + int64_t{p.group} * 2 + 1, sums[1]);
      }
      return;
    }
    cluster_sum_of_blocks(sums, shared.slots[0]);
    if (cluster_size() > 1) cluster_arrive();
  }

  const float whole = static_cast<float>(a.d) * static_cast<float>(a.s);
  GradientMap<float> to_dx = gradient_map(mean, rstd, sums[0], sums[1], whole);
  T* dx = static_cast<T*>(a.dx) + p.offset;
  T* dresidual = a.dresidual == nullptr ? nullptr : static_cast<T*>(a.dresidual) + p.offset;
  for (unsigned i = team.thread; i < p.r.rows * p.r.runs; i += team.threads) {
    const unsigned row = quotient(i, p.r.by_runs);
    const AffineTerms t = table[row];
    to_dx.p = rstd * t.a;
    Floats<N> off, dz;
    upstream(x + i * N, dy + i * N, residual == nullptr ? nullptr : residual + i * N, {mean, to_dx.p, t.b},
             a.activation, off, dz);
    DL_UNROLL
    for (int j = 0; j < N; ++j) off[j] = group_norm_input_gradient_from_deviation(off[j], dz[j], to_dx);
    if constexpr (N > 1) {
      const int64_t at = row * p.r.stride + (i - row * p.r.runs) * N;
      store<N>(dx + at, off);
      if (dresidual != nullptr) store<N>(dresidual + at, dz);
    } else {
      x[i] = from_float<T>(off[0]);
      dy[i] = from_float<T>(dz[0]);
    }
  }
  if constexpr (N == 1) {
    GROUP_NORM_TEAM_BARRIER(team);
    put_back(dx, x, p.r, team);
    if (dresidual != nullptr) put_back(dresidual, dy, p.r, team);
  }
  if (cluster_size() > 1 && a.stage == GroupNormStage::kBoth) cluster_wait();
}

struct Kernels {
  template <class T, int N>
  static auto forward() {
    return group_norm_fwd_kernel<T, N>;
  }
  template <class T, int N>
  static auto backward() {
    return group_norm_bwd_kernel<T, N>;
  }
};

}  // namespace

bool group_norm_clusters_run(const Queue& queue, const GroupNormCall& a) { return clusters_run<Kernels>(queue, a); }

void launch_group_norm(const Queue& queue, const GroupNormCall& a) { launch_in_batches<Kernels>(queue, a); }

}  // namespace dlkernels
