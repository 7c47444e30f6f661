// The weight-norm loops of one instruction set: compiled once for each, with CPU_CAPABILITY naming it.
#include "weight_norm_kernel.h"

#include "../common/loops.h"
#include "../math/weight_norm.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// Once per row: kept out of the loops, which would otherwise be compiled again and again around them.
#define DL_ONCE __attribute__((noinline))

DL_ONCE static double read(Float type, const void* p, int64_t i) {
  return with_float(type, [&](auto t) -> double { return to_float(static_cast<const decltype(t)*>(p)[i]); });
}

DL_ONCE static void write(Float type, void* p, int64_t i, double value) {
  with_float(type, [&](auto t) {
    using T = decltype(t);
    static_cast<T*>(p)[i] = from_float<T>(static_cast<typename Lanes<T>::scalar>(value));
  });
}

// sum x y over n elements: four vector accumulators.
template <class T>
DL_INLINE double dot(const T* x, const T* y, int64_t n) {
  using V = typename Lanes<T>::vec;
  constexpr int64_t kWidth = Lanes<T>::width;
  V s[4] = {V{}, V{}, V{}, V{}};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int64_t j = 0; j < 4; ++j) s[j] += load(x + i + j * kWidth) * load(y + i + j * kWidth);
  for (; i + kWidth <= n; i += kWidth) s[0] += load(x + i) * load(y + i);
  if (i < n) s[1] += load_part(x + i, n - i, 0) * load_part(y + i, n - i, 0);
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

// out = a x - b y, the second term in the backward pass only. `next` is what the following call will read.
template <class T, bool kBackward, bool kStream>
DL_INLINE void combine(T* out, const T* x, const T* y, int64_t n, double a, double b, const T* next_x,
                       const T* next_y) {
  using V = typename Lanes<T>::vec;
  constexpr int64_t kWidth = Lanes<T>::width, kLine = 64 / static_cast<int64_t>(sizeof(T));
  const V va = splat<V>(a), vb = splat<V>(b);
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    if (next_x) __builtin_prefetch(next_x + i, 0, 2);
    if (kBackward && next_y) __builtin_prefetch(next_y + i, 0, 2);
    for (int64_t j = i; j < i + kLine; j += kWidth) {
      V r = load(x + j) * va;
      if constexpr (kBackward) r -= load(y + j) * vb;
      if constexpr (kStream) stream(out + j, r);
      else store(out + j, r);
    }
  }
  for (; i < n; i += kWidth) {
    const int64_t left = n - i < kWidth ? n - i : kWidth;
    V r = load_part(x + i, left, 0) * va;
    if constexpr (kBackward) r -= load_part(y + i, left, 0) * vb;
    store_part(out + i, r, left);
  }
}

// What a row needs: the usual, nothing but zeros, or arithmetic in double.
enum Kind { kUsual, kZero, kExact };
struct Row {
  double a, b;
  Kind kind;
};

template <class T>
struct Problem {
  using A = typename Lanes<T>::scalar;
  const WeightNormArgs& args;
  const WeightNormPlan& plan;
  const T *v, *x;  // x: grad_output, or v in the forward pass
  T* out;

  explicit Problem(const WeightNormArgs& a)
      : args(a),
        plan(a.plan),
        v(static_cast<const T*>(a.v)),
        x(static_cast<const T*>(a.grad_output ? a.grad_output : a.v)),
        out(static_cast<T*>(a.out)) {}

  static bool aligned(const T* p) { return reinterpret_cast<uintptr_t>(p) % (Lanes<T>::width * sizeof(T)) == 0; }

  bool backward() const { return args.grad_output != nullptr; }

  // f(offset, length) for each contiguous piece of a segment of row k.
  template <class F>
  DL_INLINE void pieces(int64_t k, int64_t segment, F f) const {
    const int64_t inner = args.inner;
    if (plan.parts > 1) {
      const int64_t begin = segment % plan.parts * kWeightNormSegment, left = inner - begin;
      return f((segment / plan.parts * args.rows + k) * inner + begin,
               left < kWeightNormSegment ? left : kWeightNormSegment);
    }
    const int64_t begin = segment * plan.chunks, left = args.outer - begin;
    const int64_t end = begin + (left < plan.chunks ? left : plan.chunks);
    for (int64_t a = begin; a < end; ++a) f((a * args.rows + k) * inner, inner);
  }

