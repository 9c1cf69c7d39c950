// Vectors, exp2, packing and the register-blocked matrix product that both directions of attention are made of.
// Included by attention_kernel.inl.h inside an anonymous namespace, once per instruction set: everything here is local
// to its object file.
//
// All products have the form C[r][v] = sum_k a(r, k) * B[k][v]: elements of A are broadcast, rows of B are vectors, and
// a tile of C stays in registers.

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int count = TRELLIS_VECTOR_BYTES / 4;
  typedef float Vector __attribute__((vector_size(TRELLIS_VECTOR_BYTES)));
  typedef int32_t Integers __attribute__((vector_size(TRELLIS_VECTOR_BYTES)));
};
template <>
struct Lanes<double> {
  static constexpr int count = TRELLIS_VECTOR_BYTES / 8;
  typedef double Vector __attribute__((vector_size(TRELLIS_VECTOR_BYTES)));
  typedef int64_t Integers __attribute__((vector_size(TRELLIS_VECTOR_BYTES)));
};
template <class T>
using Vector = typename Lanes<T>::Vector;

#define TRELLIS_INLINE static inline __attribute__((always_inline))

template <class T>
TRELLIS_INLINE Vector<T> load(const T* from) {
  Vector<T> vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}
template <class T>
TRELLIS_INLINE void store(T* to, Vector<T> vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}
template <class V>
TRELLIS_INLINE V larger(V a, V b) {  // b where either is NaN
  return a > b ? a : b;
}
TRELLIS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int N>
struct Int {
  static constexpr int value = N;
};

// 2^x for x <= 127, within 2 ulp; at least 2^-126, which stands for zero here: it is added to or multiplied with
// numbers near one. NaN stays NaN. 2^x = 2^round(x) * 2^f with |f| <= 1/2.
TRELLIS_INLINE Vector<float> exp2(Vector<float> x) {
  const Vector<float> lowest = Vector<float>{} - 126.f;
  x = larger(lowest, x);
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const Vector<float> shifted = x + magic;
  const Vector<float> f = x - (shifted - magic);
  // Interpolates 2^f at the Chebyshev nodes of [-1/2, 1/2]
  Vector<float> p = Vector<float>{} + 0.000154531634f;
  p = p * f + 0.00133908633f;
  p = p * f + 0.00961808302f;
  p = p * f + 0.0555035695f;
  p = p * f + 0.240226507f;
  p = p * f + 0.693147182f;
  p = p * f + 1.f;
  typedef Lanes<float>::Integers Integers;
  return (Vector<float>)((Integers)p + ((Integers)shifted << 23));
}
TRELLIS_INLINE Vector<double> exp2(Vector<double> x) {
  const Vector<double> lowest = Vector<double>{} - 1022.;
  x = larger(lowest, x);
  const double magic = 6755399441055744.;  // 1.5 * 2^52
  const Vector<double> shifted = x + magic;
  const Vector<double> f = (x - (shifted - magic)) * 0.69314718055994530942;
  Vector<double> p = Vector<double>{} + 1. / 6227020800.;  // Taylor, 13 terms: 4e-18 at |f| = 1/2
  const double inverse_factorials[] = {
      1. / 479001600., 1. / 39916800., 1. / 3628800., 1. / 362880., 1. / 40320., 1. / 5040., 1. / 720.,
      1. / 120.,       1. / 24.,       1. / 6.,       .5,           1.,          1.};
#pragma GCC unroll 13
  for (const double c : inverse_factorials) p = p * f + c;
  typedef Lanes<double>::Integers Integers;
  return (Vector<double>)((Integers)p + ((Integers)shifted << 52));
}

template <class T>
TRELLIS_INLINE T* row_of(const AttentionRows<T>& rows, int64_t i) {
  return rows.base + (rows.index ? rows.index[i] : i) * rows.stride;
}

template <class T>
TRELLIS_INLINE void fetch(const T* row, int64_t width) {
  for (int64_t d = 0; d < width; d += 64 / sizeof(T)) __builtin_prefetch(row + d, 0, 2);
}

// to[i][0:padded] = the row, then zeros.
template <class T>
static void pack_rows(const AttentionRows<const T>& rows, int64_t first, int64_t count, int64_t width, T* to,
                      int64_t padded) {
  constexpr int L = Lanes<T>::count;
  for (int64_t i = 0; i < count; ++i, to += padded) {
    const T* const row = row_of(rows, first + i);
    int64_t d = 0;
    for (; d + L <= width; d += L) store(to + d, load(row + d));
    for (; d < padded; ++d) to[d] = d < width ? row[d] : T(0);
  }
}

