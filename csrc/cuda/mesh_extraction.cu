// Quads to triangles. The topology of the surface is in mesh_topology.cu, its values in mesh_values.cu and
// mesh_gradient.cu.
#include "launch.h"
#include "mesh_extraction.h"

namespace trellis::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void cut_quads(const int4* __restrict__ quads, const T* __restrict__ gammas, int64_t vertices, int64_t count,
                          int64_t* __restrict__ faces) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= count) return;
  const int4 q = quads[n];
  DEVICE_CHECK(min(min(q.x, q.y), min(q.z, q.w)) >= 0 && max(max(q.x, q.y), max(q.z, q.w)) < vertices,
               "quads must be in [0, V)");
  const bool along_02 = gammas[q.x] * gammas[q.z] > gammas[q.y] * gammas[q.w];
  int64_t* const face = faces + 6 * n;
  face[0] = q.x;
  face[1] = q.y;
  face[2] = along_02 ? q.z : q.w;
  face[3] = along_02 ? q.x : q.w;
  face[4] = along_02 ? q.z : q.y;
  face[5] = along_02 ? q.w : q.z;
}

}  // namespace

template <class T>
void split_quads(TensorView<const int32_t, 2> quads, TensorView<const T, 1> gammas, TensorView<int64_t, 3> faces,
                 int64_t stream) {
  const int64_t count = quads.size(0);
  if (quads.size(1) != 4 || faces.size(0) != count || faces.size(1) != 2 || faces.size(2) != 3)
    throw std::invalid_argument("quads must be [Q, 4] and faces [Q, 2, 3]");
  launch({"cut_quads", blocks(count, kThreads), kThreads, stream}, cut_quads<T>,
         reinterpret_cast<const int4*>(quads.data), gammas.data, gammas.numel(), count, faces.data);
}

template void split_quads(TensorView<const int32_t, 2>, TensorView<const float, 1>, TensorView<int64_t, 3>, int64_t);
template void split_quads(TensorView<const int32_t, 2>, TensorView<const double, 1>, TensorView<int64_t, 3>, int64_t);

}  // namespace trellis::cuda
