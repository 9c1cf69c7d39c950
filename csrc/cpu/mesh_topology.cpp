// Which cells the surface crosses and how their dual vertices are joined. Everything before the surface cells is done
// on words of 64 grid points or cells at a time; nothing here is larger than a few bytes per cube.
#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

#include "flexicubes_tables.h"
#include "mesh_extraction.h"

namespace trellis::cpu {

using flexicubes::kCases;

SurfaceTopology::SurfaceTopology(TensorView<const int32_t, 2> coords, int64_t resolution, int threads)
    : resolution_(resolution),
      cubes_(coords.size(0)),
      threads_(threads),
      voxels_(resolution),
      points_(resolution + 1),
      surface_(resolution) {
  if (resolution < 1 || resolution > 4095) throw std::invalid_argument("resolution must be in [1, 4095]");
  if (coords.size(1) != 3) throw std::invalid_argument("coords must be [N, 3]");
  if (cubes_ > 0) {
    const auto [low, high] = std::minmax_element(coords.data, coords.data + coords.numel());
    if (*low < 0 || *high >= resolution) {
      throw std::invalid_argument("coords must be in [0, " + std::to_string(resolution) + "); got " +
                                  std::to_string(*low) + " to " + std::to_string(*high));
    }
  }
  constexpr int64_t kGrain = 1 << 14;
  parallel_for(cubes_, kGrain, threads_, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* c = coords.row(i);
      set_bits(voxels_.column(c[0], c[1]).segments, uint64_t{1} << (c[2] >> 6));
    }
  });
  voxels_.allocate();
  parallel_for(cubes_, kGrain, threads_, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* c = coords.row(i);
      const int64_t word = SparseBits::word_index(voxels_.column(c[0], c[1]), c[2] >> 6);
      set_bits(voxels_.words[word], uint64_t{1} << (c[2] & 63));
    }
  });
  voxels_.number();
  if (voxels_.size() != cubes_) throw std::invalid_argument("coords must be distinct; got the same cube twice");
  cube_of_voxel_.resize(cubes_);
  parallel_for(cubes_, kGrain, threads_, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* c = coords.row(i);
      cube_of_voxel_[voxels_.find(c[0], c[1], c[2])] = static_cast<int32_t>(i);
    }
  });
  number_points();
}

// A point is in the set if one of the four columns of cells around it has a cell at its z or below.
void SurfaceTopology::number_points() {
  const auto around = [&](int64_t x, int64_t y, const auto& body) {
    for (int64_t cx = std::max<int64_t>(x - 1, 0); cx <= std::min(x, resolution_ - 1); ++cx) {
      for (int64_t cy = std::max<int64_t>(y - 1, 0); cy <= std::min(y, resolution_ - 1); ++cy) {
        const SparseBits::Column& column = voxels_.column(cx, cy);
        int64_t index = column.first;
        for (uint64_t rest = column.segments; rest; rest &= rest - 1) {
          body(std::countr_zero(rest), voxels_.words[index++]);
        }
      }
    }
  };
  points_.for_columns(threads_, [&](int64_t x, int64_t y, SparseBits::Column& column) {
    around(x, y, [&](int segment, uint64_t word) {
      column.segments |= uint64_t{1} << segment;
      if (word >> 63) column.segments |= uint64_t{2} << segment;
    });
  });
  points_.allocate();
  points_.for_columns(threads_, [&](int64_t x, int64_t y, SparseBits::Column& column) {
    around(x, y, [&](int segment, uint64_t word) {
      points_.words[SparseBits::word_index(column, segment)] |= word | word << 1;
      if (word >> 63) points_.words[SparseBits::word_index(column, segment + 1)] |= 1;
    });
  });
  points_.number();
}

