// SparseBits: a set of grid coordinates, as one bit each in words of 64 along z, kept only where a word is not empty.
// A word knows how many bits come before it, so every coordinate of the set has a rank, in the order of x, y, z.
// Memory: 16 bytes per (x, y) column of the grid, and 12 per word. Sides up to 4096.
#pragma once
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace trellis::cpu {

// std::popcount, which for the baseline instruction set is a call into libgcc.
inline int64_t count_bits(uint64_t word) {
  word -= word >> 1 & 0x5555555555555555;
  word = (word & 0x3333333333333333) + (word >> 2 & 0x3333333333333333);
  return static_cast<int64_t>(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101 >> 56);
}

struct SparseBits {
  struct Column {
    uint64_t segments = 0;  // bit s: this column has a word for z in [64 s, 64 s + 64)
    int64_t first = 0;      // its words start here
  };

  int64_t side = 0;
  std::vector<Column> columns;
  std::vector<uint64_t> words;
  std::vector<int32_t> ranks;  // one more than words: the last is the size of the set

  explicit SparseBits(int64_t side) : side(side), columns(side * side) {}

  int64_t size() const { return ranks.empty() ? 0 : ranks.back(); }
  Column& column(int64_t x, int64_t y) { return columns[x * side + y]; }
  const Column& column(int64_t x, int64_t y) const { return columns[x * side + y]; }

  // Index of the word of `segment`, or where it would be.
  static int64_t word_index(const Column& c, int segment) {
    return c.first + count_bits(c.segments & ((uint64_t{1} << segment) - 1));
  }
  static bool has(const Column& c, int segment) { return c.segments >> segment & 1; }
  uint64_t word(const Column& c, int segment) const { return has(c, segment) ? words[word_index(c, segment)] : 0; }

  // Rank of a coordinate in [0, side), -1 where it is not in the set.
  int32_t find(int64_t x, int64_t y, int64_t z) const {
    const Column& c = column(x, y);
    const int segment = static_cast<int>(z >> 6);
    if (!has(c, segment)) return -1;
    const int64_t index = word_index(c, segment);
    const uint64_t bit = uint64_t{1} << (z & 63);
    return words[index] & bit ? ranks[index] + static_cast<int32_t>(count_bits(words[index] & (bit - 1))) : -1;
  }

  // Once `segments` of all columns are set: makes room for their words, all empty.
  void allocate() {
    int64_t total = 0;
    for (Column& c : columns) {
      c.first = total;
      total += count_bits(c.segments);
    }
    words.assign(total, 0);
  }

  // Once the words are set: numbers their bits.
  void number() {
    ranks.resize(words.size() + 1);
    int32_t total = 0;
    for (size_t i = 0; i < words.size(); ++i) {
      ranks[i] = total;
      total += static_cast<int32_t>(count_bits(words[i]));
    }
    ranks[words.size()] = total;
  }

  // body(x, y, column) for every column, in parallel over x.
  template <class Body>
  void for_columns(int threads, const Body& body) {
    parallel_for(side, 4, threads, [&](int64_t begin, int64_t end) {
      for (int64_t x = begin; x < end; ++x) {
        for (int64_t y = 0; y < side; ++y) body(x, y, column(x, y));
      }
    });
  }
};

// Sets bits of a word that several threads may write. Most are set already, and reading is cheaper.
inline void set_bits(uint64_t& word, uint64_t bits) {
  if ((__atomic_load_n(&word, __ATOMIC_RELAXED) & bits) != bits) __atomic_fetch_or(&word, bits, __ATOMIC_RELAXED);
}

}  // namespace trellis::cpu
