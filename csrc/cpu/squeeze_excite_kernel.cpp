// The squeeze-and-excitation loops of one instruction set: compiled once for each, with CPU_CAPABILITY naming it.
#include "squeeze_excite_kernel.h"

#include "../math/squeeze_excite.h"
#include "squeeze_excite_layers.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// Samples whose second sweep finds them in the second-level cache; at least one.
static int64_t samples_per_item(const SqueezeExciteArgs& a) {
  const int64_t bytes = std::max<int64_t>(1, a.c * a.s * size_of(a.dtype));
  return std::max<int64_t>(1, std::min<int64_t>(kSamples, (int64_t{256} << 10) / bytes));
}

static int64_t padded(int64_t width) { return (width + kFloatLanes - 1) / kFloatLanes * kFloatLanes; }

// Sums, ds [kSamples, C] and hidden values [kSamples, R].
static int64_t scratch_bytes(const SqueezeExciteArgs& a) {
  const int64_t size = a.dtype == Float::kFloat64 ? 8 : 4;
  return padded(a.c) * 16 + (kSamples * (a.c + a.r) + 2 * padded(a.c)) * size;
}

template <class A>
struct SqueezeExciteScratch {
  double* sums;                  // [C]
  A *partial, *e, *ds, *hidden;  // [C] twice, long enough for whole vectors; [kSamples, C]; [kSamples, R]

  SqueezeExciteScratch(void* memory, const SqueezeExciteArgs& a) {
    sums = static_cast<double*>(memory);
    partial = reinterpret_cast<A*>(sums + padded(a.c));
    e = partial + padded(a.c);
    ds = e + padded(a.c);
    hidden = ds + kSamples * a.c;
  }
};

// sums[c] = sum over the rows of term(i, c, left, whole), a vector at element i: accumulators stay small and near.
template <class T, class F>
DL_INLINE void column_sums(int64_t rows, int64_t width, const SqueezeExciteScratch<typename Lanes<T>::scalar>& s,
                           F term) {
  using V = typename Lanes<T>::vec;
  for (int64_t c = 0; c < padded(width); ++c) s.partial[c] = 0;
  for (int64_t c = 0; c < width; ++c) s.sums[c] = 0;
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    for_row_groups(begin, std::min(rows, begin + kRows), [&](int64_t row, auto group) DL_BODY {
      constexpr int R = decltype(group)::size;
      for_vectors<T>(width, [&](int64_t c, int64_t left, auto whole) DL_BODY {
        V sum = load(s.partial + c);
        for (int r = 0; r < R; ++r) sum += term((row + r) * width + c, c, left, whole);
        store(s.partial + c, sum);
      });
    });
    for (int64_t c = 0; c < width; ++c) {
      s.sums[c] += s.partial[c];
      s.partial[c] = 0;
    }
  }
}

// The sum of term(i, left, whole) over elements [begin, end) of one channel.
template <class T, class F>
DL_INLINE double channel_sum(int64_t begin, int64_t end, F term) {
  using V = typename Lanes<T>::vec;
  constexpr int64_t w = Lanes<T>::width;
  double total = 0;
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t last = std::min(end, first + kChunk);
    V acc[4] = {splat<V>(0), splat<V>(0), splat<V>(0), splat<V>(0)};
    int64_t i = first;
    for (; i + 4 * w <= last; i += 4 * w)
      for (int k = 0; k < 4; ++k) acc[k] += term(i + k * w, w, Whole{});
    for (; i + w <= last; i += w) acc[0] += term(i, w, Whole{});
    if (i < last) acc[1] += first_lanes<T>(term(i, last - i, Partial{}), last - i);
    total += sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
  return total;
}

// write(i, e, extra, left, whole) for every vector of a sample, the last ones first: e is the gate there.
template <class T, class F>
DL_INLINE void for_sample(const SqueezeExciteArgs& a, const typename Lanes<T>::scalar* e,
                          const typename Lanes<T>::scalar* extra, F write) {
  using V = typename Lanes<T>::vec;
  if (a.channels_last) {
    for_row_groups_backwards(0, a.s, [&](int64_t row, auto group) DL_BODY {
      constexpr int R = decltype(group)::size;
      for_vectors<T>(a.c, [&](int64_t c, int64_t left, auto whole) DL_BODY {
        const V gate = load_as(whole, e + c, left), more = load_as(whole, extra + c, left);
        for (int r = 0; r < R; ++r) write((row + r) * a.c + c, gate, more, left, whole);
      });
    });
    return;
  }
  for (int64_t c = a.c; c-- > 0;) {
    const V gate = splat<V>(e[c]), more = splat<V>(extra[c]);
    for_vectors<T>(a.s,
                   [&](int64_t i, int64_t left, auto whole) DL_BODY { write(c * a.s + i, gate, more, left, whole); });
  }
}

