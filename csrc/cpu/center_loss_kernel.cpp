// The center-loss loops of one instruction set: compiled once for each, with CPU_CAPABILITY naming it.
#include "center_loss_kernel.h"

#include <type_traits>

#include "../common/activation.h"
#include "../common/loops.h"
#include "../math/center_loss.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

enum class Weigh { kNone, kAttention, kLogits };

// The tensors of a call as typed pointers. TA: of the attention. Centers of half precision are read through a scratch
// row, so that the loops know but one kind of them.
template <class T, class TA, Weigh W>
struct CenterRows {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  const CenterLossArgs& a;
  const T* x = static_cast<const T*>(a.features);
  const bool half_centers = sizeof(T) == 2 && a.center_dtype == a.dtype;
  const TA* attention = static_cast<const TA*>(a.attention);
  A* loss = static_cast<A*>(a.loss);
  T* dx = static_cast<T*>(a.dx);
  TA* dattention = static_cast<TA*>(a.dattention);
  const bool stream = a.stream && may_stream(dx, a.d) && (W == Weigh::kNone || may_stream(dattention, a.d));

  int64_t label(int64_t row) const {
    return a.narrow ? static_cast<const int32_t*>(a.labels)[row] : static_cast<const int64_t*>(a.labels)[row];
  }
  bool counts(int64_t y) const { return y >= 0 && y != a.ignore_index && y < a.k; }
  double grad_output(int64_t row) const {
    if (a.grad_output == nullptr) return 1.0;
    return static_cast<double>(static_cast<const A*>(a.grad_output)[row * a.grad_output_step]);
  }

  template <bool kStream, class To, class Wh>
  DL_INLINE static void write(Wh whole, To* to, V v, int64_t left) {
    if constexpr (kStream && Wh::value) return dlkernels::stream(to, v);
    store_as(whole, to, v, left);
  }

  // R rows i: their gradients, A (x - c) times `weight` added to `sum` where there is one, and their losses, one by one
  // or, returned, together. With a sum they are of one class, whose center is loaded once for all.
  template <int R, bool kSum, bool kStream>
  DL_INLINE double some_rows(const int64_t* i, const A* const* c, A* sum) const {
    const T* xs[R];
    const TA* as[R];
    T* dxs[R];
    TA* das[R];
    V by[R], attention_by[R], weight[R], total[R];
    for (int r = 0; r < R; ++r) {
      const int64_t at = i[r] * a.d;
      xs[r] = x + at;
      as[r] = W == Weigh::kNone ? nullptr : attention + at;
      dxs[r] = dx ? dx + at : nullptr;
      das[r] = W != Weigh::kNone && dattention ? dattention + at : nullptr;
      const double g = grad_output(i[r]);
      by[r] = splat<V>(g * a.grad_scale);
      attention_by[r] = splat<V>(g * a.attention_scale);
      weight[r] = splat<V>(a.mode == CenterSums::kGradient ? g : 1.0);
      total[r] = V{};
    }
    const bool gradients = dx != nullptr;
    for_vectors<T>(a.d, [&](int64_t j, int64_t left, auto whole) DL_BODY {
      V center{}, pulls{};
      if constexpr (kSum) center = load_as(whole, c[0] + j, left), pulls = load_as(whole, sum + j, left);
      for (int r = 0; r < R; ++r) {
        if constexpr (!kSum) center = load_as(whole, c[r] + j, left);
        const V difference = load_as(whole, xs[r] + j, left) - center;
        V pull = difference;
        if constexpr (W == Weigh::kAttention) {
          pull = center_loss_dx(difference, load_as(whole, as[r] + j, left));
          if (gradients) write<kStream>(whole, das[r] + j, center_loss_dattention(difference) * attention_by[r], left);
        } else if constexpr (W == Weigh::kLogits) {
          const auto s = sigmoid_and_rest(load_as(whole, as[r] + j, left));
          pull = center_loss_dx(difference, s.value);
          if (gradients)
            write<kStream>(whole, das[r] + j, center_loss_dlogit(difference, s.value, s.rest) * attention_by[r], left);
        }
        total[r] += pull * difference;
        if (gradients) write<kStream>(whole, dxs[r] + j, pull * by[r], left);
        if constexpr (kSum) pulls += pull * weight[r];
      }
      if constexpr (kSum) store_as(whole, sum + j, pulls, left);
    });
    if (loss) {
      for (int r = 0; r < R; ++r) loss[i[r]] = static_cast<A>(0.5f * dlkernels::sum(total[r]));
      return 0;
    }
    for (int r = 1; r < R; ++r) total[0] += total[r];
    return 0.5 * static_cast<double>(dlkernels::sum(total[0]));
  }

