// TensorView<T, Rank>: how a torch.Tensor looks in C++. Kernels include this; only bindings.cpp includes the caster
// (tensor_caster.h), so that kernels compile without pybind11.
#pragma once
#include <array>
#include <cstdint>

namespace trellis {

template <class T, int Rank>
struct TensorView {
  T* data = nullptr;
  std::array<int64_t, Rank> shape{};

  int64_t size(int dim) const { return shape[dim]; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t extent : shape) count *= extent;
    return count;
  }
  T* row(int64_t i) const {  // address of data[i, 0, ...]
    int64_t stride = 1;
    for (int dim = 1; dim < Rank; ++dim) stride *= shape[dim];
    return data + i * stride;
  }
};

}  // namespace trellis
