// What Python sees of the CPU kernels: a list. The signatures are the contract, TensorView checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "attention.h"
#include "cpu_features.h"
#include "gaussians.h"
#include "mesh_extraction.h"
#include "serialization.h"
#include "sparse_conv.h"
#include "tensor_caster.h"
#include "voxel_hash.h"

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

PYBIND11_MODULE(_cpu, m) {
  m.def("instruction_set", [] { return trellis::kNames[static_cast<int>(trellis::instruction_set())]; });
  m.def("set_instruction_set", &trellis::set_instruction_set);

  // attention

  // gaussians
  const auto def_rasterize_gaussians = [&m](auto function) {
    m.def("rasterize_gaussians", function, py::arg("means"), py::arg("quats"), py::arg("scales"), py::arg("opacities"),
          py::arg("colors"), py::arg("extrinsics"), py::arg("intrinsics"), py::arg("background"), py::arg("out_colors"),
          py::arg("out_depths"), py::arg("out_transmittances"), py::arg("out_last"), py::arg("kernel_size"),
          py::arg("list_entries"), py::arg("threads"), release_gil());
  };
  def_rasterize_gaussians(&trellis::rasterize_gaussians<float>);
  def_rasterize_gaussians(&trellis::rasterize_gaussians<double>);

  // mesh_extraction

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

  // voxel_hash
  m.def("neighbor_map", &trellis::cpu::neighbor_map, release_gil());
  m.def("coarsen", &trellis::cpu::coarsen, release_gil());
  m.def("subdivide_coords", &trellis::cpu::subdivide_coords, release_gil());
  m.def("subdivided_neighbor_map", &trellis::cpu::subdivided_neighbor_map, release_gil());
}
