// Products of bytes on whole arrays: what to split before the kernels of bytes.inl run on the threads.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace vila2::cpu {

// Room for `rows` quantised rows of `depth`, the calling thread's own until its next call.
ByteRows byte_scratch(int64_t rows, int64_t depth);

void quantize(const QuantizeJob& job, int64_t rows);
void byte_linear(const ByteLinearJob& job, int64_t rows);

// Whether all pairs of neighbours in panels of weights, `count` bytes, keep kNarrowPair.
bool are_narrow(const int8_t* panels, int64_t count);

// Bytes that one column of `depth` weights takes.
int64_t byte_stride(int64_t depth);

}  // namespace vila2::cpu
