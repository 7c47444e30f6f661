// What the weight-norm kernels are made of: a thread's share of a unit, sums over a tile, factors, results.
#pragma once

#include "../common/cuda_reduce.h"
#include "../math/weight_norm.h"
#include "weight_norm_kernel.h"

namespace dlkernels {
namespace weight_norm {

constexpr int kThreads = kWeightNormThreads, kTile = kWeightNormTile;

enum Kind : int { kUsual, kZero, kExact };  // nothing but zeros; arithmetic in double

template <class T>
DL_DEVICE float read_g(const WeightNormLayer& a, unsigned k) {
  if (a.g_is_float) return load_one(static_cast<const float*>(a.g) + k);
  return load_one(static_cast<const T*>(a.g) + k);
}
template <class T>
DL_DEVICE void write_dg(const WeightNormLayer& a, unsigned k, float dg) {
  if (a.g_is_float) store_one(static_cast<float*>(a.dg) + k, dg);
  else store_one(static_cast<T*>(a.dg) + k, dg);
}

// What is multiplied, and what for a result that is 0 whatever it is multiplied with.
template <class A>
struct Row {
  A a, b;
  int kind;
};

// From the sums over row k to what the row is multiplied by; writes norm or dg. `n` is the norm.
template <class T, bool kBackward, class A>
DL_DEVICE Row<A> row_factors(const WeightNormLayer& a, unsigned k, A n, A dot, bool writes) {
  const A g = read_g<T>(a, k);
  const WeightNormFactors<A> f = kBackward ? weight_norm_backward(n, g, dot) : weight_norm_forward(n, g);
  if (writes) {
    if constexpr (kBackward) write_dg<T>(a, k, static_cast<float>(f.dg));
    else store_one(a.norm + k, static_cast<float>(n));
  }
  return {f.a, f.b, n == 0 ? kZero : sizeof(A) == 8 ? kExact : kUsual};
}

// Whether squares of a norm like this may have left the range of float. A row of zeros is as it should be.
DL_DEVICE bool out_of_range(float n) { return n != 0 && !weight_norm_in_range(n); }

// The packs of a thread: first, first + step, ... before end, of a row or of a column of packs. The first of them stay
// in registers.
template <class T, int N, bool kColumns, bool kBackward>
struct Share {
  static constexpr int kHeld = weight_norm_held(N > 1);
  const T* v;
  const T* x;
  T* out;
  unsigned first, step, end;
  unsigned chunk;  // packs
  bool one_chunk;
  int64_t plane;  // elements from one chunk to the next
  Pack<T, N> held_v[kHeld], held_x[kBackward ? kHeld : 1];

  DL_DEVICE Share(const WeightNormLayer& a, int64_t base, unsigned first, unsigned step, unsigned end)
      : v(static_cast<const T*>(a.v) + base),
        x(static_cast<const T*>(a.x) + base),
        out(static_cast<T*>(a.out) + base),
        first(first),
        step(step),
        end(end),
        chunk(a.inner / N),
        one_chunk(a.outer == 1),
        plane(static_cast<int64_t>(a.rows) * a.inner) {}

  DL_DEVICE int64_t at(unsigned i) const {
    if constexpr (kColumns) return i * plane;
    if (one_chunk) return static_cast<int64_t>(i) * N;
    return i / chunk * plane + static_cast<int64_t>(i % chunk) * N;
  }

  template <Use U = Use::kOnce>
  DL_DEVICE void load_held() {
    DL_UNROLL
    for (int j = 0; j < kHeld; ++j) {
      const unsigned i = first + j * step;
      held_v[j] = {};
      if constexpr (kBackward) held_x[j] = {};
      if (i < end) {
        held_v[j] = load_pack<N, U>(v + at(i));
        if constexpr (kBackward) held_x[j] = load_pack<N, U>(x + at(i));
      }
    }
  }

  // sum v^2, or sum dw v: N sums side by side.
  DL_DEVICE Floats<N> sums() {
    Floats<N> total{};
    const auto add = [&](const Floats<N>& e, const Floats<N>& y) {
      DL_UNROLL
      for (int c = 0; c < N; ++c) total[c] += e[c] * y[c];
    };
    DL_UNROLL
    for (int j = 0; j < kHeld; ++j) {
      keep_packed(held_v[j]);
      if constexpr (kBackward) keep_packed(held_x[j]);
      const Floats<N> e = to_floats(held_v[j]);
      if constexpr (kBackward) add(e, to_floats(held_x[j]));
      else add(e, e);
    }
    DL_LOOPED
    for (unsigned i = first + kHeld * step; i < end; i += step) {
      const Floats<N> e = load<N, Use::kAgain>(v + at(i));
      if constexpr (kBackward) add(e, load<N, Use::kAgain>(x + at(i)));
      else add(e, e);
    }
    return total;
  }

