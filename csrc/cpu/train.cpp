#include "cpu/train.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"

namespace vila2::cpu {
namespace {

constexpr int64_t kSerialElements = 16384;  // below this, waking a thread costs more than the work

const TrainKernels& table() { return *kernels().train; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(begin, end) over [0, count): in one piece when count * cost elements are not worth a second thread.
template <class Body>
void split(int64_t count, int64_t cost, const Body& body) {
  if (count <= 0) return;
  if (num_threads() == 1 || count * cost < kSerialElements) return body(0, count);
  const int64_t chunk =
      std::max(ceil_div(kSerialElements / 4, std::max<int64_t>(1, cost)), ceil_div(count, num_threads() * 4));
  parallel_for(ceil_div(count, chunk), [&](int64_t i) { body(i * chunk, std::min(count, (i + 1) * chunk)); });
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace

void norm_forward(const NormForwardJob& job, int64_t rows) {
  split(rows, job.width, [&](int64_t row, int64_t end) { table().norm_forward(job, row, end); });
}

void norm_grad(const NormGradJob& job, int64_t rows, void* weight_grad) {
  const int64_t parts = ceil_div(rows, kGradRows);
  std::vector<float> sums(static_cast<size_t>(parts * job.width));
  NormGradJob filled = job;
  filled.weight_grads = sums.data();
  const auto part = [&](int64_t i) {
    table().norm_grad(filled, i * kGradRows, std::min(rows, (i + 1) * kGradRows));
  };
  parallel_for(parts, part);
  for (int64_t i = 0; i < job.width; ++i) {
    float total = 0.f;
    for (int64_t p = 0; p < parts; ++p) total += sums[static_cast<size_t>(p * job.width + i)];
    if (job.storage == Storage::kFloat32) {
      static_cast<float*>(weight_grad)[i] = total;
    } else {
      static_cast<uint16_t*>(weight_grad)[i] = to_bf16(total);
    }
  }
}

void silu_mul_grad(const ActivationGradJob& job, int64_t rows) {
  split(rows, 6 * job.width, [&](int64_t row, int64_t end) { table().silu_mul_grad(job, row, end); });
}

void gelu_grad(const ActivationGradJob& job, int64_t elements) {
  constexpr int64_t kLine = 64;
  ActivationGradJob line = job;
  line.width = kLine;
  const int64_t rows = elements / kLine, size = job.storage == Storage::kFloat32 ? 4 : 2;
  split(rows, 4 * kLine, [&](int64_t row, int64_t end) { table().gelu_grad(line, row, end); });
  if (const int64_t left = elements - rows * kLine) {
    const int64_t at = rows * kLine * size;
    line.x = static_cast<const char*>(job.x) + at;
    line.out = static_cast<char*>(job.out) + at;
    if (job.y_grad) line.y_grad = static_cast<const char*>(job.y_grad) + at;
    line.width = left;
    table().gelu_grad(line, 0, 1);
  }
}

void softmax_error(const SoftmaxErrorJob& job, int64_t rows) {
  split(rows, 4 * job.width, [&](int64_t row, int64_t end) { table().softmax_error(job, row, end); });
}

namespace {

int64_t context_cost(const Segment& segment) {
  const int64_t rows = segment.end - segment.start;
  return rows * (segment.prefix_end - segment.prefix_start + (rows + 1) / 2);
}

bool covers_all(const SegmentJob& job, const Segment* segments, int64_t count) {
  int64_t rows = 0;
  for (int64_t s = 0; s < count; ++s) rows += segments[s].end - segments[s].start;
  return rows == job.tokens;  // they are disjoint
}

// Rows in no segment attend to nothing.
void zero_rows(void* rows, int64_t stride, int64_t width, const SegmentJob& job) {
  const int64_t size = job.storage == Storage::kFloat32 ? 4 : 2;
  for (int64_t t = 0; t < job.tokens; ++t)
    std::memset(static_cast<char*>(rows) + t * stride * size, 0, static_cast<size_t>(width * size));
}

void add_tiles(const SegmentJob& job, const Segment& segment, int64_t kv_head,
               std::vector<SegmentTile>& tiles) {
  const int64_t most = segment_tile_rows(job.heads / job.kv_heads);
  for (int64_t row = segment.start; row < segment.end; row += most)
    tiles.push_back({segment, row, std::min(most, segment.end - row), kv_head});
}

// Segments that share rows, as keys of their own or of their prefix: those of one group add to one another's
// key gradients. Returns each segment's group, numbered from 0.
std::vector<int64_t> groups_of(const Segment* segments, int64_t count, int64_t& groups) {
  struct Span {
    int64_t start, end, segment;
  };
  std::vector<Span> spans;
  for (int64_t s = 0; s < count; ++s) {
    const Segment& segment = segments[s];
    if (segment.start == segment.end) continue;
    spans.push_back({segment.start, segment.end, s});
    if (segment.prefix_start < segment.prefix_end)
      spans.push_back({segment.prefix_start, segment.prefix_end, s});
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.start < b.start; });
  std::vector<int64_t> parent(static_cast<size_t>(count));
  std::iota(parent.begin(), parent.end(), 0);
  const auto root = [&](int64_t s) {
    while (parent[static_cast<size_t>(s)] != s) {
      parent[static_cast<size_t>(s)] = parent[static_cast<size_t>(parent[static_cast<size_t>(s)])];
      s = parent[static_cast<size_t>(s)];
    }
    return s;
  };
  int64_t reached = -1, last = 0;
  for (const Span& span : spans) {
    if (span.start < reached) {
      parent[static_cast<size_t>(root(span.segment))] = root(last);
      reached = std::max(reached, span.end);
    } else {
      reached = span.end;
    }
    last = span.segment;
  }
  std::vector<int64_t> group(static_cast<size_t>(count), -1), number(static_cast<size_t>(count), -1);
  groups = 0;
  for (int64_t s = 0; s < count; ++s) {
    if (segments[s].start == segments[s].end) continue;
    int64_t& n = number[static_cast<size_t>(root(s))];
    if (n < 0) n = groups++;
    group[static_cast<size_t>(s)] = n;
  }
  return group;
}

}  // namespace

void segment_forward(const SegmentJob& job, const Segment* segments, int64_t count) {
  const TrainKernels& kernel = table();
  split(job.tokens, (job.heads + 2 * job.kv_heads) * job.dim,
        [&](int64_t token, int64_t end) { kernel.segment_load(job, token, end); });
  if (!covers_all(job, segments, count)) zero_rows(job.out, job.heads * job.dim, job.heads * job.dim, job);
  std::vector<SegmentTile> tiles;
  for (int64_t s = 0; s < count; ++s)
    for (int64_t h = 0; h < job.kv_heads; ++h) add_tiles(job, segments[s], h, tiles);
  const int64_t scratch = kernel.segment_scratch(job);
  parallel_for(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    kernel.segment_forward(job, tiles[static_cast<size_t>(i)], thread_scratch(scratch));
  });
}

void segment_backward(const SegmentJob& job, const Segment* segments, int64_t count) {
  const TrainKernels& kernel = table();
  if (!covers_all(job, segments, count)) zero_rows(job.q_grad, job.q_grad_stride, job.heads * job.dim, job);
  const int64_t plane = job.tokens * job.dim;
  parallel_for(2 * job.kv_heads, [&](int64_t i) {
    float* sums = i % 2 ? job.v_sums : job.k_sums;
    std::memset(sums + i / 2 * plane, 0, static_cast<size_t>(plane) * sizeof(float));
  });

  // One task for each group and KV head: no two add to the same keys.
  int64_t groups = 0;
  const std::vector<int64_t> group = groups_of(segments, count, groups);
  std::vector<std::vector<SegmentTile>> tasks(static_cast<size_t>(groups * job.kv_heads));
  std::vector<int64_t> cost(tasks.size());
  for (int64_t s = 0; s < count; ++s) {
    if (group[static_cast<size_t>(s)] < 0) continue;
    for (int64_t h = 0; h < job.kv_heads; ++h) {
      const size_t task = static_cast<size_t>(group[static_cast<size_t>(s)] * job.kv_heads + h);
      add_tiles(job, segments[s], h, tasks[task]);
      cost[task] += context_cost(segments[s]);
    }
  }
  std::vector<size_t> order(tasks.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return cost[a] > cost[b]; });
  const int64_t scratch = kernel.segment_scratch(job);
  parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    float* memory = thread_scratch(scratch);
    for (const SegmentTile& tile : tasks[order[static_cast<size_t>(i)]])
      kernel.segment_backward(job, tile, memory);
  });
  split(job.tokens, 2 * job.kv_heads * job.dim,
        [&](int64_t token, int64_t end) { kernel.segment_store(job, token, end); });
}

}  // namespace vila2::cpu
