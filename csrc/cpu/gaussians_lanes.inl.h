// Lanes of float or double, as wide as the instruction set: Lanes<T>::V, Lanes<T>::M (a mask) and a few functions.
// Included by gaussians.inl.h inside its namespace; every function is inlined, so no symbol is left.
#define INLINE static inline __attribute__((always_inline))

template <class T>
struct Lanes;

#if defined(__AVX512F__)

template <>
struct Lanes<float> {
  typedef __m512 V;
  typedef __mmask16 M;
  static constexpr int kWidth = 16;
};
template <>
struct Lanes<double> {
  typedef __m512d V;
  typedef __mmask8 M;
  static constexpr int kWidth = 8;
};
INLINE __m512 splat(float x) { return _mm512_set1_ps(x); }
INLINE __m512d splat(double x) { return _mm512_set1_pd(x); }
INLINE __mmask16 less(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE __mmask8 less(__m512d a, __m512d b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
INLINE __mmask16 less_equal(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
INLINE __mmask8 less_equal(__m512d a, __m512d b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
INLINE __m512 select(__mmask16 m, __m512 a, __m512 b) { return _mm512_mask_blend_ps(m, b, a); }
INLINE __m512d select(__mmask8 m, __m512d a, __m512d b) { return _mm512_mask_blend_pd(m, b, a); }
INLINE unsigned bits(__mmask16 m) { return m; }
INLINE unsigned bits(__mmask8 m) { return m; }
INLINE bool any(__mmask16 m) { return m != 0; }
INLINE bool any(__mmask8 m) { return m != 0; }
INLINE void store_where(__mmask16 m, int32_t* target, int32_t value) {
  _mm512_mask_storeu_epi32(target, m, _mm512_set1_epi32(value));
}
INLINE void store_where(__mmask8 m, int32_t* target, int32_t value) {
  _mm256_mask_storeu_epi32(target, m, _mm256_set1_epi32(value));
}
// The forms with a full mask: the plain ones make gcc 12 warn about its own headers.
INLINE __m512 min(__m512 a, __m512 b) { return _mm512_maskz_min_ps(0xFFFF, a, b); }
INLINE __m512d min(__m512d a, __m512d b) { return _mm512_maskz_min_pd(0xFF, a, b); }
INLINE __m512 max(__m512 a, __m512 b) { return _mm512_maskz_max_ps(0xFFFF, a, b); }
INLINE __m512d max(__m512d a, __m512d b) { return _mm512_maskz_max_pd(0xFF, a, b); }
INLINE __m512 sqrt(__m512 a) { return _mm512_maskz_sqrt_ps(0xFFFF, a); }
INLINE __m512d sqrt(__m512d a) { return _mm512_maskz_sqrt_pd(0xFF, a); }

#else  // vectors of 32 or 16 bytes; the compiler maps them to whatever there is

#if defined(__AVX2__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float FloatLanes __attribute__((vector_size(BYTES)));
typedef double DoubleLanes __attribute__((vector_size(BYTES)));
typedef int32_t FloatMask __attribute__((vector_size(BYTES)));
typedef int64_t DoubleMask __attribute__((vector_size(BYTES)));

template <>
struct Lanes<float> {
  typedef FloatLanes V;
  typedef FloatMask M;
  static constexpr int kWidth = BYTES / 4;
};
template <>
struct Lanes<double> {
  typedef DoubleLanes V;
  typedef DoubleMask M;
  static constexpr int kWidth = BYTES / 8;
};
INLINE FloatLanes splat(float x) { return x - FloatLanes{}; }
INLINE DoubleLanes splat(double x) { return x - DoubleLanes{}; }
INLINE FloatMask less(FloatLanes a, FloatLanes b) { return a < b; }
INLINE DoubleMask less(DoubleLanes a, DoubleLanes b) { return a < b; }
INLINE FloatMask less_equal(FloatLanes a, FloatLanes b) { return a <= b; }
INLINE DoubleMask less_equal(DoubleLanes a, DoubleLanes b) { return a <= b; }
INLINE FloatLanes select(FloatMask m, FloatLanes a, FloatLanes b) { return m ? a : b; }
INLINE DoubleLanes select(DoubleMask m, DoubleLanes a, DoubleLanes b) { return m ? a : b; }
INLINE FloatLanes min(FloatLanes a, FloatLanes b) { return a < b ? a : b; }
INLINE DoubleLanes min(DoubleLanes a, DoubleLanes b) { return a < b ? a : b; }
INLINE FloatLanes max(FloatLanes a, FloatLanes b) { return a > b ? a : b; }
INLINE DoubleLanes max(DoubleLanes a, DoubleLanes b) { return a > b ? a : b; }
template <class M>
INLINE void store_where(M m, int32_t* target, int32_t value) {
  for (unsigned lane = 0; lane < sizeof(M) / sizeof(m[0]); ++lane) {
    if (m[lane]) target[lane] = value;
  }
}
#if defined(__AVX2__)
INLINE unsigned bits(FloatMask m) { return _mm256_movemask_ps(reinterpret_cast<__m256>(m)); }
INLINE unsigned bits(DoubleMask m) { return _mm256_movemask_pd(reinterpret_cast<__m256d>(m)); }
INLINE FloatLanes sqrt(FloatLanes a) { return _mm256_sqrt_ps(a); }
INLINE DoubleLanes sqrt(DoubleLanes a) { return _mm256_sqrt_pd(a); }
#elif defined(__SSE2__)
INLINE unsigned bits(FloatMask m) { return _mm_movemask_ps(reinterpret_cast<__m128>(m)); }
INLINE unsigned bits(DoubleMask m) { return _mm_movemask_pd(reinterpret_cast<__m128d>(m)); }
INLINE FloatLanes sqrt(FloatLanes a) { return _mm_sqrt_ps(a); }
INLINE DoubleLanes sqrt(DoubleLanes a) { return _mm_sqrt_pd(a); }
#else
INLINE unsigned bits(FloatMask m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
INLINE unsigned bits(DoubleMask m) { return (m[0] & 1) | (m[1] & 2); }
INLINE FloatLanes sqrt(FloatLanes a) {
  return FloatLanes{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
INLINE DoubleLanes sqrt(DoubleLanes a) { return DoubleLanes{__builtin_sqrt(a[0]), __builtin_sqrt(a[1])}; }
#endif
INLINE bool any(FloatMask m) { return bits(m) != 0; }
INLINE bool any(DoubleMask m) { return bits(m) != 0; }
#undef BYTES

#endif

typedef Lanes<float>::V F;
typedef Lanes<double>::V D;
typedef int32_t FloatBits __attribute__((vector_size(sizeof(F))));
typedef int64_t DoubleBits __attribute__((vector_size(sizeof(D))));

template <class T>
INLINE typename Lanes<T>::V load(const T* source) {
  typename Lanes<T>::V value;
  __builtin_memcpy(&value, source, sizeof(value));
  return value;
}
template <class T>
INLINE void store(T* target, typename Lanes<T>::V value) {
  __builtin_memcpy(target, &value, sizeof(value));
}

// 0, 1, 2, ...
INLINE F lane_numbers(float) {
  static const float numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(numbers);
}
INLINE D lane_numbers(double) {
  static const double numbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  return load(numbers);
}

// Rounding to whole numbers by adding and taking away a number so large that no fraction fits beside it.
INLINE F nearest(F x) { return (x + 12582912.0f) - 12582912.0f; }                // |x| < 2^22
INLINE D nearest(D x) { return (x + 6755399441055744.0) - 6755399441055744.0; }  // |x| < 2^51
template <class V>
INLINE V floor(V x) {
  const V whole = nearest(x);
  return select(less(x, whole), whole - 1, whole);
}
template <class V>
INLINE V ceil(V x) {
  const V whole = nearest(x);
  return select(less(whole, x), whole + 1, whole);
}
// Of -1 < x the ceiling below 0, of others the floor: truncation.
template <class V>
INLINE V trunc(V x) {
  return select(less(x, x - x), ceil(x), floor(x));
}

// e^x for -87 <= x <= 88 within an ulp or two: x = n log 2 + r with |r| <= log(2) / 2, a polynomial for e^r (float:
// minimax, Cephes; double: Taylor), and n put into the exponent.
INLINE F exp(F x) {
  const F n = nearest(x * 1.44269504088896341f);
  const F r = x - n * 0.693359375f - n * -2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const FloatBits whole = reinterpret_cast<FloatBits>(n + 12582912.0f) << 23;  // low bits of the sum are n
  return reinterpret_cast<F>(reinterpret_cast<FloatBits>(p) + whole);
}
INLINE D exp(D x) {
  const D n = nearest(x * 1.4426950408889634074);
  const D r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
  D p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const DoubleBits whole = reinterpret_cast<DoubleBits>(n + 6755399441055744.0) << 52;
  return reinterpret_cast<D>(reinterpret_cast<DoubleBits>(p) + whole);
}

// At least log(x) of a positive x, by at most 0.06: the exponent, and the mantissa as a straight line above its log.
INLINE F log_above(F x) {
  const F log2 = __builtin_convertvector(reinterpret_cast<FloatBits>(x), F) * 0x1p-23f - (127.0f - 0.0861f);
  return log2 * 0.6931472f;
}
INLINE D log_above(D x) {
  const D log2 = __builtin_convertvector(reinterpret_cast<DoubleBits>(x), D) * 0x1p-52 - (1023.0 - 0.0861);
  return log2 * 0.6931472;
}
