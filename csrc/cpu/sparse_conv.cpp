// Sparse convolution on the CPU: which products there are, how they are shared out, and the check of the indices. The
// loops are in sparse_conv.inl.h.
#include "sparse_conv.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "parallel.h"
#include "sparse_conv_plan.h"

namespace trellis::cpu {
namespace {

constexpr int64_t kVoxelBlock = 1024;    // most voxels of a task: their rows of the output stay in the cache
constexpr int64_t kSmallBlock = 512;     // the same if a tap's weights are few, and packing them often is cheap
constexpr int64_t kGradientBlocks = 32;  // blocks of voxels whose pairs are listed at a time by the weight gradient

template <class T>
ConvKernels<T> kernels() {
  ConvKernels<T> chosen{};
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512) {
    avx512::conv_kernels(chosen);
    return chosen;
  }
  if (instruction_set() == InstructionSet::avx2) {
    avx2::conv_kernels(chosen);
    return chosen;
  }
#endif
  baseline::conv_kernels(chosen);
  return chosen;
}

void check_neighbors(TensorView<const int32_t, 2> neighbors, int threads) {
  const int32_t voxels = static_cast<int32_t>(neighbors.size(0));
  std::atomic<int32_t> wrong{0};  // negative once an index was: the sign bit of x + 1 or of N - 1 - x
  parallel_for(neighbors.numel(), 1 << 15, threads, [&](int64_t begin, int64_t end) {
    uint32_t signs = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t x = static_cast<uint32_t>(neighbors.data[i]);
      signs |= (x + 1) | (static_cast<uint32_t>(voxels) - 1 - x);
    }
    wrong |= static_cast<int32_t>(signs);
  });
  if (wrong >= 0) return;
  const int32_t* const end = neighbors.data + neighbors.numel();
  const int32_t* const first = std::find_if(neighbors.data, end, [&](int32_t x) { return x < -1 || x >= voxels; });
  throw std::invalid_argument("neighbors must be in [-1, N) with N=" + std::to_string(voxels) + "; got " +
                              std::to_string(*first));
}

// One product per tap; `turned` for the adjoint, which reads the opposite neighbor.
std::vector<Product> single_products(int taps, bool turned) {
  std::vector<Product> products(taps);
  for (int tap = 0; tap < taps; ++tap) {
    products[tap].in = {{{turned ? taps - 1 - tap : tap, 0, 1}}, 1};
    products[tap].weight_tap = tap;
    products[tap].shift_count = 1;
  }
  return products;
}

// Subdivided voxels: along each axis there are three products, with the weights w-, S = w- + w0 + w+ and w+, in place
// of the three taps. An operand of a product is a signed sum along each axis, given as (position, child, sign).
enum class Operand { parents, children, adjoint_children };

std::vector<Term> axis_terms(Operand operand, int product) {
  switch (operand) {
    case Operand::parents:  // of a voxel: p- - p0, p0, p+ - p0
      if (product == 1) return {{1, 0, 1}};
      return {{product, 0, 1}, {1, 0, -1}};
    case Operand::children:  // of a voxel that take part in the product: even, both, odd
      if (product == 1) return {{1, 0, 1}, {1, 1, 1}};
      return {{1, product / 2, 1}};
    case Operand::adjoint_children:  // which have this voxel as p0, or as p- or p+
      if (product == 1) return {{1, 0, 1}, {1, 1, 1}};
      return {{2 - product, product / 2, 1}, {1, product / 2, -1}};
  }
  return {};
}

Terms terms_of(Operand operand, int product) {
  Terms terms;
  for (const Term& x : axis_terms(operand, product / 9))
    for (const Term& y : axis_terms(operand, product / 3 % 3))
      for (const Term& z : axis_terms(operand, product % 3))
        terms.term[terms.count++] = {(x.tap * 3 + y.tap) * 3 + z.tap, (x.child * 2 + y.child) * 2 + z.child,
                                     x.sign * y.sign * z.sign};
  return terms;
}

std::vector<Product> subdivided_products(Operand in, int64_t out_width) {
  std::vector<Product> products(27);
  for (int p = 0; p < 27; ++p) {
    products[p].in = terms_of(in, p);
    products[p].gradient = terms_of(Operand::children, p);
    products[p].weight_tap = p;
    if (in == Operand::adjoint_children) {
      products[p].shift_count = 1;
      continue;
    }
    for (int t = 0; t < products[p].gradient.count; ++t)
      products[p].shifts[products[p].shift_count++] = products[p].gradient.term[t].child * out_width;
  }
  return products;
}

