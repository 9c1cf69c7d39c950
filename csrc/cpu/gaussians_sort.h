// A stable radix sort of (key, value) pairs by unsigned keys, in parallel. Only digits in which the keys can differ are
// looked at: depths of one object share their leading bits, so two passes are usual for 32-bit keys.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "parallel.h"

namespace trellis {

template <class Key>
struct Keyed {
  Key key;
  uint32_t value;
};

// Sorts pairs[0, count) using `spare` of the same size; returns whichever of the two holds the result.
template <class Key>
Keyed<Key>* radix_sort(Keyed<Key>* pairs, Keyed<Key>* spare, int64_t count, int threads) {
  constexpr int kBits = 12;
  constexpr int64_t kBuckets = 1 << kBits;
  if (count == 0) return pairs;
  const int64_t chunks = std::clamp<int64_t>(count / 16384, 1, std::max(threads, 1));
  const auto bound = [&](int64_t chunk) { return count * chunk / chunks; };

  std::vector<std::pair<Key, Key>> extremes(chunks);
  parallel_chunks(chunks, threads, [&](int64_t chunk) {
    Key low = pairs[bound(chunk)].key, high = low;
    for (int64_t i = bound(chunk); i < bound(chunk + 1); ++i) {
      low = std::min(low, pairs[i].key);
      high = std::max(high, pairs[i].key);
    }
    extremes[chunk] = {low, high};
  });
  Key low = extremes[0].first, high = extremes[0].second;
  for (const auto& [chunk_low, chunk_high] : extremes) {
    low = std::min(low, chunk_low);
    high = std::max(high, chunk_high);
  }

  std::vector<int64_t> positions(chunks * kBuckets);
  for (int shift = 0; shift < static_cast<int>(std::bit_width(static_cast<Key>(high - low))); shift += kBits) {
    const auto bucket = [&](const Keyed<Key>& pair) {
      return static_cast<int64_t>(((pair.key - low) >> shift) & (kBuckets - 1));
    };
    std::fill(positions.begin(), positions.end(), 0);
    parallel_chunks(chunks, threads, [&](int64_t chunk) {
      int64_t* counts = positions.data() + chunk * kBuckets;
      for (int64_t i = bound(chunk); i < bound(chunk + 1); ++i) ++counts[bucket(pairs[i])];
    });
    int64_t next = 0;
    for (int64_t digit = 0; digit < kBuckets; ++digit) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) next += std::exchange(positions[chunk * kBuckets + digit], next);
    }
    parallel_chunks(chunks, threads, [&](int64_t chunk) {
      int64_t* targets = positions.data() + chunk * kBuckets;
      for (int64_t i = bound(chunk); i < bound(chunk + 1); ++i) spare[targets[bucket(pairs[i])]++] = pairs[i];
    });
    std::swap(pairs, spare);
  }
  return pairs;
}

}  // namespace trellis