  double segment_sum(int64_t k, int64_t segment) const {
    double total = 0;
    pieces(k, segment, [&](int64_t at, int64_t n) { total += dot(v + at, x + at, n); });
    return total;
  }

  // From the sum over row k (of v^2, or of dw v) to what the row is multiplied by; writes norm or dg.
  DL_ONCE Row row(int64_t k, double total) const {
    A* norm = static_cast<A*>(args.norm);
    const double g = read(args.g_dtype, args.g, k);
    double n = backward() ? static_cast<double>(norm[k]) : std::sqrt(total);
    Kind kind = kUsual;
    if (sizeof(A) == 4 && !weight_norm_in_range(n) && !(backward() && n == 0)) {
      double squares = 0;
      total = 0;
      for (int64_t o = 0; o < args.outer; ++o)
        for (int64_t i = 0; i < args.inner; ++i) {
          const int64_t at = (o * args.rows + k) * args.inner + i;
          const double e = to_float(v[at]);
          squares += e * e;
          total += e * static_cast<double>(to_float(x[at]));
        }
      n = std::sqrt(squares);
      kind = kExact;
    }
    const WeightNormFactors<double> f = backward() ? weight_norm_backward(n, g, total) : weight_norm_forward(n, g);
    if (backward()) write(args.g_dtype, args.dg, k, f.dg);
    else norm[k] = static_cast<A>(n);
    return {f.a, f.b, n == 0 ? kZero : kind};
  }

  // Rows out of the ordinary, one element after another.
  DL_ONCE void slowly(int64_t at, int64_t n, const Row& r) const {
    for (int64_t i = at; i < at + n; ++i) {
      const double e = to_float(v[i]), y = to_float(x[i]) * r.a - (backward() ? e * r.b : 0);
      out[i] = from_float<T>(r.kind == kZero ? 0 : static_cast<A>(y));
    }
  }

  template <bool kBackward>
  DL_ONCE void apply(int64_t k, int64_t segment, const Row& r, bool more) const {
    pieces(k, segment, [&](int64_t at, int64_t n) {
      if (r.kind != kUsual) return slowly(at, n, r);
      const T* next = more ? x + at + args.inner : nullptr;
      const T* next_v = kBackward && more ? v + at + args.inner : next;
      if (args.stream && aligned(out + at))
        combine<T, kBackward, true>(out + at, x + at, v + at, n, r.a, r.b, next, next_v);
      else combine<T, kBackward, false>(out + at, x + at, v + at, n, r.a, r.b, next, next_v);
    });
  }

  template <bool kBackward>
  void rows(int64_t begin, int64_t end) const {
    for (int64_t k = begin; k < end; ++k) {
      double total = 0;
      for (int64_t s = 0; s < plan.segments; ++s) total += segment_sum(k, s);
      const Row r = row(k, total);
      const bool more = args.outer == 1 && plan.segments == 1 && k + 1 < end;
      for (int64_t s = 0; s < plan.segments; ++s) apply<kBackward>(k, s, r, more);
    }
  }

  // Sums of all columns over a segment of chunks, four chunks at a time: memory is read in its order.
  void column_sum(int64_t segment) const {
    using V = typename Lanes<T>::vec;
    constexpr int64_t kWidth = Lanes<T>::width;
    const int64_t width = args.rows * args.inner, begin = segment * plan.height;
    const int64_t end = begin + plan.height < args.outer ? begin + plan.height : args.outer;
    A* to = static_cast<A*>(args.partial) + segment * width;
    for (int64_t c = 0; c < width; ++c) to[c] = 0;
    for (int64_t o = begin; o < end; o += 4) {
      const int64_t step = o + 4 <= end ? 4 : end - o;
      const T *pv = v + o * width, *px = x + o * width;
      int64_t c = 0;
      for (; step == 4 && c + kWidth <= width; c += kWidth) {
        V s[4];
        for (int64_t j = 0; j < 4; ++j) s[j] = load(pv + j * width + c) * load(px + j * width + c);
        store(to + c, load(to + c) + ((s[0] + s[1]) + (s[2] + s[3])));
      }
      for (; c < width; c += kWidth) {
        const int64_t n = width - c < kWidth ? width - c : kWidth;
        V s = load_part(to + c, n, 0);
        for (int64_t j = 0; j < step; ++j)
          s += load_part(pv + j * width + c, n, 0) * load_part(px + j * width + c, n, 0);
        store_part(to + c, s, n);
      }
    }
  }

