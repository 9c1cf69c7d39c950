// Triangle rasterization. mesh_raster.cu finds the triangle of each pixel, mesh_raster_gradient.cu holds interpolation
// and the gradients.
#pragma once
#include "tensor_view.h"

namespace trellis::cuda {

// A box of more pixels is drawn by draw_mesh_tiles, tile by tile, a smaller one by draw_mesh_faces.
constexpr int64_t kSmallBox = 256;

// What drawing does to a pixel. keys [B, H, W]: with float, depth << 32 | face, ordered like unsigned numbers, so that
// the least of all is the nearest, and of equally near ones the lowest row; all ones where there is nothing. With
// double, the depth alone, and `second` draws once more, into winners: the lowest of the rows that have this depth.
// behind_*: an earlier layer, or tensors without elements.
// tiles [B, F]: how many tiles each triangle has that is too large for draw_mesh_faces; without elements if none can
// be.
template <class T>
void draw_mesh_faces(TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                     TensorView<const int32_t, 3> behind_ids, TensorView<const T, 3> behind_depths,
                     TensorView<int64_t, 3> keys, TensorView<int32_t, 3> winners, TensorView<int32_t, 2> tiles,
                     bool second, int64_t stream);

// ends [B * F]: the cumulative sum of `tiles`. `block_count` blocks share the tiles.
template <class T>
void draw_mesh_tiles(TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                     TensorView<const int32_t, 3> behind_ids, TensorView<const T, 3> behind_depths,
                     TensorView<int64_t, 3> keys, TensorView<int32_t, 3> winners, TensorView<const int64_t, 1> ends,
                     bool second, int64_t block_count, int64_t stream);

// From keys (and winners, which may be `ids`) to the pictures.
template <class T>
void describe_mesh_pixels(TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                          TensorView<const int64_t, 3> keys, TensorView<int32_t, 3> ids, TensorView<T, 4> barycentrics,
                          TensorView<T, 3> depths, TensorView<T, 4> derivatives, int64_t stream);

template <class T>
void interpolate(TensorView<const T, 3> attributes, TensorView<const int32_t, 2> faces,
                 TensorView<const int32_t, 3> ids, TensorView<const T, 4> barycentrics, TensorView<T, 4> out,
                 int64_t stream);

template <class T>
void interpolate_barycentrics_gradient(TensorView<const T, 4> out_gradient, TensorView<const T, 3> attributes,
                                       TensorView<const int32_t, 2> faces, TensorView<const int32_t, 3> ids,
                                       TensorView<T, 4> barycentrics_gradient, int64_t stream);

// The two sums over pixels: by face and corner, sums [B * F, 12] (3 corners of 4 columns), written only for faces that
// are seen. Pixels are grouped by key = view * F + face: keys [N] in rising order, -1 where there is no face; order [N]
// which pixel each is; starts [B * F + 1] where each key begins. partials [chunks, 2, 12]: see ordered_sums.cuh.
template <class T>
void mesh_gradient_of_faces(TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                            TensorView<const int32_t, 3> ids, TensorView<const T, 4> barycentrics_gradient,
                            TensorView<const T, 3> depths_gradient, TensorView<const int32_t, 1> keys,
                            TensorView<const int64_t, 1> order, TensorView<const int32_t, 1> starts,
                            TensorView<double, 3> partials, TensorView<double, 2> sums, int64_t stream);

// For the attributes' channels [first_channel, first_channel + 4).
template <class T>
void interpolate_gradient_of_faces(TensorView<const T, 4> out_gradient, TensorView<const int32_t, 2> faces,
                                   int64_t vertices, TensorView<const int32_t, 3> ids,
                                   TensorView<const T, 4> barycentrics, int64_t first_channel,
                                   TensorView<const int32_t, 1> keys, TensorView<const int64_t, 1> order,
                                   TensorView<const int32_t, 1> starts, TensorView<double, 3> partials,
                                   TensorView<double, 2> sums, int64_t stream);

// Adds the sums of the corners of each vertex to out [B or 1, V, C], channels [first_channel, first_channel + 4).
// face_starts [B * F + 1] tells which faces are seen; the 3 F corners are grouped by vertex: keys, order, starts;
// partials [B or 1, chunks, 2 * 4].
template <class T>
void add_corners_to_vertices(TensorView<const double, 2> sums, TensorView<const int32_t, 1> face_starts,
                             int64_t first_channel, TensorView<const int32_t, 1> keys,
                             TensorView<const int64_t, 1> order, TensorView<const int32_t, 1> starts,
                             TensorView<double, 3> partials, TensorView<T, 3> out, int64_t stream);

}  // namespace trellis::cuda