template <class T, Activation K>
void forward_item(const SqueezeExciteArgs& a, int64_t begin, int64_t end,
                  const SqueezeExciteScratch<typename Lanes<T>::scalar>& s) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  const Layers<A> layers(a);
  const int64_t size = a.c * a.s;
  for (int64_t n = begin; n < end; ++n) {
    const T* x = static_cast<const T*>(a.x) + n * size;
    A* mean = layers.mean + n * a.c;
    if (a.channels_last) {
      column_sums<T>(a.s, a.c, s,
                     [&](int64_t i, int64_t, int64_t left, auto whole) DL_BODY { return load_as(whole, x + i, left); });
      for (int64_t c = 0; c < a.c; ++c) mean[c] = static_cast<A>(s.sums[c] / static_cast<double>(a.s));
    } else {
      for (int64_t c = 0; c < a.c; ++c) {
        const double total = channel_sum<T>(c * a.s, (c + 1) * a.s, [&](int64_t i, int64_t left, auto whole) DL_BODY {
          return load_as(whole, x + i, left);
        });
        mean[c] = static_cast<A>(total / static_cast<double>(a.s));
      }
    }
  }
  layers.forward(begin, end, s.hidden);
  for (int64_t n = end; n-- > begin;) {
    const T* x = static_cast<const T*>(a.x) + n * size;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + n * size : nullptr;
    T* y = static_cast<T*>(a.y) + n * size;
    const A* e = layers.gate_value + n * a.c;
    const bool past_caches = a.stream && may_stream(y, a.channels_last ? a.c : a.s);
    for_sample<T>(a, e, e, [&](int64_t i, V gate, V, int64_t left, auto whole) DL_BODY {
      const V r = residual ? load_as(whole, residual + i, left) : splat<V>(0);
      const V out = squeeze_excite_output<K>(load_as(whole, x + i, left), gate, r);
      if (past_caches) {
        stream(y + i, out);
      } else {
        store_as(whole, y + i, out, left);
      }
    });
  }
}

template <class T, Activation K>
void backward_item(const SqueezeExciteArgs& a, int64_t begin, int64_t end,
                   const SqueezeExciteScratch<typename Lanes<T>::scalar>& s) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  const Layers<A> layers(a);
  const int64_t size = a.c * a.s;
  for (int64_t n = begin; n < end; ++n) {
    const T *x = static_cast<const T*>(a.x) + n * size, *dy = static_cast<const T*>(a.dy) + n * size;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + n * size : nullptr;
    const A* e = layers.gate_value + n * a.c;
    A* de = layers.dz2 + n * a.c;
    const auto product = [&](int64_t i, V gate, int64_t left, auto whole) DL_BODY {
      const V v = load_as(whole, x + i, left);
      const V r = residual ? load_as(whole, residual + i, left) : splat<V>(0);
      return squeeze_excite_upstream<K>(v, gate, r, load_as(whole, dy + i, left)) * v;
    };
    if (a.channels_last) {
      for (int64_t c = 0; c < a.c; ++c) s.e[c] = e[c];
      column_sums<T>(a.s, a.c, s, [&](int64_t i, int64_t c, int64_t left, auto whole) DL_BODY {
        return product(i, load(s.e + c), left, whole);
      });
      for (int64_t c = 0; c < a.c; ++c) de[c] = static_cast<A>(s.sums[c]);
    } else {
      for (int64_t c = 0; c < a.c; ++c) {
        const V gate = splat<V>(e[c]);
        de[c] = static_cast<A>(channel_sum<T>(c * a.s, (c + 1) * a.s, [&](int64_t i, int64_t left, auto whole) DL_BODY {
          return product(i, gate, left, whole);
        }));
      }
    }
  }
  layers.backward(begin, end, s.ds);
  for (int64_t n = end; n-- > begin;) {
    const T *x = static_cast<const T*>(a.x) + n * size, *dy = static_cast<const T*>(a.dy) + n * size;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + n * size : nullptr;
    T* dx = static_cast<T*>(a.dx) + n * size;
    T* dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + n * size : nullptr;
    const bool past_caches = a.stream && may_stream(dx, a.channels_last ? a.c : a.s);
    const A *e = layers.gate_value + n * a.c, *ds = s.ds + (n - begin) * a.c;
    for_sample<T>(a, e, ds, [&](int64_t i, V gate, V share, int64_t left, auto whole) DL_BODY {
      V dz = load_as(whole, dy + i, left);
      if constexpr (K != Activation::kNone) {
        const V r = residual ? load_as(whole, residual + i, left) : splat<V>(0);
        dz = squeeze_excite_upstream<K>(load_as(whole, x + i, left), gate, r, dz);
        if (dresidual) store_as(whole, dresidual + i, dz, left);
      }
      const V out = dz * gate + share;
      if (past_caches) {
        stream(dx + i, out);
      } else {
        store_as(whole, dx + i, out, left);
      }
    });
  }
}

// f(T, activation tag), for the dtype and the activation after the residual.
template <class F>
void with_types(const SqueezeExciteArgs& a, F f) {
  with_float(a.dtype, [&](auto t) {
    with_activation(static_cast<Activation>(a.residual_activation), [&](auto kind) { f(t, kind); });
  });
}

static void forward(const SqueezeExciteArgs& a, int64_t begin, int64_t end, void* scratch) {
  const int64_t per = samples_per_item(a);
  with_types(a, [&](auto t, auto kind) {
    using T = decltype(t);
    for (int64_t i = begin; i < end; ++i)
      forward_item<T, decltype(kind)::value>(a, i * per, std::min(a.n, (i + 1) * per), {scratch, a});
  });
  if (a.stream) store_fence();
}

static void backward(const SqueezeExciteArgs& a, int64_t begin, int64_t end, void* scratch) {
  const int64_t per = samples_per_item(a);
  with_types(a, [&](auto t, auto kind) {
    using T = decltype(t);
    for (int64_t i = begin; i < end; ++i)
      backward_item<T, decltype(kind)::value>(a, i * per, std::min(a.n, (i + 1) * per), {scratch, a});
  });
  if (a.stream) store_fence();
}

static void outer_sum(Float arithmetic, const OuterSum& p, int64_t begin, int64_t end) {
  if (arithmetic == Float::kFloat64) return outer_sum<double>(p, begin, end);
  outer_sum<float>(p, begin, end);
}

}  // namespace CPU_CAPABILITY

SqueezeExciteKernels DL_CONCAT(squeeze_excite_kernels_, CPU_CAPABILITY)() {
  return {samples_per_item, scratch_bytes, forward, backward, outer_sum};
}

}  // namespace dlkernels
