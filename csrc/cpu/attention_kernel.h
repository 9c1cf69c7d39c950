// Between attention.cpp, which checks and hands out work, and the kernels, compiled once per instruction set. Only
// plain data and declarations: this header is seen by the files compiled for AVX2 and AVX-512, which must not emit weak
// symbols.
#pragma once
#include <cstdint>

namespace trellis::cpu {

// Rows of one head of one sequence: row i begins at base + (index ? index[i] : i) * stride.
template <class T>
struct AttentionRows {
  T* base;
  int64_t stride;
  const int32_t* index;
};

template <class T>
struct AttentionForward {
  int64_t queries, keys, width;
  AttentionRows<const T> query, key, value;
  AttentionRows<T> out, logsumexp;  // logsumexp: rows of one number
  int64_t ahead;  // elements from this head to the one the thread does next on the same rows; 0: some other rows
};

template <class T>
struct AttentionBackward {
  int64_t queries, keys, width;
  AttentionRows<const T> query, key, value, out, logsumexp, out_gradient;
  AttentionRows<T> query_gradient, key_gradient, value_gradient;
};

// The most queries of one forward task: keys and values are packed once per task, so more is cheaper, fewer is better
// balanced. A multiple of every panel width.
constexpr int64_t kAttentionQueries = 384;

// Scratch: elements that forward and backward need, 64-byte aligned, for heads of this width.
#define TRELLIS_ATTENTION_KERNELS(NAMESPACE)                        \
  namespace NAMESPACE {                                             \
  int64_t scratch_elements(int64_t width);                          \
  void forward(const AttentionForward<float>&, float* scratch);     \
  void forward(const AttentionForward<double>&, double* scratch);   \
  void backward(const AttentionBackward<float>&, float* scratch);   \
  void backward(const AttentionBackward<double>&, double* scratch); \
  }

TRELLIS_ATTENTION_KERNELS(attention_baseline)
TRELLIS_ATTENTION_KERNELS(attention_avx2)
TRELLIS_ATTENTION_KERNELS(attention_avx512)

}  // namespace trellis::cpu