// In [taps = 27][channels], replaces along each axis w0 by w- + w0 + w+ or, adjoint, adds w0 to w- and w+.
template <class T>
void combine_taps(T* taps, int64_t channels, bool adjoint) {
  for (const int step : {9, 3, 1})
    for (int tap = 0; tap < 27; ++tap) {
      if (tap / step % 3 != 1) continue;
      T* const middle = taps + tap * channels;
      T *const before = middle - step * channels, *const after = middle + step * channels;
      for (int64_t i = 0; i < channels; ++i) {
        if (adjoint) {
          before[i] += middle[i];
          after[i] += middle[i];
        } else {
          middle[i] = (before[i] + after[i]) + middle[i];
        }
      }
    }
}

template <class T>
std::unique_ptr<T[]> combined(TensorView<const T, 3> weight, int threads) {
  std::unique_ptr<T[]> sums(new T[weight.numel()]);
  const int64_t row = weight.size(1) * weight.size(2);
  parallel_for(weight.size(0), 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      std::copy_n(weight.row(o), row, sums.get() + o * row);
      combine_taps(sums.get() + o * row, weight.size(2), false);
    }
  });
  return sums;
}

struct PairMemory {
  std::unique_ptr<int32_t[]> memory;
  int64_t taps, capacity;
  PairMemory(int64_t slots, int64_t taps, int64_t capacity)
      : memory(new int32_t[slots * taps * (2 * capacity + 1)]), taps(taps), capacity(capacity) {}
  Pairs slot(int64_t i) const {
    int32_t* const first = memory.get() + i * taps * (2 * capacity + 1);
    return {first, first + taps * capacity, first + 2 * taps * capacity, capacity};
  }
};

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
void run(ConvTask<T> task, int64_t voxels, int threads) {
  if (voxels == 0 || task.out_width == 0) return;
  const ConvKernels<T> kernel = kernels<T>();
  threads = std::max(threads, 1);
  const int64_t panels = divided_up(task.out_width, kernel.panel);
  const int64_t column_blocks = divided_up(task.out_width, kColumnBlock);
  // A multiple of the threads, all about equal. More, smaller tasks would pack the weights more often.
  const int64_t most = task.in.width * task.out_width <= 64 * 64 ? kSmallBlock : kVoxelBlock;
  int64_t blocks = divided_up(voxels, most);
  while (blocks * column_blocks % threads != 0 && blocks < voxels) ++blocks;
  const int64_t capacity = divided_up(voxels, blocks);
  const PairMemory pairs(task.single_terms ? threads : 0, task.taps, capacity);
  const int64_t scratch_size = conv_scratch<T>();
  const std::unique_ptr<T[]> scratch(new T[threads * scratch_size]);
  parallel_chunks(blocks * column_blocks, threads, [&](int64_t index) {
    const int64_t block = index / column_blocks, columns = index % column_blocks, slot = omp_get_thread_num();
    ConvTask<T> mine = task;
    mine.voxel_begin = block * voxels / blocks;
    mine.voxel_end = (block + 1) * voxels / blocks;
    mine.column_begin = columns * panels / column_blocks * kernel.panel;
    mine.column_end = std::min((columns + 1) * panels / column_blocks * kernel.panel, task.out_width);
    mine.scratch = scratch.get() + slot * scratch_size;
    if (task.single_terms) {
      mine.pairs = pairs.slot(slot);
      kernel.list_pairs(task.neighbors, task.taps, mine.voxel_begin, mine.voxel_end, mine.pairs);
    }
    kernel.conv(mine);
  });
}

