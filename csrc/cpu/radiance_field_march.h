// Between radiance_field.cpp and the kernels of each instruction set. Plain data only: see cpu_features.h.
#pragma once
#include <cstdint>

#include "field_ray.h"

namespace trellis::cpu {

constexpr int kFieldTile = 8;    // pixels per side
constexpr int kFieldChunk = 32;  // samples that are evaluated at once; a leaf of 8 entries has up to 28 on a ray

// The factors of all leaves: per leaf [3, entries, rank], then density [rank] and features [3, rank] times C0; ranks
// are padded with zeros to whole vectors.
template <class T>
struct PackedField {
  const T* data;
  int64_t stride;  // per leaf
  int64_t rank, entries;
  double step;  // between samples, world units
};

// Samples that a ray takes from one leaf, at most kFieldChunk.
template <class T>
struct FieldSegment {
  int32_t leaf, pixel, count;
  int16_t cell[3];
  double first;  // number of the first sample
  T before;      // transmittance in front of it
  T later;       // what samples behind the last one and the background add to the loss
};

// The images of one camera; jitter may be null. Null pointers to gradients: a forward.
template <class T>
struct FieldImages {
  const T *jitter, *background;
  T *colors, *depths, *left, *medians;
  int32_t* crossings;
  const T *colors_gradient, *depths_gradient, *left_gradient;
};

// Marches along the rays of a tile. Backward: notes segments in the order of pixels and distances, and returns how many
// there are, of which the first `capacity` are written; adds to the gradient of the background.
template <class T>
struct MarchJob {
  const PackedField<T>* field;
  const LeafGridView* grid;
  const FieldCamera* camera;
  const FieldImages<T>* images;
  int64_t left, top;
  FieldSegment<T>* segments;
  int64_t capacity;
  T* background_gradient;  // [3]
};

// Adds the segments list[0..count), all of one leaf, to its gradient, packed like the field.
template <class T>
struct LeafGradientJob {
  const PackedField<T>* field;
  const FieldCamera* camera;
  const FieldImages<T>* images;
  const FieldSegment<T>* segments;
  const int32_t* list;
  int64_t count;
  T* gradient;
};

#define TRELLIS_RADIANCE_FIELD(isa)                       \
  namespace isa {                                         \
  int64_t rank_multiple(float);                           \
  int64_t rank_multiple(double);                          \
  int64_t march(const MarchJob<float>& job);              \
  int64_t march(const MarchJob<double>& job);             \
  void leaf_gradient(const LeafGradientJob<float>& job);  \
  void leaf_gradient(const LeafGradientJob<double>& job); \
  }
TRELLIS_RADIANCE_FIELD(field_baseline)
TRELLIS_RADIANCE_FIELD(field_avx2)
TRELLIS_RADIANCE_FIELD(field_avx512)
#undef TRELLIS_RADIANCE_FIELD

}  // namespace trellis::cpu