template <class T>
void SurfaceTopology::fill_points(TensorView<const T, 2> feats, TensorView<int32_t, 2> points,
                                  TensorView<int32_t, 2> point_cubes) {
  if (feats.size(0) != cubes_ || feats.size(1) < 8) throw std::invalid_argument("feats must have a row for each cube");
  if (points.size(0) != point_count() || points.size(1) != 3 || point_cubes.size(0) != point_count() ||
      point_cubes.size(1) != 8) {
    throw std::invalid_argument("points must be [G, 3] and point_cubes [G, 8]");
  }
  constexpr int64_t kAhead = 16;
  const T bias = static_cast<T>(-1.0 / static_cast<double>(resolution_));
  inside_.assign(points_.words.size(), 0);
  points_.for_columns(threads_, [&](int64_t x, int64_t y, const SparseBits::Column& column) {
    int64_t index = column.first;
    for (uint64_t rest = column.segments; rest; rest &= rest - 1, ++index) {
      const int segment = std::countr_zero(rest);
      // The four columns of cells around this column of points: their cells here, the one below, and their ranks.
      uint64_t cells[4] = {}, below[4] = {};
      int32_t next[4] = {};
      for (int k = 0; k < 4; ++k) {
        const int64_t cx = x - (k & 1), cy = y - (k >> 1);
        if (cx < 0 || cy < 0 || cx >= resolution_ || cy >= resolution_) continue;
        const SparseBits::Column& voxels = voxels_.column(cx, cy);
        cells[k] = voxels_.word(voxels, segment);
        below[k] = cells[k] << 1 | (segment > 0 ? voxels_.word(voxels, segment - 1) >> 63 : 0);
        next[k] = voxels_.ranks[SparseBits::word_index(voxels, segment)];
      }
      int64_t rank = points_.ranks[index];
      for (uint64_t bits = points_.words[index]; bits; bits &= bits - 1, ++rank) {
        const int bit = std::countr_zero(bits);
        int32_t* const point = points.row(rank);
        int32_t* const cubes = point_cubes.row(rank);
        point[0] = static_cast<int32_t>(x);
        point[1] = static_cast<int32_t>(y);
        point[2] = segment * 64 + bit;
        for (int k = 0; k < 4; ++k) {  // every cell is met here in the order of its rank
          cubes[k + 4] = below[k] >> bit & 1 ? cube_of_voxel_[next[k] - 1] : -1;
          cubes[k] = cells[k] >> bit & 1 ? cube_of_voxel_[next[k]++] : -1;
        }
        // Cubes come in any order: ask early for one that is needed soon, and for the first time.
        const int64_t ahead = std::min<int64_t>(next[0] + kAhead, cubes_ - 1);
        if (cubes[0] >= 0) __builtin_prefetch(feats.row(cube_of_voxel_[ahead]));
        T sum = 0, count = 0;
        for (int k = 0; k < 8; ++k) {
          if (cubes[k] < 0) continue;
          sum += feats.row(cubes[k])[k] + bias;
          ++count;
        }
        if (sum / count < 0) inside_[index] |= uint64_t{1} << bit;
      }
    }
  });
  find_surface();
  find_cases();
}

void SurfaceTopology::find_surface() {
  // Of the cells of a column, which have a corner inside and which only such; the points above come from the next word.
  const auto inside = [&](const SparseBits::Column& column, int segment) {
    return SparseBits::has(column, segment) ? inside_[SparseBits::word_index(column, segment)] : 0;
  };
  const auto crossed = [&](int64_t x, int64_t y, int segment) {
    uint64_t any = 0, all = ~uint64_t{0};
    for (int k = 0; k < 4; ++k) {
      const SparseBits::Column& column = points_.column(x + (k & 1), y + (k >> 1));
      const uint64_t here = inside(column, segment);
      const uint64_t above = here >> 1 | (segment < 63 ? inside(column, segment + 1) << 63 : 0);
      any |= here | above;
      all &= here & above;
    }
    const int64_t left = resolution_ - segment * 64;
    return any & ~all & (left >= 64 ? ~uint64_t{0} : left > 0 ? (uint64_t{1} << left) - 1 : 0);
  };
  surface_.for_columns(threads_, [&](int64_t x, int64_t y, SparseBits::Column& column) {
    uint64_t candidates = 0;
    for (int k = 0; k < 4; ++k) candidates |= points_.column(x + (k & 1), y + (k >> 1)).segments;
    candidates |= candidates >> 1;
    for (uint64_t rest = candidates; rest; rest &= rest - 1) {
      const int segment = std::countr_zero(rest);
      if (crossed(x, y, segment)) column.segments |= uint64_t{1} << segment;
    }
  });
  surface_.allocate();
  surface_.for_columns(threads_, [&](int64_t x, int64_t y, const SparseBits::Column& column) {
    int64_t index = column.first;
    for (uint64_t rest = column.segments; rest; rest &= rest - 1) {
      surface_.words[index++] = crossed(x, y, std::countr_zero(rest));
    }
  });
  surface_.number();
}

template <class Body>
void SurfaceTopology::for_surface(const Body& body) const {
  parallel_for(surface_.side, 4, threads_, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * surface_.side; i < end * surface_.side; ++i) {
      const SparseBits::Column& column = surface_.columns[i];
      int64_t index = column.first;
      for (uint64_t rest = column.segments; rest; rest &= rest - 1, ++index) {
        int64_t rank = surface_.ranks[index];
        for (uint64_t bits = surface_.words[index]; bits; bits &= bits - 1) {
          body(rank++, i / surface_.side, i % surface_.side, std::countr_zero(rest) * 64 + std::countr_zero(bits));
        }
      }
    }
  });
}

namespace {
// A quad belongs to the edge that starts in corner 0 of a cell and runs along an axis. The cells around it are at
// (-1, -1), (-1, 0), (0, -1), (0, 0) in the two other axes; `edges` is what it is called in each.
struct Axis {
  int u, v, edges[4];
  int end;    // the corner of the cell at its other end
  bool down;  // its direction in the table
};
constexpr Axis kAxes[3] = {
    {1, 2, {6, 4, 2, 0}, 1, false}, {0, 2, {10, 9, 11, 8}, 2, true}, {0, 1, {5, 1, 7, 3}, 4, false}};

// Corners of a crossed cell that are inside. Not the case, which an ambiguous face may turn around.
bool starts_quad(int corners, const Axis& axis, const int64_t (&cell)[3]) {
  return ((corners ^ corners >> axis.end) & 1) && cell[axis.u] > 0 && cell[axis.v] > 0;
}
}  // namespace

