// The dual marching cubes tables of csrc/include/flexicubes_tables.h as device memory, packed: 16 bytes per case.
#pragma once
#include "flexicubes_tables.h"
#include "launch.h"

namespace trellis::cuda {

struct CellCase {
  uint16_t groups[4];   // bit e of each dual vertex: edge e is one of its edges; 0 where there is no such vertex
  int8_t vertices;      // how many there are
  int8_t ambiguous;     // 0 or 1
  int8_t direction[3];  // to the neighbor that resolves an ambiguity
  int8_t unused[3];
};

struct CellCases {
  CellCase of[256];
};

constexpr CellCases packed_cases() {
  CellCases packed{};
  for (int i = 0; i < 256; ++i) {
    const flexicubes::Case& from = flexicubes::kCases[i];
    CellCase& to = packed.of[i];
    to.vertices = from.count;
    to.ambiguous = from.ambiguous;
    for (int a = 0; a < 3; ++a) to.direction[a] = from.direction[a];
    for (int e = 0; e < 12; ++e)
      if (from.vertex_of_edge[e] >= 0)
        to.groups[from.vertex_of_edge[e]] = static_cast<uint16_t>(to.groups[from.vertex_of_edge[e]] | 1 << e);
  }
  return packed;
}

__device__ constexpr CellCases kCellCases = packed_cases();

// The dual vertex of a case that an edge belongs to, -1 where it is not crossed.
__device__ inline int vertex_of_edge(const CellCase& kind, int edge) {
  for (int v = 0; v < 4; ++v)
    if (kind.groups[v] >> edge & 1) return v;
  return -1;
}

}  // namespace trellis::cuda
