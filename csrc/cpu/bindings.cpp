// What Python sees of the CPU kernels: a list. The signatures are the contract, TensorView checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "attention.h"
#include "backprojection.h"
#include "cpu_features.h"
#include "gaussians.h"
#include "gaussians_harmonics.h"
#include "mesh_extraction.h"
#include "mesh_raster.h"
#include "normalization.h"
#include "radiance_field.h"
#include "serialization.h"
#include "silhouettes.h"
#include "sparse_conv.h"
#include "ssim.h"
#include "tensor_caster.h"
#include "texture.h"
#include "voxel_hash.h"
#include "voxelize.h"

namespace py = pybind11;
using release_gil = py::call_guard<py::gil_scoped_release>;

namespace trellis {

static InstructionSet current = detect_instruction_set();
InstructionSet instruction_set() { return current; }

static const char* const kNames[] = {"baseline", "avx2", "avx512"};

static void set_instruction_set(const std::string& name) {
  for (int level = 0; level <= static_cast<int>(detect_instruction_set()); ++level) {
    if (name == kNames[level]) {
      current = static_cast<InstructionSet>(level);
      return;
    }
  }
  throw std::invalid_argument("instruction set must be one this CPU has; got " + name);
}

}  // namespace trellis

// mesh_extraction: the integer operator is an object, because its output sizes come from the data.
template <class T>
static void bind_surface_values(py::module_& m) {
  using trellis::TensorView, trellis::cpu::SurfaceValues, trellis::cpu::Topology;
  using Ints1 = TensorView<const int32_t, 1>;
  using Ints2 = TensorView<const int32_t, 2>;
  m.def(
      "surface_values",
      [](TensorView<const T, 2> feats, Ints2 points, Ints2 point_cubes, Ints2 cells, Ints1 cell_cubes,
         Ints2 cell_points, Ints1 cases, int64_t resolution, bool training, TensorView<T, 2> vertices,
         TensorView<T, 2> attributes, TensorView<T, 1> gammas, TensorView<T, 1> terms, TensorView<T, 2> grid_positions,
         TensorView<T, 1> grid_sdf, int threads) {
        const Topology topology{points, point_cubes, cells,    cell_cubes, cell_points,
                                cases,  resolution,  training, threads};
        trellis::cpu::surface_values<T>(feats, topology,
                                        {vertices, attributes, gammas, terms, grid_positions, grid_sdf});
      },
      release_gil());
  m.def(
      "surface_values_gradient",
      [](TensorView<const T, 2> feats, Ints2 points, Ints2 point_cubes, Ints2 cells, Ints1 cell_cubes,
         Ints2 cell_points, Ints1 cases, int64_t resolution, bool training, TensorView<const T, 2> vertices,
         TensorView<const T, 2> attributes, TensorView<const T, 1> gammas, TensorView<const T, 1> terms,
         TensorView<const T, 2> grid_positions, TensorView<const T, 1> grid_sdf, TensorView<T, 2> feats_gradient,
         int threads) {
        const Topology topology{points, point_cubes, cells,    cell_cubes, cell_points,
                                cases,  resolution,  training, threads};
        trellis::cpu::surface_values_gradient<T>(
            feats, topology, {vertices, attributes, gammas, terms, grid_positions, grid_sdf}, feats_gradient);
      },
      release_gil());
}

static void bind_mesh_extraction(py::module_& m) {
  using trellis::cpu::SurfaceTopology;
  py::class_<SurfaceTopology>(m, "SurfaceTopology")
      .def(py::init<trellis::TensorView<const int32_t, 2>, int64_t, int>(), release_gil())
      .def("fill_points", &SurfaceTopology::fill_points<float>, release_gil())
      .def("fill_points", &SurfaceTopology::fill_points<double>, release_gil())
      .def("fill_cells", &SurfaceTopology::fill_cells, release_gil())
      .def_property_readonly("points", &SurfaceTopology::point_count)
      .def_property_readonly("cells", &SurfaceTopology::cell_count)
      .def_property_readonly("vertices", &SurfaceTopology::vertex_count)
      .def_property_readonly("quads", &SurfaceTopology::quad_count);
  m.def("split_quads", &trellis::cpu::split_quads<float>, release_gil());
  m.def("split_quads", &trellis::cpu::split_quads<double>, release_gil());
  bind_surface_values<float>(m);
  bind_surface_values<double>(m);
}

