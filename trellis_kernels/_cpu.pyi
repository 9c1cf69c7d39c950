from torch import Tensor

def instruction_set() -> str: ...
def set_instruction_set(name: str) -> None: ...

# attention
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    threads: int,
) -> None: ...
def varlen_attention_backward(
    out_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    query_gradient: Tensor,
    key_gradient: Tensor,
    value_gradient: Tensor,
    threads: int,
) -> None: ...
def windowed_attention(
    qkv: Tensor, order: Tensor, offsets: Tensor, out: Tensor, logsumexp: Tensor, threads: int
) -> None: ...
def windowed_attention_backward(
    out_gradient: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    order: Tensor,
    offsets: Tensor,
    qkv_gradient: Tensor,
    threads: int,
) -> None: ...
def window_partition(coords: Tensor, window_size: int, shift: int, order: Tensor, offsets: Tensor) -> int: ...

# backprojection: the other arguments in the order of csrc/cpu/backprojection.h
def backproject(features: Tensor | None, *others: Tensor | float) -> None: ...
def backproject_gradient(out_gradient: Tensor, *others: Tensor | float) -> None: ...

# gaussians
def rasterize_gaussians(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    out_colors: Tensor,
    out_depths: Tensor,
    out_transmittances: Tensor,
    out_last: Tensor,
    out_medians: Tensor,
    kernel_size: float,
    list_entries: int,
    threads: int,
) -> None: ...
def spherical_harmonics(coefficients: Tensor, directions: Tensor, out: Tensor, threads: int) -> None: ...
def spherical_harmonics_gradient(
    out_gradient: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    out_coefficients: Tensor,
    out_directions: Tensor,
    threads: int,
) -> None: ...
def rasterize_gaussians_backward(
    colors_gradient: Tensor,
    depths_gradient: Tensor,
    transmittances_gradient: Tensor,
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    out_colors: Tensor,
    out_depths: Tensor,
    out_transmittances: Tensor,
    d_means: Tensor,
    d_quats: Tensor,
    d_scales: Tensor,
    d_opacities: Tensor,
    d_colors: Tensor,
    d_extrinsics: Tensor,
    d_intrinsics: Tensor,
    d_background: Tensor,
    kernel_size: float,
    list_entries: int,
    threads: int,
) -> None: ...

# mesh_extraction

class SurfaceTopology:
    def __init__(self, coords: Tensor, resolution: int, threads: int) -> None: ...
    def fill_points(self, feats: Tensor, points: Tensor, point_cubes: Tensor) -> None: ...
    def fill_cells(
        self,
        cells: Tensor,
        cell_cubes: Tensor,
        cell_points: Tensor,
        cases: Tensor,
        vertex_cells: Tensor,
        quads: Tensor,
    ) -> None: ...
    @property
    def points(self) -> int: ...
    @property
    def cells(self) -> int: ...
    @property
    def vertices(self) -> int: ...
    @property
    def quads(self) -> int: ...

def split_quads(quads: Tensor, gammas: Tensor, faces: Tensor, threads: int) -> None: ...
def surface_values(
    feats: Tensor,
    points: Tensor,
    point_cubes: Tensor,
    cells: Tensor,
    cell_cubes: Tensor,
    cell_points: Tensor,
    cases: Tensor,
    resolution: int,
    training: bool,
    vertices: Tensor,
    attributes: Tensor,
    gammas: Tensor,
    terms: Tensor,
    grid_positions: Tensor,
    grid_sdf: Tensor,
    threads: int,
) -> None: ...
def surface_values_gradient(
    feats: Tensor,
    points: Tensor,
    point_cubes: Tensor,
    cells: Tensor,
    cell_cubes: Tensor,
    cell_points: Tensor,
    cases: Tensor,
    resolution: int,
    training: bool,
    vertices_gradient: Tensor,
    attributes_gradient: Tensor,
    gammas_gradient: Tensor,
    terms_gradient: Tensor,
    positions_gradient: Tensor,
    sdf_gradient: Tensor,
    feats_gradient: Tensor,
    threads: int,
) -> None: ...

# normalization
def layer_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    gain: Tensor,
    shift: Tensor,
    offsets: Tensor,
    eps: float,
    unit: float,
    sum: Tensor,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threads: int,
) -> None: ...
def layer_norm_backward(
    out_gradient: Tensor,
    x: Tensor,
    gain: Tensor,
    offsets: Tensor,
    mean: Tensor,
    rstd: Tensor,
    unit: float,
    x_gradient: Tensor,
    gain_gradient: Tensor,
    shift_gradient: Tensor,
    threads: int,
) -> None: ...
def gated_residual(x: Tensor, update: Tensor, gate: Tensor, offsets: Tensor, out: Tensor, threads: int) -> None: ...
def gated_residual_backward(
    out_gradient: Tensor,
    update: Tensor,
    gate: Tensor,
    offsets: Tensor,
    update_gradient: Tensor,
    gate_gradient: Tensor,
    threads: int,
) -> None: ...
def head_rms_norm(x: Tensor, gamma: Tensor, out: Tensor, threads: int) -> None: ...
def head_rms_norm_backward(
    out_gradient: Tensor, x: Tensor, gamma: Tensor, x_gradient: Tensor, gamma_gradient: Tensor, threads: int
) -> None: ...

