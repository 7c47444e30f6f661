// The pointers of a fused optimizer step, kept between steps and looked over at each: what tables of CPU and of CUDA
// tensors share.
//
// Python (dlkernels/optim/_plan.py) checks everything and makes the table. `refresh` then says whether all is as it
// was: the same parameters in the same groups, the same state tensors at the same addresses, gradients of the same kind
// for the same sets of parameters. It takes the addresses of the gradients; where anything differs, Python plans anew.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "host.h"
#include "optimizer.h"

namespace dlkernels {

class OptimizerTableBase {
 public:
  // position among the owners, param, grad, slots, master, average
  using ItemTensors = std::tuple<int64_t, at::Tensor, std::optional<at::Tensor>, std::vector<std::optional<at::Tensor>>,
                                 std::optional<at::Tensor>, std::optional<at::Tensor>>;
  // row, norm_set, offset, period, full_period, index
  using ItemNumbers = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
  using Items = std::vector<std::pair<ItemTensors, ItemNumbers>>;

  virtual ~OptimizerTableBase() = default;

  // Remember whose parameters, which state and what kind of gradients this is, for `refresh`.
  void watch(const pybind11::list& param_groups, const pybind11::dict& state) {
    groups_.clear(), state_.clear();
    c10::DispatchKeySet usual;
    for (Item& item : items_) {
      const at::Tensor& owner = owners_[item.owner].tensor();
      item.version = version_of(owner);
      if (!item.present) continue;
      const auto keys = owner.grad().key_set();
      const bool plain = owner.grad().layout() == at::kStrided && !keys.has(at::DispatchKey::Python) &&
                         !keys.has(at::DispatchKey::Negative) && !keys.has(at::DispatchKey::ZeroTensor);
      item.grad_keys = plain ? keys : c10::DispatchKeySet();  // which no gradient has
      if (plain) usual = keys;
    }
    for (Item& item : items_)
      if (!item.present) item.grad_keys = usual;
    for (const pybind11::handle group : param_groups) {
      PyObject* params = PyDict_GetItemString(group.ptr(), "params");
      groups_.push_back(PyList_GET_SIZE(params));
    }
    walk_state(state.ptr(), [&](PyObject* object) {
      keep(object);
      state_.push_back(object);
      return true;
    });
  }

  bool refresh(const pybind11::list& param_groups, const pybind11::dict& state) {
    if (!same_groups(param_groups.ptr())) return false;
    size_t at = 0;
    const bool same =
        walk_state(state.ptr(), [&](PyObject* object) { return at < state_.size() && state_[at++] == object; });
    return same && at == state_.size() && take_grads();
  }

  // Gradients like those that the table was made with, one for each item.
  void set_grads(const std::vector<at::Tensor>& grads) {
    TORCH_CHECK_VALUE(grads.size() == items_.size(), "expected ", items_.size(), " gradients, got ", grads.size());
    for (size_t i = 0; i < grads.size(); ++i) items_[i].tensor.grad = address_of(grads[i]);
  }

 protected:
  struct Item {
    int64_t owner;
    at::Tensor param;                // gradients are not held: whoever sets them to None wants the memory back
    std::vector<at::Tensor> others;  // slots, master and average that there are, with the pointers in `tensor`
    std::vector<void*> pointers;
    StepTensor tensor;
    int64_t norm_set;
    bool present;                   // has a gradient now
    c10::DispatchKeySet grad_keys;  // of the gradient that was checked: layout, device and the like in one number
    const void* last_grad;          // where the last one's metadata lay: only ever prefetched
    int64_t version;                // of the parameter after the last step: looked at beside a master copy
  };

  // By its object only: modules may exchange what is behind it (torch.utils.swap_tensors), which nobody else may hold.
  struct Owner {
    PyObject* object;
    int64_t item;  // or -1: it had no gradient when the table was made

    const at::Tensor& tensor() const { return THPVariable_Unpack(object); }
  };

