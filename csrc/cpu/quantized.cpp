#include "cpu/quantized.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/parallel.h"

namespace vila2::cpu {
namespace {

constexpr int64_t kTasksPerThread = 4;  // so that a thread that loses its core for a while holds up little
constexpr int64_t kSerialElements = 16384;  // below this, waking a thread costs more than the work
constexpr int64_t kSerialProducts = 1 << 17;
constexpr int64_t kRowBlockBytes = 192 << 10;  // of rows that stay in the L2 cache while all panels pass by

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int64_t byte_stride(int64_t depth) { return ceil_div(depth, kByteGroup) * kByteGroup; }

bool are_narrow(const int8_t* panels, int64_t count) {
  constexpr int64_t kPairs = 1 << 16;  // a task's
  const int64_t pairs = count / 2;     // a panel has whole groups of four
  std::atomic<bool> all{true};
  parallel_for(ceil_div(pairs, kPairs), [&](int64_t i) {
    int16_t most = 0, least = 0;
    for (int64_t at = i * kPairs, end = std::min(pairs, at + kPairs); at < end; ++at) {
      const int16_t first = panels[2 * at], second = panels[2 * at + 1], none = 0;
      most = std::max(most, static_cast<int16_t>(std::max(first, none) + std::max(second, none)));
      least = std::min(least, static_cast<int16_t>(std::min(first, none) + std::min(second, none)));
    }
    if (most > kNarrowPair || least < -kNarrowPair) all.store(false);
  });
  return all.load();
}

ByteRows byte_scratch(int64_t rows, int64_t depth) {
  thread_local std::vector<uint8_t> bytes;
  thread_local std::vector<float> scales;
  thread_local std::vector<int32_t> zeros;
  const int64_t stride = byte_stride(depth);
  if (static_cast<int64_t>(bytes.size()) < rows * stride) bytes.resize(static_cast<size_t>(rows * stride));
  // Each by its own size: the last call may have run out of memory between two of them.
  if (static_cast<int64_t>(scales.size()) < rows) scales.resize(static_cast<size_t>(rows));
  if (static_cast<int64_t>(zeros.size()) < rows) zeros.resize(static_cast<size_t>(rows));
  return {bytes.data(), scales.data(), zeros.data(), stride};
}

void quantize(const QuantizeJob& job, int64_t rows) {
  const int64_t width = job.out.stride;
  const int64_t least = std::max<int64_t>(1, kSerialElements / 4 / width);
  const int64_t chunk = rows * width < kSerialElements || num_threads() == 1
                            ? std::max<int64_t>(1, rows)
                            : std::max(least, ceil_div(rows, num_threads() * kTasksPerThread));
  parallel_for(ceil_div(rows, chunk), [&](int64_t i) {
    kernels().quantize(job, i * chunk, std::min(rows, (i + 1) * chunk), thread_scratch(width));
  });
}

void byte_linear(const ByteLinearJob& job, int64_t rows) {
  if (rows == 0) return;
  const int64_t panels = ceil_div(job.columns, kBytePanel);
  const int64_t most_rows = std::clamp<int64_t>(kRowBlockBytes / job.x.stride, 24, 384);
  const int64_t row_blocks = ceil_div(rows, most_rows), block_rows = ceil_div(rows, row_blocks);
  const bool is_small = rows * job.x.stride * job.columns < kSerialProducts;
  const int64_t wanted = is_small || num_threads() == 1 ? 1 : num_threads() * kTasksPerThread;
  const int64_t groups = std::clamp<int64_t>(ceil_div(wanted, row_blocks), 1, panels);
  const int64_t group = ceil_div(ceil_div(panels, groups), 4) * 4;  // what a single row takes side by side
  const int64_t used = ceil_div(panels, group);
  parallel_for(row_blocks * used, [&](int64_t i) {
    const int64_t row = i / used * block_rows, panel = i % used * group;
    kernels().byte_linear(job, row, std::min(rows, row + block_rows), panel, std::min(panels, panel + group));
  });
}

}  // namespace vila2::cpu
