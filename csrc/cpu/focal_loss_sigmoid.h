// Sigmoid focal loss: the loop over blocks of elements.
//
// Math      csrc/math/focal_loss.h, sigmoid_focal_hard and sigmoid_focal_soft.
// Traffic   per element: read x and t, write dx (mean, sum with gradient) = 3 elements; class indices are read once a
// row. Grid      blocks of kSigmoidBlock elements, spread over threads by the caller. Requires  checked targets;
// contiguous arrays. Result    bitwise reproducible for one instruction set: one partial sum a block, summed in order
// by the caller.
#pragma once

#include "../common/simd.h"
#include "../math/focal_loss.h"
#include "focal_loss_kernel.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// Left-out elements of integer targets carry this value instead of 0 or 1.
constexpr float kLeftOut = -1.0f;

// Hard targets of one block as 0, 1 or kLeftOut.
template <class A, class I>
DL_INLINE void expand_integers(const SigmoidArgs& a, int64_t begin, int64_t n, A* __restrict out) {
  const I* __restrict target = static_cast<const I*>(a.target);
  if (a.classes == 0) {
    // Compared in the targets' own type: an ignore_index beyond it leaves nothing out.
    const I ignored = static_cast<I>(a.ignore_index);
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(target[begin + i]);
    if (static_cast<int64_t>(ignored) != a.ignore_index) return;
    for (int64_t i = 0; i < n; ++i) out[i] = target[begin + i] == ignored ? A(kLeftOut) : out[i];
    return;
  }
  for (int64_t i = 0; i < n;) {
    const int64_t row = (begin + i) / a.classes;
    const int64_t first = (begin + i) - row * a.classes;
    const int64_t last = first + (n - i) < a.classes ? first + (n - i) : a.classes;
    const int64_t label = static_cast<int64_t>(target[row]);
    const A fill = label == a.ignore_index ? A(kLeftOut) : A(0);
    for (int64_t c = first; c < last; ++c) out[i + c - first] = fill;
    if (fill == A(0) && label >= first && label < last) out[i + label - first] = A(1);
    i += last - first;
  }
}

template <class A>
DL_INLINE void expand_targets(const SigmoidArgs& a, int64_t begin, int64_t n, A* out) {
  switch (a.target_kind) {
    case Target::kUInt8: return expand_integers<A, uint8_t>(a, begin, n, out);
    case Target::kInt32: return expand_integers<A, int32_t>(a, begin, n, out);
    default: return expand_integers<A, int64_t>(a, begin, n, out);
  }
}

// One vector: hard or soft by value when kFloats, hard or left out otherwise.
template <Gamma G, bool kFloats, class V>
DL_INLINE LossAndGrad<V> sigmoid_focal(V x, V t, double alpha, double gamma) {
  const V one = splat<V>(1), zero = splat<V>(0);
  const auto positive = t == 1.0f;
  LossAndGrad<V> out = sigmoid_focal_hard<G>(select(positive, -x, x), gamma);
  out.grad = select(positive, -out.grad, out.grad);
  V alpha_t = alpha < 0 ? one : select(positive, splat<V>(alpha), splat<V>(1 - alpha));
  if constexpr (kFloats) {
    const auto hard = positive | (t == 0.0f);
    if (!all(hard)) {
      const LossAndGrad<V> soft = sigmoid_focal_soft<G>(x, select(hard, splat<V>(0.5), t), gamma);
      out = {select(hard, out.loss, soft.loss), select(hard, out.grad, soft.grad)};
      if (alpha >= 0) alpha_t = select(hard, alpha_t, splat<V>(alpha) * t + splat<V>(1 - alpha) * (one - t));
      // A NaN label is neither hard nor a number between: nothing above hides it.
    }
    return {alpha_t * out.loss, alpha_t * out.grad};
  }
  const auto left_out = t < 0.0f;
  return {select(left_out, zero, alpha_t * out.loss), select(left_out, zero, alpha_t * out.grad)};
}

