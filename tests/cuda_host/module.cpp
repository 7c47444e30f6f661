// The module _cuda_host: the CUDA kernels and their host sides, compiled for CPU tensors, and what tests ask the shim.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/common/cuda_call.h"
#include "../../csrc/cuda/optimizer_table.h"
#include "shim.h"

namespace py = pybind11;
namespace shim = dlkernels::shim;

PYBIND11_MODULE(_cuda_host, m) {
  m.doc() = "Host twin of the CUDA kernels.";
  m.def("seed", &shim::seed, "Draw the order of threads and blocks anew, from this number on.");
  m.def(
      "machine",
      [](int arch, int multiprocessors, int shared_per_block, int shared_per_multiprocessor,
         int threads_per_multiprocessor, int64_t l2) {
        shim::settings = {
            arch, multiprocessors, shared_per_block, shared_per_multiprocessor, threads_per_multiprocessor, l2};
      },
      "The device that launches are planned for.");
  m.def(
      "take_launches",
      [] {
        py::list launches;
        for (const auto& [op, s] : shim::take_launches()) {
          py::dict one;
          one["op"] = op, one["grid"] = s.grid[0], one["block"] = s.block, one["shared"] = s.shared;
          one["cluster"] = s.cluster, one["overlap"] = s.overlap;
          launches.append(one);
        }
        return launches;
      },
      "The launches since the last call.");
  m.def("forget_counters", &dlkernels::forget_counters, "What a kernel that was stopped left is nobody's fault.");
  m.def("take_barriers", &shim::take_barriers, "The barriers passed since the last call: file:line, or cluster.");
  m.def("leave_out", &shim::leave_out, "A barrier that is not there from now on; an empty name ends that.");
  m.def("count_bytes", &shim::count_bytes, "Count the bytes of global memory that kernels load and store from now on.");
  m.def("counted_bytes", &shim::counted_bytes, "Loaded and stored in all; of each span loaded, stored, loaded again.");
  m.def("begin_capture", &shim::begin_capture, "Launches are recorded, and do not run, from now on.");
  m.def("end_capture", &shim::end_capture, "Ends that; the number of the graph.");
  m.def("replay", &shim::replay, "Run the launches of a graph.");
  m.def("dry_run", &shim::dry_run, "Whether launches are only counted.");
  dlkernels::bind_cuda_optimizers(m);
}
