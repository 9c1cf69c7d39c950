// The one place for thread policy. Kernels take the number of threads from Python (torch.get_num_threads()), so that
// torch's setting is ours too, and hand out work through these loops. Nothing may throw inside one.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace trellis {

// body(begin, end) over [0, count) in chunks of `grain`, handed out as threads become free.
template <class Body>
void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  const int64_t chunks = (count + grain - 1) / grain;
  if (threads <= 1 || chunks <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    body(chunk * grain, std::min(count, (chunk + 1) * grain));
  }
}

// body(chunk) for chunk in [0, chunks): for reductions whose partial sums belong to fixed chunks and are combined in
// order afterwards, so that a result does not depend on the number of threads.
template <class Body>
void parallel_chunks(int64_t chunks, int threads, const Body& body) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(std::max(threads, 1)) if (threads > 1 && chunks > 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
}

}  // namespace trellis