  // sum v^2, or sum dw v, in double. Everything is read once more: such rows are rare.
  static constexpr int kSums = kColumns ? N : 1;
  template <bool kDot>
  DL_DEVICE void exact_sums(double (&sums)[kSums]) const {
    DL_UNROLL
    for (int c = 0; c < kSums; ++c) sums[c] = 0;
    DL_LOOPED
    for (unsigned i = first; i < end; i += step) {
      const Floats<N> e = load<N, Use::kAgain>(v + at(i));
      Floats<N> y = e;
      if constexpr (kDot) y = load<N, Use::kAgain>(x + at(i));
      DL_UNROLL
      for (int c = 0; c < N; ++c) sums[kColumns ? c : 0] += static_cast<double>(e[c]) * y[c];
    }
  }

  // row(c) of the c-th column of a pack.
  template <class F>
  DL_DEVICE void apply(F row) {
    Floats<kSums> fa, fb;
    unsigned zeros = 0;
    DL_UNROLL
    for (int c = 0; c < kSums; ++c) {
      const auto r = row(c);
      fa[c] = static_cast<float>(r.a), fb[c] = static_cast<float>(r.b);
      zeros |= static_cast<unsigned>(r.kind == kZero) << c;
    }
    const auto combine = [&](const Pack<T, N>& pack_v, const Pack<T, N>& pack_x, unsigned i) {
      const Floats<N> e = to_floats(pack_v);
      Floats<N> y = e;
      if constexpr (kBackward) y = to_floats(pack_x);
      DL_UNROLL
      for (int c = 0; c < N; ++c) {
        const int s = kColumns ? c : 0;
        y[c] *= fa[s];
        if constexpr (kBackward) y[c] -= e[c] * fb[s];
        if (zeros >> s & 1) y[c] = 0;
      }
      store<N>(out + at(i), y);
    };
    DL_UNROLL
    for (int j = 0; j < kHeld; ++j) {
      const unsigned i = first + j * step;
      keep_packed(held_v[j]);
      if constexpr (kBackward) keep_packed(held_x[j]);
      if (i < end) combine(held_v[j], held_x[kBackward ? j : 0], i);
    }
    DL_LOOPED
    for (unsigned i = first + kHeld * step; i < end; i += step) {
      const Pack<T, N> e = load_pack<N>(v + at(i));
      if constexpr (kBackward) combine(e, load_pack<N>(x + at(i)), i);
      else combine(e, e, i);
    }
  }

