// The step of an optimizer family over all parameters: what AdamW and SGDW share. A family says what it makes of the
// numbers of a row and of one element:
//
//   struct Family {
//     static constexpr int kSlots, kPlainSlots;   // moments, and those that every plain item has
//     struct Row { ... };                         // in float, for the elements
//     static Row row(const StepRow&, double lr, double multiplier, double t);
//     // theta as it is after the step, and the slots as they will be stored, by round(1 + slot, value)
//     template <int N, Needs kNeeds, class Round>
//     static void update(const Row&, Floats<N>& theta, const Floats<N>& grad, Floats<N> (&slots)[kSlots],
//                        const Has<kSlots>& has, Round round);
//   };
#pragma once

#include "optimizer_rounding.h"
#include "optimizer_units.h"

namespace dlkernels {

template <int kSlots>
struct Has {
  bool slot[kSlots];
};

// What the scalars on the device say of a step.
struct Control {
  double factor;  // of the gradients: unscaling and clipping
  int skip;
};

template <class Family>
struct StepShared {
  Control control;
  typename Family::Row row;
  uint32_t step;  // the one being made, from 1 on
  bool last;
};

DL_DEVICE Control read_control(const StepHeader& h, bool writes) {
  const double inv = 1.0 / read(h.scale);
  Control c = {inv, read(h.found_inf) != 0.0 ? 1 : 0};
  if (h.norm_squares == nullptr) return c;
  const double squares = load_integer<Use::kAgain>(h.norm_squares);
  const double norm = sqrt(squares) * inv;
  if (writes) store_one(h.norm, static_cast<float>(norm));
  if (h.skip_nonfinite && squares - squares != 0.0) c.skip = 1;
  if (h.max_norm >= 0.0) {
    const double clip = h.max_norm / (norm + 1e-6);
    c.factor = clip > 1.0 ? inv : inv * clip;  // NaN stays
  }
  return c;
}

// Elements of one item from one on, as a family steps them. A plain item has its parameter, gradient and the family's
// plain slots, all rounded to nearest.
template <class Family, class P, class S, Needs kNeeds>
struct Elements {
  static constexpr bool kPlain = kNeeds != Needs::kAll, kRounds = kNeeds != Needs::kLittle;
  static constexpr int kSlots = kPlain ? Family::kPlainSlots : Family::kSlots;
  P param, grad;
  S slots[kSlots];
  Stream<float> master, average;
  Has<Family::kSlots> has;
  bool has_master, has_average, round_param, round_slots;

  DL_DEVICE Elements(const StepTensor& t, const void* gradient, const Randoms& randoms, int64_t begin)
      : param(t.param, t.dtype, begin),
        grad(gradient, t.dtype, begin),
        master(t.master, Float::kFloat32, begin),
        average(t.average, Float::kFloat32, begin),
        has_master(!kPlain && t.master != nullptr),
        has_average(!kPlain && t.average != nullptr) {
    DL_UNROLL
    for (int k = 0; k < Family::kSlots; ++k) has.slot[k] = kPlain ? k < kSlots : t.slots[k] != nullptr;
    DL_UNROLL
    for (int k = 0; k < kSlots; ++k) slots[k] = S(t.slots[k], t.slot_dtype, begin);
    round_param = kRounds && randoms.on && param.is_bfloat16() && !has_master;
    round_slots = kRounds && randoms.on && slots[0].is_bfloat16();
  }