  // The center of a class, in scratch where its dtype is another.
  DL_INLINE const A* center(int64_t y, A* scratch) const {
    if (!half_centers) return static_cast<const A*>(a.centers) + y * a.d;
    const T* c = static_cast<const T*>(a.centers) + y * a.d;
    for_vectors<T>(a.d, [&](int64_t j, int64_t left, auto whole)
                            DL_BODY { store_as(whole, scratch + j, load_as(whole, c + j, left), left); });
    return scratch;
  }

  void left_out(int64_t i) const {
    if (loss) loss[i] = 0;
    for (int64_t j = 0; dx && j < a.d; ++j) dx[i * a.d + j] = T{};
    for (int64_t j = 0; W != Weigh::kNone && dattention && j < a.d; ++j) dattention[i * a.d + j] = TA{};
  }

  bool in_range(int64_t begin, int64_t end) const {
    bool fine = true;
    for (int64_t i = begin; W == Weigh::kAttention && i < end; ++i) {
      if (!counts(label(i))) continue;
      V out{};  // stays 0, or becomes a sum above 0; NaN is not our business
      for_vectors<TA>(a.d, [&](int64_t j, int64_t left, auto whole) DL_BODY {
        const V v = load_as(whole, attention + i * a.d + j, left), zero{}, one = splat<V>(1.0);
        out += select(v < zero, one, zero) + select(v > one, one, zero);
      });
      fine = fine && !(dlkernels::sum(out) > 0);
    }
    return fine;
  }

