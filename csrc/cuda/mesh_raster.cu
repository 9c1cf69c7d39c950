// Which triangle each pixel shows: every triangle offers itself to the pixels it covers, and atomicMin keeps the best
// offer, whatever the order. A warp takes 32 triangles and goes through the pixels of their boxes as one list, so that
// small and medium ones keep all lanes busy; large ones are drawn afterwards, in tiles spread over the whole GPU.
#include "mesh_raster.h"
#include "mesh_triangle.cuh"

namespace trellis::cuda {
namespace {

using Word = unsigned long long;  // CUDA's atomics know no uint64_t

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 32;     // pixels per side of the tiles of large triangles
constexpr int kNumbers = 13;  // of a triangle: normals, z, determinant

template <class T>
struct Drawing {
  const T* positions;
  const int32_t* faces;
  const int32_t* behind_ids;  // or null
  const T* behind_depths;
  Word* keys;
  int32_t *winners, *tiles;
  const int64_t* ends;
  int64_t views, vertices, count;
  int width, height;
  double step_x, step_y;  // of a pixel
};

// Bits whose order as unsigned numbers is that of the values; 0 and -0 are the same.
__device__ inline Word ordered(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ inline Word ordered(double value) {
  const Word bits = static_cast<Word>(__double_as_longlong(value + 0.0));
  return bits >> 63 ? ~bits : bits | Word{1} << 63;
}
__device__ inline float depth_of(Word bits, float) {
  const unsigned low = static_cast<unsigned>(bits);
  return __uint_as_float(low >> 31 ? low & 0x7fffffffu : ~low);
}
__device__ inline double depth_of(Word bits, double) {
  return __longlong_as_double(static_cast<long long>(bits >> 63 ? bits & ~(Word{1} << 63) : ~bits));
}

template <class T>
struct Corners {
  int32_t face[3];
  Vertex vertices[3];
};
template <class T>
__device__ Corners<T> corners_of(const T* positions, const int32_t* faces, int64_t vertices, int64_t view,
                                 int64_t face) {
  Corners<T> corners;
  for (int i = 0; i < 3; ++i) {
    const int32_t row = faces[3 * face + i];
    DEVICE_CHECK(row >= 0 && row < vertices, "faces must be in [0, V)");
    corners.face[i] = row;
    corners.vertices[i] = vertex_of(positions + 4 * view * vertices, row);
  }
  return corners;
}

// The edge functions of a triangle along one row of pixels, and what is shown of it there.
struct Row {
  double slope[3], base[3], z[3], determinant;
  bool takes_zero[3];

  template <class Number>  // number(i): as in Triangle, normals first
  __device__ Row(const Number& number, double y) {
    for (int i = 0; i < 3; ++i) {
      const double nx = number(3 * i), ny = number(3 * i + 1);
      slope[i] = nx;
      base[i] = sum(product(ny, y), number(3 * i + 2));
      takes_zero[i] = nx > 0 || (nx == 0 && ny > 0);  // the top-left rule
      z[i] = number(9 + i);
    }
    determinant = number(12);
  }

  template <class T, bool kSecond>
  __device__ void offer(const Drawing<T>& in, int64_t face, int64_t pixel, double x) const {
    double e[3];
    for (int i = 0; i < 3; ++i) {
      e[i] = sum(product(slope[i], x), base[i]);
      if (!(e[i] > 0 || (e[i] == 0 && takes_zero[i]))) return;
    }
    const T depth =
        static_cast<T>(sum(sum(product(e[0], z[0]), product(e[1], z[1])), product(e[2], z[2])) / determinant);
    if (!(depth >= T(-1) && depth <= T(1))) return;
    if (in.behind_ids) {
      const int32_t front = in.behind_ids[pixel];
      const T front_depth = in.behind_depths[pixel];
      if (face == front || !(depth > front_depth || (depth == front_depth && front >= 0 && face > front))) return;
    }
    if constexpr (kSecond) {
      if (ordered(depth) == in.keys[pixel]) atomicMin(in.winners + pixel, static_cast<int32_t>(face));
    } else {
      const Word key = sizeof(T) == 4 ? ordered(depth) << 32 | static_cast<Word>(face) : ordered(depth);
      if (key < in.keys[pixel]) atomicMin(in.keys + pixel, key);  // what is read may be old, then it is too high
    }
  }
};

// Like the numbers of a Row.
__device__ inline double number_of(const Triangle& t, int i) {
  if (i == 12) return t.determinant;
  if (i >= 9) return t.z[i - 9];
  const Vector3& n = t.normal[i / 3];
  return i % 3 == 0 ? n.x : i % 3 == 1 ? n.y : n.z;
}

__device__ inline int tiles_of(const Box& box) {
  return ((box.across() + kTile - 1) / kTile) * ((box.down() + kTile - 1) / kTile);
}

template <class T, bool kSecond>
__global__ void __launch_bounds__(kThreads) draw_faces(const Drawing<T> in) {
  SHARED_ARRAY(double, numbers, kWarps, kNumbers, 32);
  SHARED_ARRAY(int, left, kWarps, 32);
  SHARED_ARRAY(int, top, kWarps, 32);
  SHARED_ARRAY(int, across, kWarps, 32);
  SHARED_ARRAY(int, starts, kWarps, 32);  // in the list of pixels of the warp
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t first = int64_t{blockIdx.x} * kThreads + warp * 32, view = blockIdx.y;

  int pixels = 0;
  if (first + lane < in.count) {
    const Corners corners = corners_of(in.positions, in.faces, in.vertices, view, first + lane);
    const Triangle t = triangle_of(corners.vertices, corners.face);
    Box box{0, -1, 0, -1};
    if (t.valid()) box = box_of(corners.vertices, in.width, in.height);
    const int64_t area = box.empty() ? 0 : int64_t{box.across()} * box.down();
    if (!kSecond && in.tiles) in.tiles[view * in.count + first + lane] = area > kSmallBox ? tiles_of(box) : 0;
    if (area > 0 && area <= kSmallBox) {
      pixels = static_cast<int>(area);
      for (int i = 0; i < kNumbers; ++i) numbers[warp][i][lane] = number_of(t, i);
      left[warp][lane] = box.left;
      top[warp][lane] = box.top;
      across[warp][lane] = box.across();
    }
  }
  int through = pixels;
  for (int delta = 1; delta < 32; delta *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, through, delta);
    if (lane >= delta) through += before;
  }
  starts[warp][lane] = through - pixels;
  const int total = __shfl_sync(0xffffffffu, through, 31);
  __syncwarp();

  for (int entry = lane; entry < total; entry += 32) {
    int which = 0;  // the last triangle whose pixels begin at or before this entry
    for (int step = 16; step > 0; step /= 2)
      if (starts[warp][which + step] <= entry) which += step;
    const unsigned place = static_cast<unsigned>(entry - starts[warp][which]);
    const unsigned wide = static_cast<unsigned>(across[warp][which]);
    const int y = top[warp][which] + static_cast<int>(place / wide);
    const int x = left[warp][which] + static_cast<int>(place % wide);
    const Row row([&](int i) { return numbers[warp][i][which]; }, pixel_center(y, in.step_y));
    row.template offer<T, kSecond>(in, first + which, (view * in.height + y) * in.width + x,
                                   pixel_center(x, in.step_x));
  }
}

template <class T, bool kSecond>
__global__ void __launch_bounds__(kThreads) draw_tiles(const Drawing<T> in) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, warps = int64_t{gridDim.x} * kWarps;
  const int64_t total = in.ends[in.views * in.count - 1], share = (total + warps - 1) / warps;
  const int64_t last = min(total, (warp + 1) * share);
  int64_t row = 0, row_end = 0;
  Triangle t{};
  Box box{};
  for (int64_t item = warp * share; item < last; ++item) {
    if (item >= row_end) {  // the first (view, face) that ends behind it
      int64_t high = in.views * in.count - 1;
      while (row < high) {
        const int64_t middle = (row + high) / 2;
        if (in.ends[middle] > item)
          high = middle;
        else
          row = middle + 1;
      }
      row_end = in.ends[row];
      const Corners corners = corners_of(in.positions, in.faces, in.vertices, row / in.count, row % in.count);
      t = triangle_of(corners.vertices, corners.face);
      box = box_of(corners.vertices, in.width, in.height);
    }
    const int tile = static_cast<int>(item - (row_end - tiles_of(box)));
    const int tiles_across = (box.across() + kTile - 1) / kTile;
    const int left = box.left + tile % tiles_across * kTile, right = min(box.right, left + kTile - 1);
    const int top = box.top + tile / tiles_across * kTile, bottom = min(box.bottom, top + kTile - 1);
    // Roundings keep order: an edge function is nowhere in the tile higher than at this corner of it.
    bool outside = false;
    for (const Vector3& n : t.normal) {
      const double x = pixel_center(n.x > 0 ? right : left, in.step_x);
      const double y = pixel_center(n.y > 0 ? bottom : top, in.step_y);
      outside |= sum(product(n.x, x), sum(product(n.y, y), n.z)) < 0;
    }
    const int x = left + lane;
    if (outside || x > right) continue;
    for (int y = top; y <= bottom; ++y) {
      const Row across([&](int i) { return number_of(t, i); }, pixel_center(y, in.step_y));
      across.template offer<T, kSecond>(in, row % in.count, (row / in.count * in.height + y) * in.width + x,
                                        pixel_center(x, in.step_x));
    }
  }
}

__device__ inline void write(float* to, float a, float b) { *reinterpret_cast<float2*>(to) = make_float2(a, b); }
__device__ inline void write(double* to, double a, double b) {
  to[0] = a;
  to[1] = b;
}

// A warp describes 8 x 4 pixels.
template <class T>
__global__ void __launch_bounds__(kThreads)
    describe_pixels(const Drawing<T> in, int32_t* ids, T* barycentrics, T* depths, T* derivatives) {
  const int thread = static_cast<int>(threadIdx.x);
  const int x = static_cast<int>(blockIdx.x) * 8 + thread % 8, y = static_cast<int>(blockIdx.y) * 16 + thread / 8;
  if (x >= in.width || y >= in.height) return;
  const int64_t view = blockIdx.z, pixel = (view * in.height + y) * in.width + x;
  const Word key = in.keys[pixel];
  if (key == ~Word{0}) {
    ids[pixel] = -1;
    depths[pixel] = T(1);
    write(barycentrics + 2 * pixel, T(0), T(0));
    write(derivatives + 4 * pixel, T(0), T(0));
    write(derivatives + 4 * pixel + 2, T(0), T(0));
    return;
  }
  const int32_t face = sizeof(T) == 4 ? static_cast<int32_t>(key & 0xffffffffu) : ids[pixel];
  const Corners corners = corners_of(in.positions, in.faces, in.vertices, view, face);
  const Triangle t = triangle_of(corners.vertices, corners.face);
  const double center_x = pixel_center(x, in.step_x), center_y = pixel_center(y, in.step_y);
  double e[3];
  for (int i = 0; i < 3; ++i)
    e[i] = sum(sum(product(t.normal[i].x, center_x), product(t.normal[i].y, center_y)), t.normal[i].z);
  const double inverse = 1 / sum(sum(e[0], e[1]), e[2]);
  const double sum_x = t.normal[0].x + t.normal[1].x + t.normal[2].x;
  const double sum_y = t.normal[0].y + t.normal[1].y + t.normal[2].y;
  const double step_x = in.step_x * inverse, step_y = in.step_y * inverse;
  const double u = e[0] * inverse, v = e[1] * inverse;
  const auto within = [](double weight) { return static_cast<T>(fmin(fmax(weight, 0.0), 1.0)); };
  const auto step = [&](int i, double weight, T* to) {
    write(to, static_cast<T>((t.normal[i].x - weight * sum_x) * step_x),
          static_cast<T>((t.normal[i].y - weight * sum_y) * step_y));
  };
  ids[pixel] = face;
  depths[pixel] = depth_of(sizeof(T) == 4 ? key >> 32 : key, T(0));
  write(barycentrics + 2 * pixel, within(u), within(v));
  step(0, u, derivatives + 4 * pixel);
  step(1, v, derivatives + 4 * pixel + 2);
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <class T>
Drawing<T> drawing(TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces, const int64_t* keys,
                   const std::array<int64_t, 3>& shape) {
  require(positions.size(2) == 4 && faces.size(1) == 3, "positions must be [B, V, 4] and faces [F, 3]");
  require(shape[0] == positions.size(0) && shape[0] <= 65535, "pictures must be [B, H, W] with B <= 65535");
  require(shape[1] <= 16384 && shape[2] <= 16384, "pictures may have at most 16384 x 16384 pixels");
  Drawing<T> in{};
  in.positions = positions.data;
  in.faces = faces.data;
  in.keys = reinterpret_cast<Word*>(const_cast<int64_t*>(keys));
  in.views = shape[0];
  in.vertices = positions.size(1);
  in.count = faces.size(0);
  in.height = static_cast<int>(shape[1]);
  in.width = static_cast<int>(shape[2]);
  in.step_x = 2.0 / in.width;
  in.step_y = 2.0 / in.height;
  return in;
}

template <class T>
void set_layer(Drawing<T>& in, TensorView<const int32_t, 3> behind_ids, TensorView<const T, 3> behind_depths,
               TensorView<int32_t, 3> winners, const TensorView<int64_t, 3>& keys, bool second) {
  if (behind_ids.numel() > 0) {
    require(behind_ids.shape == keys.shape && behind_depths.shape == keys.shape, "pictures must be [B, H, W]");
    in.behind_ids = behind_ids.data;
    in.behind_depths = behind_depths.data;
  }
  require(!second || winners.shape == keys.shape, "winners must be [B, H, W]");
  in.winners = winners.data;
}

}  // namespace

template <class T>
void draw_mesh_faces(TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                     TensorView<const int32_t, 3> behind_ids, TensorView<const T, 3> behind_depths,
                     TensorView<int64_t, 3> keys, TensorView<int32_t, 3> winners, TensorView<int32_t, 2> tiles,
                     bool second, int64_t stream) {
  Drawing<T> in = drawing(positions, faces, keys.data, keys.shape);
  set_layer(in, behind_ids, behind_depths, winners, keys, second);
  require(tiles.numel() == (tiles.numel() > 0 ? in.views * in.count : 0), "tiles must be [B, F]");
  require(tiles.numel() > 0 || keys.size(1) * keys.size(2) <= kSmallBox || in.views * in.count == 0,
          "tiles must be given unless the pictures are small");
  in.tiles = tiles.numel() > 0 ? tiles.data : nullptr;
  const dim3 grid(blocks(in.count, kThreads), static_cast<unsigned>(in.views));
  launch({"draw_mesh_faces", grid, kThreads, stream}, second ? draw_faces<T, true> : draw_faces<T, false>, in);
}

template <class T>
void draw_mesh_tiles(TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                     TensorView<const int32_t, 3> behind_ids, TensorView<const T, 3> behind_depths,
                     TensorView<int64_t, 3> keys, TensorView<int32_t, 3> winners, TensorView<const int64_t, 1> ends,
                     bool second, int64_t block_count, int64_t stream) {
  Drawing<T> in = drawing(positions, faces, keys.data, keys.shape);
  set_layer(in, behind_ids, behind_depths, winners, keys, second);
  require(ends.numel() == in.views * in.count && ends.numel() > 0, "ends must be [B * F], and not empty");
  in.ends = ends.data;
  launch({"draw_mesh_tiles", static_cast<unsigned>(block_count), kThreads, stream},
         second ? draw_tiles<T, true> : draw_tiles<T, false>, in);
}

template <class T>
void describe_mesh_pixels(TensorView<const T, 3> positions, TensorView<const int32_t, 2> faces,
                          TensorView<const int64_t, 3> keys, TensorView<int32_t, 3> ids, TensorView<T, 4> barycentrics,
                          TensorView<T, 3> depths, TensorView<T, 4> derivatives, int64_t stream) {
  const Drawing<T> in = drawing(positions, faces, keys.data, keys.shape);
  require(ids.shape == keys.shape && depths.shape == keys.shape && barycentrics.numel() == 2 * keys.numel() &&
              derivatives.numel() == 4 * keys.numel(),
          "pictures must be [B, H, W]");
  const dim3 grid(blocks(in.width, 8), blocks(in.height, 16), static_cast<unsigned>(in.views));
  launch({"describe_mesh_pixels", grid, kThreads, stream}, describe_pixels<T>, in, ids.data, barycentrics.data,
         depths.data, derivatives.data);
}

#define TRELLIS_INSTANTIATE(T)                                                                                      \
  template void draw_mesh_faces(TensorView<const T, 3>, TensorView<const int32_t, 2>, TensorView<const int32_t, 3>, \
                                TensorView<const T, 3>, TensorView<int64_t, 3>, TensorView<int32_t, 3>,             \
                                TensorView<int32_t, 2>, bool, int64_t);                                             \
  template void draw_mesh_tiles(TensorView<const T, 3>, TensorView<const int32_t, 2>, TensorView<const int32_t, 3>, \
                                TensorView<const T, 3>, TensorView<int64_t, 3>, TensorView<int32_t, 3>,             \
                                TensorView<const int64_t, 1>, bool, int64_t, int64_t);                              \
  template void describe_mesh_pixels(TensorView<const T, 3>, TensorView<const int32_t, 2>,                          \
                                     TensorView<const int64_t, 3>, TensorView<int32_t, 3>, TensorView<T, 4>,        \
                                     TensorView<T, 3>, TensorView<T, 4>, int64_t);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)

}  // namespace trellis::cuda
