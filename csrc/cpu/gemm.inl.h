// A register-blocked product of small matrices for one instruction set, on GCC's vector extensions. The including file
// is compiled for that set and defines TRELLIS_ISA (a namespace), TRELLIS_VECTOR_BYTES and TRELLIS_TILE_ROWS.
// Everything is static: nothing compiled here may be shared with files compiled for another set.
#include <cstdint>
#include <utility>

namespace trellis::cpu::TRELLIS_ISA {

constexpr int kTileRows = TRELLIS_TILE_ROWS;  // rows x 2 vectors of accumulators fill the register file
constexpr int kPanelVectors = 2;

template <class T>
struct Simd {
  typedef T Vector __attribute__((vector_size(TRELLIS_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  static constexpr int lanes = TRELLIS_VECTOR_BYTES / sizeof(T);
  static constexpr int panel = kPanelVectors * lanes;  // columns of a full panel of the right-hand matrix
};

template <class T>
static inline typename Simd<T>::Vector load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Vector*>(p);
}
template <class T>
static inline void store(T* p, typename Simd<T>::Vector v) {
  *reinterpret_cast<typename Simd<T>::Vector*>(p) = v;
}

// Where the rows of a product are added: row r, columns from `column` on, at out[r] + shifts[s] for every s.
template <class T>
struct Destination {
  T* const* out;
  const int64_t* shifts;
  int shift_count;
  int64_t column;
  int columns;  // of this panel that exist
};

// destination += a b, where a(r, k) = a[r * kRowStride + k * kDepthStride] and b is a packed panel [depth][vectors].
// Strides are compile-time constants, so that all rows are addressed from one register.
template <class T, int kRows, int kVectors, int kRowStride, int kDepthStride>
static void multiply_add(const T* a, const T* b, int64_t depth, const Destination<T>& to) {
  using S = Simd<T>;
  using V = typename S::Vector;
  for (int r = 0; r < kRows; ++r)  // read back below, long after
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(to.out[r] + to.shifts[0] + to.column + v * S::lanes, 1);
  V sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = V{};
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k) {
    V right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * S::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const T left = a[r * kRowStride];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
    a += kDepthStride;
    b += kVectors * S::lanes;
  }
  if (to.columns == kVectors * S::lanes) {
    for (int s = 0; s < to.shift_count; ++s) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        T* const p = to.out[r] + to.shifts[s] + to.column;
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) store(p + v * S::lanes, load(p + v * S::lanes) + sum[r][v]);
      }
    }
    return;
  }
  T rest[kRows][kVectors * S::lanes];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(rest[r] + v * S::lanes, sum[r][v]);
  for (int s = 0; s < to.shift_count; ++s)
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < to.columns; ++c) to.out[r][to.shifts[s] + to.column + c] += rest[r][c];
}

template <class T>
using MultiplyAdd = void (*)(const T*, const T*, int64_t, const Destination<T>&);

template <class T, int kRowStride, int kDepthStride, int... kRows>
static MultiplyAdd<T> choose(int rows, int vectors, std::integer_sequence<int, kRows...>) {
  static constexpr MultiplyAdd<T> table[kPanelVectors][kTileRows] = {
      {&multiply_add<T, kRows + 1, 1, kRowStride, kDepthStride>...},
      {&multiply_add<T, kRows + 1, 2, kRowStride, kDepthStride>...}};
  return table[vectors - 1][rows - 1];
}

// A tile of `rows` rows times all panels of a packed matrix of `columns` columns.
template <class T, int kRowStride, int kDepthStride>
static void multiply_panels(const T* a, int rows, const T* packed, int64_t depth, int64_t columns, Destination<T> to) {
  using S = Simd<T>;
  constexpr auto all = std::make_integer_sequence<int, kTileRows>{};
  const auto full = choose<T, kRowStride, kDepthStride>(rows, kPanelVectors, all);
  for (int64_t c = 0; c < columns; c += S::panel, packed += depth * S::panel, to.column += S::panel) {
    to.columns = static_cast<int>(columns - c < S::panel ? columns - c : S::panel);
    const int vectors = (to.columns + S::lanes - 1) / S::lanes;
    if (vectors == kPanelVectors)
      full(a, packed, depth, to);
    else
      choose<T, kRowStride, kDepthStride>(rows, vectors, all)(a, packed, depth, to);
  }
}

template <int kHalf, class V, int... l>
static inline void exchange(V& a, V& b, std::integer_sequence<int, l...>) {
  constexpr int n = sizeof...(l);
  const V low = __builtin_shufflevector(a, b, ((l & kHalf) ? n + l - kHalf : l)...);
  const V high = __builtin_shufflevector(a, b, ((l & kHalf) ? n + l : l + kHalf)...);
  a = low;
  b = high;
}

template <int kHalf, int kLanes, class V>
static inline void transpose(V (&v)[kLanes]) {
  if constexpr (kHalf > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & kHalf)) exchange<kHalf>(v[i], v[i + kHalf], std::make_integer_sequence<int, kLanes>{});
    transpose<kHalf / 2, kLanes>(v);
  }
}

// The panels of matrix(k, c) = source[k * depth_stride + c * column_stride], one of the strides being 1. Columns past
// the last one, up to a whole vector, are zero.
template <class T>
static void pack_panels(const T* source, int64_t depth_stride, int64_t column_stride, int64_t depth, int64_t columns,
                        T* packed) {
  using S = Simd<T>;
  using V = typename S::Vector;
  for (int64_t begin = 0; begin < columns; begin += S::panel) {
    const int64_t width = columns - begin < S::panel ? columns - begin : S::panel;
    const int64_t stride = (width + S::lanes - 1) / S::lanes * S::lanes;
    for (int64_t c = 0; c < stride; c += S::lanes) {
      const int64_t present = width - c < S::lanes ? width - c : S::lanes;
      const T* const from = source + (begin + c) * column_stride;
      T* const to = packed + c;
      int64_t k = 0;
      if (present == S::lanes && column_stride == 1) {
        for (; k < depth; ++k) store(to + k * stride, load(from + k * depth_stride));
      } else if (depth_stride == 1) {
        for (; k + S::lanes <= depth; k += S::lanes) {
          V v[S::lanes];
#pragma GCC unroll 16
          for (int i = 0; i < S::lanes; ++i) v[i] = i < present ? load(from + i * column_stride + k) : V{};
          transpose<S::lanes / 2, S::lanes>(v);
#pragma GCC unroll 16
          for (int i = 0; i < S::lanes; ++i) store(to + (k + i) * stride, v[i]);
        }
      }
      for (; k < depth; ++k)
        for (int i = 0; i < S::lanes; ++i)
          to[k * stride + i] = i < present ? from[k * depth_stride + i * column_stride] : T(0);
    }
    packed += depth * stride;
  }
}

}  // namespace trellis::cpu::TRELLIS_ISA