  // Rows in their own order, four at a time.
  template <bool kStream>
  void blocks(int64_t begin, int64_t end, A* scratch) const {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t stop = (block + 1) * kBlockRows < a.n ? (block + 1) * kBlockRows : a.n;
      double partial = 0;
      int64_t some[4];
      const A* c[4];
      int waiting = 0;
      for (int64_t i = block * kBlockRows; i < stop; ++i) {
        const int64_t y = label(i);
        if (!counts(y)) {
          left_out(i);
          continue;
        }
        some[waiting] = i;
        c[waiting] = center(y, scratch + waiting * a.d);
        ++waiting;
        if (waiting == 4) partial += some_rows<4, false, kStream>(some, c, nullptr), waiting = 0;
      }
      for (int r = 0; r < waiting; ++r) partial += some_rows<1, false, kStream>(some + r, c + r, nullptr);
      if (a.partial) a.partial[block] = partial;
    }
  }

  bool blocks(int64_t begin, int64_t end, A* scratch) const {
    const bool fine = in_range(begin * kBlockRows, end * kBlockRows < a.n ? end * kBlockRows : a.n);
    stream ? blocks<true>(begin, end, scratch) : blocks<false>(begin, end, scratch);
    if (stream) store_fence();
    return fine;
  }

  // What becomes of the sum of a class: the center's step, or its gradient.
  template <class TC>
  void finish_as(int64_t y, int64_t count, const A* sum) const {
    const bool step = a.mode == CenterSums::kUpdate;
    TC* c = static_cast<TC*>(step ? a.centers : a.dcenters) + y * a.d;
    const V factor = splat<V>(step ? center_step(a.alpha, count, a.ema) : -1.0);
    for_vectors<T>(a.d, [&](int64_t j, int64_t left, auto whole) DL_BODY {
      V v = factor * load_as(whole, sum + j, left);
      if (step) v += load_as(whole, c + j, left);
      store_as(whole, c + j, v, left);
    });
  }
  void finish(int64_t y, int64_t count, const A* sum) const {
    half_centers ? finish_as<T>(y, count, sum) : finish_as<A>(y, count, sum);
  }

  template <bool kStream>
  void pieces(int64_t begin, int64_t end, A* scratch) const {
    constexpr int64_t kAhead = 4, kPrefetched = 2048 / sizeof(T);
    const int64_t last = begin < end ? a.pieces[end - 1].end : 0, near = a.d < kPrefetched ? a.d : kPrefetched;
    for (int64_t p = begin; p < end; ++p) {
      const CenterPiece& piece = a.pieces[p];
      A* sum = piece.slot < 0 ? scratch : static_cast<A*>(a.sums) + piece.slot * a.d;
      const A* const c = center(piece.label, scratch + a.d);
      for (int64_t j = 0; j < a.d; ++j) sum[j] = 0;
      if (p + 2 < end && !half_centers) prefetch(static_cast<const A*>(a.centers) + a.pieces[p + 2].label * a.d, near);
      double partial = 0;
      for_row_groups(piece.begin, piece.end, [&](int64_t row, auto group) DL_BODY {
        constexpr int R = decltype(group)::size;
        int64_t some[R];
        for (int r = 0; r < R; ++r) {
          some[r] = a.order[row + r];
          if (row + r + kAhead < last) prefetch(x + a.order[row + r + kAhead] * a.d, near);
        }
        partial += some_rows<R, true, kStream>(some, &c, sum);
      });
      if (a.partial) a.partial[p] = partial;
      if (piece.slot < 0) finish(piece.label, piece.count, sum);
    }
  }

  void pieces(int64_t begin, int64_t end, A* scratch) const {
    stream ? pieces<true>(begin, end, scratch) : pieces<false>(begin, end, scratch);
    if (stream) store_fence();
  }

  void merge(int64_t begin, int64_t end) const {
    for (int64_t k = begin; k < end; ++k) {
      const CenterClass& of = a.classes[k];
      A* sum = static_cast<A*>(a.sums) + of.slot * a.d;
      for (int64_t p = 1; p < of.pieces; ++p)
        for_vectors<T>(a.d, [&](int64_t j, int64_t left, auto whole) DL_BODY {
          store_as(whole, sum + j, load_as(whole, sum + j, left) + load_as(whole, sum + p * a.d + j, left), left);
        });
      if (a.mode != CenterSums::kNone) finish(of.label, of.count, sum);
    }
  }
};

template <class F>
auto with_rows(const CenterLossArgs& a, F f) {
  return with_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (a.attention == nullptr) return f(CenterRows<T, T, Weigh::kNone>{a});
    if constexpr (sizeof(T) == 2)
      if (a.attention_dtype == Float::kFloat32)
        return a.logits ? f(CenterRows<T, float, Weigh::kLogits>{a}) : f(CenterRows<T, float, Weigh::kAttention>{a});
    return a.logits ? f(CenterRows<T, T, Weigh::kLogits>{a}) : f(CenterRows<T, T, Weigh::kAttention>{a});
  });
}

static bool blocks(const CenterLossArgs& a, int64_t begin, int64_t end, void* scratch) {
  return with_rows(a, [&](const auto& r) {
    using A = typename std::decay_t<decltype(r)>::A;
    return r.blocks(begin, end, static_cast<A*>(scratch));
  });
}
static bool in_range(const CenterLossArgs& a, int64_t begin, int64_t end) {
  return with_rows(a, [&](const auto& r) { return r.in_range(begin, end); });
}
static void pieces(const CenterLossArgs& a, int64_t begin, int64_t end, void* scratch) {
  with_rows(a, [&](const auto& r) {
    using A = typename std::decay_t<decltype(r)>::A;
    r.pieces(begin, end, static_cast<A*>(scratch));
  });
}
static void left_out(const CenterLossArgs& a, int64_t begin, int64_t end) {
  with_rows(a, [&](const auto& r) {
    for (int64_t i = begin; i < end; ++i)
      if (!r.counts(r.label(i))) r.left_out(i);
  });
}
static void merge(const CenterLossArgs& a, int64_t begin, int64_t end) {
  with_rows(a, [&](const auto& r) { r.merge(begin, end); });
}