  template <class F>
  DL_DEVICE void apply_exactly(F row) const {
    DL_LOOPED
    for (unsigned i = first; i < end; i += step) {
      const Floats<N> e = load<N, Use::kAgain>(v + at(i));
      Floats<N> y = e;
      if constexpr (kBackward) y = load<N, Use::kAgain>(x + at(i));
      DL_UNROLL
      for (int c = 0; c < N; ++c) {
        const auto r = row(kColumns ? c : 0);
        const double value = static_cast<double>(y[c]) * r.a - (kBackward ? static_cast<double>(e[c]) * r.b : 0.0);
        y[c] = r.kind == kZero ? 0.0f : static_cast<float>(value);
      }
      store<N>(out + at(i), y);
    }
  }
};

template <int N>
DL_DEVICE float total_of(const Floats<N>& x) {
  float total = x[0];
  DL_UNROLL
  for (int c = 1; c < N; ++c) total += x[c];
  return total;
}

// A unit whose elements a whole block sums, or several: a row, or a tile of columns. ----------------------------------

template <class T>
struct TileShared {
  BlockSums<float, 1> sums;
  BlockSums<double, 1> exact_sums;
  double squares[kTile], dots[kTile];  // of this block's part
  Row<double> row[kTile];
  int exact;
  bool last;
  double grid[kThreads * kPack<T>];
};

// Where a thread stands in a unit: tile-wide packs side by side, rows of them below each other.
struct Place {
  unsigned k0, ks;  // the k's of the unit
  unsigned inner;   // columns of each
  unsigned x, y, down;
  int64_t base;
  bool there;  // whether it has columns at all
};

template <int N, bool kColumns>
DL_DEVICE Place place_of(const WeightNormLayer& a, unsigned unit) {
  Place p;
  p.k0 = unit * a.tile;
  p.ks = a.rows - p.k0 < a.tile ? a.rows - p.k0 : a.tile;
  p.inner = kColumns ? a.inner : 1;
  const unsigned across = kColumns ? a.across : 1;
  p.x = threadIdx.x % across, p.y = threadIdx.x / across, p.down = kThreads / across;
  p.there = !kColumns || (p.y < p.down && p.x * N < p.ks * a.inner);
  p.base = static_cast<int64_t>(p.k0) * a.inner + (kColumns ? p.x * N : 0);
  return p;
}

// The sums of N columns of each thread become sums of each k: f(k, total), in one thread of the block, the same one in
// every call. Two barriers; the grid may be written again behind a third one.
template <class A, int N, class F>
DL_DEVICE void sum_columns(const A* mine, A* grid, unsigned across, const Place& p, F f) {
  constexpr unsigned kPieces = 16;  // sums of these many, then of the rest
  const unsigned columns = across * N;
  if (p.y < p.down) {
    DL_UNROLL
    for (int c = 0; c < N; ++c) grid[p.y * columns + p.x * N + c] = mine[c];
  }
  __syncthreads();
  unsigned pieces = p.down < kPieces ? p.down : kPieces;
  if (pieces * columns > kThreads) pieces = columns < kThreads ? kThreads / columns : 1;
  for (unsigned t = threadIdx.x; t < pieces * columns; t += kThreads) {
    const unsigned piece = t / columns, c = t % columns;
    A total = grid[piece * columns + c];
    for (unsigned y = piece + pieces; y < p.down; y += pieces) total += grid[y * columns + c];
    grid[piece * columns + c] = total;  // nobody else reads this column's rows of this piece
  }
  __syncthreads();
  for (unsigned k = threadIdx.x; k < p.ks; k += kThreads) {
    A total = A(0);
    for (unsigned piece = 0; piece < pieces; ++piece)
      for (unsigned b = 0; b < p.inner; ++b) total += grid[piece * columns + k * p.inner + b];
    f(k, total);
  }
}

// sum v^2, or sum dw v, in double; a barrier comes last.
template <bool kDot, class T, int N, bool kColumns, bool kBackward>
DL_DEVICE void sum_exactly(const WeightNormLayer& a, const Place& p, const Share<T, N, kColumns, kBackward>& share,
                           TileShared<T>& shared, double* to) {
  double sums[kColumns ? N : 1];
  share.template exact_sums<kDot>(sums);
  if constexpr (kColumns) {
    sum_columns<double, N>(sums, shared.grid, a.across, p, [&](unsigned k, double s) { to[k] = s; });
  } else {
    const double total = block_sum(sums[0], shared.exact_sums);
    if (threadIdx.x == 0) to[0] = total;
  }
  __syncthreads();
}

// shared.squares or shared.dots of the part of a unit that this block has.
template <class T, int N, bool kColumns, bool kBackward>
DL_DEVICE void sum_part(const WeightNormLayer& a, const Place& p, Share<T, N, kColumns, kBackward>& share,
                        TileShared<T>& shared) {
  if (threadIdx.x == 0) shared.exact = 0;
  const auto keep = [&](unsigned k, float total) {
    (kBackward ? shared.dots : shared.squares)[k] = total;
    // In units of a row: a part of nothing but zeros or of squares that vanished looks the same.
    const bool exact = kBackward ? out_of_range(load_one(a.norm + p.k0 + k)) : !weight_norm_in_range(sqrtf(total));
    if (exact) shared.exact = 1;
  };
  const Floats<N> sums = share.sums();
  if constexpr (kColumns) {
    sum_columns<float, N>(sums.v, reinterpret_cast<float*>(shared.grid), a.across, p, keep);
  } else {
    const float total = block_sum(total_of(sums), shared.sums);
    if (threadIdx.x == 0) keep(0, total);
  }
  __syncthreads();
  if (!shared.exact) return;
  sum_exactly<false>(a, p, share, shared, shared.squares);
  if constexpr (kBackward) sum_exactly<true>(a, p, share, shared, shared.dots);
}

// shared.row of the thread's k's from the sums over all parts. `writes`: one block of a unit writes norm and dg.
template <class T, bool kBackward>
DL_DEVICE void factors_of(const WeightNormLayer& a, const Place& p, unsigned k, double squares, double dot, bool writes,
                          Row<double>& row) {
  if constexpr (kBackward) {
    const float n = load_one(a.norm + p.k0 + k);
    if (out_of_range(n)) {
      row = row_factors<T, kBackward>(a, p.k0 + k, sqrt(squares), dot, writes);
    } else {
      const Row<float> r = row_factors<T, kBackward>(a, p.k0 + k, n, static_cast<float>(dot), writes);
      row = {r.a, r.b, r.kind};
    }
  } else {
    const double n = sqrt(squares);
    if (n != 0 && !weight_norm_in_range(n)) {
      row = row_factors<T, kBackward>(a, p.k0 + k, n, 0.0, writes);
    } else {
      const Row<float> r = row_factors<T, kBackward>(a, p.k0 + k, sqrtf(static_cast<float>(squares)), 0.0f, writes);
      row = {r.a, r.b, r.kind};
    }
  }
}

// The results of a part, by the rows' factors.
template <class T, int N, bool kColumns, bool kBackward>
DL_DEVICE void apply_part(const WeightNormLayer& a, const Place& p, Share<T, N, kColumns, kBackward>& share,
                          const Row<double>* rows) {
  if (!p.there) return;
  const auto row = [&](int c) -> const Row<double>& { return rows[kColumns ? (p.x * N + c) / a.inner : 0]; };
  bool exact = false;
  DL_UNROLL
  for (int c = 0; c < (kColumns ? N : 1); ++c) exact = exact || row(c).kind == kExact;
  if (exact) share.apply_exactly(row);
  else share.apply(row);
}

}  // namespace weight_norm
}  // namespace dlkernels