template <class T>
static void bind_mesh_raster(py::module_& m) {
  using trellis::TensorView;
  m.def(
      "rasterize_mesh",
      [](TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces, TensorView<const int32_t, 3> behind_ids,
         TensorView<const T, 3> behind_depths, TensorView<int32_t, 3> ids, TensorView<T, 4> barycentrics,
         TensorView<T, 3> depths, TensorView<T, 4> derivatives, int threads) {
        trellis::cpu::rasterize_mesh<T>(positions, faces, {behind_ids, behind_depths},
                                        {ids, barycentrics, depths, derivatives}, threads);
      },
      release_gil());
  m.def("rasterize_mesh_gradient", &trellis::cpu::rasterize_mesh_gradient<T>, release_gil());
  m.def("interpolate", &trellis::cpu::interpolate<T>, release_gil());
  m.def("interpolate_gradient", &trellis::cpu::interpolate_gradient<T>, release_gil());
}

template <class T>
static void bind_textures(py::module_& m) {
  using trellis::TensorView;
  using Images = TensorView<const T, 4>;
  m.def(
      "sample_texture",
      [](Images texture, Images uv, Images derivatives, TensorView<T, 4> out, TensorView<T, 3> mips,
         const std::string& wrap, const std::string& filter, int threads) {
        trellis::cpu::sample_texture<T>(texture, trellis::cpu::pixels_of(uv, derivatives, wrap, filter), out, mips,
                                        threads);
      },
      release_gil());
  m.def(
      "sample_texture_gradient",
      [](Images out_gradient, Images uv, Images derivatives, TensorView<T, 4> out, const std::string& wrap,
         const std::string& filter, int threads) {
        trellis::cpu::sample_texture_gradient<T>(out_gradient, trellis::cpu::pixels_of(uv, derivatives, wrap, filter),
                                                 out, threads);
      },
      release_gil());
  m.def(
      "sample_texture_uv_gradient",
      [](Images out_gradient, Images texture, TensorView<const T, 3> mips, Images uv, Images derivatives,
         TensorView<T, 4> out, const std::string& wrap, const std::string& filter, int threads) {
        trellis::cpu::sample_texture_uv_gradient<T>(
            out_gradient, texture, mips, trellis::cpu::pixels_of(uv, derivatives, wrap, filter), out, threads);
      },
      release_gil());
  m.def("interpolate_derivatives", &trellis::cpu::interpolate_derivatives<T>, release_gil());
  m.def(
      "antialias",
      [](Images images, TensorView<const int32_t, 3> ids, TensorView<const T, 3> depths,
         TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces, TensorView<const int32_t, 2> neighbors,
         TensorView<T, 4> out, TensorView<T, 4> shares, TensorView<int32_t, 4> edges, int threads) {
        trellis::cpu::antialias<T>(images, {ids, depths, positions, faces, neighbors}, out, shares, edges, threads);
      },
      release_gil());
  m.def("antialias_gradient", &trellis::cpu::antialias_gradient<T>, release_gil());
}

template <class T>
static void bind_radiance_field(py::module_& m) {
  using trellis::TensorView;
  m.def(
      "render_radiance_field",
      [](TensorView<const double, 2> positions, TensorView<const T, 4> trivec, TensorView<const T, 2> density,
         TensorView<const T, 3> features, TensorView<const double, 3> extrinsics,
         TensorView<const double, 3> intrinsics, TensorView<const T, 2> background, TensorView<const T, 3> jitter,
         TensorView<const double, 1> box, int64_t depth, TensorView<T, 4> colors, TensorView<T, 3> depths,
         TensorView<T, 3> left, TensorView<T, 3> medians, TensorView<int32_t, 3> crossings, int threads) {
        trellis::cpu::render_radiance_field<T>({positions, trivec, density, features, background, jitter},
                                               {extrinsics, intrinsics, box, depth},
                                               {colors, depths, left, medians, crossings}, threads);
      },
      release_gil());
  m.def(
      "render_radiance_field_gradient",
      [](TensorView<const T, 4> colors_gradient, TensorView<const T, 3> depths_gradient,
         TensorView<const T, 3> left_gradient, TensorView<const double, 2> positions, TensorView<const T, 4> trivec,
         TensorView<const T, 2> density, TensorView<const T, 3> features, TensorView<const double, 3> extrinsics,
         TensorView<const double, 3> intrinsics, TensorView<const T, 2> background, TensorView<const T, 3> jitter,
         TensorView<const double, 1> box, int64_t depth, TensorView<T, 4> trivec_gradient,
         TensorView<T, 2> density_gradient, TensorView<T, 3> features_gradient, TensorView<T, 2> background_gradient,
         int threads) {
        trellis::cpu::render_radiance_field_gradient<T>(
            {colors_gradient, depths_gradient, left_gradient},
            {positions, trivec, density, features, background, jitter}, {extrinsics, intrinsics, box, depth},
            {trivec_gradient, density_gradient, features_gradient, background_gradient}, threads);
      },
      release_gil());
}

