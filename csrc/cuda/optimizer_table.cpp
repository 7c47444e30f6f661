// One call and one launch per optimizer step for all parameters on a GPU: a table of pointers that is made once, and
// looked over at each step (csrc/common/optimizer_table_base.h).
#include "optimizer_table.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "../common/cuda_call.h"
#include "../common/optimizer_table_base.h"
#include "optimizer_kernel.h"

#if !defined(DL_CUDA_HOST)
#include <cuda_runtime_api.h>
#endif

namespace dlkernels {
namespace {

namespace py = pybind11;

// Bytes of a kernel's argument that this driver takes.
int largest_argument() {
#if defined(DL_CUDA_HOST)
  return kLargeArgument;
#else
  static const int driver = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  }();
  return driver >= 12010 ? kLargeArgument : kSmallArgument;
#endif
}

// A table in device memory, written by launches: their arguments are all that a step or a replay of it needs of the
// host. One that never changes is written once; a captured step writes it for itself, if no step before it has.
// One that changes is written where it differs from the last one, and once a captured step has written it, by every
// step: a replay may have been last.
class DeviceTable {
 public:
  explicit DeviceTable(bool fixed) : fixed_(fixed) {}

  void* set(const Queue& queue, const at::Device& device, const std::vector<uint64_t>& words, int argument) {
    const bool capturing = is_capturing(queue);
    const bool known = table_.defined() && written_ == words;
    if (known && (fixed_ || !(capturing || replayed_))) return table_.mutable_data_ptr();
    const auto size = static_cast<int64_t>(words.size());
    if (!table_.defined() || table_.numel() != size) table_ = at::empty({size}, at::device(device).dtype(at::kLong));
    launch_write_table(queue, table_.mutable_data_ptr(), words.data(), size, argument);
    replayed_ |= capturing;
    if (capturing) written_.clear();
    else written_ = words;
    return table_.mutable_data_ptr();
  }

