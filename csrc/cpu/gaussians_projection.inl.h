// What the inner loops of forward and backward share; included inside their namespaces after gaussians_lanes.inl.h.

// [width, stride] in memory to one vector per column; lanes past the end repeat the last Gaussian.
template <int kColumns, class T>
INLINE void load_columns(const T* rows, int64_t begin, int64_t end, typename Lanes<T>::V* columns) {
  constexpr int kWidth = Lanes<T>::kWidth;
  T buffer[kColumns][kWidth];
  for (int lane = 0; lane < kWidth; ++lane) {
    const int64_t row = begin + lane < end ? begin + lane : end - 1;
    for (int column = 0; column < kColumns; ++column) buffer[column][lane] = rows[row * kColumns + column];
  }
  for (int column = 0; column < kColumns; ++column) columns[column] = load(buffer[column]);
}

// What is known of Gaussians, one per lane, on the way to the picture.
template <class T>
struct Footprint {
  typedef typename Lanes<T>::V V;
  V x, y, z;  // in the camera
  V clip_w, ndc_x, ndc_y;
  V near;                    // 1 / z
  V tx, ty;                  // x / z and y / z, moved near the field of view
  V jx, jy;                  // pixels per unit of length
  V row_x[3], row_y[3];      // the linearised projection after the turn into the camera
  V length2, shrink;         // of the quaternion: its squared length, and 1 / length
  V qw, qx, qy, qz;          // of length 1
  V axes[3][3];              // of the ellipsoid, in the world
  V along_x[3], along_y[3];  // the axes on the picture
  V a, b, c;                 // covariance before the filter: xx, xy, yy
};

template <class T>
INLINE void to_camera(const Camera<T>& camera, const typename Lanes<T>::V* mean, Footprint<T>& f) {
  const T *r = camera.rotation, *t = camera.translation;
  f.x = r[0] * mean[0] + r[1] * mean[1] + r[2] * mean[2] + t[0];
  f.y = r[3] * mean[0] + r[4] * mean[1] + r[5] * mean[2] + t[1];
  f.z = r[6] * mean[0] + r[7] * mean[1] + r[8] * mean[2] + t[2];
}

// After to_camera.
template <class T>
INLINE void footprint(const Camera<T>& camera, const typename Lanes<T>::V* quat, const typename Lanes<T>::V* scale,
                      Footprint<T>& f) {
  typedef typename Lanes<T>::V V;
  const T* r = camera.rotation;
  f.clip_w = f.z + T(1e-7);  // the guard of the official code
  f.ndc_x = (2 * camera.fx * f.x + (2 * camera.cx - 1) * f.z) / f.clip_w;
  f.ndc_y = (2 * camera.fy * f.y + (2 * camera.cy - 1) * f.z) / f.clip_w;

  const T limit_x = T(1.3 * 0.5) / camera.fx, limit_y = T(1.3 * 0.5) / camera.fy;
  f.near = 1 / f.z;
  f.tx = min(max(f.x * f.near, splat(-limit_x)), splat(limit_x));
  f.ty = min(max(f.y * f.near, splat(-limit_y)), splat(limit_y));
  f.jx = camera.fx * T(camera.width) * f.near;
  f.jy = camera.fy * T(camera.height) * f.near;
  for (int i = 0; i < 3; ++i) {
    f.row_x[i] = f.jx * (r[i] - f.tx * r[6 + i]);
    f.row_y[i] = f.jy * (r[3 + i] - f.ty * r[6 + i]);
  }

  f.length2 = quat[0] * quat[0] + quat[1] * quat[1] + quat[2] * quat[2] + quat[3] * quat[3];
  f.shrink = 1 / sqrt(f.length2);
  const V w = quat[0] * f.shrink, x = quat[1] * f.shrink, y = quat[2] * f.shrink, z = quat[3] * f.shrink;
  f.qw = w, f.qx = x, f.qy = y, f.qz = z;
  const V axes[3][3] = {
      {1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)},
      {2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)},
      {2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)},
  };
  f.a = f.b = f.c = splat(T(0));
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) f.axes[i][j] = axes[i][j];
    f.along_x[i] = f.row_x[0] * axes[i][0] + f.row_x[1] * axes[i][1] + f.row_x[2] * axes[i][2];
    f.along_y[i] = f.row_y[0] * axes[i][0] + f.row_y[1] * axes[i][1] + f.row_y[2] * axes[i][2];
    const V u = scale[i] * f.along_x[i], v = scale[i] * f.along_y[i];
    f.a += u * u;
    f.b += u * v;
    f.c += v * v;
  }
}

// Rows of a tile, as bits, where a splat may reach its limit: the footprint at the largest point of each row within the
// tile, rounded up a little. A lane is a row here.
template <class T>
INLINE unsigned reached_rows(const Splat<T>& s, int left, int top) {
  typedef typename Lanes<T>::V V;
  constexpr int kWidth = Lanes<T>::kWidth;
  const V rightmost = splat(s.x - T(left)), leftmost = splat(s.x - T(left + kTile - 1));
  unsigned rows = 0;
  for (int part = 0; part < kTile / kWidth; ++part) {
    const V dy = s.y - T(top + part * kWidth) - lane_numbers(T(0));
    const V dx = min(max(s.ridge * dy, leftmost), rightmost);
    const V power = (dx * dx * s.xx + dy * dy * s.yy) * T(1 - 4e-6) + dx * dy * s.xy;
    rows |= bits(less_equal(splat(s.limit), power)) << (part * kWidth);
  }
  return rows;
}
