// GroupNorm of [N, S, C], the channels innermost, on GPUs, forward and backward.
#include "group_norm_kernel.h"
#include "group_norm_pieces.h"

namespace dlkernels {
namespace {

// The part of a tile that a team works on: positions by the channels of some groups.
struct Piece {
  bool there;  // false for teams beyond the last tile
  unsigned n, tile, part;
  unsigned group, groups;  // the first one, in its sample; how many
  unsigned channel;        // the first one
  unsigned row, rows;      // a thread adds up positions row, row + rows, ...; none if row >= rows
  unsigned vector;         // and channels vector * N on; if a row has more vectors than the team threads, others too
  int64_t offset;          // of the first element
  Rectangle r;
};

template <int N>
DL_DEVICE Piece own_piece(const GroupNormCall& a, const Team& team) {
  const GroupNormPlan& p = a.plan;
  Piece piece;
  const unsigned block = blockIdx.x / p.parts, tile = block * p.teams + team.index;
  piece.there = tile < a.tiles;
  piece.part = blockIdx.x - block * p.parts;
  piece.tile = a.first_tile + (piece.there ? tile : 0);
  piece.n = quotient(piece.tile, p.by_tiles);
  piece.group = (piece.tile - piece.n * p.tiles_of_sample) * p.tile_groups;
  piece.groups = a.groups - piece.group < p.tile_groups ? a.groups - piece.group : p.tile_groups;
  piece.channel = piece.group * a.d;
  const unsigned position = piece.part * p.positions;
  const auto s = static_cast<unsigned>(a.s);
  const unsigned positions = position < s ? s - position : 0;
  piece.r.rows = !piece.there ? 0 : positions < p.positions ? positions : p.positions;
  piece.r.cols = piece.groups * a.d;
  piece.r.runs = piece.r.cols / N;
  piece.r.stride = a.c;
  piece.r.by_runs = p.by_run[piece.groups < p.tile_groups];
  piece.rows = p.rows;
  piece.row = quotient(team.thread, piece.r.by_runs);
  piece.vector = team.thread - piece.row * piece.r.runs;
  piece.offset = (piece.n * a.s + position) * a.c + piece.channel;
  return piece;
}

DL_DEVICE float elements_of_part(const GroupNormCall& a, unsigned part) {
  const unsigned left = static_cast<unsigned>(a.s) - part * a.plan.positions;
  return static_cast<float>(left < a.plan.positions ? left : a.plan.positions) * static_cast<float>(a.d);
}

// Tables of a team in shared memory.
struct Tables {
  AffineTerms* affine;  // [channels]
  float* partial;       // [2, rows, channels]: sums of a thread
  float* columns;       // [2, channels]
  float* values;        // [8, groups]
  DL_DEVICE Tables(const GroupNormPlan& p, unsigned char* room)
      : affine(reinterpret_cast<AffineTerms*>(room + p.table)),
        partial(reinterpret_cast<float*>(room + p.partial)),
        columns(reinterpret_cast<float*>(room + p.columns)),
        values(reinterpret_cast<float*>(room + p.values)) {}
};

DL_DEVICE void fill_table(const GroupNormCall& a, const Piece& p, const Team& team, AffineTerms* table) {
  if (!p.there) return;
  for (unsigned c = team.thread; c < p.r.cols; c += team.threads) table[c] = affine_of(a, p.n, p.channel + c);
}

// f(lane, group, whether it exists) for the groups of the tile, each with as many threads as a warp's collective has.
template <class F>
DL_DEVICE void for_groups(const GroupNormCall& a, const Piece& p, const Team& team, F f) {
  const unsigned width = team.width(), lane = team.thread & (width - 1);
  for (unsigned first = 0; first < a.plan.tile_groups; first += team.threads / width) {
    const unsigned g = first + team.thread / width;
    f(lane, g, g < p.groups && p.there);
  }
}

// The threads' sums of their channels added up over rows; f(channel, K sums) may change them; then added up over each
// group, to values[k * groups of the tile + group]. Behind a barrier of the team.
template <int K, class F>
DL_DEVICE void sum_groups(const GroupNormCall& a, const Piece& p, const Team& team, const Tables& t, float* values,
                          F f) {
  GROUP_NORM_TEAM_BARRIER(team);
  for (unsigned c = team.thread; c < p.r.cols; c += team.threads) {
    float sums[K];
    DL_UNROLL
    for (int k = 0; k < K; ++k) {
      sums[k] = 0.0f;
      for (unsigned row = 0; row < p.rows; ++row) sums[k] += t.partial[(k * p.rows + row) * p.r.cols + c];
    }
    f(c, sums);
    DL_UNROLL
    for (int k = 0; k < K; ++k) t.columns[k * p.r.cols + c] = sums[k];
  }
  GROUP_NORM_TEAM_BARRIER(team);
  for_groups(a, p, team, [&](unsigned lane, unsigned g, bool there) {
    DL_UNROLL
    for (int k = 0; k < K; ++k) {
      float sum = 0.0f;
      for (unsigned c = lane; there && c < a.d; c += team.width()) sum += t.columns[k * p.r.cols + g * a.d + c];
      sum = warp_sum(sum, team.width());
      if (lane == 0 && there) values[k * a.plan.tile_groups + g] = sum;
    }
  });
}

// A barrier of all that share a tile, and what one value is over them. The cluster's blocks come in their order.
DL_DEVICE void tile_barrier(const Team& team) {
  if (cluster_size() > 1) {
    cluster_barrier();
  } else {
    GROUP_NORM_TEAM_BARRIER(team);
  }
}
DL_DEVICE float over_tile(float* value) { return cluster_size() == 1 ? *value : sum_over_cluster(value); }

// f(channel in the tile, index of it among N) for the channels of a vector.
template <int N, class F>
DL_DEVICE Floats<N> of_channels(unsigned vector, F f) {
  Floats<N> x;
  DL_UNROLL
  for (int j = 0; j < N; ++j) x[j] = f(vector * N + j);
  return x;
}

template <int N>
DL_DEVICE void put(float* to, const Floats<N>& x) {
  DL_UNROLL
  for (int j = 0; j < N; ++j) to[j] = x[j];
}

// What the channels of a vector are mapped with.
template <int N>
struct Maps {
  Floats<N> mean, slope, offset;
  DL_DEVICE Maps(const GroupNormCall& a, const Tables& t, const float* means, const float* rstds, unsigned v)
      : mean(of_channels<N>(v, [&](unsigned c) { return means[quotient(c, a.plan.by_d)]; })),
        slope(of_channels<N>(v, [&](unsigned c) { return rstds[quotient(c, a.plan.by_d)] * t.affine[c].a; })),
        offset(of_channels<N>(v, [&](unsigned c) { return t.affine[c].b; })) {}
};

// Two numbers of a group in a part of the tile.
DL_DEVICE float* of_part(const GroupNormCall& a, const Piece& p, unsigned part, unsigned g) {
  return a.parts + ((int64_t{p.tile} * a.plan.parts + part) * a.plan.tile_groups + g) * 2;
}

// Mean and m2 of the groups from those of the parts, around the first one's mean: exact where all are equal.
DL_DEVICE void merge(const GroupNormCall& a, const Piece& p, const Team& team, float* means, float* rstds) {
  const float whole = static_cast<float>(a.d) * static_cast<float>(a.s);
  for_groups(a, p, team, [&](unsigned lane, unsigned g, bool there) {
    const float origin = there ? load_one<Use::kAgain>(of_part(a, p, 0, g)) : 0.0f;
    float sum = 0.0f, m2 = 0.0f;
    for (unsigned i = lane; there && i < a.plan.parts; i += team.width())
      sum += elements_of_part(a, i) * (load_one<Use::kAgain>(of_part(a, p, i, g)) - origin);
    const float mean = origin + warp_sum(sum, team.width()) / whole;
    for (unsigned i = lane; there && i < a.plan.parts; i += team.width()) {
      const float off = load_one<Use::kAgain>(of_part(a, p, i, g)) - mean;
      m2 += load_one<Use::kAgain>(of_part(a, p, i, g) + 1) + elements_of_part(a, i) * off * off;
    }
    m2 = warp_sum(m2, team.width());
    if (lane == 0 && there) means[g] = mean, rstds[g] = reciprocal_std(m2, whole, a.eps);
  });
}

// Math      as group_norm_fwd_kernel, for the groups of a tile at once.
// Traffic   per element: read x (and residual), write y. Split: x is read again, from L2.
// Grid      tiles / teams * parts blocks; parts are positions. A thread has channels of its own.
// Requires  packs: C % N == 0 and 16-byte aligned x, residual, y; N = 1 else. Shared memory as planned.
// Result    bitwise reproducible: fixed orders of positions, channels and parts.
template <class T, int N>
DL_KERNEL(kGroupNormFewThreads, 2)
group_norm_last_fwd_kernel(DL_CONSTANT GroupNormCall a) {
  GroupNormShared& shared = *shared_memory<GroupNormShared>();
  const GroupNormPlan& plan = a.plan;
  const Team team = own_team(plan);
  const Piece p = own_piece<N>(a, team);
  unsigned char* room = room_of(plan, shared, team);
  const Tables t(plan, room);
  T* x = fetch<N>(reinterpret_cast<T*>(room), static_cast<const T*>(a.x) + p.offset, p.r, team);
  close_copies();
  allow_next_kernel();
  if (a.stage != GroupNormStage::kSums) fill_table(a, p, team, t.affine);
  copies_done();
  GROUP_NORM_TEAM_BARRIER(team);

  float* means = t.values + 3 * plan.tile_groups;
  float* rstds = means + plan.tile_groups;
  const float whole = static_cast<float>(a.d) * static_cast<float>(a.s);
  const int64_t first_group = int64_t{p.n} * a.groups + p.group;
  const auto no_change = [](unsigned, float*) {};
  if (a.stage == GroupNormStage::kRest) {
    wait_for_previous_kernel();
    for (unsigned g = team.thread; g < p.groups; g += team.threads) {
      const int64_t at = first_group + g;
      means[g] = load_one<Use::kAgain>(a.mean + at);
      rstds[g] = load_one<Use::kAgain>(a.rstd + at);
    }
  } else {
    const float count =
        a.stage == GroupNormStage::kSums ? static_cast<float>(a.d) * static_cast<float>(p.r.rows) : whole;
    for (unsigned v = p.vector; p.row < p.rows && v < p.r.runs; v += team.threads) {
      Floats<N> sum{};
      for (unsigned row = p.row; row < p.r.rows; row += p.rows) {
        const Floats<N> values = held<N>(x + row * p.r.cols + v * N);
        DL_UNROLL
        for (int j = 0; j < N; ++j) sum[j] += values[j];
      }
      put(t.partial + p.row * p.r.cols + v * N, sum);
    }
    sum_groups<1>(a, p, team, t, t.values, no_change);
    tile_barrier(team);
    for (unsigned g = team.thread; g < p.groups; g += team.threads) means[g] = over_tile(t.values + g) / count;
    GROUP_NORM_TEAM_BARRIER(team);
    for (unsigned v = p.vector; p.row < p.rows && v < p.r.runs; v += team.threads) {
      const Floats<N> mean = of_channels<N>(v, [&](unsigned c) { return means[quotient(c, plan.by_d)]; });
      Floats<N> sum{}, squares{};
      for (unsigned row = p.row; row < p.r.rows; row += p.rows) {
        const Floats<N> values = held<N>(x + row * p.r.cols + v * N);
        DL_UNROLL
        for (int j = 0; j < N; ++j) {
          const float off = values[j] - mean[j];
          sum[j] += off;
          squares[j] += off * off;
        }
      }
      put(t.partial + p.row * p.r.cols + v * N, sum);
      put(t.partial + (p.rows + p.row) * p.r.cols + v * N, squares);
    }
    float* offs = t.values + plan.tile_groups;
    sum_groups<2>(a, p, team, t, offs, no_change);
    tile_barrier(team);
    for (unsigned g = team.thread; g < p.groups; g += team.threads) {
      const float off = over_tile(offs + g), m2 = over_tile(offs + plan.tile_groups + g);
      const float around_mean = not_below_zero(m2 - off * (off / count));
      means[g] += off / count;
      rstds[g] = reciprocal_std(around_mean, count, a.eps);
      if (a.stage == GroupNormStage::kSums && p.there) {
        float* part = of_part(a, p, p.part, g);
        store_one<Use::kAgain>(part, means[g]);
        store_one<Use::kAgain>(part + 1, around_mean);
      }
    }
    if (cluster_size() > 1) cluster_arrive();
    if (a.stage == GroupNormStage::kSums) {
      if (!last_block(a.counters + p.tile, plan.parts, shared.last)) return;
      merge(a, p, team, means, rstds);
      GROUP_NORM_TEAM_BARRIER(team);
    }
    if (p.there && (p.part == 0 || a.stage == GroupNormStage::kSums)) {
      for (unsigned g = team.thread; g < p.groups; g += team.threads) {
        store_one<Use::kAgain>(a.mean + first_group + g, means[g]);
        store_one<Use::kAgain>(a.rstd + first_group + g, rstds[g]);
      }
    }
    if (a.stage == GroupNormStage::kSums) return;
  }
  GROUP_NORM_TEAM_BARRIER(team);

  const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + p.offset;
  T* y = static_cast<T*>(a.y) + p.offset;
  for (unsigned v = p.vector; p.there && p.row < p.rows && v < p.r.runs; v += team.threads) {
    const Maps<N> maps(a, t, means, rstds, v);
    for (unsigned row = p.row; row < p.r.rows; row += p.rows) {
      T* own = x + row * p.r.cols + v * N;
      const int64_t at = row * p.r.stride + v * N;
      Floats<N> z = held<N>(own);
      DL_UNROLL
      for (int j = 0; j < N; ++j)
        z[j] = group_norm_before_activation(z[j], ChannelMap<float>{maps.mean[j], maps.slope[j], maps.offset[j]});
      if (residual != nullptr) {
        const Floats<N> r = load<N>(residual + at);
        DL_UNROLL
        for (int j = 0; j < N; ++j) z[j] += r[j];
      }
      activate_all(a.activation, z);
      if constexpr (N > 1) store<N>(y + at, z);
      else *own = from_float<T>(z[0]);
    }
  }
  if constexpr (N == 1) {
    GROUP_NORM_TEAM_BARRIER(team);
    put_back(y, x, p.r, team);
  }
  if (cluster_size() > 1) cluster_wait();
}

template <int N, class T>
DL_DEVICE void upstream(const T* x, const T* dy, const T* residual, const Maps<N>& maps, int activation, Floats<N>& off,
                        Floats<N>& dz) {
  off = held<N>(x);
  dz = held<N>(dy);
  if (activation != 0) {
    Floats<N> z;
    DL_UNROLL
    for (int j = 0; j < N; ++j)
      z[j] = group_norm_before_activation(off[j], ChannelMap<float>{maps.mean[j], maps.slope[j], maps.offset[j]});
    if (residual != nullptr) {
      const Floats<N> r = held<N>(residual);
      DL_UNROLL
      for (int j = 0; j < N; ++j) z[j] += r[j];
    }
    times_slope(activation, dz, z);
  }
  DL_UNROLL
  for (int j = 0; j < N; ++j) off[j] -= maps.mean[j];
}

DL_DEVICE void merge_sums(const GroupNormCall& a, const Piece& p, const Team& team) {
  for_groups(a, p, team, [&](unsigned lane, unsigned g, bool there) {
    float sums[2] = {0.0f, 0.0f};
    for (unsigned i = lane; there && i < a.plan.parts; i += team.width()) {
      sums[0] += load_one<Use::kAgain>(of_part(a, p, i, g));
      sums[1] += load_one<Use::kAgain>(of_part(a, p, i, g) + 1);
    }
    sums[0] = warp_sum(sums[0], team.width());
    sums[1] = warp_sum(sums[1], team.width());
    if (lane != 0 || !there) return;
    float* terms = a.terms + (int64_t{p.tile} * a.plan.tile_groups + g) * 2;
    store_one<Use::kAgain>(terms, sums[0]);
    store_one<Use::kAgain>(terms + 1, sums[1]);
  });
}

// Math      as group_norm_bwd_kernel, for the groups of a tile at once.
// Traffic   per element: read x, dy (and residual, with an activation), write dx (and dresidual). Split: x, dy and
//           residual are read again, from L2.
// Grid      as the forward pass.
// Requires  as the forward pass, for dy, dx and dresidual too.
// Result    bitwise reproducible; the sums of a channel's parts go to a.sums.
template <class T, int N>
DL_KERNEL(kGroupNormFewThreads, 2)
group_norm_last_bwd_kernel(DL_CONSTANT GroupNormCall a) {
  GroupNormShared& shared = *shared_memory<GroupNormShared>();
  const GroupNormPlan& plan = a.plan;
  const Team team = own_team(plan);
  const Piece p = own_piece<N>(a, team);
  unsigned char* room = room_of(plan, shared, team);
  const Tables t(plan, room);
  const bool keeps_residual = a.residual != nullptr && a.activation != 0;
  T* x = fetch<N>(reinterpret_cast<T*>(room), static_cast<const T*>(a.x) + p.offset, p.r, team);
  T* dy = fetch<N>(reinterpret_cast<T*>(room + plan.array), static_cast<const T*>(a.dy) + p.offset, p.r, team);
  const T* residual = nullptr;
  if (keeps_residual)
    residual =
        fetch<N>(reinterpret_cast<T*>(room + 2 * plan.array), static_cast<const T*>(a.residual) + p.offset, p.r, team);
  close_copies();
  allow_next_kernel();
  float* means = t.values + 2 * plan.tile_groups;  // in front of it this block's two sums of each group
  float* rstds = means + plan.tile_groups;
  float* qs = rstds + plan.tile_groups;
  float* rests = qs + plan.tile_groups;
  for (unsigned g = team.thread; g < p.groups; g += team.threads) {
    const int64_t at = int64_t{p.n} * a.groups + p.group + g;
    means[g] = load_one(a.mean + at);
    rstds[g] = load_one(a.rstd + at);
  }
  fill_table(a, p, team, t.affine);
  copies_done();
  GROUP_NORM_TEAM_BARRIER(team);

  const float whole = static_cast<float>(a.d) * static_cast<float>(a.s);
  const auto set_terms = [&](unsigned g, float sum_dz_x_hat, float sum_dz) {
    const GradientMap<float> map = gradient_map(means[g], rstds[g], sum_dz_x_hat, sum_dz, whole);
    qs[g] = map.q;
    rests[g] = map.r;
  };
  if (a.stage == GroupNormStage::kRest) {
    wait_for_previous_kernel();
    const float* terms = a.terms + int64_t{p.tile} * plan.tile_groups * 2;
    for (unsigned g = team.thread; g < p.groups; g += team.threads)
      set_terms(g, load_one<Use::kAgain>(terms + 2 * g), load_one<Use::kAgain>(terms + 2 * g + 1));
  } else {
    for (unsigned v = p.vector; p.row < p.rows && v < p.r.runs; v += team.threads) {
      Floats<N> da{}, db{};
      if (p.there) {
        const Maps<N> maps(a, t, means, rstds, v);
        for (unsigned row = p.row; row < p.r.rows; row += p.rows) {
          const unsigned at = row * p.r.cols + v * N;
          Floats<N> off, dz;
          upstream(x + at, dy + at, residual == nullptr ? nullptr : residual + at, maps, a.activation, off, dz);
          DL_UNROLL
          for (int j = 0; j < N; ++j) da[j] += dz[j] * off[j], db[j] += dz[j];
        }
      }
      put(t.partial + p.row * p.r.cols + v * N, da);
      put(t.partial + (p.rows + p.row) * p.r.cols + v * N, db);
    }
    sum_groups<2>(a, p, team, t, t.values, [&](unsigned c, float (&sums)[2]) {
      if (!p.there) return;
      sums[0] *= rstds[quotient(c, plan.by_d)];
      if (a.sums != nullptr) {
        float* to = a.sums + (int64_t{p.n} * plan.position_parts + p.part) * a.c + p.channel + c;
        store_one<Use::kAgain>(to, sums[0]);
        store_one<Use::kAgain>(to + a.n * plan.position_parts * a.c, sums[1]);
      }
      sums[0] *= t.affine[c].a;
      sums[1] *= t.affine[c].a;
    });
    tile_barrier(team);
    for (unsigned g = team.thread; p.there && g < p.groups; g += team.threads) {
      const float first = over_tile(t.values + g), second = over_tile(t.values + plan.tile_groups + g);
      if (a.stage == GroupNormStage::kSums) {
        float* part = of_part(a, p, p.part, g);
        store_one<Use::kAgain>(part, first);
        store_one<Use::kAgain>(part + 1, second);
      } else {
        set_terms(g, first, second);
      }
    }
    if (a.stage == GroupNormStage::kSums) {
      if (last_block(a.counters + p.tile, plan.parts, shared.last)) merge_sums(a, p, team);
      return;
    }
    if (cluster_size() > 1) cluster_arrive();
  }
  GROUP_NORM_TEAM_BARRIER(team);

  T* dx = static_cast<T*>(a.dx) + p.offset;
  T* dresidual = a.dresidual == nullptr ? nullptr : static_cast<T*>(a.dresidual) + p.offset;
  for (unsigned v = p.vector; p.there && p.row < p.rows && v < p.r.runs; v += team.threads) {
    const Maps<N> maps(a, t, means, rstds, v);
    const Floats<N> q = of_channels<N>(v, [&](unsigned c) { return qs[quotient(c, plan.by_d)]; });
    const Floats<N> rest = of_channels<N>(v, [&](unsigned c) { return rests[quotient(c, plan.by_d)]; });
    for (unsigned row = p.row; row < p.r.rows; row += p.rows) {
      const unsigned own = row * p.r.cols + v * N;
      Floats<N> off, dz;
      upstream(x + own, dy + own, residual == nullptr ? nullptr : residual + own, maps, a.activation, off, dz);
      DL_UNROLL
      for (int j = 0; j < N; ++j)
        off[j] = group_norm_input_gradient_from_deviation(
            off[j], dz[j], GradientMap<float>{maps.mean[j], maps.slope[j], q[j], rest[j]});
      if constexpr (N > 1) {
        const int64_t at = row * p.r.stride + v * N;
        store<N>(dx + at, off);
        if (dresidual != nullptr) store<N>(dresidual + at, dz);
      } else {
        x[own] = from_float<T>(off[0]);
        dy[own] = from_float<T>(dz[0]);
      }
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
    return group_norm_last_fwd_kernel<T, N>;
  }
  template <class T, int N>
  static auto backward() {
    return group_norm_last_bwd_kernel<T, N>;
  }
};

}  // namespace

bool group_norm_last_clusters_run(const Queue& queue, const GroupNormCall& a) {
  return clusters_run<Kernels>(queue, a);
}

void launch_group_norm_last(const Queue& queue, const GroupNormCall& a) { launch_in_batches<Kernels>(queue, a); }

}  // namespace dlkernels