 private:
  const bool fixed_;
  at::Tensor table_;
  std::vector<uint64_t> written_;
  bool replayed_ = false;
};

class CudaOptimizerTable final : public OptimizerTableBase {
 public:
  CudaOptimizerTable(const std::string& family, const py::list& owners, const Items& items,
                     std::vector<at::Tensor> counters, std::vector<int64_t> counter_of_row,
                     std::vector<int64_t> group_of_row, double average_decay, std::optional<uint64_t> seed)
      : OptimizerTableBase(owners, items, std::move(counters), std::move(counter_of_row)),
        adamw_(family == "adamw"),
        name_(family + "_step"),
        group_of_row_(std::move(group_of_row)),
        average_decay_(average_decay),
        seed_(seed),
        argument_(largest_argument()) {
    TORCH_CHECK_VALUE(!items_.empty(), "a step needs parameters");
    for (const Item& item : items_)
      TORCH_CHECK_TYPE(item.tensor.dtype != Float::kFloat64, "CUDA C++ steps no float64 parameters");
    for (const at::Tensor& counter : counters_)
      TORCH_CHECK_VALUE(counter.device() == device(), "a counter must be on its parameters' device, ", device(),
                        ", got ", counter.device());
    order_.resize(items_.size());
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](size_t a, size_t b) { return items_[a].norm_set < items_[b].norm_set; });
    cut();
    presence_changed();
  }

  static bool serves(const at::Tensor& param) { return served(param); }

  bool captured() const { return captured_; }
  int argument() const { return argument_; }
  void set_argument(int bytes) {
    TORCH_CHECK_VALUE(bytes == kSmallArgument || bytes == kLargeArgument, "an argument has ", kSmallArgument, " or ",
                      kLargeArgument, " bytes, got ", bytes);
    argument_ = bytes;
  }

  // Of the gradients as they are, by norm set: float64, on the device. Good until the next call.
  at::Tensor squares(int64_t sets) {
    TORCH_CHECK_VALUE(sets >= sets_, "expected at least ", sets_, " norm sets, got ", sets);
    const CudaCall call("gradient_squares", items_[0].param);
    const auto options = at::device(device()).dtype(at::kDouble);
    if (!squares_.defined() || squares_.numel() != sets) squares_ = at::empty({sets}, options);
    if (!partial_.defined()) partial_ = at::empty({std::max(1, units_)}, options);
    SquaresHeader h{};
    h.table = table(call.queue, &h.set_begin);
    take_addresses();
    const bool inlined = fits<SquaresHeader>(grads_.size());
    if (!inlined)
      h.grads = static_cast<const void* const*>(grads_on_device_.set(call.queue, device(), grads_, argument_));
    h.partial = partial_.mutable_data_ptr<double>(), h.squares = squares_.mutable_data_ptr<double>();
    h.sets = static_cast<int>(sets), h.known = static_cast<int>(sets_);
    const Counters ticket = zeroed_counters(call.queue, 1);
    h.ticket = ticket.data;
    launch_gradient_squares(call.queue, h, grads_.data(), inlined ? 8 * static_cast<int>(grads_.size()) : 0);
    return squares_;
  }

  // `values` are the numbers of each group, see dlkernels/optim/_items.py, Scalars. Gradients are divided by `scale`,
  // and nothing is stepped where `found_inf` is not 0. Gives back the norm, where there is one.
  std::optional<at::Tensor> step(const py::list& values, const py::object& scale, const py::object& found_inf,
                                 const std::optional<at::Tensor>& norm_squares, std::optional<double> max_norm,
                                 bool skip_nonfinite) {
    TORCH_CHECK_VALUE(norm_squares.has_value() || !(max_norm.has_value() || skip_nonfinite),
                      "`max_norm` and `skip_nonfinite` need `norm_squares`, got None");
    const CudaCall call(name_.c_str(), items_[0].param);
    StepHeader h{};
    h.table = table(call.queue, nullptr);
    h.num_rows = static_cast<int>(counter_of_row_.size());
    h.rounds = rounds_, h.needs = needs_, h.seed = seed_.value_or(0);
    h.average_weight = static_cast<float>(1 - average_decay_);
    h.scale = scale.is_none() ? Number{nullptr, Float::kFloat32, 1.0} : number("grad_scale", scale);
    h.found_inf = found_inf.is_none() ? Number{} : number("found_inf", found_inf);
    h.skip_nonfinite = skip_nonfinite, h.max_norm = max_norm.value_or(-1);
    std::optional<at::Tensor> norm;
    if (norm_squares.has_value()) {
      TORCH_CHECK_TYPE(norm_squares->scalar_type() == at::kDouble && norm_squares->numel() == 1,
                       "`norm_squares` must be one float64 number, got ", norm_squares->sizes());
      norm = at::empty({}, at::device(device()).dtype(at::kFloat));
      h.norm_squares = norm_squares->const_data_ptr<double>(), h.norm = norm->mutable_data_ptr<float>();
    }
    for (const char advances : advances_) h.counts |= advances != 0;
    Counters ticket{};
    if (h.counts) ticket = zeroed_counters(call.queue, 1), h.ticket = ticket.data;

    take_addresses();
    fill_rows(values);
    const size_t words = rows_.size() + grads_.size();
    const bool inlined = fits<StepHeader>(words);
    if (inlined) {
      rows_.insert(rows_.end(), grads_.begin(), grads_.end());
    } else {
      h.rows = static_cast<const StepRow*>(rows_on_device_.set(call.queue, device(), rows_, argument_));
      h.grads = static_cast<const void* const*>(grads_on_device_.set(call.queue, device(), grads_, argument_));
    }
    const int bytes = inlined ? 8 * static_cast<int>(words) : 0;
    adamw_ ? launch_adamw_step(call.queue, h, rows_.data(), bytes)
           : launch_sgdw_step(call.queue, h, rows_.data(), bytes);
    note_step();
    return norm;
  }

 private:
  static_assert(sizeof(StepRow) % 8 == 0 && sizeof(StepTensor) % 8 == 0, "tables are made of words");

  at::Device device() const { return items_[0].param.device(); }

  template <class Header>
  bool fits(size_t words) const {
    return 8 * static_cast<int64_t>(words) <= room_in<Header>(argument_);
  }

  // Whether a kernel that knows the family's usual items only will do.
  bool is_usual(const StepTensor& t) const {
    const bool slots = adamw_ ? t.slots[0] != nullptr && t.slots[1] != nullptr && t.slots[2] == nullptr
                              : t.slots[0] != nullptr && t.slots[1] == nullptr;
    return slots && t.master == nullptr && t.average == nullptr;
  }

  // Units, and the part of the table that stays.
  void cut() {
    int64_t elements = 0;
    bool usual = true;
    for (const Item& item : items_) {
      const StepTensor& t = item.tensor;
      if (t.numel == 0) continue;
      elements += t.numel;
      usual &= is_usual(t);
      rounds_ |= seed_.has_value() && ((t.dtype == Float::kBFloat16 && t.master == nullptr) ||
                                       (t.slot_dtype == Float::kBFloat16 && t.slots[0] != nullptr));
    }
    needs_ = !usual ? Needs::kAll : rounds_ ? Needs::kRounding : Needs::kLittle;
    length_ = unit_length(elements, machine_of(items_[0].param));
    std::vector<int> begins;  // of items, then of norm sets
    std::vector<int> sets;
    for (const size_t i : order_) {
      while (static_cast<int64_t>(sets.size()) <= items_[i].norm_set) sets.push_back(units_);
      begins.push_back(units_);
      const int64_t more = ceil_div<int64_t>(items_[i].tensor.numel, length_);
      TORCH_CHECK(units_ + more < (int64_t{1} << 31), "too many elements for one step");
      units_ += static_cast<int>(more);
    }
    begins.push_back(units_), sets.push_back(units_);
    sets_ = static_cast<int64_t>(sets.size()) - 1;
    begins.insert(begins.end(), sets.begin(), sets.end());
    const size_t tensors = order_.size() * sizeof(StepTensor), bytes = tensors + begins.size() * sizeof(int);
    fixed_.assign(ceil_div<size_t>(bytes, 8), 0);
    auto* at = reinterpret_cast<char*>(fixed_.data());
    for (size_t k = 0; k < order_.size(); ++k) {
      StepTensor t = items_[order_[k]].tensor;
      t.grad = nullptr;
      std::memcpy(at + k * sizeof(StepTensor), &t, sizeof(StepTensor));
    }
    std::memcpy(at + tensors, begins.data(), begins.size() * sizeof(int));
  }

  UnitTable table(const Queue& queue, const int** set_begin) {
    captured_ |= is_capturing(queue);
    const void* on_device = fixed_on_device_.set(queue, device(), fixed_, argument_);
    const auto count = static_cast<int>(order_.size());
    const auto* items = static_cast<const StepTensor*>(on_device);
    const int* first_unit = reinterpret_cast<const int*>(items + count);
    if (set_begin != nullptr) *set_begin = first_unit + count + 1;
    return {items, first_unit, count, units_, length_};
  }

  void take_addresses() {
    grads_.resize(order_.size());
    for (size_t k = 0; k < order_.size(); ++k) {
      const Item& item = items_[order_[k]];
      grads_[k] = item.present ? reinterpret_cast<uintptr_t>(item.tensor.grad) : 0;
    }
  }

  void presence_changed() override {
    std::vector<char> stepped(counter_of_row_.size(), 0), counted(counters_.size(), 0);
    for (const Item& item : items_) stepped[item.tensor.row] |= item.present;
    advances_.assign(counter_of_row_.size(), 0);
    for (size_t r = 0; r < advances_.size(); ++r) {
      const int64_t c = counter_of_row_[r];
      if (c >= 0 && stepped[r] && !counted[c]) advances_[r] = counted[c] = 1;
    }
  }

  void fill_rows(const py::list& values) {
    std::vector<StepRow> groups;
    for (const py::handle numbers : values) {
      const auto of_group = py::reinterpret_borrow<py::sequence>(numbers);
      TORCH_CHECK_VALUE(of_group.size() == 6, "expected 6 numbers of a group, got ", of_group.size());
      StepRow row{};
      row.lr = number("lr", of_group[0]);
      row.decay_rate = of_group[1].cast<double>(), row.sign = of_group[2].cast<double>();
      for (int k = 0; k < 3; ++k) row.own[k] = of_group[3 + k].cast<double>();
      for (int k = 0; adamw_ && k < 2; ++k) row.log_beta[k] = std::log(row.own[k]);  // of 0: minus infinity
      groups.push_back(row);
    }
    const size_t words = sizeof(StepRow) / 8;
    rows_.assign(counter_of_row_.size() * words, 0);
    for (size_t r = 0; r < counter_of_row_.size(); ++r) {
      StepRow row = groups.at(group_of_row_[r]);
      const int64_t c = counter_of_row_[r];
      if (c >= 0) row.counter = counters_[c].mutable_data_ptr<float>();
      row.advances = advances_[r] != 0;
      std::memcpy(rows_.data() + r * words, &row, sizeof(StepRow));
    }
  }

  Number number(const char* name, const py::handle& x) const {
    if (!THPVariable_Check(x.ptr())) return {nullptr, Float::kFloat32, x.cast<double>()};
    const at::Tensor& tensor = THPVariable_Unpack(x.ptr());
    TORCH_CHECK_VALUE(tensor.numel() == 1 && tensor.device() == device(), "`", name, "` must be one number on ",
                      device(), ", got shape ", tensor.sizes(), " on ", tensor.device());
    return {tensor.const_data_ptr(), float_kind(name, tensor), 0};
  }

  const bool adamw_;
  const std::string name_;
  const std::vector<int64_t> group_of_row_;
  const double average_decay_;
  const std::optional<uint64_t> seed_;
  int argument_;               // bytes of a kernel's argument at most
  std::vector<size_t> order_;  // items by norm set: so they lie on the device
  std::vector<char> advances_;
  bool rounds_ = false, captured_ = false;
  Needs needs_ = Needs::kAll;
  int length_ = 0, units_ = 0;
  int64_t sets_ = 0;
  std::vector<uint64_t> fixed_, rows_, grads_;  // as the device has them
  DeviceTable fixed_on_device_{true}, rows_on_device_{false}, grads_on_device_{false};
  at::Tensor partial_, squares_;
};

}  // namespace

void bind_cuda_optimizers(pybind11::module_& m) {
  using Table = CudaOptimizerTable;
  py::class_<Table>(m, "CudaOptimizerTable", py::module_local())
      .def(py::init<const std::string&, const py::list&, const Table::Items&, std::vector<at::Tensor>,
                    std::vector<int64_t>, std::vector<int64_t>, double, std::optional<uint64_t>>())
      .def_static("serves", &Table::serves)
      .def_property_readonly("captured", &Table::captured)
      .def_property("argument", &Table::argument, &Table::set_argument)
      .def("watch", &Table::watch)
      .def("refresh", &Table::refresh)
      .def("set_grads", &Table::set_grads)
      .def("squares", &Table::squares)
      .def("step", &Table::step, py::arg("values"), py::arg("scale"), py::arg("found_inf"), py::arg("norm_squares"),
           py::arg("max_norm"), py::arg("skip_nonfinite"));
}

}  // namespace dlkernels