template <class T, class TT, Gamma G, bool kFloats>
void sigmoid_blocks(const SigmoidArgs& a, int64_t block_begin, int64_t block_end) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  constexpr int W = Lanes<T>::width;
  const T* x = static_cast<const T*>(a.input);
  const A* grad_output = static_cast<const A*>(a.grad_output);
  A* loss = static_cast<A*>(a.loss);
  T* grad = static_cast<T*>(a.grad);
  const V scale = splat<V>(a.grad_scale);
  const bool stream_grad = a.stream && (reinterpret_cast<uintptr_t>(grad) % (W * sizeof(T))) == 0;
  alignas(64) A expanded[kSigmoidBlock];

  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t begin = block * kSigmoidBlock;
    const int64_t n = a.count - begin < kSigmoidBlock ? a.count - begin : kSigmoidBlock;
    if constexpr (!kFloats) expand_targets<A>(a, begin, n, expanded);
    V total = splat<V>(0);
    for (int64_t i = 0; i < n; i += W) {
      const int64_t at = begin + i, left = n - i;
      const bool whole = left >= W;
      const V xv = whole ? load(x + at) : load_part<T>(x + at, left, A(0));
      V tv;
      if constexpr (kFloats) {
        const TT* t = static_cast<const TT*>(a.target) + at;
        tv = whole ? load(t) : load_part<TT>(t, left, A(0));
      } else {
        tv = whole ? load(expanded + i) : load_part<A>(expanded + i, left, A(kLeftOut));
      }
      const LossAndGrad<V> out = sigmoid_focal<G, kFloats>(xv, tv, a.alpha, a.gamma);
      if (loss) {
        if (whole) store(loss + at, out.loss);
        else store_part<A>(loss + at, out.loss, left);
      }
      if (a.partial) {
        V counted = out.loss;
        if (!whole) {
          A lanes[W];
          store(lanes, counted);
          for (int64_t j = left; j < W; ++j) lanes[j] = A(0);
          counted = load(lanes);
        }
        total += counted;
      }
      if (grad) {
        V g = out.grad * scale;
        if (grad_output) {
          V factor;
          if (a.grad_output_step == 0) factor = splat<V>(static_cast<double>(*grad_output));
          else factor = whole ? load(grad_output + at) : load_part<A>(grad_output + at, left, A(0));
          g = g * factor;
        }
        if constexpr (!kFloats) g = select(tv < 0.0f, splat<V>(0), g);  // 0 even where the scale is infinite
        if (!whole) store_part<T>(grad + at, g, left);
        else if (stream_grad) stream<T>(grad + at, g);
        else store(grad + at, g);
      }
    }
    if (a.partial) a.partial[block] = static_cast<double>(sum(total));
  }
  if (stream_grad) store_fence();
}

template <class T, class TT, bool kFloats>
void sigmoid_gamma(const SigmoidArgs& a, int64_t begin, int64_t end) {
  switch (gamma_kind(a.gamma)) {
    case Gamma::kZero: return sigmoid_blocks<T, TT, Gamma::kZero, kFloats>(a, begin, end);
    case Gamma::kOne: return sigmoid_blocks<T, TT, Gamma::kAny, kFloats>(a, begin, end);
    case Gamma::kTwo: return sigmoid_blocks<T, TT, Gamma::kTwo, kFloats>(a, begin, end);
    case Gamma::kAny: return sigmoid_blocks<T, TT, Gamma::kAny, kFloats>(a, begin, end);
  }
}

template <class T>
void sigmoid_typed(const SigmoidArgs& a, int64_t begin, int64_t end) {
  using A = typename Lanes<T>::scalar;
  if (a.target_kind == Target::kFloat) return sigmoid_gamma<T, T, true>(a, begin, end);
  if constexpr (sizeof(T) == 2)
    if (a.target_kind == Target::kFloat32) return sigmoid_gamma<T, float, true>(a, begin, end);
  return sigmoid_gamma<T, A, false>(a, begin, end);
}

inline void sigmoid(const SigmoidArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Float::kFloat32: return sigmoid_typed<float>(a, begin, end);
    case Float::kFloat16: return sigmoid_typed<float16>(a, begin, end);
    case Float::kBFloat16: return sigmoid_typed<bfloat16>(a, begin, end);
    case Float::kFloat64: return sigmoid_typed<double>(a, begin, end);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
