// Splits work over threads.
//
// The threads are those of the OpenMP runtime that torch has loaded, when there is one. Its workers spin for
// milliseconds after each of torch's own parallel operations; a second pool would fight them for the same
// cores just when a model alternates between torch's operations and ours. Linking an OpenMP runtime of our
// own would load a second copy with the same effect, so the entry point is looked up in the process instead.
// Without one (another OpenMP, no torch), or with VILA2_CPU_POOL=own, a small pool of our own takes its
// place.
#pragma once

#include <cstdint>

namespace vila2::cpu {

void set_num_threads(int count);
int num_threads();
const char* thread_pool();  // "openmp" or "own"

using Task = void (*)(const void* context, int64_t index);

// Calls task(context, i) once for each i in [0, count), in any order, on up to num_threads() threads.
void parallel_for(int64_t count, Task task, const void* context);

template <class Body>
void parallel_for(int64_t count, const Body& body) {
  parallel_for(
      count, [](const void* context, int64_t index) { (*static_cast<const Body*>(context))(index); }, &body);
}

// At least `count` floats for the calling thread, aligned to a cache line and kept for its next call.
float* thread_scratch(int64_t count);

}  // namespace vila2::cpu
