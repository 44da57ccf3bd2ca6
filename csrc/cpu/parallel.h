// Splits work over threads.
//
// The threads are our own, beside those of torch's OpenMP. An OpenMP region ends only when every thread of
// its team has arrived; while image decoding holds a core, each operation then waits for the scheduler: one
// row through 40 linears took 320 ms that way on two busy cores, and 2 to 8 ms with these threads, which are
// waited for only once they have taken work. The price: OpenMP's workers spin for milliseconds after each
// parallel operation of torch, on cores that ours could use. A process that alternates between the two (a
// command line, a server) should start with OMP_WAIT_POLICY=PASSIVE.
#pragma once

#include <cstdint>

namespace vila2::cpu {

void set_num_threads(int count);
int num_threads();

using Task = void (*)(const void* context, int64_t index);

// Calls task(context, i) once for each i in [0, count), in any order, on up to num_threads() threads. What a
// task throws reaches the caller when all threads have left; then some tasks may not have run.
void parallel_for(int64_t count, Task task, const void* context);

template <class Body>
void parallel_for(int64_t count, const Body& body) {
  parallel_for(
      count, [](const void* context, int64_t index) { (*static_cast<const Body*>(context))(index); }, &body);
}

// At least `count` floats for the calling thread, aligned to a cache line and kept for its next call.
float* thread_scratch(int64_t count);

}  // namespace vila2::cpu