  // U packs of N elements, `stride` apart: all of them are on their way before the first is computed with, a few
  // elements at a time.
  template <int N, int U>
  DL_DEVICE void step(const typename Family::Row& row, const Randoms& randoms, float average_weight, int at,
                      int stride) const {
    constexpr int C = N < 4 ? N : 4;
    // Cleared, for what is not loaded: a register without a value on some path is kept through the whole kernel.
    typename P::template Loaded<N> theta_in[U] = {}, grad_in[U] = {};
    typename S::template Loaded<N> slots_in[U][kSlots] = {};
    DL_UNROLL
    for (int u = 0; u < U; ++u) {
      const int i = at + u * stride;
      if (!has_master) theta_in[u] = param.template load<N>(i);
      grad_in[u] = grad.template load<N>(i);
      DL_UNROLL
      for (int k = 0; k < kSlots; ++k)
        if (has.slot[k]) slots_in[u][k] = slots[k].template load<N>(i);
    }
    DL_UNROLL
    for (int u = 0; u < U; ++u) {
      const int i = at + u * stride;
      Bits<N> bits[3] = {};  // of the parameter, and of slots that are rounded
      if constexpr (kRounds) {
        if (round_param) bits[0] = randoms.draw<N>(0, i);
        DL_UNROLL
        for (int k = 0; k < 2 && k < kSlots; ++k)
          if (round_slots) bits[1 + k] = randoms.draw<N>(1 + k, i);
      }
      DL_UNROLL
      for (int part = 0; part < N / C; ++part) {
        const int j = i + part * C;
        const auto round = [&](int stream, const Floats<C>& x) {
          if constexpr (!kRounds) return x;
          return (stream == 0 ? round_param : round_slots) ? round_by(x, bits[stream], part * C) : x;
        };
        Floats<C> theta, now[Family::kSlots] = {};
        theta = has_master ? load<C>(master.p + j) : param.template floats<C>(theta_in[u], part);
        DL_UNROLL
        for (int k = 0; k < kSlots; ++k)
          if (has.slot[k]) now[k] = slots[k].template floats<C>(slots_in[u][k], part);
        Family::template update<C, kNeeds>(row, theta, grad.template floats<C>(grad_in[u], part), now, has, round);
        DL_UNROLL
        for (int k = 0; k < kSlots; ++k)
          if (has.slot[k]) slots[k].put(slots_in[u][k], part, now[k]);
        theta = round(0, theta);
        param.put(theta_in[u], part, theta);
        if (has_master) store<C>(master.p + j, theta);
        if (has_average) {
          const Floats<C> value = has_master ? theta : param.stored(theta);
          Floats<C> mean = load<C>(average.p + j);
          DL_UNROLL
          for (int k = 0; k < C; ++k) mean[k] += average_weight * (value[k] - mean[k]);
          store<C>(average.p + j, mean);
        }
      }
      DL_UNROLL
      for (int k = 0; k < kSlots; ++k)
        if (has.slot[k]) slots[k].store(i, slots_in[u][k]);
      param.store(i, theta_in[u]);
    }
  }
};

// `count` elements from `begin` on, a multiple of N.
template <class Family, class P, class S, int N, int U, Needs kNeeds>
DL_DEVICE void step_elements(const StepTensor& t, const void* grad, const typename Family::Row& row,
                             const Randoms& randoms, float average_weight, int64_t begin, int count) {
  const Elements<Family, P, S, kNeeds> elements(t, grad, randoms, begin);
  constexpr int kStride = kStepThreads * N;
  int i = static_cast<int>(threadIdx.x) * N;
  DL_LOOPED
  for (; i + (U - 1) * kStride < count; i += U * kStride)
    elements.template step<N, U>(row, randoms, average_weight, i, kStride);
  if constexpr (U > 1) {
    DL_LOOPED
    for (; i < count; i += kStride) elements.template step<N, 1>(row, randoms, average_weight, i, kStride);
  }
}

template <class Family, Needs kNeeds>
DL_DEVICE void step_unit(const StepHeader& h, const StepTensor& t, const void* grad, const typename Family::Row& row,
                         uint32_t step, int64_t begin, int count) {
  auto addresses = reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(grad) |
                   reinterpret_cast<uintptr_t>(t.master) | reinterpret_cast<uintptr_t>(t.average);
  DL_UNROLL
  for (int k = 0; k < Family::kSlots; ++k) addresses |= reinterpret_cast<uintptr_t>(t.slots[k]);
  const Randoms randoms{t, h.seed, begin, step, kNeeds != Needs::kLittle && h.rounds};
  int whole = 0;  // in packs
  if (addresses % kPackBytes == 0 && (!randoms.on || randoms.grouped())) {
    whole = count / 8 * 8;
    const auto packs = [&](auto p, auto s) {
      using P = decltype(p);
      using S = decltype(s);
      constexpr int N = sizeof(P) == 2 && sizeof(S) == 2 ? 8 : 4, U = kNeeds == Needs::kLittle ? 2 : 1;
      step_elements<Family, Stream<P>, Stream<S>, N, U, kNeeds>(t, grad, row, randoms, h.average_weight, begin, whole);
    };
    if (t.dtype == Float::kFloat32) {
      if (t.slot_dtype == Float::kFloat32) packs(float{}, float{});
      else packs(float{}, bfloat16{});
    } else if (t.dtype == Float::kBFloat16) {
      if (t.slot_dtype == Float::kFloat32) packs(bfloat16{}, float{});
      else packs(bfloat16{}, bfloat16{});
    } else {
      if (t.slot_dtype == Float::kFloat32) packs(float16{}, float{});
      else if (t.slot_dtype == Float::kBFloat16) packs(float16{}, bfloat16{});
      else packs(float16{}, float16{});
    }
  }
  if (whole == count) return;
  const Randoms rest{t, h.seed, begin + whole, step, randoms.on};
  step_elements<Family, AnyStream, AnyStream, 1, 1, kNeeds>(t, grad, row, rest, h.average_weight, begin + whole,
                                                            count - whole);
}

template <class Family, Needs kNeeds>
DL_DEVICE void step_all(const StepHeader& h, const unsigned char* inlined) {
  StepShared<Family>& shared = *shared_memory<StepShared<Family>>();
  wait_for_previous_kernel();
  const StepRow* rows = h.rows;
  if (rows == nullptr) {
    rows = reinterpret_cast<const StepRow*>(inlined);
    inlined += h.num_rows * sizeof(StepRow);
  }
  const void* const* grads = h.grads != nullptr ? h.grads : reinterpret_cast<const void* const*>(inlined);
  if (threadIdx.x == 0) shared.control = read_control(h, blockIdx.x == 0);
  __syncthreads();
  if (shared.control.skip != 0) return;
  int row = -1;
  for (int unit = static_cast<int>(blockIdx.x); unit < h.table.units; unit += static_cast<int>(gridDim.x)) {
    const int at = find_item(h.table, unit);
    const void* grad = grads[at];
    if (grad == nullptr) continue;
    const StepTensor& t = h.table.items[at];
    if (t.row != row) {
      row = t.row;
      __syncthreads();  // nobody needs the row before any more
      if (threadIdx.x == 0) {
        const StepRow& r = rows[row];
        const double made = r.counter == nullptr ? 0.0 : load_one<Use::kAgain>(r.counter) + 1.0;
        shared.row = Family::row(r, read(r.lr), r.sign * shared.control.factor, made);
        shared.step = static_cast<uint32_t>(made);
      }
      __syncthreads();
    }
    const int64_t begin = static_cast<int64_t>(unit - h.table.first_unit[at]) * h.table.length;
    const int64_t left = t.numel - begin;
    step_unit<Family, kNeeds>(h, t, grad, shared.row, shared.step, begin,
                              left < h.table.length ? static_cast<int>(left) : h.table.length);
  }
  // All blocks have read the counters when the last one comes here.
  if (!h.counts || !last_block(h.ticket, gridDim.x, shared.last)) return;
  for (int r = static_cast<int>(threadIdx.x); r < h.num_rows; r += kStepThreads)
    if (rows[r].advances) store_one<Use::kAgain>(rows[r].counter, load_one<Use::kAgain>(rows[r].counter) + 1.0f);
}

}  // namespace dlkernels