template <class V>
TRELLIS_INLINE void interleave(V a, V b, V& low, V& high, Int<2>) {
  low = __builtin_shufflevector(a, b, 0, 2);
  high = __builtin_shufflevector(a, b, 1, 3);
}
template <class V>
TRELLIS_INLINE void interleave(V a, V b, V& low, V& high, Int<4>) {
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
}
template <class V>
TRELLIS_INLINE void interleave(V a, V b, V& low, V& high, Int<8>) {
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
template <class V>
TRELLIS_INLINE void interleave(V a, V b, V& low, V& high, Int<16>) {
  low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// to[d][i] = factor * row i [d], for lanes i < count; zero in the lanes up to the next full vector.
template <class T>
static void pack_transposed(const AttentionRows<const T>& rows, int64_t first, int64_t count, int64_t width, T factor,
                            T* to, int64_t pitch) {
  constexpr int L = Lanes<T>::count;
  for (int64_t begin = 0; begin < count; begin += L) {
    const int64_t lanes = count - begin < L ? count - begin : L;
    const T* row[L];
    for (int i = 0; i < L; ++i) row[i] = row_of(rows, first + begin + (i < lanes ? i : 0));
    int64_t d = 0;
    for (; d + L <= width; d += L) {
      Vector<T> a[L], b[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) a[i] = i < lanes ? load(row[i] + d) * factor : Vector<T>{};
      // Dealing the two halves of the deck into each other log2(L) times transposes it.
#pragma GCC unroll 4
      for (int round = 1; round < L; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < L / 2; ++i) interleave(a[i], a[i + L / 2], b[2 * i], b[2 * i + 1], Int<L>{});
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) a[i] = b[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(to + (d + i) * pitch + begin, a[i]);
    }
    for (; d < width; ++d)
      for (int i = 0; i < L; ++i) to[d * pitch + begin + i] = i < lanes ? row[i][d] * factor : T(0);
  }
}

enum class Major { row, depth };  // a(r, k) = a[r * pitch + k]  or  a[k * pitch + r]

template <int Rows, int Vectors, Major major, class T>
TRELLIS_INLINE void tile(const T* a, int64_t a_pitch, const T* b, int64_t b_pitch, int64_t depth,
                         Vector<T> (*c)[Vectors]) {
  constexpr int L = Lanes<T>::count;
  Vector<T> sum[Rows][Vectors];
#pragma GCC unroll 24
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Vector<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> row[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) row[v] = load(b + k * b_pitch + v * L);
#pragma GCC unroll 24
    for (int r = 0; r < Rows; ++r) {
      const Vector<T> x = Vector<T>{} + (major == Major::row ? a[r * a_pitch + k] : a[k * a_pitch + r]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) c[r][v] = sum[r][v];
}

// finish(row, its vectors) for each row of C. A may be read up to one tile beyond its last row; what is there does not
// matter. Tiles are left through the stack, so that `finish` is compiled once and not for every row of every tile.
template <int Vectors, Major major, class T, class Finish>
TRELLIS_INLINE void product(int64_t rows, const T* a, int64_t a_pitch, const T* b, int64_t b_pitch, int64_t depth,
                            const Finish& finish) {
  constexpr int kTall = TRELLIS_ACCUMULATORS / Vectors, kShort = kTall / 2;
  const int64_t step = major == Major::row ? a_pitch : 1;
  Vector<T> c[kTall][Vectors];
  for (int64_t r = 0; r < rows; r += kTall) {
    const int64_t count = rows - r < kTall ? rows - r : kTall;
    if (count > kShort)
      tile<kTall, Vectors, major>(a + r * step, a_pitch, b, b_pitch, depth, c);
    else
      tile<kShort, Vectors, major>(a + r * step, a_pitch, b, b_pitch, depth, c);
    for (int64_t i = 0; i < count; ++i) finish(r + i, c[i]);
  }
}

// call(Int<n>) with the number of vectors as a constant.
template <class Call>
TRELLIS_INLINE void with_vectors(int64_t n, const Call& call) {
  switch (n) {
    case 1:
      return call(Int<1>{});
    case 2:
      return call(Int<2>{});
    case 3:
      return call(Int<3>{});
#if TRELLIS_PANEL_VECTORS > 3
    case 4:
      return call(Int<4>{});
#endif
  }
}

// call(first vector, Int<n>) for panels of at most TRELLIS_PANEL_VECTORS vectors, as even as possible.
template <class Call>
TRELLIS_INLINE void for_panels(int64_t vectors, const Call& call) {
  const int64_t panels = ceil_div(vectors, TRELLIS_PANEL_VECTORS);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = p * vectors / panels, last = (p + 1) * vectors / panels;
    with_vectors(last - first, [&](auto n) __attribute__((always_inline)) { call(first, n); });
  }
}

// The columns of a tile that the row really has: `width` need not be a multiple of the vector.
template <class T, int Vectors, class V>
TRELLIS_INLINE void store_columns(T* row, int64_t column, int64_t width, V (&columns)[Vectors]) {
  constexpr int L = Lanes<T>::count;
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const int64_t at = column + v * L;
    if (at + L <= width) {
      store(row + at, columns[v]);
    } else {
      for (int i = 0; i < width - at; ++i) row[at + i] = columns[v][i];
    }
  }
}
template <class T, int Vectors, class V>
TRELLIS_INLINE void add_columns(const T* row, int64_t column, int64_t width, V (&columns)[Vectors]) {
  constexpr int L = Lanes<T>::count;
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const int64_t at = column + v * L;
    if (at + L <= width) {
      columns[v] += load(row + at);
    } else {
      for (int i = 0; i < width - at; ++i) columns[v][i] += row[at + i];
    }
  }
}

template <class T>
TRELLIS_INLINE T dot(const T* a, const T* b, int64_t count) {
  constexpr int L = Lanes<T>::count;
  Vector<T> partial{};
  int64_t i = 0;
  for (; i + L <= count; i += L) partial += load(a + i) * load(b + i);
  T sum = 0;
  for (int lane = 0; lane < L; ++lane) sum += partial[lane];
  for (; i < count; ++i) sum += a[i] * b[i];
  return sum;
}
