// One call per optimizer step for all parameters on CPUs: a table of pointers that is made once, and looked over at
// each step (csrc/common/optimizer_table_base.h).
#include "optimizer_table.h"

#include <algorithm>
#include <string>

#include "../common/optimizer_table_base.h"

namespace dlkernels {
namespace {

namespace py = pybind11;

// A run of elements of one item: what a thread takes at a time.
struct Piece {
  int64_t item, begin, end;
};

constexpr int64_t kQuick = int64_t{1} << 17;  // elements of a step that other Python threads can wait for

class OptimizerTable final : public OptimizerTableBase {
 public:
  OptimizerTable(const std::string& family, const py::list& owners, const Items& items,
                 std::vector<at::Tensor> counters, std::vector<int64_t> counter_of_row,
                 std::vector<int64_t> group_of_row)
      : OptimizerTableBase(owners, items, std::move(counters), std::move(counter_of_row)),
        family_(family == "adamw" ? adamw_family() : sgdw_family()),
        group_of_row_(std::move(group_of_row)) {
    cut();
  }

  // Of the raw gradients, by norm set; partial sums per piece are added in order: the same for any number of threads.
  std::vector<double> squares(int64_t sets) const {
    std::vector<double> of_piece(pieces_.size()), sums(sets);
    parallel([&](size_t i) {
      const Piece& p = pieces_[i];
      const StepTensor& t = items_[p.item].tensor;
      of_piece[i] = family_.squares(t.grad, t.dtype, p.begin, p.end);
    });
    for (size_t i = 0; i < pieces_.size(); ++i) sums[items_[pieces_[i].item].norm_set] += of_piece[i];
    return sums;
  }

  // `values` are the numbers of each group, see dlkernels/optim/_items.py, Scalars.
  void step(const std::vector<std::vector<double>>& values, double factor, double average_decay,
            std::optional<uint64_t> seed) {
    for (const auto& numbers : values)
      TORCH_CHECK_VALUE(numbers.size() == family_.values, "expected ", family_.values, " numbers of a group");
    const auto loop = family_.loop({factor, average_decay, seed.has_value(), seed.value_or(0)});
    for (size_t r = 0; r < counter_of_row_.size(); ++r) {
      const int64_t c = counter_of_row_[r];
      loop->add_row(values.at(group_of_row_[r]),
                    c < 0 ? 0 : static_cast<int64_t>(*counters_[c].const_data_ptr<float>()) + 1);
    }
    parallel([&](size_t i) {
      const Piece& p = pieces_[i];
      loop->run(items_[p.item].tensor, p.begin, p.end);
    });
    std::vector<char> counted(counters_.size(), 0);
    for (const Item& item : items_) {
      const int64_t c = item.present ? counter(item) : -1;
      if (c >= 0 && !counted[c]) *counters_[c].mutable_data_ptr<float>() += 1, counted[c] = 1;
    }
    note_step();
  }

 private:
  void presence_changed() override { cut(); }

  // The pieces of the items that are present.
  void cut() {
    pieces_.clear();
    elements_ = 0;
    for (size_t i = 0; i < items_.size(); ++i) {
      if (!items_[i].present) continue;
      const int64_t n = items_[i].tensor.numel;
      elements_ += n;
      for (int64_t begin = 0; begin < n; begin += kPiece)
        pieces_.push_back({static_cast<int64_t>(i), begin, std::min(n, begin + kPiece)});
    }
  }

  // Other Python threads run during a long step, and may set gradients to None: these are held meanwhile.
  template <class F>
  void parallel(F f) const {
    const int64_t n = static_cast<int64_t>(pieces_.size());
    if (n == 0) return;
    std::vector<at::Tensor> held;
    std::optional<py::gil_scoped_release> release;
    if (elements_ > kQuick) {
      for (const Item& item : items_)
        if (item.present) held.push_back(owners_[item.owner].tensor().grad());
      release.emplace();
    }
    at::parallel_for(0, n, grain(elements_ / n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(static_cast<size_t>(i));
    });
  }

  OptimizerFamily family_;
  std::vector<int64_t> group_of_row_;
  std::vector<Piece> pieces_;
  int64_t elements_ = 0;
};

}  // namespace

void bind_optimizers(pybind11::module_& m) {
  py::class_<OptimizerTable>(m, "OptimizerTable")
      .def(py::init<const std::string&, const py::list&, const OptimizerTableBase::Items&, std::vector<at::Tensor>,
                    std::vector<int64_t>, std::vector<int64_t>>())
      .def("watch", &OptimizerTable::watch)
      .def("refresh", &OptimizerTable::refresh)
      .def("set_grads", &OptimizerTable::set_grads)
      .def("squares", &OptimizerTable::squares)
      .def("step", &OptimizerTable::step, py::arg("values"), py::arg("factor"), py::arg("average_decay"),
           py::arg("seed"));
}

}  // namespace dlkernels
