// An autograd node for ops that are called often on little data: it keeps what it needs in members of its own, where
// torch::autograd::Function builds a dictionary and checks every tensor anew.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

namespace dlkernels {

// How this torch holds nodes: std::shared_ptr, later c10::intrusive_ptr.
using GradFn = std::decay_t<decltype(std::declval<const at::Tensor&>().grad_fn())>;

template <class Pointer, class T>
Pointer owned(std::unique_ptr<T> made) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return Pointer(made.release(), [](auto* node) { deleteNode(node); });  // torch's own, which does not recurse
  } else {
    return c10::intrusive_ptr<T>::unsafe_steal_from_new(made.release());
  }
}

// A subclass gives `apply`, which may call `unpack`, and `name`. N: how many tensors are kept.
template <size_t N>
class LightNode : public torch::autograd::Node {
 public:
  // Make `output` the result of this node, computed from `inputs`; `kept` are inputs or plain tensors.
  template <class T, class... Inputs>
  static at::Tensor attach(std::unique_ptr<T> made, at::Tensor output, const std::array<at::Tensor, N>& kept,
                           const Inputs&... inputs) {
    made->set_next_edges(torch::autograd::collect_next_edges(inputs...));
    for (size_t i = 0; i < N; ++i) made->kept_[i] = torch::autograd::SavedVariable(kept[i], /*is_output=*/false);
    torch::autograd::set_history(output, owned<GradFn>(std::move(made)));
    return output;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : kept_) variable.reset_data();
  }

 protected:
  // What was kept; raises torch's messages after a change in place and on a second pass through a freed graph.
  std::array<at::Tensor, N> unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::array<at::Tensor, N> tensors;
    for (size_t i = 0; i < N; ++i) tensors[i] = kept_[i].unpack();
    return tensors;
  }

 private:
  std::array<torch::autograd::SavedVariable, N> kept_;
};

}  // namespace dlkernels
