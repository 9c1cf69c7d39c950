// Groups voxels by window: a stable sort by window number. A counting sort where the box of windows is not much larger
// than the set of voxels (always, for the models' grids), else a radix sort of only the bits that occur.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"

namespace trellis::cpu {
namespace {

struct Entry {
  uint64_t window;
  int32_t row;
};

void counting_sort(const std::vector<uint64_t>& window, uint64_t windows, int32_t* order) {
  std::vector<int32_t> next(windows + 1, 0);
  for (const uint64_t w : window) ++next[w + 1];
  for (uint64_t w = 0; w < windows; ++w) next[w + 1] += next[w];
  for (size_t row = 0; row < window.size(); ++row) order[next[window[row]]++] = static_cast<int32_t>(row);
}

void radix_sort(const std::vector<uint64_t>& window, uint64_t windows, int32_t* order) {
  constexpr int kBits = 11;
  std::vector<Entry> from(window.size()), to(window.size());
  for (size_t row = 0; row < window.size(); ++row) from[row] = {window[row], static_cast<int32_t>(row)};
  for (int shift = 0; (windows - 1) >> shift != 0; shift += kBits) {
    std::vector<int32_t> next((1 << kBits) + 1, 0);
    const auto digit = [&](const Entry& entry) { return (entry.window >> shift) & ((1 << kBits) - 1); };
    for (const Entry& entry : from) ++next[digit(entry) + 1];
    for (int d = 0; d < 1 << kBits; ++d) next[d + 1] += next[d];
    for (const Entry& entry : from) to[next[digit(entry)]++] = entry;
    from.swap(to);
  }
  for (size_t i = 0; i < from.size(); ++i) order[i] = from[i].row;
}

}  // namespace

int64_t window_partition(TensorView<const int32_t, 2> coords, int64_t window_size, int64_t shift,
                         TensorView<int32_t, 1> order, TensorView<int32_t, 1> offsets) {
  const int64_t rows = coords.size(0);
  if (coords.size(1) != 4) throw std::invalid_argument("coords must be [N, 4]");
  if (window_size < 1 || shift < 0) throw std::invalid_argument("window_size must be positive, shift not negative");
  if (order.size(0) != rows || offsets.size(0) != rows + 1)
    throw std::invalid_argument("order must be [N] and offsets [N + 1]");
  offsets.data[0] = 0;
  if (rows == 0) return 0;

  int32_t lowest = 0;
  std::array<int64_t, 4> extent{};
  for (int64_t row = 0; row < rows; ++row)
    for (int axis = 0; axis < 4; ++axis) {
      lowest = std::min(lowest, coords.row(row)[axis]);
      extent[axis] = std::max<int64_t>(extent[axis], coords.row(row)[axis]);
    }
  if (lowest < 0) throw std::invalid_argument("coords must not be negative; got " + std::to_string(lowest));

  // Number the windows in the order they come in, skipping whole windows that the shift leaves empty at the start.
  const int64_t start = shift % window_size;
  uint64_t windows = 1;
  for (int axis = 0; axis < 4; ++axis) {
    extent[axis] = (axis ? (extent[axis] + start) / window_size : extent[axis]) + 1;
    if (windows > (uint64_t{1} << 62) / extent[axis])
      throw std::invalid_argument("coords must span fewer than 2^62 windows");
    windows *= extent[axis];
  }
  std::vector<uint64_t> window(rows);
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t* const c = coords.row(row);
    window[row] = c[0];
    for (int axis = 1; axis < 4; ++axis) window[row] = window[row] * extent[axis] + (c[axis] + start) / window_size;
  }
  if (windows <= static_cast<uint64_t>(4 * rows) + 65536)
    counting_sort(window, windows, order.data);
  else
    radix_sort(window, windows, order.data);

  int64_t count = 0;
  for (int64_t i = 1; i <= rows; ++i)
    if (i == rows || window[order.data[i]] != window[order.data[i - 1]])
      offsets.data[++count] = static_cast<int32_t>(i);
  return count;
}

}  // namespace trellis::cpu
