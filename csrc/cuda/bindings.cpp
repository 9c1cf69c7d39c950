// What Python sees of the CUDA kernels: a list. Compiled once for the GPU (_cuda) and once for the host, where the same
// kernels are emulated for tests (_cuda_emulated); TensorView checks that tensors are on the device it was compiled
// for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#ifdef TRELLIS_EMULATED
#define TRELLIS_MODULE _cuda_emulated
#else
#define TRELLIS_MODULE _cuda
#define TRELLIS_TENSORS_ON_CUDA
#endif

#include "gaussians.h"
#include "gaussians_harmonics.h"
#include "mesh_extraction.h"
#include "mesh_raster.h"
#include "radiance_field.h"
#include "serialization.h"
#include "silhouettes.h"
#include "ssim.h"
#include "tensor_caster.h"
#include "texture.h"
#include "voxel_hash.h"

namespace py = pybind11;

template <class T>
static void bind_textures(py::module_& m) {
  m.def("antialias", &trellis::cuda::antialias<T>);
  m.def("antialias_images_gradient", &trellis::cuda::antialias_images_gradient<T>);
  m.def("antialias_edges_gradient", &trellis::cuda::antialias_edges_gradient<T>);
  m.def("antialias_positions_gradient", &trellis::cuda::antialias_positions_gradient<T>);
  m.def("interpolate_derivatives", &trellis::cuda::interpolate_derivatives<T>);
  m.def("sample_texture", &trellis::cuda::sample_texture<T>);
  m.def("sample_texture_uv_gradient", &trellis::cuda::sample_texture_uv_gradient<T>);
  m.def("sum_texture", &trellis::cuda::sum_texture<T>);
  m.def("texture_keys", &trellis::cuda::texture_keys<T>);
  m.def("texture_runs", &trellis::cuda::texture_runs<T>);
}

PYBIND11_MODULE(TRELLIS_MODULE, m) {
  // The GPU generations there is machine code for; the newest is there as PTX, too.
  m.attr("architectures") = py::tuple(py::cast(std::vector<int>{TRELLIS_ARCHITECTURES}));

  // gaussians
  m.def("project_gaussians", &trellis::cuda::project_gaussians);
  m.def("list_tiles", &trellis::cuda::list_tiles);
  m.def("first_entries", &trellis::cuda::first_entries);
  m.def("blend_tiles", &trellis::cuda::blend_tiles);
  m.def("spherical_harmonics", &trellis::cuda::spherical_harmonics);
  m.def("spherical_harmonics_gradient", &trellis::cuda::spherical_harmonics_gradient);
  m.def("blend_tiles_gradient", &trellis::cuda::blend_tiles_gradient);
  m.def("sum_entries", &trellis::cuda::sum_entries);
  m.def("project_gaussians_gradient", &trellis::cuda::project_gaussians_gradient);

  // mesh_extraction
  m.def("mesh_voxel_columns", &trellis::cuda::mesh_voxel_columns);
  m.def("mesh_point_columns", &trellis::cuda::mesh_point_columns);
  m.def("mesh_surface_cells", &trellis::cuda::mesh_surface_cells<float>);
  m.def("mesh_surface_cells", &trellis::cuda::mesh_surface_cells<double>);
  m.def("mesh_fill_topology", &trellis::cuda::mesh_fill_topology);
  m.def("split_quads", &trellis::cuda::split_quads<float>);
  m.def("split_quads", &trellis::cuda::split_quads<double>);
  m.def("surface_values", &trellis::cuda::surface_values<float>);
  m.def("surface_values", &trellis::cuda::surface_values<double>);
  m.def("surface_values_gradient", &trellis::cuda::surface_values_gradient<float>);
  m.def("surface_values_gradient", &trellis::cuda::surface_values_gradient<double>);

  // mesh_raster
  m.def("draw_mesh_faces", &trellis::cuda::draw_mesh_faces<float>);
  m.def("draw_mesh_faces", &trellis::cuda::draw_mesh_faces<double>);
  m.def("draw_mesh_tiles", &trellis::cuda::draw_mesh_tiles<float>);
  m.def("draw_mesh_tiles", &trellis::cuda::draw_mesh_tiles<double>);
  m.def("describe_mesh_pixels", &trellis::cuda::describe_mesh_pixels<float>);
  m.def("describe_mesh_pixels", &trellis::cuda::describe_mesh_pixels<double>);
  m.def("interpolate", &trellis::cuda::interpolate<float>);
  m.def("interpolate", &trellis::cuda::interpolate<double>);
  m.def("interpolate_barycentrics_gradient", &trellis::cuda::interpolate_barycentrics_gradient<float>);
  m.def("interpolate_barycentrics_gradient", &trellis::cuda::interpolate_barycentrics_gradient<double>);
  m.def("mesh_gradient_of_faces", &trellis::cuda::mesh_gradient_of_faces<float>);
  m.def("mesh_gradient_of_faces", &trellis::cuda::mesh_gradient_of_faces<double>);
  m.def("interpolate_gradient_of_faces", &trellis::cuda::interpolate_gradient_of_faces<float>);
  m.def("interpolate_gradient_of_faces", &trellis::cuda::interpolate_gradient_of_faces<double>);
  m.def("add_corners_to_vertices", &trellis::cuda::add_corners_to_vertices<float>);
  m.def("add_corners_to_vertices", &trellis::cuda::add_corners_to_vertices<double>);
  bind_textures<float>(m);
  bind_textures<double>(m);
  m.def("texture_places", &trellis::cuda::texture_places);
  m.attr("texture_chunk") = trellis::cuda::kTextureChunk;

  // radiance_field
  m.def("pack_field", &trellis::cuda::pack_field);
  m.def("march_field", &trellis::cuda::march_field);
  m.def("note_field", &trellis::cuda::note_field);
  m.def("sum_field_gradient", &trellis::cuda::sum_field_gradient);
  m.def("trace_voxels", &trellis::cuda::trace_voxels);

  // serialization
  m.def("curve_codes", &trellis::cuda::curve_codes);

  // ssim
  m.def("ssim_map", &trellis::cuda::ssim_map);
  m.def("ssim_map_gradient", &trellis::cuda::ssim_map_gradient);

  // voxel_hash
  m.def("neighbor_map", &trellis::cuda::neighbor_map);
  m.def("gather_runs", &trellis::cuda::gather_runs);
  m.def("run_sizes", &trellis::cuda::run_sizes);
  m.def("write_coarse", &trellis::cuda::write_coarse);
  m.def("subdivide_coords", &trellis::cuda::subdivide_coords);
  m.def("subdivided_neighbor_map", &trellis::cuda::subdivided_neighbor_map);
}
