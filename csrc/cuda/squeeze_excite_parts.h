// Pieces of the squeeze-and-excitation kernels: sums per channel of a part of a sample, values of the channels that a
// pack of elements belongs to.
#pragma once

#include "../common/cuda_dtype.h"
#include "../common/cuda_reduce.h"
#include "../math/squeeze_excite.h"
#include "squeeze_excite_kernel.h"

namespace dlkernels {
namespace squeeze_excite {

enum class Pass {
  kForward,
  kGrad,    // no activation behind the residual: dz is dy
  kGradAct  // dz = dy act'(x e + r)
};

// Rows of a sample behind each other, `ld` elements apart; see SqueezeExcitePlan.
struct Tile {
  int64_t begin;  // element of the sample
  int64_t ld;
  int rows, width;
  int first_c;  // its first channel
};

template <class T>
struct Room {
  T *slab, *second, *third;
  float *sums, *gate, *part, *hidden, *scratch;
  bool* flag;
};
template <class T>
DL_DEVICE Room<T> room(const SqueezeExciteShared& s) {
  auto* memory = shared_memory<unsigned char>();
  Room<T> r;
  r.slab = reinterpret_cast<T*>(memory);
  r.second = reinterpret_cast<T*>(memory + s.slab);
  r.third = reinterpret_cast<T*>(memory + 2 * s.slab);
  r.sums = reinterpret_cast<float*>(memory + s.slab * s.slabs);
  r.gate = r.sums + s.visible;
  r.part = r.gate + s.gates;
  r.hidden = r.part + s.wide;
  r.scratch = r.hidden + s.hidden;
  r.flag = reinterpret_cast<bool*>(r.scratch + s.scratch);
  return r;
}

// Values of channels, in shared or in global memory. many: N behind each other, the first a multiple of N.
struct SharedValues {
  const float* v;
  DL_DEVICE float one(int64_t i) const { return v[i]; }
  template <int N>
  DL_DEVICE Floats<N> many(int64_t i) const {
    constexpr int kStep = N % 4 == 0 ? 4 : 1;
    Floats<N> x;
    DL_UNROLL
    for (int j = 0; j < N; j += kStep) {
      const auto pack = *reinterpret_cast<const Pack<float, kStep>*>(v + i + j);
      DL_UNROLL
      for (int k = 0; k < kStep; ++k) x[j + k] = pack.v[k];
    }
    return x;
  }
};
template <Use U = Use::kShared>
struct GlobalValues {
  const float* v;
  DL_DEVICE float one(int64_t i) const { return load_one<U>(v + i); }
  template <int N>
  DL_DEVICE Floats<N> many(int64_t i) const {
    return load<N, U>(v + i);
  }
};

// The values of N elements from element `o` on; rows are of `inner` elements. `whole`: no pack lies in two rows.
template <int N, class I, class V>
DL_DEVICE Floats<N> of_channels(bool last, bool whole, I inner, I o, const V& values) {
  I row = o / inner, at = o - row * inner;
  Floats<N> x;
  if (!last) {
    float v = values.one(row);
    DL_UNROLL
    for (int j = 0; j < N; ++j) {
      x[j] = v;
      if (!whole && j + 1 < N && ++at == inner) at = 0, v = values.one(++row);
    }
  } else if (whole) {
    x = values.template many<N>(at);
  } else {
    DL_UNROLL
    for (int j = 0; j < N; ++j) {
      x[j] = values.one(at);
      if (++at == inner) at = 0;
    }
  }
  return x;
}

// Sums per channel ----------------------------------------------------------------------------------------------------

// dz, from dy in its place.
template <int N>
DL_DEVICE void upstream(int kind, const Floats<N>& x, const Floats<N>& e, const Floats<N>& r, Floats<N>& dz) {
  with_activation(static_cast<Activation>(kind), [&](auto k) {
    DL_UNROLL
    for (int j = 0; j < N; ++j) dz[j] = squeeze_excite_upstream<decltype(k)::value>(x[j], e[j], r[j], dz[j]);
  });
}

// What is summed, from global memory: x or dz x. On its way x or dz is kept in shared memory, where there is a `keep`.
template <class T, int N, Pass P, Use kUse>
struct Streamed {
  static constexpr int kWidth = N, kUnroll = P == Pass::kForward ? 4 : 2;
  const T *x, *dy, *residual;  // of the tile
  T* dresidual;
  T* keep;         // [rows, width]
  const float* e;  // of its first channel
  Tile tile;
  int kind;
  bool last;

