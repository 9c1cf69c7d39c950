// Checks the arguments of attention, cuts it into tasks (a head of a sequence, forward also a range of its queries),
// largest first, and runs the kernel of the CPU's instruction set on each. Tasks share no output, so results do not
// depend on the number of threads.
#include "attention.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_kernel.h"
#include "cpu_features.h"
#include "parallel.h"
#include "voxel_coords.h"

namespace trellis::cpu {
namespace {

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check_offsets(const std::string& name, TensorView<const int32_t, 1> offsets, int64_t rows) {
  const int64_t count = offsets.size(0);
  if (count < 1 || offsets.data[0] != 0 || offsets.data[count - 1] != rows ||
      !std::is_sorted(offsets.data, offsets.data + count))
    throw std::invalid_argument(
        name + " must be non-decreasing from 0 to " + std::to_string(rows) + "; got " +
        (count < 1 ? "nothing" : std::to_string(offsets.data[0]) + " to " + std::to_string(offsets.data[count - 1])));
}

void check_permutation(TensorView<const int32_t, 1> order) {
  const int64_t rows = order.size(0);
  std::vector<bool> seen(rows, false);
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t row = order.data[i];
    if (row < 0 || row >= rows || seen[row])
      throw std::invalid_argument("order must hold each row number from 0 to " + std::to_string(rows - 1) + " once");
    seen[row] = true;
  }
}

// An output above the allocator's limit is fresh memory at every call, with a page fault for every 4 KiB.
template <class T, int Rank>
void prefer_large_pages(TensorView<T, Rank> out) {
  cpu::prefer_large_pages(out.data, out.numel() * static_cast<int64_t>(sizeof(T)));
}

struct Range {
  int64_t sequence, begin, end, cost;  // queries begin to end of the sequence
};

std::vector<Range> ranges(TensorView<const int32_t, 1> query_offsets, TensorView<const int32_t, 1> key_offsets,
                          bool split) {
  std::vector<Range> tasks;
  for (int64_t b = 0; b + 1 < query_offsets.size(0); ++b) {
    const int64_t queries = query_offsets.data[b + 1] - query_offsets.data[b];
    const int64_t keys = key_offsets.data[b + 1] - key_offsets.data[b];
    if (!split) {
      if (queries || keys) tasks.push_back({b, 0, queries, queries * keys});
      continue;
    }
    const int64_t pieces = (queries + kAttentionQueries - 1) / kAttentionQueries;
    for (int64_t p = 0; p < pieces; ++p) {
      const int64_t begin = p * queries / pieces, end = (p + 1) * queries / pieces;
      tasks.push_back({b, begin, end, (end - begin) * keys});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Range& a, const Range& b) { return a.cost > b.cost; });
  return tasks;
}

// body(range, head, kernel scratch) for all heads of all ranges. One thread does the heads of a range in a row where
// there are ranges enough: their rows lie side by side in memory.
template <class T, class Body>
void for_heads(const std::vector<Range>& tasks, int64_t heads, int64_t scratch_elements, int threads,
               const Body& body) {
  const int64_t count = static_cast<int64_t>(tasks.size()) * heads;
  const int64_t grain = std::clamp<int64_t>(count / (int64_t{32} * threads), 1, std::max<int64_t>(heads, 1));
  const int workers = static_cast<int>(std::clamp<int64_t>((count + grain - 1) / grain, 1, threads));
  const size_t bytes = (scratch_elements * sizeof(T) + 4095) / 4096 * 4096;
  const std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(4096, bytes * workers), &std::free);
  if (!memory) throw std::bad_alloc();
  parallel_for(count, grain, workers, [&](int64_t begin, int64_t end) {
    T* const scratch = reinterpret_cast<T*>(static_cast<char*>(memory.get()) + bytes * omp_get_thread_num());
    for (int64_t i = begin; i < end; ++i) body(tasks[i / heads], i % heads, scratch);
  });
}

