// Pooling of rows by a map from fine to coarse voxels: the rows are put in the order of their coarse voxels once, then
// every coarse voxel is summed by one thread, in the order its rows have in the input.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"
#include "sparse_conv.h"

namespace trellis::cpu {

template <class T>
void sparse_pool(TensorView<const T, 2> feats, TensorView<const int32_t, 1> inverse, int mode, TensorView<T, 2> out,
                 int threads) {
  const int64_t count = out.size(0), channels = out.size(1), rows = inverse.size(0);
  std::vector<int32_t> first(count + 1, 0), order(rows);
  for (int64_t n = 0; n < rows; ++n) {
    const int32_t m = inverse.data[n];
    if (m < 0 || m >= count)
      throw std::invalid_argument("inverse must be in [0, count) with count=" + std::to_string(count) + "; got " +
                                  std::to_string(m));
    ++first[m + 1];
  }
  for (int64_t m = 0; m < count; ++m) first[m + 1] += first[m];
  std::vector<int32_t> next(first.begin(), first.end() - 1);
  for (int64_t n = 0; n < rows; ++n) order[next[inverse.data[n]]++] = static_cast<int32_t>(n);

  parallel_for(count, std::max<int64_t>(1, 16384 / std::max<int64_t>(channels, 1)), threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t m = begin; m < end; ++m) {
                   T* const sum = out.row(m);
                   std::fill_n(sum, channels, T(0));
                   for (int32_t i = first[m]; i < first[m + 1]; ++i) {
                     const T* const row = feats.row(order[i]);
                     for (int64_t c = 0; c < channels; ++c) sum[c] += row[c];
                   }
                   if (mode == 0) continue;
                   const int32_t members = first[m + 1] - first[m];
                   const T divisor = static_cast<T>(mode == 2 ? members + 1 : std::max(members, 1));
                   for (int64_t c = 0; c < channels; ++c) sum[c] /= divisor;
                 }
               });
}

template void sparse_pool<float>(TensorView<const float, 2>, TensorView<const int32_t, 1>, int, TensorView<float, 2>,
                                 int);
template void sparse_pool<double>(TensorView<const double, 2>, TensorView<const int32_t, 1>, int, TensorView<double, 2>,
                                  int);

}  // namespace trellis::cpu