void SurfaceTopology::find_cases() {
  corners_.resize(cell_count());
  for_surface([&](int64_t rank, int64_t x, int64_t y, int64_t z) {
    int corners = 0;
    for (int k = 0; k < 8; ++k) {
      const SparseBits::Column& column = points_.column(x + (k & 1), y + (k >> 1 & 1));
      const int64_t pz = z + (k >> 2);
      const int segment = static_cast<int>(pz >> 6);
      if (SparseBits::has(column, segment)) {
        corners |= static_cast<int>(inside_[SparseBits::word_index(column, segment)] >> (pz & 63) & 1) << k;
      }
    }
    corners_[rank] = static_cast<uint8_t>(corners);
  });
  cases_.resize(cell_count());
  first_vertex_.resize(cell_count() + 1);
  first_quad_.resize(cell_count() + 1);
  for_surface([&](int64_t rank, int64_t x, int64_t y, int64_t z) {
    const int corners = corners_[rank];
    const flexicubes::Case& own = kCases[corners];
    bool inverted = false;
    if (own.ambiguous) {
      const int64_t nx = x + own.direction[0], ny = y + own.direction[1], nz = z + own.direction[2];
      if (std::min({nx, ny, nz}) >= 0 && std::max({nx, ny, nz}) < resolution_) {
        const int32_t neighbor = surface_.find(nx, ny, nz);
        inverted = neighbor >= 0 && kCases[corners_[neighbor]].ambiguous;
      }
    }
    cases_[rank] = static_cast<uint8_t>(inverted ? 255 - corners : corners);
    first_vertex_[rank + 1] = kCases[cases_[rank]].count;
    int quads = 0;
    for (const Axis& axis : kAxes) quads += starts_quad(corners, axis, {x, y, z});
    first_quad_[rank + 1] = quads;
  });
  for (int64_t i = 0; i < cell_count(); ++i) {
    first_vertex_[i + 1] += first_vertex_[i];
    first_quad_[i + 1] += first_quad_[i];
  }
}

void SurfaceTopology::fill_cells(TensorView<int32_t, 2> cells, TensorView<int32_t, 1> cell_cubes,
                                 TensorView<int32_t, 2> cell_points, TensorView<int32_t, 1> cases,
                                 TensorView<int32_t, 1> vertex_cells, TensorView<int32_t, 2> quads) const {
  const int64_t count = cell_count();
  if (cells.size(0) != count || cells.size(1) != 3 || cell_cubes.size(0) != count || cell_points.size(0) != count ||
      cell_points.size(1) != 8 || cases.size(0) != count || vertex_cells.size(0) != vertex_count() ||
      quads.size(0) != quad_count() || quads.size(1) != 4) {
    throw std::invalid_argument("the outputs of surface_topology must have the sizes it counted");
  }
  for_surface([&](int64_t rank, int64_t x, int64_t y, int64_t z) {
    const int64_t cell[3] = {x, y, z};
    for (int a = 0; a < 3; ++a) cells.row(rank)[a] = static_cast<int32_t>(cell[a]);
    const int32_t voxel = voxels_.find(x, y, z);
    cell_cubes.data[rank] = voxel < 0 ? -1 : cube_of_voxel_[voxel];
    for (int k = 0; k < 8; ++k) {
      cell_points.row(rank)[k] = points_.find(x + (k & 1), y + (k >> 1 & 1), z + (k >> 2));
    }
    cases.data[rank] = cases_[rank];
    for (int32_t v = first_vertex_[rank]; v < first_vertex_[rank + 1]; ++v) {
      vertex_cells.data[v] = static_cast<int32_t>(rank);
    }
    int32_t* quad = quads.row(first_quad_[rank]);
    for (const Axis& axis : kAxes) {
      if (!starts_quad(corners_[rank], axis, cell)) continue;
      int32_t around[4];
      for (int k = 0; k < 4; ++k) {
        int64_t other[3] = {x, y, z};
        other[axis.u] -= 1 - (k >> 1);
        other[axis.v] -= 1 - (k & 1);
        const int32_t neighbor = k == 3 ? static_cast<int32_t>(rank) : surface_.find(other[0], other[1], other[2]);
        around[k] = first_vertex_[neighbor] + kCases[cases_[neighbor]].vertex_of_edge[axis.edges[k]];
      }
      const bool first_inside = (corners_[rank] >> (axis.down ? axis.end : 0)) & 1;
      constexpr int kOrder[2][4] = {{0, 1, 3, 2}, {2, 3, 1, 0}};
      for (int k = 0; k < 4; ++k) *quad++ = around[kOrder[first_inside][k]];
    }
  });
}

template void SurfaceTopology::fill_points(TensorView<const float, 2>, TensorView<int32_t, 2>, TensorView<int32_t, 2>);
template void SurfaceTopology::fill_points(TensorView<const double, 2>, TensorView<int32_t, 2>, TensorView<int32_t, 2>);

}  // namespace trellis::cpu