  void factor(int64_t k) const {
    const int64_t width = args.rows * args.inner;
    double total = 0;
    for (int64_t s = 0; s < plan.segments; ++s) {
      if (!plan.columns) total += static_cast<const double*>(args.partial)[k * plan.segments + s];
      for (int64_t b = 0; plan.columns && b < args.inner; ++b)
        total += static_cast<const A*>(args.partial)[s * width + k * args.inner + b];
    }
    const Row r = row(k, total);
    args.factors[k] = r.a, args.factors[args.rows + k] = r.b, args.factors[2 * args.rows + k] = r.kind;
    A* spread = static_cast<A*>(args.spread);
    for (int64_t c = k * args.inner; plan.columns && c < (k + 1) * args.inner; ++c)
      spread[c] = static_cast<A>(r.a), spread[width + c] = static_cast<A>(r.b);
  }

  Row stored_row(int64_t k) const {
    return {args.factors[k], args.factors[args.rows + k], static_cast<Kind>(args.factors[2 * args.rows + k])};
  }

  template <bool kBackward>
  void column_apply(int64_t segment) const {
    using V = typename Lanes<T>::vec;
    constexpr int64_t kWidth = Lanes<T>::width;
    const int64_t width = args.rows * args.inner, begin = segment * plan.height;
    const int64_t end = begin + plan.height < args.outer ? begin + plan.height : args.outer;
    const A *fa = static_cast<const A*>(args.spread), *fb = fa + width;
    for (int64_t o = begin; o < end; ++o) {
      const T *px = x + o * width, *pv = v + o * width;
      T* to = out + o * width;
      const bool past_caches = args.stream && aligned(to);
      int64_t c = 0;
      for (; c + kWidth <= width; c += kWidth) {
        V r = load(px + c) * load(fa + c);
        if constexpr (kBackward) r -= load(pv + c) * load(fb + c);
        if (past_caches) stream(to + c, r);
        else store(to + c, r);
      }
      if (c < width) {
        V r = load_part(px + c, width - c, 0) * load_part(fa + c, width - c, 0);
        if constexpr (kBackward) r -= load_part(pv + c, width - c, 0) * load_part(fb + c, width - c, 0);
        store_part(to + c, r, width - c);
      }
    }
    for (int64_t k = 0; k < args.rows; ++k) {
      if (args.factors[2 * args.rows + k] == kUsual) continue;
      const Row r = stored_row(k);
      for (int64_t o = begin; o < end; ++o) slowly(o * width + k * args.inner, args.inner, r);
    }
  }
};

static void rows(const WeightNormArgs& a, int64_t begin, int64_t end) {
  with_float(a.dtype, [&](auto t) {
    const Problem<decltype(t)> p(a);
    a.grad_output ? p.template rows<true>(begin, end) : p.template rows<false>(begin, end);
    if (a.stream) store_fence();
  });
}

static void sum_step(const WeightNormArgs& a, int64_t begin, int64_t end) {
  with_float(a.dtype, [&](auto t) {
    const Problem<decltype(t)> p(a);
    for (int64_t i = begin; i < end; ++i) {
      if (p.plan.columns) p.column_sum(i);
      else static_cast<double*>(a.partial)[i] = p.segment_sum(i / p.plan.segments, i % p.plan.segments);
    }
  });
}

static void factor_step(const WeightNormArgs& a, int64_t begin, int64_t end) {
  with_float(a.dtype, [&](auto t) {
    const Problem<decltype(t)> p(a);
    for (int64_t k = begin; k < end; ++k) p.factor(k);
  });
}

template <class T, bool kBackward>
void apply_step_typed(const Problem<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (p.plan.columns) {
      p.template column_apply<kBackward>(p.plan.pieces - 1 - i);  // what was read last may still be in the cache
    } else {
      const int64_t k = i / p.plan.segments;
      p.template apply<kBackward>(k, i % p.plan.segments, p.stored_row(k), false);
    }
  }
}

static void apply_step(const WeightNormArgs& a, int64_t begin, int64_t end) {
  with_float(a.dtype, [&](auto t) {
    const Problem<decltype(t)> p(a);
    a.grad_output ? apply_step_typed<decltype(t), true>(p, begin, end)
                  : apply_step_typed<decltype(t), false>(p, begin, end);
    if (a.stream) store_fence();
  });
}

}  // namespace CPU_CAPABILITY

WeightNormKernels DL_CONCAT(weight_norm_kernels_, CPU_CAPABILITY)() {
  return {rows, sum_step, factor_step, apply_step};
}

}  // namespace dlkernels
