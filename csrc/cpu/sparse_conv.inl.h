// The tile loops of sparse convolution for one instruction set; see gemm.inl.h for what the including file defines and
// sparse_conv_plan.h for what is computed. One task at a time, on the calling thread, in memory that it is given.
#include "gemm.inl.h"
#include "sparse_conv_plan.h"

namespace trellis::cpu::TRELLIS_ISA {

// The rows whose signed sum is one operand row.
template <class T>
struct Sum {
  const T* row[8];
  T sign[8];
  int count;
};

template <class T>
static inline Sum<T> single(const Rows<T>& rows, int64_t source) {
  Sum<T> sum;
  sum.row[0] = rows.data + source * rows.width;
  sum.sign[0] = 1;
  sum.count = 1;
  return sum;
}

template <class T>
static inline Sum<T> resolve(const Rows<T>& rows, const Terms& terms, const int32_t* neighbors) {
  Sum<T> sum;
  sum.count = 0;
  for (int t = 0; t < terms.count; ++t) {
    const Term& term = terms.term[t];
    const int64_t neighbor = neighbors[term.tap];
    if (neighbor < 0) continue;
    sum.row[sum.count] = rows.data + (neighbor * rows.children + term.child) * rows.width;
    sum.sign[sum.count++] = static_cast<T>(term.sign);
  }
  return sum;
}

// to[i] = the sum's element begin + i, for i < length; writes, and where the tensor allows reads, whole vectors.
template <class T>
static inline void fill(const Sum<T>& sum, const T* end, int64_t begin, int64_t length, T* to) {
  using S = Simd<T>;
  using V = typename S::Vector;
  if (sum.count == 1 && sum.sign[0] == 1) {
    const T* const from = sum.row[0] + begin;
    const int64_t whole = from + (length + S::lanes - 1) / S::lanes * S::lanes <= end ? length : length - S::lanes + 1;
    int64_t i = 0;
    for (; i < whole; i += S::lanes) store(to + i, load(from + i));
    for (; i < length; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i < length; i += S::lanes) {
    V v{};
    for (int t = 0; t < sum.count; ++t) {
      const T* const from = sum.row[t] + begin + i;
      if (from + S::lanes <= end) {
        v += sum.sign[t] * load(from);
      } else {
        for (int64_t l = 0; l < S::lanes && i + l < length; ++l) v[l] += sum.sign[t] * from[l];
      }
    }
    store(to + i, v);
  }
}

// Splits `count` into the fewest parts of at most `most`, as equal as can be.
struct Split {
  int64_t count, parts;
  Split(int64_t count, int64_t most) : count(count), parts((count + most - 1) / most) {}
  int64_t begin(int64_t part) const { return part * count / parts; }
};

template <class T>
static void conv(const ConvTask<T>& task) {
  constexpr int64_t kRowStride = kDepth<T> + kPad;
  T* const rows = task.scratch;
  T* const packed = rows + kMaxTileRows * kRowStride;
  const int64_t columns = task.column_end - task.column_begin;
  const int64_t voxel_stride = task.out_children * task.out_width;
  T* const out = task.out + task.column_begin;

  for (int64_t row = task.voxel_begin * task.out_children; row < task.voxel_end * task.out_children; ++row)
    for (int64_t c = 0; c < columns; ++c)
      out[row * task.out_width + c] = task.bias ? task.bias[task.column_begin + c] : T(0);

  const Split depths(task.in.width, kDepth<T>);
  for (int p = 0; p < task.product_count; ++p) {
    const Product& product = task.products[p];
    const int32_t* const voxels = task.single_terms ? task.pairs.voxels + p * task.pairs.capacity : nullptr;
    const int32_t* const sources = task.single_terms ? task.pairs.sources + p * task.pairs.capacity : nullptr;
    const int64_t count = task.single_terms ? task.pairs.counts[p] : task.voxel_end - task.voxel_begin;
    if (count == 0) continue;
    const Split tiles(count, kTileRows);
    for (int64_t d = 0; d < depths.parts; ++d) {
      const int64_t k = depths.begin(d), depth = depths.begin(d + 1) - k;
      pack_panels(task.weight + product.weight_tap * task.tap_stride + k * task.depth_stride +
                      task.column_begin * task.column_stride,
                  task.depth_stride, task.column_stride, depth, columns, packed);
      for (int64_t t = 0; t < tiles.parts; ++t) {
        const int64_t first = tiles.begin(t), tile_rows = tiles.begin(t + 1) - first;
        T* out_rows[kTileRows];
        for (int64_t r = 0; r < tile_rows; ++r) {
          const int64_t voxel = voxels ? voxels[first + r] : task.voxel_begin + first + r;
          out_rows[r] = out + voxel * voxel_stride;
          fill(sources ? single(task.in, sources[first + r])
                       : resolve(task.in, product.in, task.neighbors + voxel * task.taps),
               task.in.end, k, depth, rows + r * kRowStride);
        }
        multiply_panels<T, kRowStride, 1>(rows, static_cast<int>(tile_rows), packed, depth, columns,
                                          {out_rows, product.shifts, product.shift_count, 0, 0});
      }
    }
  }
}

template <class T>
static void gradient(const GradientTask<T>& task) {
  using S = Simd<T>;
  T* const left = task.scratch;
  T* const packed = left + kDepth<T> * kMaxTileRows + 64;
  const Product& product = *task.product;
  const int64_t columns = task.column_end - task.column_begin;
  const int64_t shift = 0;
  const Split chunks(task.single_terms ? task.pair_count : task.voxel_end - task.voxel_begin, kDepth<T>);
  const Split tiles(task.row_end - task.row_begin, kTileRows);
  const auto voxel_of = [&](int64_t pair) { return task.single_terms ? task.voxels[pair] : task.voxel_begin + pair; };

  for (int64_t chunk = 0; chunk < chunks.parts; ++chunk) {
    const int64_t first = chunks.begin(chunk), depth = chunks.begin(chunk + 1) - first;
    for (int64_t k = 0; k < depth; ++k) {
      const Sum<T> sum = task.single_terms
                             ? single(task.in, task.sources[first + k])
                             : resolve(task.in, product.in, task.neighbors + voxel_of(first + k) * task.taps);
      for (int64_t c = 0; c < columns; c += S::panel) {
        const int64_t width = columns - c < S::panel ? columns - c : S::panel;
        const int64_t stride = (width + S::lanes - 1) / S::lanes * S::lanes;
        fill(sum, task.in.end, task.column_begin + c, width, packed + depth * c + k * stride);
      }
    }
    for (int64_t t = 0; t < tiles.parts; ++t) {
      const int64_t row = task.row_begin + tiles.begin(t), tile_rows = tiles.begin(t + 1) - tiles.begin(t);
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t voxel = voxel_of(first + k);
        fill(task.single_terms ? single(task.gradient, voxel)
                               : resolve(task.gradient, product.gradient, task.neighbors + voxel * task.taps),
             task.gradient.end, row, tile_rows, left + k * kMaxTileRows);
      }
      T* out_rows[kTileRows];
      for (int64_t r = 0; r < tile_rows; ++r)
        out_rows[r] = task.out + (row + r) * task.out_row_stride + product.weight_tap * task.out_tap_stride;
      multiply_panels<T, 1, kMaxTileRows>(left, static_cast<int>(tile_rows), packed, depth, columns,
                                          {out_rows, &shift, 1, task.column_begin, 0});
    }
  }
}

static void list_pairs(const int32_t* neighbors, int taps, const Product* products, int64_t begin, int64_t end,
                       Pairs to) {
  for (int p = 0; p < taps; ++p) to.counts[p] = 0;
  for (int64_t voxel = begin; voxel < end; ++voxel) {
    const int32_t* const row = neighbors + voxel * taps;
    for (int p = 0; p < taps; ++p) {
      const int32_t source = row[products[p].in.term[0].tap];
      const int64_t at = p * to.capacity + to.counts[p];
      to.voxels[at] = static_cast<int32_t>(voxel);
      to.sources[at] = source;
      to.counts[p] += source >= 0;
    }
  }
}

void conv_kernels(ConvKernels<float>& to) { to = {&conv<float>, &gradient<float>, &list_pairs, Simd<float>::panel}; }
void conv_kernels(ConvKernels<double>& to) {
  to = {&conv<double>, &gradient<double>, &list_pairs, Simd<double>::panel};
}

}  // namespace trellis::cpu::TRELLIS_ISA
