// What the convolutions of this room have in common, free of any instruction set: each is a sum of products
//
//   out[shifts of product p] += rows_p(in) weight_p
//
// where row n of rows_p is a signed sum of rows of `in` that belong to voxel n and to its neighbors. A plain
// convolution has one term per product; a convolution of subdivided voxels up to eight (see sparse_conv.cpp).
#pragma once
#include <cstdint>

namespace trellis::cpu {

// Row neighbors[n, tap] * children + child of a tensor with `children` rows per voxel, or nothing if there is no such
// neighbor; times sign.
struct Term {
  int tap;
  int child;
  int sign;
};

struct Terms {
  Term term[8];
  int count = 0;
};

struct Product {
  Terms in;        // operand rows, gathered from `in`
  Terms gradient;  // weight gradient only: the other operand's rows, gathered from the output gradient
  int weight_tap = 0;
  int64_t shifts[8]{};  // elements after out's first row of voxel n
  int shift_count = 0;
};

// Rows of a tensor, by voxel.
template <class T>
struct Rows {
  const T* data;
  const T* end;
  int64_t width;
  int children;  // rows per voxel
};

// For each tap, the voxels of a block that have this neighbor, and the neighbor; filled by list_pairs. Products of
// several terms use all voxels and no list.
struct Pairs {
  int32_t* voxels;   // [taps][capacity]
  int32_t* sources;  // [taps][capacity]
  int32_t* counts;   // [taps]
  int64_t capacity;
};

template <class T>
struct ConvTask {
  Rows<T> in;
  const int32_t* neighbors;
  int taps;
  const Product* products;
  int product_count;
  bool single_terms;
  const T* weight;  // weight_p(k, c) = weight[weight_tap * tap_stride + k * depth_stride + c * column_stride]
  int64_t tap_stride, depth_stride, column_stride;
  const T* bias;  // or null
  T* out;
  int64_t out_width;
  int out_children;
  int64_t voxel_begin, voxel_end, column_begin, column_end;  // this task's share of the output
  Pairs pairs;
  T* scratch;  // conv_scratch() elements
};

// weight gradient[o, weight_tap, i] += sum over voxels of gradient row [o] * in row [i]
template <class T>
struct GradientTask {
  Rows<T> in, gradient;
  const int32_t* neighbors;
  int taps;
  const Product* product;
  bool single_terms;
  T* out;  // [gradient.width, weight taps, in.width]
  int64_t out_row_stride, out_tap_stride;
  int64_t voxel_begin, voxel_end;
  const int32_t *voxels, *sources;  // the pairs of this product in the block, if single_terms
  int64_t pair_count;
  int64_t row_begin, row_end, column_begin, column_end;  // this task's share of the output: o and i
  T* scratch;                                            // gradient_scratch() elements
};

template <class T>
struct ConvKernels {
  void (*conv)(const ConvTask<T>&);
  void (*gradient)(const GradientTask<T>&);
  void (*list_pairs)(const int32_t* neighbors, int taps, int64_t begin, int64_t end, Pairs to);
  int panel;  // columns of a full panel
};

constexpr int64_t kColumnBlock = 384;  // with kDepthBytes: the packed weight block stays in L2
constexpr int64_t kDepthBytes = 1024;  // depth of a block of the reduction, in bytes of one row
constexpr int64_t kPad = 16;           // elements: rows of a tile start in different cache sets
constexpr int64_t kMaxTileRows = 16;

template <class T>
constexpr int64_t kDepth = kDepthBytes / sizeof(T);

template <class T>
constexpr int64_t conv_scratch() {
  return kDepth<T> * (kColumnBlock + 64) + kMaxTileRows * (kDepth<T> + kPad);
}
template <class T>
constexpr int64_t gradient_scratch() {
  return kDepth<T> * (kColumnBlock + 64) + kDepth<T> * kMaxTileRows + 64;
}

namespace baseline {
void conv_kernels(ConvKernels<float>&);
void conv_kernels(ConvKernels<double>&);
}  // namespace baseline
namespace avx2 {
void conv_kernels(ConvKernels<float>&);
void conv_kernels(ConvKernels<double>&);
}  // namespace avx2
namespace avx512 {
void conv_kernels(ConvKernels<float>&);
void conv_kernels(ConvKernels<double>&);
}  // namespace avx512

}  // namespace trellis::cpu