// The island ----------------------------------------------------------------------------------------------------------

template <class T>
struct IslandRows {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  const IslandArgs& a;
  const T* centers = static_cast<const T*>(a.centers);
  A* inverse = static_cast<A*>(a.inverse_norms);
  const A* total = static_cast<const A*>(a.total);

  void sums(int64_t block_begin, int64_t block_end) const {
    for (int64_t b = block_begin; b < block_end; ++b) {
      A* sum = static_cast<A*>(a.partial) + b * a.d;
      for (int64_t j = 0; j < a.d; ++j) sum[j] = 0;
      const int64_t end = (b + 1) * kIslandBlock < a.k ? (b + 1) * kIslandBlock : a.k;
      for (int64_t k = b * kIslandBlock; k < end; ++k) {
        const T* c = centers + k * a.d;
        V squares{};
        for_vectors<T>(a.d, [&](int64_t j, int64_t left, auto whole) DL_BODY {
          const V v = load_as(whole, c + j, left);
          squares += v * v;
        });
        const A norm = std::sqrt(dlkernels::sum(squares));
        inverse[k] = norm > 0 ? 1 / norm : norm == 0 ? 0 : norm;  // NaN stays NaN
        const V by = splat<V>(inverse[k]);
        for_vectors<T>(a.d, [&](int64_t j, int64_t left, auto whole) DL_BODY {
          store_as(whole, sum + j, load_as(whole, sum + j, left) + by * load_as(whole, c + j, left), left);
        });
      }
    }
  }

  // The first class of a label of `from` or more.
  const CenterClass* first_class(int64_t from) const {
    int64_t low = 0, high = a.present;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      a.classes[middle].label < from ? low = middle + 1 : high = middle;
    }
    return a.classes + low;
  }

  void apply(int64_t begin, int64_t end) const {
    const bool update = a.out == a.centers;
    const CenterClass *next = first_class(begin), *const stop = a.classes + a.present;
    for (int64_t k = begin; k < end; ++k) {
      const T* c = centers + k * a.d;
      T* out = static_cast<T*>(a.out) + k * a.d;
      const V by = splat<V>(inverse[k]);
      V dot{};
      for_vectors<T>(a.d, [&](int64_t j, int64_t left, auto whole)
                              DL_BODY { dot += by * load_as(whole, c + j, left) * load_as(whole, total + j, left); });
      const V projection = splat<V>(dlkernels::sum(dot)), scale = splat<V>(a.scale);
      const bool present = next != stop && next->label == k;
      const A* sum = present ? static_cast<const A*>(a.sums) + next->slot * a.d : nullptr;
      const V step = splat<V>(present ? center_step(a.alpha, next->count, a.ema) : 0.0);
      for_vectors<T>(a.d, [&](int64_t j, int64_t left, auto whole) DL_BODY {
        const V v = load_as(whole, c + j, left);
        V moved = scale * island_direction(v, load_as(whole, total + j, left), by, projection);
        if (update) moved += v;
        if (sum) moved += step * load_as(whole, sum + j, left);
        store_as(whole, out + j, moved, left);
      });
      next += present;
    }
  }
};

static void island_sums(const IslandArgs& a, int64_t begin, int64_t end) {
  with_float(a.dtype, [&](auto t) { IslandRows<decltype(t)>{a}.sums(begin, end); });
}
static void island_apply(const IslandArgs& a, int64_t begin, int64_t end) {
  with_float(a.dtype, [&](auto t) { IslandRows<decltype(t)>{a}.apply(begin, end); });
}

}  // namespace CPU_CAPABILITY

CenterLossKernels DL_CONCAT(center_loss_kernels_, CPU_CAPABILITY)() {
  return {blocks, pieces, merge, in_range, left_out, island_sums, island_apply};
}

}  // namespace dlkernels