  OptimizerTableBase(const pybind11::list& owners, const Items& items, std::vector<at::Tensor> counters,
                     std::vector<int64_t> counter_of_row)
      : counters_(std::move(counters)), counter_of_row_(std::move(counter_of_row)) {
    for (const pybind11::handle owner : owners) {
      keep(owner.ptr());
      owners_.push_back({owner.ptr(), -1});
    }
    for (const auto& [tensors, numbers] : items) add(tensors, numbers);
    members_.assign(counters_.size(), 0);
    for (const Item& item : items_)
      if (counter(item) >= 0) ++members_[counter(item)];
  }

  // Other items have a gradient than before.
  virtual void presence_changed() = 0;

  // Of the items present, or -1 for those that count nothing.
  int64_t counter(const Item& item) const { return counter_of_row_[item.tensor.row]; }

  // Autograd and master copies learn that the parameters have been written.
  void note_step() {
    for (const Item& item : items_) {
      if (!item.present) continue;
      const at::Tensor& owner = owners_[item.owner].tensor();
      if (!owner.is_inference()) owner.unsafeGetTensorImpl()->bump_version();
    }
    for (Item& item : items_)  // all were counted up by now: views of one tensor share their counter
      if (item.tensor.master != nullptr) item.version = version_of(owners_[item.owner].tensor());
  }

  std::vector<at::Tensor> counters_;  // [] float32 each
  std::vector<int64_t> counter_of_row_;
  std::vector<Owner> owners_;
  std::vector<Item> items_;

 private:
  // The address of a dense tensor's first element, without the checks.
  static void* address_of(const at::Tensor& x) {
    const auto* impl = x.unsafeGetTensorImpl();
    const auto* data = static_cast<const char*>(impl->unsafe_storage().unsafeGetStorageImpl()->data());
    return const_cast<char*>(data) + impl->storage_offset() * static_cast<int64_t>(impl->dtype().itemsize());
  }
  // The same where it will be written to: memory that is shared until then parts here.
  static void* writable(const at::Tensor& x) {
    x.mutable_data_ptr();
    return address_of(x);
  }

  static int64_t version_of(const at::Tensor& x) {
    return x.is_inference() ? 0 : x.unsafeGetTensorImpl()->version_counter().current_version();
  }

  void keep(PyObject* object) { kept_.push_back(pybind11::reinterpret_borrow<pybind11::object>(object)); }

  void add(const ItemTensors& tensors, const ItemNumbers& numbers) {
    const auto& [owner, param, grad, slots, master, average] = tensors;
    Item item{};
    item.owner = owner, item.param = param;
    StepTensor& t = item.tensor;
    std::tie(t.row, item.norm_set, t.offset, t.period, t.full_period, t.index) = numbers;
    t.param = writable(param);
    item.present = grad.has_value();
    t.grad = item.present ? address_of(*grad) : nullptr;
    t.numel = param.numel();
    t.dtype = t.slot_dtype = float_kind("params", param);
    const auto other = [&](const std::optional<at::Tensor>& x) -> void* {
      if (!x.has_value()) return nullptr;
      TORCH_CHECK_VALUE(x->numel() == t.numel, "a state tensor must have its parameter's size");
      item.others.push_back(*x);
      item.pointers.push_back(writable(*x));
      return item.pointers.back();
    };
    for (size_t i = 0; i < slots.size(); ++i) {
      t.slots[i] = other(slots[i]);
      if (slots[i].has_value()) t.slot_dtype = float_kind("state", *slots[i]);  // empty ones have no pointer
    }
    for (const auto& slot : slots)
      TORCH_CHECK_TYPE(!slot.has_value() || float_kind("state", *slot) == t.slot_dtype,
                       "the moments of a parameter must have one dtype");
    t.master = other(master);
    t.average = other(average);
    owners_[owner].item = static_cast<int64_t>(items_.size());
    items_.push_back(std::move(item));
  }