struct Kernels {
  int64_t (*scratch_elements)(int64_t);
  void (*forward_float)(const AttentionForward<float>&, float*);
  void (*forward_double)(const AttentionForward<double>&, double*);
  void (*backward_float)(const AttentionBackward<float>&, float*);
  void (*backward_double)(const AttentionBackward<double>&, double*);

  void forward(const AttentionForward<float>& task, float* scratch) const { forward_float(task, scratch); }
  void forward(const AttentionForward<double>& task, double* scratch) const { forward_double(task, scratch); }
  void backward(const AttentionBackward<float>& task, float* scratch) const { backward_float(task, scratch); }
  void backward(const AttentionBackward<double>& task, double* scratch) const { backward_double(task, scratch); }
};

Kernels kernels() {
#define TRELLIS_KERNELS(NAMESPACE)                                                                                \
  Kernels {                                                                                                       \
    NAMESPACE::scratch_elements, NAMESPACE::forward, NAMESPACE::forward, NAMESPACE::backward, NAMESPACE::backward \
  }
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::avx512:
      return TRELLIS_KERNELS(attention_avx512);
    case InstructionSet::avx2:
      return TRELLIS_KERNELS(attention_avx2);
#endif
    default:
      return TRELLIS_KERNELS(attention_baseline);
  }
}

// Where the rows of a head of a sequence are: packed end to end from `begin`, or listed from order[begin].
template <class T>
struct Packed {
  T* data;
  int64_t stride, head_stride;
  const int32_t* order;
  AttentionRows<T> rows(int64_t head, int64_t begin) const {
    return order ? AttentionRows<T>{data + head * head_stride, stride, order + begin}
                 : AttentionRows<T>{data + head * head_stride + begin * stride, stride, nullptr};
  }
};

template <class T>
Packed<T> packed(TensorView<T, 3> tensor, const int32_t* order = nullptr) {
  return {tensor.data, tensor.size(1) * tensor.size(2), tensor.size(2), order};
}
template <class T>
Packed<T> packed(TensorView<T, 2> tensor, const int32_t* order = nullptr) {
  return {tensor.data, tensor.size(1), 1, order};
}
template <class T>
Packed<T> packed(TensorView<T, 4> qkv, int64_t which, const int32_t* order) {
  const int64_t one = qkv.size(2) * qkv.size(3);
  return {qkv.data + which * one, 3 * one, qkv.size(3), order};
}

template <class T>
struct Forward {
  Packed<const T> query, key, value;
  Packed<T> out, logsumexp;
};

template <class T>
void run(const Forward<T>& p, TensorView<const int32_t, 1> query_offsets, TensorView<const int32_t, 1> key_offsets,
         int64_t heads, int64_t width, int threads) {
  const Kernels kernel = kernels();
  for_heads<T>(ranges(query_offsets, key_offsets, true), heads, kernel.scratch_elements(width), threads,
               [&](const Range& r, int64_t head, T* scratch) {
                 const int64_t first = query_offsets.data[r.sequence] + r.begin, key = key_offsets.data[r.sequence];
                 kernel.forward({r.end - r.begin, key_offsets.data[r.sequence + 1] - key, width,
                                 p.query.rows(head, first), p.key.rows(head, key), p.value.rows(head, key),
                                 p.out.rows(head, first), p.logsumexp.rows(head, first), head + 1 < heads ? width : 0},
                                scratch);
               });
}

template <class T>
struct Backward {
  Packed<const T> query, key, value, out, logsumexp, out_gradient;
  Packed<T> query_gradient, key_gradient, value_gradient;
};

