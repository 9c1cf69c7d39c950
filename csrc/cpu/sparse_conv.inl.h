// The tile loops of sparse convolution for one instruction set; see gemm.inl.h for what the including file defines and
// sparse_conv_plan.h for what is computed. One task at a time, on the calling thread, in memory that it is given.
#include "gemm.inl.h"
#include "sparse_conv_plan.h"

namespace trellis::cpu::TRELLIS_ISA {

// to[i] = from[i] for i < length; writes, and if the tensor reaches that far reads, whole vectors.
template <class T>
static inline void copy(const T* from, const T* end, int64_t length, T* to) {
  using S = Simd<T>;
  if (from + length + S::lanes <= end) {
    for (int64_t i = 0; i < length; i += S::lanes) store(to + i, load(from + i));
  } else {
    for (int64_t i = 0; i < length; ++i) to[i] = from[i];
  }
}

// The rows whose signed sum is one operand row.
template <class T>
struct Sum {
  const T* row[8];
  T sign[8];
  int count;
};

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

// to[i] = the sum's element begin + i for i < length, like copy.
template <class T>
static inline void add_up(const Sum<T>& sum, const T* end, int64_t begin, int64_t length, T* to) {
  using S = Simd<T>;
  using V = typename S::Vector;
  bool inside = true;
  for (int t = 0; t < sum.count; ++t) inside &= sum.row[t] + begin + length + S::lanes <= end;
  int64_t i = 0;
  for (; i < (inside ? length : length - S::lanes + 1); i += S::lanes) {
    V v{};
    for (int t = 0; t < sum.count; ++t) v += sum.sign[t] * load(sum.row[t] + begin + i);
    store(to + i, v);
  }
  for (; i < length; ++i) {
    to[i] = 0;
    for (int t = 0; t < sum.count; ++t) to[i] += sum.sign[t] * sum.row[t][begin + i];
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
    const int64_t list = product.in.term[0].tap * task.pairs.capacity;
    const int32_t *const voxels = task.pairs.voxels + list, *const sources = task.pairs.sources + list;
    const int64_t count =
        task.single_terms ? task.pairs.counts[product.in.term[0].tap] : task.voxel_end - task.voxel_begin;
    if (count == 0) continue;
    const Split tiles(count, kTileRows);
    for (int64_t d = 0; d < depths.parts; ++d) {
      const int64_t k = depths.begin(d), depth = depths.begin(d + 1) - k;
      pack_panels(task.weight + product.weight_tap * task.tap_stride + k * task.depth_stride +
                      task.column_begin * task.column_stride,
                  task.depth_stride, task.column_stride, depth, columns, packed);
      for (int64_t t = 0; t < tiles.parts; ++t) {
        const int64_t first = tiles.begin(t);
        const int tile_rows = static_cast<int>(tiles.begin(t + 1) - first);
        T* out_rows[kTileRows];
        for (int r = 0; r < tile_rows; ++r) {
          if (task.single_terms) {
            out_rows[r] = out + voxels[first + r] * voxel_stride;
            copy(task.in.data + sources[first + r] * task.in.width + k, task.in.end, depth, rows + r * kRowStride);
          } else {
            const int64_t voxel = task.voxel_begin + first + r;
            out_rows[r] = out + voxel * voxel_stride;
            add_up(resolve(task.in, product.in, task.neighbors + voxel * task.taps), task.in.end, k, depth,
                   rows + r * kRowStride);
          }
        }
        multiply_panels<T, kRowStride, 1>(rows, tile_rows, packed, depth, columns,
                                          {out_rows, product.shifts, product.shift_count, 0, 0});
      }
    }
  }
}

// The operand rows of the voxels from `first` on, one column block of them, as panels.
template <class T>
static void gather_panels(const GradientTask<T>& task, int64_t first, int64_t depth, T* packed) {
  using S = Simd<T>;
  const int64_t columns = task.column_end - task.column_begin;
  for (int64_t k = 0; k < depth; ++k) {
    Sum<T> sum;
    const T* source = nullptr;
    if (task.single_terms)
      source = task.in.data + task.sources[first + k] * task.in.width + task.column_begin;
    else
      sum = resolve(task.in, task.product->in, task.neighbors + (task.voxel_begin + first + k) * task.taps);
    for (int64_t c = 0; c < columns; c += S::panel) {
      const int64_t width = columns - c < S::panel ? columns - c : S::panel;
      T* const to = packed + depth * c + k * ((width + S::lanes - 1) / S::lanes * S::lanes);
      if (source)
        copy(source + c, task.in.end, width, to);
      else
        add_up(sum, task.in.end, task.column_begin + c, width, to);
    }
  }
}

template <class T>
static void gradient(const GradientTask<T>& task) {
  T* const left = task.scratch;
  T* const packed = left + kDepth<T> * kMaxTileRows + 64;
  const Product& product = *task.product;
  const int64_t shift = 0;
  const Split chunks(task.single_terms ? task.pair_count : task.voxel_end - task.voxel_begin, kDepth<T>);
  const Split tiles(task.row_end - task.row_begin, kTileRows);

  for (int64_t chunk = 0; chunk < chunks.parts; ++chunk) {
    const int64_t first = chunks.begin(chunk), depth = chunks.begin(chunk + 1) - first;
    gather_panels(task, first, depth, packed);
    for (int64_t t = 0; t < tiles.parts; ++t) {
      const int64_t row = task.row_begin + tiles.begin(t);
      const int tile_rows = static_cast<int>(tiles.begin(t + 1) - tiles.begin(t));
      for (int64_t k = 0; k < depth; ++k) {
        if (task.single_terms) {
          copy(task.gradient.data + task.voxels[first + k] * task.gradient.width + row, task.gradient.end, tile_rows,
               left + k * kMaxTileRows);
        } else {
          const int32_t* const neighbors = task.neighbors + (task.voxel_begin + first + k) * task.taps;
          add_up(resolve(task.gradient, product.gradient, neighbors), task.gradient.end, row, tile_rows,
                 left + k * kMaxTileRows);
        }
      }
      T* out_rows[kTileRows];
      for (int r = 0; r < tile_rows; ++r)
        out_rows[r] = task.out + (row + r) * task.out_row_stride + product.weight_tap * task.out_tap_stride;
      multiply_panels<T, 1, kMaxTileRows>(left, tile_rows, packed, depth, task.column_end - task.column_begin,
                                          {out_rows, &shift, 1, task.column_begin, 0});
    }
  }
}

static void list_pairs(const int32_t* __restrict neighbors, int taps, int64_t begin, int64_t end, Pairs to) {
  int32_t* const __restrict voxels = to.voxels, * const __restrict sources = to.sources, * const __restrict counts = to.counts;
  for (int tap = 0; tap < taps; ++tap) counts[tap] = 0;
  for (int64_t voxel = begin; voxel < end; ++voxel) {
    const int32_t* const row = neighbors + voxel * taps;
    int64_t list = 0;
    for (int tap = 0; tap < taps; ++tap, list += to.capacity) {  // writes past a list's end are overwritten
      const int32_t source = row[tap], count = counts[tap];
      voxels[list + count] = static_cast<int32_t>(voxel);
      sources[list + count] = source;
      counts[tap] = count + (source >= 0);
    }
  }
}

void conv_kernels(ConvKernels<float>& to) { to = {&conv<float>, &gradient<float>, &list_pairs, Simd<float>::panel}; }
void conv_kernels(ConvKernels<double>& to) {
  to = {&conv<double>, &gradient<double>, &list_pairs, Simd<double>::panel};
}

}  // namespace trellis::cpu::TRELLIS_ISA