  bool same_groups(PyObject* groups) const {
    if (PyList_GET_SIZE(groups) != static_cast<Py_ssize_t>(groups_.size())) return false;
    size_t at = 0;
    for (size_t g = 0; g < groups_.size(); ++g) {
      PyObject* params = PyDict_GetItemString(PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(g)), "params");
      if (params == nullptr || !PyList_Check(params) || PyList_GET_SIZE(params) != groups_[g]) return false;
      for (Py_ssize_t i = 0; i < groups_[g]; ++i)
        if (PyList_GET_ITEM(params, i) != owners_[at++].object) return false;
    }
    return at == owners_.size();
  }

  // f(object) for every key, dictionary and value of the state, until one says false.
  template <class F>
  static bool walk_state(PyObject* state, F f) {
    PyObject *key, *value, *name, *entry;
    Py_ssize_t i = 0;
    while (PyDict_Next(state, &i, &key, &value)) {
      if (!f(key) || !f(value)) return false;
      if (!PyDict_Check(value)) continue;
      Py_ssize_t j = 0;
      while (PyDict_Next(value, &j, &name, &entry))
        if (!f(entry)) return false;
    }
    return true;
  }

  bool take_grads() {
    bool changed = false;
    for (size_t i = 0; i < owners_.size(); ++i) {
      prefetch(i + 8);
      const Owner& owner = owners_[i];
      const at::Tensor& tensor = owner.tensor();
      const at::Tensor& grad = tensor.unsafeGetTensorImpl()->grad();
      if (owner.item < 0) {
        if (grad.defined()) return false;
        continue;
      }
      Item& item = items_[owner.item];
      changed |= item.present != grad.defined();
      item.present = grad.defined();
      if (!item.present) continue;
      if (!same_kind(item, tensor, grad)) return false;
      item.tensor.grad = address_of(grad);
      item.last_grad = grad.unsafeGetTensorImpl();
    }
    if (changed) {
      std::vector<int64_t> present(counters_.size(), 0);
      for (const Item& item : items_)
        if (item.present && counter(item) >= 0) ++present[counter(item)];
      for (size_t c = 0; c < present.size(); ++c)
        if (present[c] != 0 && present[c] != members_[c]) return false;  // some of those that share it are left out
      presence_changed();
    }
    return true;
  }

  static bool same_shape(const at::Tensor& a, const at::Tensor& b) {
    if (a.sizes() != b.sizes()) return false;
    return (a.is_contiguous() && b.is_contiguous()) || a.strides() == b.strides() || a.numel() <= 1;
  }

  static bool same_kind(const Item& item, const at::Tensor& owner, const at::Tensor& grad) {
    if (address_of(owner) != item.tensor.param || owner.scalar_type() != item.param.scalar_type()) return false;
    if (item.tensor.master != nullptr && version_of(owner) != item.version) return false;  // written by somebody else
    for (size_t i = 0; i < item.others.size(); ++i)
      if (address_of(item.others[i]) != item.pointers[i]) return false;
    return grad.key_set() == item.grad_keys && grad.scalar_type() == item.param.scalar_type() &&
           same_shape(owner, item.param) && same_shape(grad, item.param);
  }

  static void prefetch_impl(const void* impl) {
    for (size_t at = 0; at < sizeof(c10::TensorImpl); at += 64) __builtin_prefetch(static_cast<const char*>(impl) + at);
  }

  // The metadata of a parameter, its gradient and its state: they are spread over memory, and a step ago in the cache.
  void prefetch(size_t i) const {
    if (i >= owners_.size()) return;
    prefetch_impl(owners_[i].tensor().unsafeGetTensorImpl());
    if (owners_[i].item < 0) return;
    const Item& item = items_[owners_[i].item];
    prefetch_impl(item.last_grad);
    for (const at::Tensor& other : item.others) {
      const auto* impl = other.unsafeGetTensorImpl();
      __builtin_prefetch(impl->unsafe_storage().unsafeGetStorageImpl());
    }
  }

  std::vector<int64_t> members_;        // items of each counter
  std::vector<Py_ssize_t> groups_;      // parameters of each
  std::vector<PyObject*> state_;        // what walk_state saw
  std::vector<pybind11::object> kept_;  // all objects whose addresses are compared live as long as the table
};

}  // namespace dlkernels
