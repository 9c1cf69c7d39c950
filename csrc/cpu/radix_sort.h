// Stable parallel radix sort, least significant digit first, of elements that carry their key in an integer.
#pragma once
#include <bit>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "parallel.h"
#include "voxel_coords.h"

namespace trellis::cpu {

struct KeyAndRow {
  uint64_t key;
  uint32_t row;
};
inline uint64_t sort_key(uint64_t element) { return element; }
inline uint64_t sort_key(const KeyAndRow& element) { return element.key; }

// Sorts `count` elements by bits [low, high) of their keys. Either array may end up with the result, which is returned.
// The array is cut into one part per thread; a stable sort has one result, however it is cut.
template <class Element>
Element* radix_sort(Element* from, Element* to, int64_t count, int low, int high, int threads) {
  constexpr int kMaxDigit = 12;  // 4096 counters: half of a first-level cache; two passes for a grid of 256^3
  const int passes = (high - low + kMaxDigit - 1) / kMaxDigit;
  const int parts = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count / 16384)));
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = low + (high - low) * pass / passes;
    const int digits = 1 << (low + (high - low) * (pass + 1) / passes - shift);
    const auto digit = [&](const Element& element) { return (sort_key(element) >> shift) & (digits - 1); };
    std::vector<uint32_t> place(static_cast<size_t>(parts) * digits, 0);
    parallel_chunks(parts, threads, [&](int64_t part) {
      uint32_t* const counts = place.data() + part * digits;
      for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) ++counts[digit(from[i])];
    });
    uint32_t total = 0;
    bool constant = false;  // all elements have the same digit: nothing to do
    for (int value = 0; value < digits; ++value) {
      const uint32_t before = total;
      for (int part = 0; part < parts; ++part)
        total += std::exchange(place[static_cast<size_t>(part) * digits + value], total);
      constant |= total - before == static_cast<uint64_t>(count);
    }
    if (constant) continue;
    parallel_chunks(parts, threads, [&](int64_t part) {
      uint32_t* const next = place.data() + part * digits;
      for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) to[next[digit(from[i])]++] = from[i];
    });
    std::swap(from, to);
  }
  return from;
}

// The rows 0 .. count-1 in the order of their keys (`key_bits` wide, computed by key_of(row)), equal keys by row;
// visit(begin, end, row_at, key_at) is called once with accessors of the sorted sequence.
template <class KeyOf, class Visit>
void sorted_rows(int64_t count, int key_bits, int threads, const KeyOf& key_of, const Visit& visit) {
  const int row_bits = std::bit_width(static_cast<uint64_t>(count));
  const auto fill = [&](auto* elements, const auto& element_of) {
    parallel_for(count, 16384, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) elements[row] = element_of(key_of(row), static_cast<uint32_t>(row));
    });
  };
  if (key_bits + row_bits <= 64) {  // key and row share a word: half the traffic
    const auto memory = std::make_unique_for_overwrite<uint64_t[]>(2 * count);
    prefer_large_pages(memory.get(), 2 * count * static_cast<int64_t>(sizeof(uint64_t)));
    fill(memory.get(), [&](uint64_t key, uint32_t row) { return key << row_bits | row; });
    const uint64_t* const sorted =
        radix_sort(memory.get(), memory.get() + count, count, row_bits, row_bits + key_bits, threads);
    const uint64_t row_mask = (uint64_t{1} << row_bits) - 1;
    visit([=](int64_t i) { return static_cast<uint32_t>(sorted[i] & row_mask); },
          [=](int64_t i) { return sorted[i] >> row_bits; });
  } else {
    const auto memory = std::make_unique_for_overwrite<KeyAndRow[]>(2 * count);
    prefer_large_pages(memory.get(), 2 * count * static_cast<int64_t>(sizeof(KeyAndRow)));
    fill(memory.get(), [](uint64_t key, uint32_t row) { return KeyAndRow{key, row}; });
    const KeyAndRow* const sorted = radix_sort(memory.get(), memory.get() + count, count, 0, key_bits, threads);
    visit([=](int64_t i) { return sorted[i].row; }, [=](int64_t i) { return sorted[i].key; });
  }
}

}  // namespace trellis::cpu