  struct Raw {
    Pack<T, N> x, dy, r;
  };
  DL_DEVICE Raw get(int row, int col) const {
    const int64_t at = row * tile.ld + col;
    Raw raw;
    raw.x = load_pack<N, P == Pass::kForward ? kUse : Use::kOnce>(x + at);
    if constexpr (P != Pass::kForward) raw.dy = load_pack<N, P == Pass::kGrad ? kUse : Use::kOnce>(dy + at);
    if constexpr (P == Pass::kGradAct) raw.r = load_pack<N>(residual + at);
    return raw;
  }
  DL_DEVICE Floats<N> term(const Raw& raw, int row, int col) const {
    Floats<N> v = to_floats(raw.x);
    Pack<T, N> kept = raw.x;
    if constexpr (P != Pass::kForward) {
      Floats<N> dz = to_floats(raw.dy);
      kept = raw.dy;
      if constexpr (P == Pass::kGradAct) {
        const Floats<N> r = to_floats(raw.r);
        Floats<N> gate;
        if (last) {
          gate = GlobalValues<>{e}.template many<N>(col);
        } else {
          const float one = load_one(e + row);
          DL_UNROLL
          for (int j = 0; j < N; ++j) gate[j] = one;
        }
        upstream(kind, v, gate, r, dz);
        kept = to_pack<T>(dz);
        store_pack<N, kUse>(dresidual + row * tile.ld + col, kept);
      }
      DL_UNROLL
      for (int j = 0; j < N; ++j) v[j] *= dz[j];
    }
    if (keep != nullptr) *reinterpret_cast<Pack<T, N>*>(keep + row * tile.width + col) = kept;
    return v;
  }
};

// The same from shared memory, one by one: where packs lie in two rows.
template <class T, Pass P>
struct Resident {
  static constexpr int kWidth = 1, kUnroll = P == Pass::kGradAct ? 1 : 4;
  const T *x, *dy, *residual;  // of the tile, rows behind each other
  const float* e;
  int width, kind;
  bool last;

  struct Raw {
    T x, dy;
  };
  DL_DEVICE Raw get(int row, int col) const {
    const int at = row * width + col;
    return {x[at], P == Pass::kForward ? x[at] : dy[at]};
  }
  DL_DEVICE Floats<1> term(const Raw& raw, int row, int col) const {
    Floats<1> v{{to_float(raw.x)}};
    if constexpr (P != Pass::kForward) {
      Floats<1> dz{{to_float(raw.dy)}};
      if constexpr (P == Pass::kGradAct) {
        const Floats<1> r{{to_float(residual[row * width + col])}}, gate{{load_one(e + (last ? col : row))}};
        upstream(kind, v, gate, r, dz);
      }
      v[0] *= dz[0];
    }
    return v;
  }
};

// Partial sums of other blocks.
struct Partial {
  static constexpr int kWidth = 1, kUnroll = 4;
  const float* v;
  int64_t ld;

  using Raw = float;
  DL_DEVICE Raw get(int row, int col) const { return load_one<Use::kAgain>(v + row * ld + col); }
  DL_DEVICE Floats<1> term(Raw raw, int, int) const { return {{raw}}; }
};

// done(row, its sum), in one thread. A row is cut into pieces, each for `lanes` threads.
template <class S, class F>
DL_DEVICE void row_sums(const S& source, int rows, int width, int lanes, int pieces, float* scratch, F done) {
  constexpr int V = S::kWidth, U = S::kUnroll;
  const int items = width / V, tasks = rows * pieces, per_piece = ceil_div(items, pieces);
  const int inside = lane() % lanes, groups = static_cast<int>(blockDim.x) / lanes;
  DL_LOOPED
  for (int base = warp() * (kWarp / lanes); base < tasks; base += groups) {
    const int task = base + lane() / lanes, row = task / pieces, first = (task - row * pieces) * per_piece;
    const int end = task < tasks ? vmin(items, first + per_piece) : 0;
    float sum[4] = {0, 0, 0, 0};
    DL_LOOPED
    for (int i = first + inside; i < end; i += U * lanes) {
      typename S::Raw raw[U];
      DL_UNROLL
      for (int u = 0; u < U; ++u)
        if (i + u * lanes < end) raw[u] = source.get(row, (i + u * lanes) * V);
      DL_UNROLL
      for (int u = 0; u < U; ++u) {
        if (i + u * lanes < end) {
          const Floats<V> term = source.term(raw[u], row, (i + u * lanes) * V);
          DL_UNROLL
          for (int j = 0; j < V; ++j) sum[(u + j) % 4] += term[j];
        }
      }
    }
    const float total = warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3]), lanes);
    if (task < tasks && inside == 0) {
      if (pieces == 1) done(row, total);
      else scratch[task] = total;
    }
  }
  if (pieces == 1) return;
  __syncthreads();
  for (int row = static_cast<int>(threadIdx.x); row < rows; row += static_cast<int>(blockDim.x)) {
    float total = 0;
    for (int p = 0; p < pieces; ++p) total += scratch[row * pieces + p];
    done(row, total);
  }
}