template <class T>
void run(const Backward<T>& p, TensorView<const int32_t, 1> query_offsets, TensorView<const int32_t, 1> key_offsets,
         int64_t heads, int64_t width, int threads) {
  const Kernels kernel = kernels();
  for_heads<T>(ranges(query_offsets, key_offsets, false), heads, kernel.scratch_elements(width), threads,
               [&](const Range& r, int64_t head, T* scratch) {
                 const int64_t first = query_offsets.data[r.sequence], key = key_offsets.data[r.sequence];
                 kernel.backward({r.end, key_offsets.data[r.sequence + 1] - key, width, p.query.rows(head, first),
                                  p.key.rows(head, key), p.value.rows(head, key), p.out.rows(head, first),
                                  p.logsumexp.rows(head, first), p.out_gradient.rows(head, first),
                                  p.query_gradient.rows(head, first), p.key_gradient.rows(head, key),
                                  p.value_gradient.rows(head, key)},
                                 scratch);
               });
}

template <class T>
void check_varlen(TensorView<const T, 3> query, TensorView<const T, 3> key, TensorView<const T, 3> value,
                  TensorView<const int32_t, 1> query_offsets, TensorView<const int32_t, 1> key_offsets) {
  require(key.shape == value.shape, "value must have the shape of key");
  require(query.size(1) == key.size(1) && query.size(2) == key.size(2), "key must have the heads and width of query");
  require(query.size(2) > 0, "the head width must be at least 1");
  require(query_offsets.size(0) == key_offsets.size(0), "query_offsets and key_offsets must have one length");
  check_offsets("query_offsets", query_offsets, query.size(0));
  check_offsets("key_offsets", key_offsets, key.size(0));
}

template <class T>
void check_windowed(TensorView<const T, 4> qkv, TensorView<const int32_t, 1> order,
                    TensorView<const int32_t, 1> offsets) {
  require(qkv.size(1) == 3 && qkv.size(3) > 0, "qkv must be [N, 3, H, D] with D at least 1");
  require(order.size(0) == qkv.size(0), "order must have a number for each row of qkv");
  check_offsets("offsets", offsets, qkv.size(0));
  check_permutation(order);
}

template <class T, int Rank>
std::array<int64_t, 3> rows_heads_width(TensorView<T, Rank> tensor) {
  return {tensor.size(0), tensor.size(Rank - 2), tensor.size(Rank - 1)};
}

}  // namespace

template <class T>
void varlen_attention(TensorView<const T, 3> query, TensorView<const T, 3> key, TensorView<const T, 3> value,
                      TensorView<const int32_t, 1> query_offsets, TensorView<const int32_t, 1> key_offsets,
                      TensorView<T, 3> out, TensorView<T, 2> logsumexp, int threads) {
  check_varlen(query, key, value, query_offsets, key_offsets);
  require(out.shape == query.shape, "out must have the shape of query");
  require(logsumexp.size(0) == query.size(0) && logsumexp.size(1) == query.size(1), "logsumexp must be [N, H]");
  prefer_large_pages(out);
  run(Forward<T>{packed(query), packed(key), packed(value), packed(out), packed(logsumexp)}, query_offsets, key_offsets,
      query.size(1), query.size(2), threads);
}

template <class T>
void varlen_attention_backward(TensorView<const T, 3> out_gradient, TensorView<const T, 3> query,
                               TensorView<const T, 3> key, TensorView<const T, 3> value, TensorView<const T, 3> out,
                               TensorView<const T, 2> logsumexp, TensorView<const int32_t, 1> query_offsets,
                               TensorView<const int32_t, 1> key_offsets, TensorView<T, 3> query_gradient,
                               TensorView<T, 3> key_gradient, TensorView<T, 3> value_gradient, int threads) {
  check_varlen(query, key, value, query_offsets, key_offsets);
  require(out.shape == query.shape && out_gradient.shape == query.shape && query_gradient.shape == query.shape &&
              key_gradient.shape == key.shape && value_gradient.shape == key.shape,
          "gradients must have the shapes of what they are of");
  require(logsumexp.size(0) == query.size(0) && logsumexp.size(1) == query.size(1), "logsumexp must be [N, H]");
  for (const auto gradient : {query_gradient, key_gradient, value_gradient}) prefer_large_pages(gradient);
  run(Backward<T>{packed(query), packed(key), packed(value), packed(out), packed(logsumexp), packed(out_gradient),
                  packed(query_gradient), packed(key_gradient), packed(value_gradient)},
      query_offsets, key_offsets, query.size(1), query.size(2), threads);
}

