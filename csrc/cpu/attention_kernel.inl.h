// Attention of one head of one sequence, forward and backward. Included by attention_{baseline,avx2,avx512}.cpp, which
// define TRELLIS_ATTENTION_NAMESPACE, TRELLIS_VECTOR_BYTES, TRELLIS_ACCUMULATORS and TRELLIS_PANEL_VECTORS.
//
// Logits are computed transposed, [key][query], so that the lanes of a vector are queries: maxima and sums over keys
// need no horizontal step, the last keys no mask, and the probabilities are already the broadcast side of the second
// product. Queries go in panels of a few vectors, keys in blocks that stay in the L2 cache with an online softmax over
// the blocks; a window is a single block, for which that is the ordinary softmax.
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "attention_kernel.h"

namespace trellis::cpu {
namespace {

#include "attention_products.inl.h"

constexpr int64_t kKeys = 256;  // keys per block, at most
constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <class T>
constexpr int64_t kPanel = TRELLIS_PANEL_VECTORS * Lanes<T>::count;  // queries per panel, at most
template <class T>
constexpr int64_t kPitch = kPanel<T> + Lanes<T>::count;  // of [key][query] blocks: an odd number of cache lines

TRELLIS_INLINE int64_t padded_width(int64_t width, int64_t lanes) { return ceil_div(width, lanes) * lanes; }

// Hands out pieces of the scratch memory; every piece ends with room for the tile that products may read beyond it.
// Without memory it only counts.
template <class T>
struct Scratch {
  T* memory;
  int64_t used = 0;
  T* take(int64_t rows, int64_t pitch) {
    T* const piece = memory ? memory + used : nullptr;
    used += ceil_div((rows + TRELLIS_ACCUMULATORS) * pitch, 16) * 16;
    return piece;
  }
};

template <class T>
struct ForwardScratch {
  T *key, *value, *query, *probability, *out, *largest, *sum, *factor;
  ForwardScratch(T* memory, int64_t width) {
    const int64_t padded = padded_width(width, Lanes<T>::count);
    Scratch<T> scratch{memory};
    key = scratch.take(kKeys, padded);
    value = scratch.take(kKeys, padded);
    query = scratch.take(width, kAttentionQueries + kPanel<T>);  // transposed, panel after panel
    probability = scratch.take(kKeys, kPitch<T>);
    out = scratch.take(kAttentionQueries, padded);
    largest = scratch.take(kAttentionQueries, 1);
    sum = scratch.take(kAttentionQueries, 1);
    factor = scratch.take(kAttentionQueries, 1);
    elements = scratch.used;
  }
  int64_t elements;
};

// Rows are short and far apart, so the hardware does not foresee them: while the products run, ask for the keys and
// values of the next block, or in the last block for what the next head reads and this one will write.
template <class T>
TRELLIS_INLINE void fetch_ahead(const AttentionForward<T>& t, int64_t key, int64_t block) {
  if (key + block < t.keys) {
    fetch(row_of(t.key, key + block), t.width);
    fetch(row_of(t.value, key + block), t.width);
  } else if (t.ahead) {
    fetch(row_of(t.key, key) + t.ahead, t.width);
    fetch(row_of(t.value, key) + t.ahead, t.width);
    if (key < t.queries) fetch(row_of(t.query, key) + t.ahead, t.width);
  }
  if (key < t.queries) fetch(row_of(t.out, key), t.width);
}

// Probabilities, without their denominator, of one panel of queries for one block of keys.
template <class T, int Vectors>
void weigh_keys(const AttentionForward<T>& t, const ForwardScratch<T>& s, int64_t first_query, int64_t first_key,
                int64_t keys) {
  const bool first_block = first_key == 0;
  using V = Vector<T>;
  constexpr int L = Lanes<T>::count;
  const int64_t padded = padded_width(t.width, L);

  V block_largest[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) block_largest[v] = V{} - T(INFINITY);
  product<Vectors, Major::row>(keys, s.key, padded, s.query + first_query * t.width, Vectors * L, t.width,
                               [&](int64_t key, V(&logits)[Vectors]) __attribute__((always_inline)) {
#pragma GCC unroll 4
                                 for (int v = 0; v < Vectors; ++v) {
                                   block_largest[v] = larger(logits[v], block_largest[v]);
                                   store(s.probability + key * kPitch<T> + v * L, logits[v]);
                                 }
                                 if (first_query == 0) fetch_ahead(t, first_key + key, keys);
                               });

  V largest[Vectors], sum[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const int64_t at = first_query + v * L;
    const V before = load(s.largest + at);
    largest[v] = larger(block_largest[v], before);
    const V factor = exp2(before - largest[v]);  // not used in the first block
    sum[v] = first_block ? V{} : load(s.sum + at) * factor;
    store(s.largest + at, largest[v]);
    store(s.factor + at, factor);
  }
  for (int64_t key = 0; key < keys; ++key) {
    T* const row = s.probability + key * kPitch<T>;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const V p = exp2(load(row + v * L) - largest[v]);
      sum[v] += p;
      store(row + v * L, p);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) store(s.sum + first_query + v * L, sum[v]);
}

// out += probabilities . values, for the queries of one panel; in the last block of keys, divided by their sum.
template <class T>
void mix_values(const AttentionForward<T>& t, const ForwardScratch<T>& s, int64_t first_query, int64_t queries,
                int64_t keys, bool first_block, bool last_block) {
  constexpr int L = Lanes<T>::count;
  const int64_t padded = padded_width(t.width, L);
  for_panels(padded / L, [&](int64_t first_vector, auto n) __attribute__((always_inline)) {
    constexpr int kColumns = decltype(n)::value;
    const int64_t column = first_vector * L;
    product<kColumns, Major::depth>(queries, s.probability, kPitch<T>, s.value + column, padded, keys,
                                    [&](int64_t row, Vector<T>(&out)[kColumns]) __attribute__((always_inline)) {
                                      const int64_t query = first_query + row;
                                      T* const accumulated = s.out + query * padded + column;
                                      if (!first_block) {
#pragma GCC unroll 4
                                        for (int v = 0; v < kColumns; ++v)
                                          out[v] += load(accumulated + v * L) * s.factor[query];
                                      }
                                      if (last_block) {
                                        const T inverse = T(1) / s.sum[query];
#pragma GCC unroll 4
                                        for (int v = 0; v < kColumns; ++v) out[v] *= inverse;
                                        store_columns(row_of(t.out, query), column, t.width, out);
                                      } else {
#pragma GCC unroll 4
                                        for (int v = 0; v < kColumns; ++v) store(accumulated + v * L, out[v]);
                                      }
                                    });
  });
}

template <class T>
void forward_head(const AttentionForward<T>& t, T* memory) {
  constexpr int L = Lanes<T>::count;
  if (t.keys == 0) {
    for (int64_t i = 0; i < t.queries; ++i) {
      for (int64_t d = 0; d < t.width; ++d) row_of(t.out, i)[d] = T(0);
      *row_of(t.logsumexp, i) = -T(INFINITY);
    }
    return;
  }
  const ForwardScratch<T> s(memory, t.width);
  const int64_t padded = padded_width(t.width, L), vectors = ceil_div(t.queries, L);
  const T scale = T(kLog2e / std::sqrt(double(t.width)));  // logits in base 2
  for_panels(vectors, [&](int64_t first_vector, auto n) {
    constexpr int64_t pitch = decltype(n)::value * L;
    const int64_t first = first_vector * L, count = t.queries - first < pitch ? t.queries - first : pitch;
    pack_transposed(t.query, first, count, t.width, scale, s.query + first * t.width, pitch);
  });
  for (int64_t i = 0; i < vectors * L; ++i) s.largest[i] = -T(INFINITY);
  const int64_t blocks = ceil_div(t.keys, kKeys), step = ceil_div(t.keys, blocks);
  for (int64_t begin = 0; begin < t.keys; begin += step) {
    const int64_t keys = t.keys - begin < step ? t.keys - begin : step;
    pack_rows(t.key, begin, keys, t.width, s.key, padded);
    pack_rows(t.value, begin, keys, t.width, s.value, padded);
    for_panels(vectors, [&](int64_t first_vector, auto n) {
      constexpr int kVectors = decltype(n)::value;
      const int64_t first = first_vector * L, left = t.queries - first;
      weigh_keys<T, kVectors>(t, s, first, begin, keys);
      mix_values(t, s, first, left < kVectors * L ? left : kVectors * L, keys, begin == 0, begin + keys == t.keys);
    });
  }
  for (int64_t i = 0; i < t.queries; ++i) *row_of(t.logsumexp, i) = T(kLn2) * s.largest[i] + std::log(s.sum[i]);
}

template <class T>
struct BackwardScratch {
  T *key, *value, *key_gradient, *value_gradient, *query, *out_gradient, *query_turned, *out_gradient_turned;
  T *probability, *logit_gradient, *logsumexp, *inner;
  BackwardScratch(T* memory, int64_t width) {
    const int64_t padded = padded_width(width, Lanes<T>::count);
    Scratch<T> scratch{memory};
    for (T** piece : {&key, &value, &key_gradient, &value_gradient}) *piece = scratch.take(kKeys, padded);
    for (T** piece : {&query, &out_gradient}) *piece = scratch.take(kPanel<T>, padded);
    for (T** piece : {&query_turned, &out_gradient_turned}) *piece = scratch.take(width, kPanel<T>);
    for (T** piece : {&probability, &logit_gradient}) *piece = scratch.take(kKeys, kPitch<T>);
    for (T** piece : {&logsumexp, &inner}) *piece = scratch.take(kPanel<T>, 1);
    elements = scratch.used;
  }
  int64_t elements;
};

// to[r][v] += sum_k a(r, k) B[k][v] over all columns.
template <class T>
void accumulate(int64_t rows, const T* a, const T* b, int64_t padded, int64_t depth, T* to) {
  constexpr int L = Lanes<T>::count;
  for_panels(padded / L, [&](int64_t first_vector, auto n) __attribute__((always_inline)) {
    constexpr int kColumns = decltype(n)::value;
    product<kColumns, Major::row>(rows, a, kPitch<T>, b + first_vector * L, padded, depth,
                                  [&](int64_t row, Vector<T>(&sum)[kColumns]) __attribute__((always_inline)) {
                                    T* const at = to + row * padded + first_vector * L;
#pragma GCC unroll 4
                                    for (int v = 0; v < kColumns; ++v) store(at + v * L, load(at + v * L) + sum[v]);
                                  });
  });
}

// Probabilities of one panel of queries for one block of keys, and the gradients of their logits.
template <class T, int Vectors>
void differentiate_logits(const AttentionBackward<T>& t, const BackwardScratch<T>& s, int64_t first_query,
                          int64_t queries, int64_t keys) {
  using V = Vector<T>;
  constexpr int L = Lanes<T>::count;
  const int64_t padded = padded_width(t.width, L);
  const T scale = T(1 / std::sqrt(double(t.width)));
  pack_transposed(t.query, first_query, queries, t.width, T(kLog2e) * scale, s.query_turned, Vectors * L);
  pack_transposed(t.out_gradient, first_query, queries, t.width, T(1), s.out_gradient_turned, Vectors * L);
  pack_rows(t.query, first_query, queries, t.width, s.query, padded);
  pack_rows(t.out_gradient, first_query, queries, t.width, s.out_gradient, padded);
  for (int64_t i = 0; i < Vectors * L; ++i) {
    // sum_j p_j dp_j = out . dout; a lane without a query gets probabilities of zero
    const T* const out = i < queries ? row_of(t.out, first_query + i) : nullptr;
    s.inner[i] = out ? dot(out, s.out_gradient + i * padded, t.width) : T(0);
    s.logsumexp[i] = out ? T(kLog2e) * *row_of(t.logsumexp, first_query + i) : T(INFINITY);
  }
  product<Vectors, Major::row>(keys, s.key, padded, s.query_turned, Vectors * L, t.width,
                               [&](int64_t key, V(&logits)[Vectors]) __attribute__((always_inline)) {
#pragma GCC unroll 4
                                 for (int v = 0; v < Vectors; ++v)
                                   store(s.probability + key * kPitch<T> + v * L,
                                         exp2(logits[v] - load(s.logsumexp + v * L)));
                               });
  product<Vectors, Major::row>(keys, s.value, padded, s.out_gradient_turned, Vectors * L, t.width,
                               [&](int64_t key, V(&gradient)[Vectors]) __attribute__((always_inline)) {
                                 const int64_t at = key * kPitch<T>;
#pragma GCC unroll 4
                                 for (int v = 0; v < Vectors; ++v) {
                                   const V p = load(s.probability + at + v * L) * scale;
                                   store(s.logit_gradient + at + v * L, p * (gradient[v] - load(s.inner + v * L)));
                                 }
                               });
}

// The gradients of one panel of queries and one block of keys and values, from those of the logits.
template <class T>
void accumulate_gradients(const AttentionBackward<T>& t, const BackwardScratch<T>& s, int64_t first_query,
                          int64_t queries, int64_t keys, bool first_block) {
  constexpr int L = Lanes<T>::count;
  const int64_t padded = padded_width(t.width, L);
  accumulate(keys, s.probability, s.out_gradient, padded, queries, s.value_gradient);
  accumulate(keys, s.logit_gradient, s.query, padded, queries, s.key_gradient);
  for_panels(padded / L, [&](int64_t first_vector, auto n) __attribute__((always_inline)) {
    constexpr int kColumns = decltype(n)::value;
    const int64_t column = first_vector * L;
    product<kColumns, Major::depth>(queries, s.logit_gradient, kPitch<T>, s.key + column, padded, keys,
                                    [&](int64_t row, Vector<T>(&gradient)[kColumns]) __attribute__((always_inline)) {
                                      T* const to = row_of(t.query_gradient, first_query + row);
                                      if (!first_block) add_columns(to, column, t.width, gradient);
                                      store_columns(to, column, t.width, gradient);
                                    });
  });
}

template <class T>
void backward_head(const AttentionBackward<T>& t, T* memory) {
  constexpr int L = Lanes<T>::count;
  const BackwardScratch<T> s(memory, t.width);
  const int64_t padded = padded_width(t.width, L), vectors = ceil_div(t.queries, L);
  if (t.keys == 0)
    for (int64_t i = 0; i < t.queries; ++i)
      for (int64_t d = 0; d < t.width; ++d) row_of(t.query_gradient, i)[d] = T(0);
  const int64_t blocks = ceil_div(t.keys, kKeys), step = blocks ? ceil_div(t.keys, blocks) : 1;
  for (int64_t begin = 0; begin < t.keys; begin += step) {
    const int64_t keys = t.keys - begin < step ? t.keys - begin : step;
    pack_rows(t.key, begin, keys, t.width, s.key, padded);
    pack_rows(t.value, begin, keys, t.width, s.value, padded);
    for (int64_t i = 0; i < keys * padded; ++i) s.key_gradient[i] = s.value_gradient[i] = T(0);
    for_panels(vectors, [&](int64_t first_vector, auto n) {
      constexpr int kVectors = decltype(n)::value;
      const int64_t first = first_vector * L, left = t.queries - first;
      const int64_t queries = left < kVectors * L ? left : kVectors * L;
      differentiate_logits<T, kVectors>(t, s, first, queries, keys);
      accumulate_gradients(t, s, first, queries, keys, begin == 0);
    });
    for (int64_t i = 0; i < keys; ++i)
      for (int64_t d = 0; d < t.width; ++d) {
        row_of(t.key_gradient, begin + i)[d] = s.key_gradient[i * padded + d];
        row_of(t.value_gradient, begin + i)[d] = s.value_gradient[i * padded + d];
      }
  }
}

}  // namespace

namespace TRELLIS_ATTENTION_NAMESPACE {
int64_t scratch_elements(int64_t width) {
  // Double has half the lanes, never more elements.
  const int64_t forward = ForwardScratch<float>(nullptr, width).elements;
  const int64_t backward = BackwardScratch<float>(nullptr, width).elements;
  return forward > backward ? forward : backward;
}
void forward(const AttentionForward<float>& task, float* scratch) { forward_head(task, scratch); }
void forward(const AttentionForward<double>& task, double* scratch) { forward_head(task, scratch); }
void backward(const AttentionBackward<float>& task, float* scratch) { backward_head(task, scratch); }
void backward(const AttentionBackward<double>& task, double* scratch) { backward_head(task, scratch); }
}  // namespace TRELLIS_ATTENTION_NAMESPACE
}  // namespace trellis::cpu
