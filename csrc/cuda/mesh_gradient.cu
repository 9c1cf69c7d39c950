// The gradient of surface_values with respect to the network output. Nothing is scattered: cells say what they want of
// their corners, points read their cells, cubes read their points, so sums have one order and need no atomics.
#include "mesh_surface.cuh"

namespace trellis::cuda {
namespace {

template <class T>
struct Work {
  int32_t *cube_points, *cube_cells, *point_cells;
  T *means, *point_gradients, *weight_gradients, *corner_sdf, *corner_positions, *corner_shares, *moved;
};

template <class T>
struct Wanted {  // gradients of the values
  const T *vertices, *attributes, *gammas, *terms, *positions, *sdf;
};

// Which edges end in a corner, and with which end.
struct CornerEdges {
  int8_t edge[8][3], end[8][3];
};
constexpr CornerEdges corner_edges() {
  CornerEdges corners{};
  for (int k = 0; k < 8; ++k) {
    int found = 0;
    for (int e = 0; e < 12; ++e)
      for (int end = 0; end < 2; ++end)
        if (flexicubes::kEnds[e][end] == k) {
          corners.edge[k][found] = static_cast<int8_t>(e);
          corners.end[k][found++] = static_cast<int8_t>(end);
        }
  }
  return corners;
}
__device__ constexpr CornerEdges kCornerEdges = corner_edges();

// Every corner of a cube is one point, every point a corner of each of its cells, every cube at most one cell.
template <class T>
__global__ void invert_points(Surface<T> s, Work<T> work) {
  const int64_t item = int64_t{blockIdx.x} * kPointThreads + threadIdx.x;
  if (item >= 8 * s.point_count) return;
  const int64_t cube = s.point_cubes[item];
  DEVICE_CHECK(cube >= -1 && cube < s.cubes, "point_cubes must be in [-1, N)");
  if (cube >= 0) work.cube_points[8 * cube + item % 8] = static_cast<int32_t>(item / 8);
}

template <class T>
__global__ void invert_cells(Surface<T> s, Work<T> work) {
  const int64_t item = int64_t{blockIdx.x} * kPointThreads + threadIdx.x;
  if (item >= 8 * s.cell_count) return;
  const int64_t point = s.cell_points[item], cell = item / 8, k = item % 8;
  if (point >= 0) work.point_cells[8 * point + k] = static_cast<int32_t>(cell);
  if (k == 0 && s.cell_cubes[cell] >= 0) work.cube_cells[s.cell_cubes[cell]] = static_cast<int32_t>(cell);
}

// Of one cell at a time: a thread per edge, then a thread per corner.
template <class T>
__global__ void cell_gradients(Surface<T> s, Wanted<T> wanted, Work<T> work) {
  SHARED_ARRAY(T, betas, kTileCells, 12);
  SHARED_ARRAY(T, left, kTileCells, 12);  // wa / (wa + wb)
  SHARED_ARRAY(T, right, kTileCells, 12);
  SHARED_ARRAY(T, positions, 4 * kTileCells, 3);  // of the vertices
  SHARED_ARRAY(T, pulls, 4 * kTileCells, 3);      // their gradients
  SHARED_ARRAY(T, distances, kTileCells, 12);     // and later the gradient along each edge's crossing
  SHARED_ARRAY(T, offsets, kTileCells, 12, 3);    // gradients of the plain crossings
  SHARED_ARRAY(T, plain, kTileCells, 12);         // the part of corner a in those
  SHARED_ARRAY(T, sdf, kTileCells, 12, 2);        // what an edge wants of its two ends
  SHARED_ARRAY(T, alpha, kTileCells, 12, 2);
  const int thread = static_cast<int>(threadIdx.x), local = thread / 12, edge = thread % 12;
  const int64_t first_cell = int64_t{blockIdx.x} * kTileCells, cell = first_cell + local;
  const CrossedEdge<T> own(s, cell, edge);
  const bool crossed = own.vertex >= 0;
  const int slot = 4 * local + (crossed ? own.vertex : 0);
  const unsigned group = crossed ? s.kind(cell).groups[own.vertex] : 0;
  const int64_t vertex = crossed ? s.vertices_from(cell) + own.vertex : 0;
  T total = 0;
  if (crossed) {
    betas[local][edge] = own.beta;
    left[local][edge] = own.wa / (own.wa + own.wb);
    right[local][edge] = own.wb / (own.wa + own.wb);
  }
  __syncthreads();
  for (unsigned rest = group; rest; rest &= rest - 1) total += betas[local][__ffs(static_cast<int>(rest)) - 1];

  // Vertices, an axis per thread: 16 cells x 4 vertices x 3 axes.
  const int rank = thread / 3 % 4, axis = thread % 3;
  const bool there = cell < s.cell_count && rank < s.kind(cell).vertices;
  const int64_t ranked = there ? s.vertices_from(cell) + rank : 0;
  if (there) {
    T sum = 0, weights = 0;
    for (unsigned rest = s.kind(cell).groups[rank]; rest; rest &= rest - 1) {
      const int e = __ffs(static_cast<int>(rest)) - 1;
      sum += betas[local][e] * (left[local][e] * s.corner(cell, kEdgeEnds.of[e][0], 1 + axis) +
                                right[local][e] * s.corner(cell, kEdgeEnds.of[e][1], 1 + axis));
      weights += betas[local][e];
    }
    positions[4 * local + rank][axis] = sum / weights;
    pulls[4 * local + rank][axis] = wanted.vertices[3 * ranked + axis];
  }
  __syncthreads();

  T plain_dot = 0;
  if (s.training) {
    // Each distance moves its own term and, through the mean distance, those of the whole group.
    T offset[3], square = 0;
    for (int j = 0; j < 3 && crossed; ++j) {
      offset[j] = own.plain(s, cell, j) - positions[slot][j];
      square += offset[j] * offset[j];
    }
    const T distance = Logistic<T>::root_of(square);
    if (crossed) distances[local][edge] = distance;
    __syncthreads();
    if (crossed) {
      const T size = static_cast<T>(__popc(group));
      T mean = 0, signs = 0;
      for (unsigned rest = group; rest; rest &= rest - 1) mean += distances[local][__ffs(static_cast<int>(rest)) - 1];
      mean /= size;
      for (unsigned rest = group; rest; rest &= rest - 1) {
        const T other = distances[local][__ffs(static_cast<int>(rest)) - 1];
        signs += static_cast<T>((other > mean) - (other < mean));
      }
      const T sign = static_cast<T>((distance > mean) - (distance < mean));
      const T scale = wanted.terms[0] / static_cast<T>(*s.edge_count) * (sign - signs / size);
      for (int j = 0; j < 3; ++j) {
        const T gradient = distance > 0 ? scale * (offset[j] / distance) : T(0);
        offsets[local][edge][j] = gradient;
        plain_dot += gradient * (s.corner(cell, own.a, 1 + j) - s.corner(cell, own.b, 1 + j));
      }
      plain[local][edge] = own.sdf_b / (own.sdf_b - own.sdf_a);
    }
    __syncthreads();
    if (there) {
      T pull = pulls[4 * local + rank][axis];
      for (unsigned rest = s.kind(cell).groups[rank]; rest; rest &= rest - 1)
        pull -= offsets[local][__ffs(static_cast<int>(rest)) - 1][axis];
      pulls[4 * local + rank][axis] = pull;
      work.moved[3 * ranked + axis] = pull;
    }
    __syncthreads();
  }

  // Along each edge: how its crossing and the difference of its ends go with the gradient of the vertex.
  T difference = 0, along = 0;
  if (crossed) {
    for (int j = 0; j < 3 + s.channels; ++j) {
      const T pull = j < 3 ? pulls[slot][j] : wanted.attributes[vertex * s.channels + j - 3];
      const T at_a = s.corner(cell, own.a, 1 + j), at_b = s.corner(cell, own.b, 1 + j);
      const T crossing = left[local][edge] * at_a + right[local][edge] * at_b;
      difference += pull * (at_a - at_b);
      along += pull * (j < 3 ? crossing - positions[slot][j] : crossing);
    }
    distances[local][edge] = along;
  }
  __syncthreads();
  if (crossed) {
    T mean = 0;
    for (unsigned rest = group; rest; rest &= rest - 1) {
      const int e = __ffs(static_cast<int>(rest)) - 1;
      mean += betas[local][e] / total * distances[local][e];
    }
    const T tangent = (own.beta - 1) / T(0.99);
    work.weight_gradients[21 * cell + edge] = (along - mean) / total * T(0.99) * (1 - tangent * tangent);
    const T inverse = own.beta / total / (own.wa + own.wb) * difference;
    const T wa_gradient = inverse * right[local][edge], wb_gradient = -inverse * left[local][edge];
    T plain_a = 0, plain_b = 0;
    if (s.training) {
      const T plain_inverse = plain_dot / (own.sdf_b - own.sdf_a);
      plain_a = plain_inverse * plain[local][edge];
      plain_b = plain_inverse * (1 - plain[local][edge]);
    }
    sdf[local][edge][0] = plain_a - wb_gradient * own.alpha_a;
    sdf[local][edge][1] = plain_b + wa_gradient * own.alpha_b;
    alpha[local][edge][0] = -wb_gradient * own.sdf_a;
    alpha[local][edge][1] = wa_gradient * own.sdf_b;
    left[local][edge] *= own.beta / total;
    right[local][edge] *= own.beta / total;
  } else if (cell < s.cell_count) {
    work.weight_gradients[21 * cell + edge] = 0;
  }
  __syncthreads();
  if (cell >= s.cell_count) return;

  const CellCase& kind = s.kind(cell);
  if (edge < 8) {
    const int k = edge;
    T sdf_sum = 0, alpha_sum = 0, position[3] = {};
    for (int i = 0; i < 3; ++i) {
      const int e = kCornerEdges.edge[k][i], end = kCornerEdges.end[k][i];
      if (vertex_of_edge(kind, e) < 0) continue;
      sdf_sum += sdf[local][e][end];
      alpha_sum += alpha[local][e][end];
      if (!s.training) continue;
      const T part = end == 0 ? plain[local][e] : 1 - plain[local][e];
      for (int j = 0; j < 3; ++j) position[j] += part * offsets[local][e][j];
    }
    work.corner_sdf[8 * cell + k] = sdf_sum;
    for (int j = 0; j < 3 && s.training; ++j) work.corner_positions[24 * cell + 3 * k + j] = position[j];
    for (int v = 0; v < kind.vertices; ++v) {
      T share = 0;
      for (int i = 0; i < 3; ++i) {
        const int e = kCornerEdges.edge[k][i];
        if (kind.groups[v] >> e & 1) share += kCornerEdges.end[k][i] == 0 ? left[local][e] : right[local][e];
      }
      work.corner_shares[8 * (s.vertices_from(cell) + v) + k] = share;
    }
    const T tangent = (CrossedEdge<T>::weight(s, cell, kAlpha + k) - 1) / T(0.99);
    work.weight_gradients[21 * cell + kAlpha + k] = alpha_sum * T(0.99) * (1 - tangent * tangent);
  } else if (edge == 8) {
    T sum = 0;
    for (int v = 0; v < kind.vertices; ++v) sum += wanted.gammas[s.vertices_from(cell) + v];
    const T gamma = gamma_of(s, cell);
    work.weight_gradients[21 * cell + kGamma] = sum * T(0.99) * gamma * (1 - gamma);
  }
}

// What all cells around a point want of its value j, through tanh and sigmoid to what each cube around it gets.
template <class T>
__global__ void point_gradients(Surface<T> s, Wanted<T> wanted, Work<T> work) {
  for (int item = static_cast<int>(threadIdx.x); item < kTilePoints * s.width; item += kPointThreads) {
    const int64_t point = int64_t{blockIdx.x} * kTilePoints + item / s.width;
    const int j = item % s.width;
    if (point >= s.point_count || !s.is_active(point)) continue;
    T sum = 0;
    int count = 0;
    for (int k = 0; k < 8; ++k) {
      count += s.point_cubes[8 * point + k] >= 0;
      const int64_t cell = work.point_cells[8 * point + k];
      if (cell < 0) continue;
      if (j == 0) {
        sum += work.corner_sdf[8 * cell + k];
        continue;
      }
      const int vertices = s.kind(cell).vertices;
      for (int v = 0; v < vertices; ++v) {
        const int64_t vertex = s.vertices_from(cell) + v;
        const T pull = j >= 4       ? wanted.attributes[vertex * s.channels + j - 4]
                       : s.training ? work.moved[3 * vertex + j - 1]
                                    : wanted.vertices[3 * vertex + j - 1];
        sum += work.corner_shares[8 * vertex + k] * pull;
      }
      if (j < 4 && s.training) sum += work.corner_positions[24 * cell + 3 * k + j - 1];
    }
    if (s.training && j == 0) sum += wanted.sdf[point];
    if (s.training && j >= 1 && j < 4) sum += wanted.positions[3 * point + j - 1];
    if (j >= 1 && j < 4) {
      const T shift = Logistic<T>::tanh_of(work.means[point * s.width + j]);
      sum *= s.reach() * (1 - shift * shift);
    } else if (j >= 4) {
      const T color = s.field[point * s.width + j];
      sum *= color * (1 - color);
    }
    work.point_gradients[point * s.width + j] = sum / static_cast<T>(count);
  }
}

// Every channel of every cube, in the order of memory.
template <class T>
__global__ void cube_gradients(Surface<T> s, Wanted<T> wanted, Work<T> work, T* out) {
  const int stride = static_cast<int>(s.stride);
  const T disagreement = s.training ? 2 * wanted.terms[1] / (8 * static_cast<T>(s.cubes) * s.width) : T(0);
  const T magnitude = s.training ? wanted.terms[2] / (kGamma * static_cast<T>(s.cubes)) : T(0);
  for (int item = static_cast<int>(threadIdx.x); item < kTilePoints * stride; item += kPointThreads) {
    const int64_t cube = int64_t{blockIdx.x} * kTilePoints + item / stride;
    if (cube >= s.cubes) return;
    const int channel = item % stride;
    T gradient = 0;
    if (channel >= kWeights && channel < kColors) {
      const int64_t cell = work.cube_cells[cube];
      if (cell >= 0) gradient = work.weight_gradients[21 * cell + channel - kWeights];
      if (s.training && channel < kWeights + kGamma) {
        const T weight = s.feats[cube * s.stride + channel];
        gradient += magnitude * static_cast<T>((weight > 0) - (weight < 0));
      }
    } else {
      const int from = channel - (channel < kDeform ? 0 : channel < kWeights ? kDeform : kColors);
      const int each = channel < kDeform ? 1 : channel < kWeights ? 3 : s.channels, k = from / each;
      const int j = from % each + (channel < kDeform ? 0 : channel < kWeights ? 1 : 4);
      const int64_t point = work.cube_points[8 * cube + k];
      if (point >= 0 && s.is_active(point)) {
        gradient = work.point_gradients[point * s.width + j];
        if (s.training) gradient += disagreement * (s.said(cube, k, j) - work.means[point * s.width + j]);
      }
    }
    out[cube * s.stride + channel] = gradient;
  }
}

template <class View>
bool has_shape(const View& view, int64_t rows, int64_t columns) {
  return view.size(0) == rows && view.size(1) == columns;
}

}  // namespace

template <class T>
void surface_values_gradient(TensorView<const T, 2> feats, const SurfaceMaps& maps, int64_t resolution, bool training,
                             const SurfaceRoom<T>& room, const GradientRoom<T>& more,
                             const SurfaceValues<const T>& gradients, TensorView<T, 2> feats_gradient, int64_t stream) {
  const Surface<T> s = surface_of(feats, maps, resolution, training, room);
  const auto& [vertices, attributes, gammas, terms, positions, sdf] = gradients;
  const auto& [cube_points, cube_cells, point_cells, means, points, weights, corner_sdf, corner_positions, shares,
               moved] = more;
  if (!has_shape(feats_gradient, s.cubes, s.stride) || !has_shape(vertices, s.vertex_count, 3) ||
      !has_shape(attributes, s.vertex_count, s.channels) || gammas.size(0) != s.vertex_count || terms.size(0) != 3 ||
      (training && (!has_shape(positions, s.point_count, 3) || sdf.size(0) != s.point_count)))
    throw std::invalid_argument("the gradients must have the shapes of the values");
  if (!has_shape(cube_points, s.cubes, 8) || cube_cells.size(0) != s.cubes ||
      !has_shape(point_cells, s.point_count, 8) || !has_shape(means, s.point_count, s.width) ||
      !has_shape(points, s.point_count, s.width) || !has_shape(weights, s.cell_count, 21) ||
      !has_shape(corner_sdf, s.cell_count, 8) || !has_shape(shares, s.vertex_count, 8) ||
      (training && (!has_shape(corner_positions, s.cell_count, 24) || !has_shape(moved, s.vertex_count, 3))))
    throw std::invalid_argument("the room to work in must have the shapes of mesh_extraction.h");
  const Work<T> work{cube_points.data, cube_cells.data, point_cells.data,      means.data,  points.data,
                     weights.data,     corner_sdf.data, corner_positions.data, shares.data, moved.data};
  const Wanted<T> wanted{vertices.data, attributes.data, gammas.data, terms.data, positions.data, sdf.data};
  prepare_surface(s, {means.data, nullptr, nullptr, nullptr}, stream);
  const auto per = [&](const char* kernel, int64_t count, int tile, int threads) {
    return Launch{kernel, blocks(count, tile), static_cast<unsigned>(threads), stream};
  };
  launch(per("invert_points", 8 * s.point_count, kPointThreads, kPointThreads), invert_points<T>, s, work);
  launch(per("invert_cells", 8 * s.cell_count, kPointThreads, kPointThreads), invert_cells<T>, s, work);
  launch(per("cell_gradients", s.cell_count, kTileCells, kCellThreads), cell_gradients<T>, s, wanted, work);
  launch(per("point_gradients", s.point_count, kTilePoints, kPointThreads), point_gradients<T>, s, wanted, work);
  launch(per("cube_gradients", s.cubes, kTilePoints, kPointThreads), cube_gradients<T>, s, wanted, work,
         feats_gradient.data);
}

template void surface_values_gradient(TensorView<const float, 2>, const SurfaceMaps&, int64_t, bool,
                                      const SurfaceRoom<float>&, const GradientRoom<float>&,
                                      const SurfaceValues<const float>&, TensorView<float, 2>, int64_t);
template void surface_values_gradient(TensorView<const double, 2>, const SurfaceMaps&, int64_t, bool,
                                      const SurfaceRoom<double>&, const GradientRoom<double>&,
                                      const SurfaceValues<const double>&, TensorView<double, 2>, int64_t);

}  // namespace trellis::cuda