template <class T>
void windowed_attention(TensorView<const T, 4> qkv, TensorView<const int32_t, 1> order,
                        TensorView<const int32_t, 1> offsets, TensorView<T, 3> out, TensorView<T, 2> logsumexp,
                        int threads) {
  check_windowed(qkv, order, offsets);
  require(rows_heads_width(qkv) == out.shape, "out must be [N, H, D]");
  require(logsumexp.size(0) == out.size(0) && logsumexp.size(1) == out.size(1), "logsumexp must be [N, H]");
  prefer_large_pages(out);
  const int32_t* const rows = order.data;
  run(Forward<T>{packed(qkv, 0, rows), packed(qkv, 1, rows), packed(qkv, 2, rows), packed(out, rows),
                 packed(logsumexp, rows)},
      offsets, offsets, out.size(1), out.size(2), threads);
}

template <class T>
void windowed_attention_backward(TensorView<const T, 3> out_gradient, TensorView<const T, 4> qkv,
                                 TensorView<const T, 3> out, TensorView<const T, 2> logsumexp,
                                 TensorView<const int32_t, 1> order, TensorView<const int32_t, 1> offsets,
                                 TensorView<T, 4> qkv_gradient, int threads) {
  check_windowed(qkv, order, offsets);
  require(rows_heads_width(qkv) == out.shape && out_gradient.shape == out.shape && qkv_gradient.shape == qkv.shape,
          "gradients must have the shapes of what they are of");
  require(logsumexp.size(0) == out.size(0) && logsumexp.size(1) == out.size(1), "logsumexp must be [N, H]");
  prefer_large_pages(qkv_gradient);
  const int32_t* const rows = order.data;
  run(Backward<T>{packed(qkv, 0, rows), packed(qkv, 1, rows), packed(qkv, 2, rows), packed(out, rows),
                  packed(logsumexp, rows), packed(out_gradient, rows), packed(qkv_gradient, 0, rows),
                  packed(qkv_gradient, 1, rows), packed(qkv_gradient, 2, rows)},
      offsets, offsets, out.size(1), out.size(2), threads);
}

#define TRELLIS_INSTANTIATE(T)                                                                                         \
  template void varlen_attention(TensorView<const T, 3>, TensorView<const T, 3>, TensorView<const T, 3>,               \
                                 TensorView<const int32_t, 1>, TensorView<const int32_t, 1>, TensorView<T, 3>,         \
                                 TensorView<T, 2>, int);                                                               \
  template void varlen_attention_backward(TensorView<const T, 3>, TensorView<const T, 3>, TensorView<const T, 3>,      \
                                          TensorView<const T, 3>, TensorView<const T, 3>, TensorView<const T, 2>,      \
                                          TensorView<const int32_t, 1>, TensorView<const int32_t, 1>,                  \
                                          TensorView<T, 3>, TensorView<T, 3>, TensorView<T, 3>, int);                  \
  template void windowed_attention(TensorView<const T, 4>, TensorView<const int32_t, 1>, TensorView<const int32_t, 1>, \
                                   TensorView<T, 3>, TensorView<T, 2>, int);                                           \
  template void windowed_attention_backward(TensorView<const T, 3>, TensorView<const T, 4>, TensorView<const T, 3>,    \
                                            TensorView<const T, 2>, TensorView<const int32_t, 1>,                      \
                                            TensorView<const int32_t, 1>, TensorView<T, 4>, int);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis::cpu
