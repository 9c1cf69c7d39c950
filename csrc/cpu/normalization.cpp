// Rows are cut into chunks that never cross a segment. One task does a chunk, so gate, gain and shift are looked up
// once for it and stay in the cache; the sums of the backward belong to the chunks and are combined in their order.
#include "normalization.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "normalization_rows.h"
#include "parallel.h"

namespace trellis::cpu {
namespace {

constexpr int64_t kChunkRows = 64;
constexpr int64_t kColumns = 256;  // of a sum over chunks that one task does

struct Chunk {
  int64_t segment, begin, end;
};

std::vector<Chunk> chunks_of(TensorView<const int32_t, 1> offsets, int64_t rows) {
  const int32_t whole[] = {0, static_cast<int32_t>(rows)};
  const int32_t* const bounds = offsets.size(0) ? offsets.data : whole;
  const int64_t segments = offsets.size(0) ? offsets.size(0) - 1 : 1;
  if (bounds[0] != 0 || bounds[segments] != rows || !std::is_sorted(bounds, bounds + segments + 1))
    throw std::invalid_argument("offsets must be non-decreasing from 0 to " + std::to_string(rows) + "; got " +
                                std::to_string(bounds[0]) + " to " + std::to_string(bounds[segments]));
  std::vector<Chunk> chunks;
  for (int64_t segment = 0; segment < segments; ++segment) {
    const int64_t end = bounds[segment + 1];
    for (int64_t begin = bounds[segment]; begin < end; begin += kChunkRows)
      chunks.push_back({segment, begin, std::min(end, begin + kChunkRows)});
  }
  return chunks;
}

// The row of `values` [0, 1 or B, C] that is a segment's own; null if there is none.
template <class T>
T* own_row(TensorView<T, 2> values, int64_t segment) {
  return values.size(0) == 0 ? nullptr : values.row(values.size(0) == 1 ? 0 : segment);
}

template <class T>
void expect_own_rows(const char* name, TensorView<const T, 2> values, TensorView<const int32_t, 1> offsets) {
  const int64_t segments = std::max<int64_t>(offsets.size(0), 2) - 1;
  if (values.size(0) > 1 && values.size(0) != segments)
    throw std::invalid_argument(std::string(name) + " must have 1 row or one for each of " + std::to_string(segments) +
                                " segments; got " + std::to_string(values.size(0)));
}

// out [R, C] = sums of partial [chunks, C] over the chunks of each row's segment, or over all where R = 1.
template <class T>
void combine(const std::vector<Chunk>& chunks, const std::vector<T>& partial, TensorView<T, 2> out, int threads) {
  if (out.size(0) == 0) return;
  const int64_t width = out.size(1);
  parallel_chunks((width + kColumns - 1) / kColumns, threads, [&](int64_t block) {
    const int64_t first = block * kColumns, last = std::min(width, first + kColumns);
    for (int64_t row = 0; row < out.size(0); ++row) std::fill(out.row(row) + first, out.row(row) + last, T(0));
    for (size_t i = 0; i < chunks.size(); ++i) {
      T* const total = own_row(out, chunks[i].segment);
      const T* const part = partial.data() + i * width;
      for (int64_t c = first; c < last; ++c) total[c] += part[c];
    }
  });
}

template <class Job>
void run(void (*baseline)(const Job&), void (*avx2)(const Job&), void (*avx512)(const Job&), const Job& job) {
  const InstructionSet set = instruction_set();
  (set == InstructionSet::avx512 ? avx512 : set == InstructionSet::avx2 ? avx2 : baseline)(job);
}

#if defined(__x86_64__)
#define TRELLIS_RUN(function, job) run(rows_baseline::function, rows_avx2::function, rows_avx512::function, job)
#else
#define TRELLIS_RUN(function, job) rows_baseline::function(job)
#endif

}  // namespace

template <class T>
void layer_norm(TensorView<const T, 2> x, TensorView<const T, 2> update, TensorView<const T, 2> gate,
                TensorView<const T, 2> gain, TensorView<const T, 2> shift, TensorView<const int32_t, 1> offsets,
                double eps, double unit, TensorView<T, 2> sum, TensorView<T, 2> out, TensorView<T, 1> mean,
                TensorView<T, 1> rstd, int threads) {
  const std::vector<Chunk> chunks = chunks_of(offsets, x.size(0));
  expect_own_rows("gate", gate, offsets);
  expect_own_rows("gain", gain, offsets);
  const bool has_update = update.numel() > 0;
  parallel_chunks(static_cast<int64_t>(chunks.size()), threads, [&](int64_t i) {
    const auto [segment, begin, end] = chunks[i];
    const NormJob<T> job{end - begin,
                         x.size(1),
                         x.row(begin),
                         has_update ? update.row(begin) : nullptr,
                         own_row(gate, segment),
                         own_row(gain, segment),
                         own_row(shift, segment),
                         static_cast<T>(eps),
                         static_cast<T>(unit),
                         has_update ? sum.row(begin) : nullptr,
                         out.row(begin),
                         mean.row(begin),
                         rstd.row(begin)};
    TRELLIS_RUN(norm_rows, job);
  });
}

template <class T>
void layer_norm_backward(TensorView<const T, 2> out_gradient, TensorView<const T, 2> x, TensorView<const T, 2> gain,
                         TensorView<const int32_t, 1> offsets, TensorView<const T, 1> mean, TensorView<const T, 1> rstd,
                         double unit, TensorView<T, 2> x_gradient, TensorView<T, 2> gain_gradient,
                         TensorView<T, 2> shift_gradient, int threads) {
  const std::vector<Chunk> chunks = chunks_of(offsets, x.size(0));
  expect_own_rows("gain", gain, offsets);
  const int64_t width = x.size(1);
  const size_t sums = gain.size(0) ? chunks.size() * width : 0;
  std::vector<T> gain_sums(sums, T(0)), shift_sums(sums, T(0));
  parallel_chunks(static_cast<int64_t>(chunks.size()), threads, [&](int64_t i) {
    const auto [segment, begin, end] = chunks[i];
    const NormGradientJob<T> job{end - begin,
                                 width,
                                 out_gradient.row(begin),
                                 x.row(begin),
                                 own_row(gain, segment),
                                 mean.row(begin),
                                 rstd.row(begin),
                                 static_cast<T>(unit),
                                 x_gradient.row(begin),
                                 gain_sums.data() + (sums ? i * width : 0),
                                 shift_sums.data() + (sums ? i * width : 0)};
    TRELLIS_RUN(norm_rows, job);
  });
  combine(chunks, gain_sums, gain_gradient, threads);
  combine(chunks, shift_sums, shift_gradient, threads);
}

template <class T>
void gated_residual(TensorView<const T, 2> x, TensorView<const T, 2> update, TensorView<const T, 2> gate,
                    TensorView<const int32_t, 1> offsets, TensorView<T, 2> out, int threads) {
  const std::vector<Chunk> chunks = chunks_of(offsets, x.size(0));
  expect_own_rows("gate", gate, offsets);
  parallel_chunks(static_cast<int64_t>(chunks.size()), threads, [&](int64_t i) {
    const auto [segment, begin, end] = chunks[i];
    const GateJob<T> job{end - begin,   x.size(1), x.row(begin), update.row(begin), own_row(gate, segment),
                         out.row(begin)};
    TRELLIS_RUN(gate_rows, job);
  });
}

template <class T>
void gated_residual_backward(TensorView<const T, 2> out_gradient, TensorView<const T, 2> update,
                             TensorView<const T, 2> gate, TensorView<const int32_t, 1> offsets,
                             TensorView<T, 2> update_gradient, TensorView<T, 2> gate_gradient, int threads) {
  const std::vector<Chunk> chunks = chunks_of(offsets, update.size(0));
  expect_own_rows("gate", gate, offsets);
  const int64_t width = update.size(1);
  std::vector<T> sums(chunks.size() * width, T(0));
  parallel_chunks(static_cast<int64_t>(chunks.size()), threads, [&](int64_t i) {
    const auto [segment, begin, end] = chunks[i];
    const GateGradientJob<T> job{end - begin,
                                 width,
                                 out_gradient.row(begin),
                                 update.row(begin),
                                 own_row(gate, segment),
                                 update_gradient.row(begin),
                                 sums.data() + i * width};
    TRELLIS_RUN(gate_rows, job);
  });
  combine(chunks, sums, gate_gradient, threads);
}

template <class T>
void head_rms_norm(TensorView<const T, 4> x, TensorView<const T, 3> gamma, TensorView<T, 4> out, int threads) {
  const std::vector<Chunk> chunks = chunks_of({}, x.size(0));
  parallel_chunks(static_cast<int64_t>(chunks.size()), threads, [&](int64_t i) {
    const auto [segment, begin, end] = chunks[i];
    const HeadsJob<T> job{end - begin, x.size(1),    out.size(1), gamma.size(0), x.size(2),
                          x.size(3),   x.row(begin), gamma.data,  out.row(begin)};
    TRELLIS_RUN(norm_heads, job);
  });
}

template <class T>
void head_rms_norm_backward(TensorView<const T, 4> out_gradient, TensorView<const T, 4> x, TensorView<const T, 3> gamma,
                            TensorView<T, 4> x_gradient, TensorView<T, 3> gamma_gradient, int threads) {
  const std::vector<Chunk> chunks = chunks_of({}, x.size(0));
  const int64_t width = gamma.numel();
  std::vector<T> sums(chunks.size() * width, T(0));
  parallel_chunks(static_cast<int64_t>(chunks.size()), threads, [&](int64_t i) {
    const auto [segment, begin, end] = chunks[i];
    const HeadsGradientJob<T> job{end - begin,
                                  x.size(1),
                                  out_gradient.size(1),
                                  gamma.size(0),
                                  x.size(2),
                                  x.size(3),
                                  out_gradient.row(begin),
                                  x.row(begin),
                                  gamma.data,
                                  x_gradient.row(begin),
                                  sums.data() + i * width};
    TRELLIS_RUN(norm_heads, job);
  });
  combine(chunks, sums, TensorView<T, 2>{gamma_gradient.data, {1, width}}, threads);
}

#define TRELLIS_INSTANTIATE(T)                                                                                       \
  template void layer_norm<T>(TensorView<const T, 2>, TensorView<const T, 2>, TensorView<const T, 2>,                \
                              TensorView<const T, 2>, TensorView<const T, 2>, TensorView<const int32_t, 1>, double,  \
                              double, TensorView<T, 2>, TensorView<T, 2>, TensorView<T, 1>, TensorView<T, 1>, int);  \
  template void layer_norm_backward<T>(TensorView<const T, 2>, TensorView<const T, 2>, TensorView<const T, 2>,       \
                                       TensorView<const int32_t, 1>, TensorView<const T, 1>, TensorView<const T, 1>, \
                                       double, TensorView<T, 2>, TensorView<T, 2>, TensorView<T, 2>, int);           \
  template void gated_residual<T>(TensorView<const T, 2>, TensorView<const T, 2>, TensorView<const T, 2>,            \
                                  TensorView<const int32_t, 1>, TensorView<T, 2>, int);                              \
  template void gated_residual_backward<T>(TensorView<const T, 2>, TensorView<const T, 2>, TensorView<const T, 2>,   \
                                           TensorView<const int32_t, 1>, TensorView<T, 2>, TensorView<T, 2>, int);   \
  template void head_rms_norm<T>(TensorView<const T, 4>, TensorView<const T, 3>, TensorView<T, 4>, int);             \
  template void head_rms_norm_backward<T>(TensorView<const T, 4>, TensorView<const T, 4>, TensorView<const T, 3>,    \
                                          TensorView<T, 4>, TensorView<T, 3>, int);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis::cpu