# mesh_raster
def rasterize_mesh(
    positions: Tensor,
    faces: Tensor,
    behind_ids: Tensor,
    behind_depths: Tensor,
    ids: Tensor,
    barycentrics: Tensor,
    depths: Tensor,
    derivatives: Tensor,
    threads: int,
) -> None: ...
def rasterize_mesh_gradient(
    positions: Tensor,
    faces: Tensor,
    ids: Tensor,
    barycentrics_gradient: Tensor,
    depths_gradient: Tensor,
    out: Tensor,
    threads: int,
) -> None: ...
def interpolate(
    attributes: Tensor, faces: Tensor, ids: Tensor, barycentrics: Tensor, out: Tensor, threads: int
) -> None: ...
def interpolate_gradient(
    out_gradient: Tensor,
    attributes: Tensor,
    faces: Tensor,
    ids: Tensor,
    barycentrics: Tensor,
    attributes_gradient: Tensor,
    barycentrics_gradient: Tensor,
    threads: int,
) -> None: ...
def interpolate_derivatives(
    attributes: Tensor, faces: Tensor, ids: Tensor, derivatives: Tensor, out: Tensor, threads: int
) -> None: ...
def sample_texture(
    texture: Tensor,
    uv: Tensor,
    derivatives: Tensor,
    out: Tensor,
    mips: Tensor,
    wrap: str,
    filter: str,
    threads: int,
) -> None: ...
def sample_texture_gradient(
    out_gradient: Tensor, uv: Tensor, derivatives: Tensor, out: Tensor, wrap: str, filter: str, threads: int
) -> None: ...
def sample_texture_uv_gradient(
    out_gradient: Tensor,
    texture: Tensor,
    mips: Tensor,
    uv: Tensor,
    derivatives: Tensor,
    out: Tensor,
    wrap: str,
    filter: str,
    threads: int,
) -> None: ...
def face_neighbors(faces: Tensor, out: Tensor, threads: int) -> None: ...
def antialias(
    images: Tensor,
    ids: Tensor,
    depths: Tensor,
    positions: Tensor,
    faces: Tensor,
    neighbors: Tensor,
    out: Tensor,
    shares: Tensor,
    edges: Tensor,
    threads: int,
) -> None: ...
def antialias_gradient(
    out_gradient: Tensor,
    images: Tensor,
    positions: Tensor,
    faces: Tensor,
    shares: Tensor,
    edges: Tensor,
    images_gradient: Tensor,
    positions_gradient: Tensor,
    threads: int,
) -> None: ...

# radiance_field
def render_radiance_field(
    positions: Tensor,
    trivec: Tensor,
    density: Tensor,
    features: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    jitter: Tensor,
    box: Tensor,
    depth: int,
    colors: Tensor,
    depths: Tensor,
    left: Tensor,
    medians: Tensor,
    crossings: Tensor,
    threads: int,
) -> None: ...
def render_radiance_field_gradient(
    colors_gradient: Tensor,
    depths_gradient: Tensor,
    left_gradient: Tensor,
    positions: Tensor,
    trivec: Tensor,
    density: Tensor,
    features: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    jitter: Tensor,
    box: Tensor,
    depth: int,
    trivec_gradient: Tensor,
    density_gradient: Tensor,
    features_gradient: Tensor,
    background_gradient: Tensor,
    threads: int,
) -> None: ...
def trace_voxels(
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    box: Tensor,
    depth: int,
    ids: Tensor,
    depths: Tensor,
    threads: int,
) -> None: ...

# serialization

def curve_codes(coords: Tensor, hilbert: bool, transposed: bool, bits: int, codes: Tensor, threads: int) -> None: ...
def curve_order(coords: Tensor, hilbert: bool, transposed: bool, bits: int, order: Tensor, threads: int) -> None: ...

# sparse_conv
def submanifold_conv(
    feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor, out: Tensor, threads: int
) -> None: ...
def submanifold_conv_input_gradient(
    out_gradient: Tensor, neighbors: Tensor, weight: Tensor, out: Tensor, threads: int
) -> None: ...
def submanifold_conv_weight_gradient(
    feats: Tensor, neighbors: Tensor, out_gradient: Tensor, out: Tensor, threads: int
) -> None: ...
def subdivided_conv(
    feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor, out: Tensor, threads: int
) -> None: ...
def subdivided_conv_input_gradient(
    out_gradient: Tensor, neighbors: Tensor, weight: Tensor, out: Tensor, threads: int
) -> None: ...
def subdivided_conv_weight_gradient(
    feats: Tensor, neighbors: Tensor, out_gradient: Tensor, out: Tensor, threads: int
) -> None: ...
def sparse_pool(feats: Tensor, inverse: Tensor, mode: int, out: Tensor, threads: int) -> None: ...

# ssim
def ssim_map(images: Tensor, targets: Tensor, out: Tensor, threads: int) -> None: ...
def ssim_map_gradient(out_gradient: Tensor, images: Tensor, targets: Tensor, out: Tensor, threads: int) -> None: ...

# voxel_hash

def neighbor_map(coords: Tensor, kernel_size: int, neighbors: Tensor, threads: int) -> None: ...
def coarsen(coords: Tensor, factor: int, coarse: Tensor, inverse: Tensor, threads: int) -> int: ...
def subdivide_coords(coords: Tensor, children: Tensor, threads: int) -> None: ...
def subdivided_neighbor_map(neighbors: Tensor, children: Tensor, threads: int) -> None: ...

# voxelize
def voxelize_mesh(vertices: Tensor, faces: Tensor, resolution: int, bits: Tensor, threads: int) -> int: ...
def list_voxels(bits: Tensor, coords: Tensor) -> None: ...