// Every task owns a part of the result and sums over all voxels in order, so that threads do not matter.
template <class T>
void run(GradientTask<T> task, const std::vector<Product>& products, int64_t voxels, int threads) {
  std::fill_n(task.out, task.gradient.width * task.out_row_stride, T(0));
  if (voxels == 0 || task.in.width == 0 || task.gradient.width == 0) return;
  const ConvKernels<T> kernel = kernels<T>();
  threads = std::max(threads, 1);
  const int64_t panels = divided_up(task.in.width, kernel.panel);
  const int64_t column_blocks = divided_up(task.in.width, kColumnBlock);
  const int64_t row_blocks = divided_up(task.gradient.width, kColumnBlock);
  const int64_t product_count = static_cast<int64_t>(products.size());
  const int64_t blocks = divided_up(voxels, kVoxelBlock);
  const PairMemory pairs(task.single_terms ? std::min(blocks, kGradientBlocks) : 0, task.taps, kVoxelBlock);
  const int64_t scratch_size = gradient_scratch<T>();
  const std::unique_ptr<T[]> scratch(new T[threads * scratch_size]);
  for (int64_t first = 0; first < blocks; first += kGradientBlocks) {
    const int64_t count = std::min(kGradientBlocks, blocks - first);
    const auto begin = [&](int64_t block) { return std::min(voxels, (first + block) * kVoxelBlock); };
    if (task.single_terms)
      parallel_chunks(count, threads, [&](int64_t block) {
        kernel.list_pairs(task.neighbors, task.taps, begin(block), begin(block + 1), pairs.slot(block));
      });
    parallel_chunks(product_count * row_blocks * column_blocks, threads, [&](int64_t index) {
      const int64_t p = index / (row_blocks * column_blocks), rows = index / column_blocks % row_blocks,
                    columns = index % column_blocks;
      GradientTask<T> mine = task;
      mine.product = &products[p];
      mine.row_begin = rows * task.gradient.width / row_blocks;
      mine.row_end = (rows + 1) * task.gradient.width / row_blocks;
      mine.column_begin = columns * panels / column_blocks * kernel.panel;
      mine.column_end = std::min((columns + 1) * panels / column_blocks * kernel.panel, task.in.width);
      mine.scratch = scratch.get() + omp_get_thread_num() * scratch_size;
      for (int64_t block = 0; block < count; ++block) {
        mine.voxel_begin = begin(block);
        mine.voxel_end = begin(block + 1);
        if (task.single_terms) {
          const Pairs listed = pairs.slot(block);
          const int tap = products[p].in.term[0].tap;
          mine.voxels = listed.voxels + tap * listed.capacity;
          mine.sources = listed.sources + tap * listed.capacity;
          mine.pair_count = listed.counts[tap];
        }
        kernel.gradient(mine);
      }
    });
  }
}

template <class T>
Rows<T> rows_of(TensorView<const T, 2> tensor, int children) {
  return {tensor.data, tensor.data + tensor.numel(), tensor.size(1), children};
}

// forward: reduces over the input channels, the weight's last dimension; else over the output channels, its first.
template <class T>
ConvTask<T> conv_task(TensorView<const T, 2> in, int in_children, TensorView<const int32_t, 2> neighbors,
                      const std::vector<Product>& products, const T* weight, int64_t weight_in, bool forward,
                      TensorView<T, 2> out, int out_children) {
  const int64_t taps = neighbors.size(1), row = taps * weight_in;
  ConvTask<T> task{};
  task.in = rows_of(in, in_children);
  task.neighbors = neighbors.data;
  task.taps = static_cast<int>(taps);
  task.products = products.data();
  task.product_count = static_cast<int>(products.size());
  task.single_terms = in_children == 1 && out_children == 1;
  task.weight = weight;
  task.tap_stride = weight_in;
  task.depth_stride = forward ? 1 : row;
  task.column_stride = forward ? row : 1;
  task.out = out.data;
  task.out_width = out.size(1);
  task.out_children = out_children;
  return task;
}

template <class T>
GradientTask<T> gradient_task(TensorView<const T, 2> feats, TensorView<const int32_t, 2> neighbors,
                              TensorView<const T, 2> out_gradient, int children, TensorView<T, 3> out) {
  GradientTask<T> task{};
  task.in = rows_of(feats, 1);
  task.gradient = rows_of(out_gradient, children);
  task.neighbors = neighbors.data;
  task.taps = static_cast<int>(neighbors.size(1));
  task.single_terms = children == 1;
  task.out = out.data;
  task.out_row_stride = out.size(1) * out.size(2);
  task.out_tap_stride = out.size(2);
  return task;
}

}  // namespace

