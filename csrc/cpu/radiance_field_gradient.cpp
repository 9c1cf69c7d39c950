#include <algorithm>
#include <stdexcept>

#include "parallel.h"
#include "radiance_field.h"
#include "radiance_field_scene.h"

namespace trellis::cpu {
namespace {

constexpr int64_t kBatchTiles = 1024;

// What the rays of one tile noted.
template <class T>
struct TileNotes {
  std::vector<FieldSegment<T>> segments;
  T background[3];
};

template <class T>
class Differentiation {
 public:
  Differentiation(const FieldScene<T>& scene, int64_t leaves, int threads)
      : scene_(scene),
        packed_(scene.packed()),
        grid_(scene.grid()),
        threads_(threads),
        gradient_(leaves * packed_.stride),
        starts_(leaves + 1) {}

  // Tiles [begin, end) of one camera; adds to the gradients.
  void batch(const FieldCamera& camera, const FieldImages<T>& images, int64_t begin, int64_t end, T* background) {
    note(camera, images, begin, end);
    for (const TileNotes<T>& tile : notes_) {
      for (int k = 0; k < 3; ++k) background[k] += tile.background[k];
    }
    sort_by_leaf();
    parallel_for(static_cast<int64_t>(touched_.size()), 8, threads_, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int32_t leaf = touched_[i];
        scene_.kernels.leaf_gradient({&packed_, &camera, &images, segments_.data(), list_.data() + starts_[leaf],
                                      starts_[leaf + 1] - starts_[leaf], gradient_.data() + leaf * packed_.stride});
      }
    });
  }

  void unpack(const FieldGradients<T>& out) const {
    const int64_t rank = out.trivec.size(1), entries = packed_.entries, padded = packed_.rank;
    parallel_for(out.trivec.size(0), 64, threads_, [&](int64_t from, int64_t to) {
      for (int64_t leaf = from; leaf < to; ++leaf) {
        const T* const g = gradient_.data() + leaf * packed_.stride;
        for (int64_t r = 0; r < rank; ++r) {
          for (int64_t i = 0; i < 3 * entries; ++i) out.trivec.row(leaf)[r * 3 * entries + i] = g[i * padded + r];
          const T* const last = g + 3 * entries * padded + r;
          out.density.row(leaf)[r] = last[0];
          for (int k = 0; k < 3; ++k) out.features.row(leaf)[3 * r + k] = last[(k + 1) * padded] * T(kDegreeZero);
        }
      }
    });
  }

 private:
  void note(const FieldCamera& camera, const FieldImages<T>& images, int64_t begin, int64_t end) {
    const int64_t across = (camera.width + kFieldTile - 1) / kFieldTile;
    notes_.assign(end - begin, {});
    parallel_for(end - begin, 4, threads_, [&](int64_t from, int64_t to) {
      std::vector<FieldSegment<T>> scratch(kFieldTile * kFieldTile * 16);
      for (int64_t i = from; i < to; ++i) {
        TileNotes<T>& tile = notes_[i];
        for (;;) {  // once more if there was no room for all
          tile.background[0] = tile.background[1] = tile.background[2] = 0;
          const int64_t capacity = static_cast<int64_t>(scratch.size());
          const int64_t count =
              scene_.kernels.march({&packed_, &grid_, &camera, &images, (begin + i) % across * kFieldTile,
                                    (begin + i) / across * kFieldTile, scratch.data(), capacity, tile.background});
          if (count <= capacity) {
            tile.segments.assign(scratch.begin(), scratch.begin() + count);
            break;
          }
          scratch.resize(2 * count);
        }
      }
    });
  }

  // One array of all segments, and for each leaf a list of its own in the same order.
  void sort_by_leaf() {
    segments_.clear();
    for (TileNotes<T>& tile : notes_) {
      segments_.insert(segments_.end(), tile.segments.begin(), tile.segments.end());
      tile.segments = {};
    }
    std::fill(starts_.begin(), starts_.end(), 0);
    for (const FieldSegment<T>& segment : segments_) ++starts_[segment.leaf + 1];
    touched_.clear();
    for (size_t leaf = 0; leaf + 1 < starts_.size(); ++leaf) {
      if (starts_[leaf + 1]) touched_.push_back(static_cast<int32_t>(leaf));
      starts_[leaf + 1] += starts_[leaf];
    }
    ends_.assign(starts_.begin(), starts_.end());
    list_.resize(segments_.size());
    for (size_t i = 0; i < segments_.size(); ++i) list_[ends_[segments_[i].leaf]++] = static_cast<int32_t>(i);
  }

  const FieldScene<T>& scene_;
  PackedField<T> packed_;
  LeafGridView grid_;
  int threads_;
  std::vector<T> gradient_;  // like the packed field
  std::vector<TileNotes<T>> notes_;
  std::vector<FieldSegment<T>> segments_;
  std::vector<int32_t> list_, touched_;
  std::vector<int64_t> starts_, ends_;
};

}  // namespace

template <class T>
void render_radiance_field_gradient(const FieldOutputGradients<T>& gradients, const FieldTensors<T>& field,
                                    const FieldCameras& cameras, const FieldGradients<T>& out, int threads) {
  const int64_t views = gradients.depths.size(0), height = gradients.depths.size(1), width = gradients.depths.size(2);
  if (gradients.colors.shape != std::array<int64_t, 4>{views, height, width, 3} ||
      gradients.left.shape != gradients.depths.shape)
    throw std::invalid_argument("gradients of images must have one shape");
  if (out.trivec.shape != field.trivec.shape || out.density.shape != field.density.shape ||
      out.features.shape != field.features.shape || out.background.shape != field.background.shape)
    throw std::invalid_argument("gradients must have the shapes of the inputs");
  const FieldScene<T> scene(field, cameras, views, width, height, threads);
  Differentiation<T> differentiation(scene, field.trivec.size(0), threads);
  const int64_t across = (width + kFieldTile - 1) / kFieldTile, down = (height + kFieldTile - 1) / kFieldTile;
  for (int64_t view = 0; view < views; ++view) {
    const FieldImages<T> images{field.jitter.size(0) ? field.jitter.row(view) : nullptr,
                                field.background.row(view),
                                nullptr,
                                nullptr,
                                nullptr,
                                nullptr,
                                nullptr,
                                gradients.colors.row(view),
                                gradients.depths.row(view),
                                gradients.left.row(view)};
    T* const background = out.background.row(view);
    std::fill_n(background, 3, T(0));
    for (int64_t begin = 0; begin < across * down; begin += kBatchTiles) {
      const int64_t end = std::min(begin + kBatchTiles, across * down);
      differentiation.batch(scene.cameras[view], images, begin, end, background);
    }
  }
  differentiation.unpack(out);
}

#define TRELLIS_INSTANTIATE(T)                                                                            \
  template void render_radiance_field_gradient<T>(const FieldOutputGradients<T>&, const FieldTensors<T>&, \
                                                  const FieldCameras&, const FieldGradients<T>&, int);
TRELLIS_INSTANTIATE(float)
TRELLIS_INSTANTIATE(double)
#undef TRELLIS_INSTANTIATE

}  // namespace trellis::cpu