PYBIND11_MODULE(_cpu, m) {
  m.def("instruction_set", [] { return trellis::kNames[static_cast<int>(trellis::instruction_set())]; });
  m.def("set_instruction_set", &trellis::set_instruction_set);

  // attention
  m.def("varlen_attention", &trellis::cpu::varlen_attention<float>, release_gil());
  m.def("varlen_attention", &trellis::cpu::varlen_attention<double>, release_gil());
  m.def("varlen_attention_backward", &trellis::cpu::varlen_attention_backward<float>, release_gil());
  m.def("varlen_attention_backward", &trellis::cpu::varlen_attention_backward<double>, release_gil());
  m.def("windowed_attention", &trellis::cpu::windowed_attention<float>, release_gil());
  m.def("windowed_attention", &trellis::cpu::windowed_attention<double>, release_gil());
  m.def("windowed_attention_backward", &trellis::cpu::windowed_attention_backward<float>, release_gil());
  m.def("windowed_attention_backward", &trellis::cpu::windowed_attention_backward<double>, release_gil());
  m.def("window_partition", &trellis::cpu::window_partition, release_gil());

  // backprojection
  m.def("backproject", &trellis::cpu::backproject<float>, release_gil());
  m.def("backproject", &trellis::cpu::backproject<double>, release_gil());
  m.def("backproject_gradient", &trellis::cpu::backproject_gradient<float>, release_gil());
  m.def("backproject_gradient", &trellis::cpu::backproject_gradient<double>, release_gil());

  // gaussians
  const auto def_rasterize_gaussians = [&m](auto function) {
    m.def("rasterize_gaussians", function, py::arg("means"), py::arg("quats"), py::arg("scales"), py::arg("opacities"),
          py::arg("colors"), py::arg("extrinsics"), py::arg("intrinsics"), py::arg("background"), py::arg("out_colors"),
          py::arg("out_depths"), py::arg("out_transmittances"), py::arg("out_last"), py::arg("out_medians"),
          py::arg("kernel_size"), py::arg("list_entries"), py::arg("threads"), release_gil());
  };
  def_rasterize_gaussians(&trellis::rasterize_gaussians<float>);
  def_rasterize_gaussians(&trellis::rasterize_gaussians<double>);
  m.def("rasterize_gaussians_backward", &trellis::rasterize_gaussians_backward<float>, release_gil());
  m.def("rasterize_gaussians_backward", &trellis::rasterize_gaussians_backward<double>, release_gil());

  m.def("spherical_harmonics", &trellis::cpu::spherical_harmonics<float>, release_gil());
  m.def("spherical_harmonics", &trellis::cpu::spherical_harmonics<double>, release_gil());
  m.def("spherical_harmonics_gradient", &trellis::cpu::spherical_harmonics_gradient<float>, release_gil());
  m.def("spherical_harmonics_gradient", &trellis::cpu::spherical_harmonics_gradient<double>, release_gil());

  // mesh_extraction
  bind_mesh_extraction(m);

  // normalization
  m.def("layer_norm", &trellis::cpu::layer_norm<float>, release_gil());
  m.def("layer_norm", &trellis::cpu::layer_norm<double>, release_gil());
  m.def("layer_norm_backward", &trellis::cpu::layer_norm_backward<float>, release_gil());
  m.def("layer_norm_backward", &trellis::cpu::layer_norm_backward<double>, release_gil());
  m.def("gated_residual", &trellis::cpu::gated_residual<float>, release_gil());
  m.def("gated_residual", &trellis::cpu::gated_residual<double>, release_gil());
  m.def("gated_residual_backward", &trellis::cpu::gated_residual_backward<float>, release_gil());
  m.def("gated_residual_backward", &trellis::cpu::gated_residual_backward<double>, release_gil());
  m.def("head_rms_norm", &trellis::cpu::head_rms_norm<float>, release_gil());
  m.def("head_rms_norm", &trellis::cpu::head_rms_norm<double>, release_gil());
  m.def("head_rms_norm_backward", &trellis::cpu::head_rms_norm_backward<float>, release_gil());
  m.def("head_rms_norm_backward", &trellis::cpu::head_rms_norm_backward<double>, release_gil());

  // mesh_raster
  bind_mesh_raster<float>(m);
  bind_mesh_raster<double>(m);
  m.def("face_neighbors", &trellis::cpu::face_neighbors, release_gil());
  bind_textures<float>(m);
  bind_textures<double>(m);

  // radiance_field
  bind_radiance_field<float>(m);
  bind_radiance_field<double>(m);
  m.def(
      "trace_voxels",
      [](trellis::TensorView<const double, 2> positions, trellis::TensorView<const double, 3> extrinsics,
         trellis::TensorView<const double, 3> intrinsics, trellis::TensorView<const double, 1> box, int64_t depth,
         trellis::TensorView<int32_t, 3> ids, trellis::TensorView<double, 3> depths, int threads) {
        trellis::cpu::trace_voxels(positions, {extrinsics, intrinsics, box, depth}, ids, depths, threads);
      },
      release_gil());

  // serialization
  m.def("curve_codes", &trellis::cpu::curve_codes, release_gil());
  m.def("curve_order", &trellis::cpu::curve_order, release_gil());

  // sparse_conv
  m.def("submanifold_conv", &trellis::cpu::submanifold_conv<float>, release_gil());
  m.def("submanifold_conv", &trellis::cpu::submanifold_conv<double>, release_gil());
  m.def("submanifold_conv_input_gradient", &trellis::cpu::submanifold_conv_input_gradient<float>, release_gil());
  m.def("submanifold_conv_input_gradient", &trellis::cpu::submanifold_conv_input_gradient<double>, release_gil());
  m.def("submanifold_conv_weight_gradient", &trellis::cpu::submanifold_conv_weight_gradient<float>, release_gil());
  m.def("submanifold_conv_weight_gradient", &trellis::cpu::submanifold_conv_weight_gradient<double>, release_gil());
  m.def("subdivided_conv", &trellis::cpu::subdivided_conv<float>, release_gil());
  m.def("subdivided_conv", &trellis::cpu::subdivided_conv<double>, release_gil());
  m.def("subdivided_conv_input_gradient", &trellis::cpu::subdivided_conv_input_gradient<float>, release_gil());
  m.def("subdivided_conv_input_gradient", &trellis::cpu::subdivided_conv_input_gradient<double>, release_gil());
  m.def("subdivided_conv_weight_gradient", &trellis::cpu::subdivided_conv_weight_gradient<float>, release_gil());
  m.def("subdivided_conv_weight_gradient", &trellis::cpu::subdivided_conv_weight_gradient<double>, release_gil());
  m.def("sparse_pool", &trellis::cpu::sparse_pool<float>, release_gil());
  m.def("sparse_pool", &trellis::cpu::sparse_pool<double>, release_gil());

  // ssim
  m.def("ssim_map", &trellis::cpu::ssim_map<float>, release_gil());
  m.def("ssim_map", &trellis::cpu::ssim_map<double>, release_gil());
  m.def("ssim_map_gradient", &trellis::cpu::ssim_map_gradient<float>, release_gil());
  m.def("ssim_map_gradient", &trellis::cpu::ssim_map_gradient<double>, release_gil());

  // voxelize
  m.def("voxelize_mesh", &trellis::cpu::voxelize_mesh, release_gil());
  m.def("list_voxels", &trellis::cpu::list_voxels, release_gil());

  // voxel_hash
  m.def("neighbor_map", &trellis::cpu::neighbor_map, release_gil());
  m.def("coarsen", &trellis::cpu::coarsen, release_gil());
  m.def("subdivide_coords", &trellis::cpu::subdivide_coords, release_gil());
  m.def("subdivided_neighbor_map", &trellis::cpu::subdivided_neighbor_map, release_gil());
}