template <class T>
void submanifold_conv(TensorView<const T, 2> feats, TensorView<const int32_t, 2> neighbors,
                      TensorView<const T, 3> weight, TensorView<const T, 1> bias, TensorView<T, 2> out, int threads) {
  check_neighbors(neighbors, threads);
  const auto products = single_products(static_cast<int>(neighbors.size(1)), false);
  auto task = conv_task(feats, 1, neighbors, products, weight.data, weight.size(2), true, out, 1);
  task.bias = bias.numel() ? bias.data : nullptr;
  run(task, neighbors.size(0), threads);
}

template <class T>
void submanifold_conv_input_gradient(TensorView<const T, 2> out_gradient, TensorView<const int32_t, 2> neighbors,
                                     TensorView<const T, 3> weight, TensorView<T, 2> out, int threads) {
  check_neighbors(neighbors, threads);
  const auto products = single_products(static_cast<int>(neighbors.size(1)), true);
  run(conv_task(out_gradient, 1, neighbors, products, weight.data, weight.size(2), false, out, 1), neighbors.size(0),
      threads);
}

template <class T>
void submanifold_conv_weight_gradient(TensorView<const T, 2> feats, TensorView<const int32_t, 2> neighbors,
                                      TensorView<const T, 2> out_gradient, TensorView<T, 3> out, int threads) {
  check_neighbors(neighbors, threads);
  run(gradient_task(feats, neighbors, out_gradient, 1, out),
      single_products(static_cast<int>(neighbors.size(1)), false), neighbors.size(0), threads);
}

template <class T>
void subdivided_conv(TensorView<const T, 2> feats, TensorView<const int32_t, 2> neighbors,
                     TensorView<const T, 3> weight, TensorView<const T, 1> bias, TensorView<T, 2> out, int threads) {
  check_neighbors(neighbors, threads);
  const auto sums = combined(weight, threads);
  const auto products = subdivided_products(Operand::parents, out.size(1));
  auto task = conv_task(feats, 1, neighbors, products, sums.get(), weight.size(2), true, out, 8);
  task.bias = bias.numel() ? bias.data : nullptr;
  run(task, neighbors.size(0), threads);
}

template <class T>
void subdivided_conv_input_gradient(TensorView<const T, 2> out_gradient, TensorView<const int32_t, 2> neighbors,
                                    TensorView<const T, 3> weight, TensorView<T, 2> out, int threads) {
  check_neighbors(neighbors, threads);
  const auto sums = combined(weight, threads);
  const auto products = subdivided_products(Operand::adjoint_children, out.size(1));
  run(conv_task(out_gradient, 8, neighbors, products, sums.get(), weight.size(2), false, out, 1), neighbors.size(0),
      threads);
}

template <class T>
void subdivided_conv_weight_gradient(TensorView<const T, 2> feats, TensorView<const int32_t, 2> neighbors,
                                     TensorView<const T, 2> out_gradient, TensorView<T, 3> out, int threads) {
  check_neighbors(neighbors, threads);
  run(gradient_task(feats, neighbors, out_gradient, 8, out), subdivided_products(Operand::parents, 0),
      neighbors.size(0), threads);
  parallel_for(out.size(0), 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) combine_taps(out.row(o), out.size(2), true);
  });
}

#define TRELLIS_INSTANTIATE(T)                                                                                    \
  template void submanifold_conv<T>(TensorView<const T, 2>, TensorView<const int32_t, 2>, TensorView<const T, 3>, \
                                    TensorView<const T, 1>, TensorView<T, 2>, int);                               \
  template void submanifold_conv_input_gradient<T>(TensorView<const T, 2>, TensorView<const int32_t, 2>,          \
                                                   TensorView<const T, 3>, TensorView<T, 2>, int);                \
  template void submanifold_conv_weight_gradient<T>(TensorView<const T, 2>, TensorView<const int32_t, 2>,         \
                                                    TensorView<const T, 2>, TensorView<T, 3>, int);               \
  template void subdivided_conv<T>(TensorView<const T, 2>, TensorView<const int32_t, 2>, TensorView<const T, 3>,  \
                                   TensorView<const T, 1>, TensorView<T, 2>, int);                                \
  template void subdivided_conv_input_gradient<T>(TensorView<const T, 2>, TensorView<const int32_t, 2>,           \
                                                  TensorView<const T, 3>, TensorView<T, 2>, int);                 \
  template void subdivided_conv_weight_gradient<T>(TensorView<const T, 2>, TensorView<const int32_t, 2>,          \
                                                   TensorView<const T, 2>, TensorView<T, 3>, int);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis::cpu