// done(column, its sum), in one thread. scratch: kWidth numbers a thread.
template <class S, class F>
DL_DEVICE void column_sums(const S& source, int rows, int width, float* scratch, F done) {
  constexpr int V = S::kWidth, U = S::kUnroll;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x), columns = width / V;
  const int across = vmax(1, vmin(columns, threads)), groups = threads / across;
  const int group = thread / across, column = thread - group * across;
  DL_LOOPED
  for (int base = 0; base < columns; base += across) {
    const int end = group < groups && base + column < columns ? rows : 0;
    Floats<V> sum;
    DL_UNROLL
    for (int j = 0; j < V; ++j) sum[j] = 0;
    DL_LOOPED
    for (int row = group; row < end; row += U * groups) {
      typename S::Raw raw[U];
      DL_UNROLL
      for (int u = 0; u < U; ++u)
        if (row + u * groups < end) raw[u] = source.get(row + u * groups, (base + column) * V);
      DL_UNROLL
      for (int u = 0; u < U; ++u) {
        if (row + u * groups < end) {
          const Floats<V> term = source.term(raw[u], row + u * groups, (base + column) * V);
          DL_UNROLL
          for (int j = 0; j < V; ++j) sum[j] += term[j];
        }
      }
    }
    if (groups == 1) {
      DL_UNROLL
      for (int j = 0; j < V; ++j)
        if (group == 0 && base + column < columns) done((base + column) * V + j, sum[j]);
      continue;
    }
    // More than one group: all columns at once.
    if (group < groups) {
      DL_UNROLL
      for (int j = 0; j < V; ++j) scratch[(j * groups + group) * across + column] = sum[j];
    }
    __syncthreads();
    for (int i = thread; i < across * V; i += threads) {
      const int j = i / across, col = i - j * across;
      float total = 0;
      for (int g = 0; g < groups; ++g) total += scratch[(j * groups + g) * across + col];
      done(col * V + j, total);
    }
  }
}

// Copies the elements of a tile whose rows lie behind each other, and waits for its own.
template <class T, int N>
DL_DEVICE void copy_tile(T* to, const T* from, int length) {
  for (int i = static_cast<int>(threadIdx.x) * N; i < length; i += static_cast<int>(blockDim.x) * N) {
    if constexpr (N > 1) copy_16_bytes(to + i, from + i);
    else to[i] = from[i];
  }
}

// done(index of the row or, with channels last, of the column; sum of x or dz x over the tile). With `keep` x or dz of
// the tile lies in room.slab behind the next barrier.
template <class T, int N, Pass P, Use kUse, bool kKeep, class F>
DL_DEVICE void channel_sums(const SqueezeExciteArgs& a, int64_t n, const Tile& tile, const Room<T>& room, F done) {
  const int64_t start = n * a.c * a.s + tile.begin;
  const T* x = static_cast<const T*>(a.x) + start;
  const T *dy = nullptr, *residual = nullptr;
  T* dresidual = nullptr;
  if constexpr (P != Pass::kForward) dy = static_cast<const T*>(a.dy) + start;
  if constexpr (P == Pass::kGradAct) {
    residual = static_cast<const T*>(a.residual) + start;
    dresidual = static_cast<T*>(a.dresidual) + start;
  }
  const float* e = P == Pass::kGradAct ? a.gate_value + n * a.c + tile.first_c : nullptr;
  const auto sums = [&](const auto& source) {
    if (a.last) column_sums(source, tile.rows, tile.width, room.scratch, done);
    else row_sums(source, tile.rows, tile.width, a.plan.row_lanes, a.plan.pieces, room.scratch, done);
  };
  if constexpr (N > 1) {
    if (a.plan.straddles) {
      const int length = tile.rows * tile.width;
      T* const held = P == Pass::kForward ? room.slab : room.second;
      copy_tile<T, N>(held, x, length);
      if constexpr (P != Pass::kForward) copy_tile<T, N>(room.slab, dy, length);
      if constexpr (P == Pass::kGradAct) copy_tile<T, N>(room.third, residual, length);
      close_copies();
      copies_done();
      __syncthreads();
      sums(Resident<T, P>{held, room.slab, room.third, e, tile.width, a.residual_activation, a.last});
      if constexpr (P == Pass::kGradAct) {  // sums take dz unrounded: they are gradients in float32
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x) * N; i < length; i += static_cast<int>(blockDim.x) * N) {
          const auto at = [&](const T* v) { return to_floats(*reinterpret_cast<const Pack<T, N>*>(v + i)); };
          Floats<N> dz = at(room.slab);
          upstream(a.residual_activation, at(room.second),
                   of_channels<N>(a.last, false, tile.width, i, GlobalValues<>{e}), at(room.third), dz);
          const Pack<T, N> kept = to_pack<T>(dz);
          store_pack<N, kUse>(dresidual + i, kept);
          *reinterpret_cast<Pack<T, N>*>(room.slab + i) = kept;
        }
      }
      return;
    }
  }
  sums(Streamed<T, N, P, kUse>{x, dy, residual, dresidual, kKeep ? room.slab : nullptr, e, tile, a.residual_activation,
                               a.last});
}

}  // namespace squeeze_excite
}  // namespace dlkernels
