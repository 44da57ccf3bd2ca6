#include "cpu/ops.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/parallel.h"

namespace vila2::cpu {
namespace {

constexpr int64_t kSerialElements = 16384;  // below this, waking a thread costs more than the work
constexpr int64_t kTasksPerThread = 4;  // so that a thread that loses its core for a while holds up little

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// kernel(job, begin, end) over [0, count), in parallel when count * cost elements are worth it.
template <class Job>
void split(void (*kernel)(const Job&, int64_t, int64_t), const Job& job, int64_t count, int64_t cost) {
  if (num_threads() == 1 || count * cost < kSerialElements) {
    if (count > 0) kernel(job, 0, count);
    return;
  }
  const int64_t chunk =
      std::max(ceil_div(kSerialElements / 4, cost), ceil_div(count, num_threads() * kTasksPerThread));
  parallel_for(ceil_div(count, chunk),
               [&](int64_t i) { kernel(job, i * chunk, std::min(count, (i + 1) * chunk)); });
}

}  // namespace

void rms_norm(const NormJob& job, int64_t rows) { split(kernels().rms_norm, job, rows, job.width); }
void add_rms_norm(const NormJob& job, int64_t rows) { split(kernels().add_rms_norm, job, rows, job.width); }
void layer_norm(const NormJob& job, int64_t rows) { split(kernels().layer_norm, job, rows, job.width); }
void add_layer_norm(const NormJob& job, int64_t rows) {
  split(kernels().add_layer_norm, job, rows, job.width);
}
void silu_mul(const ActivationJob& job, int64_t rows) { split(kernels().silu_mul, job, rows, 4 * job.width); }

void gelu(const ActivationJob& job, int64_t elements) {
  ActivationJob line = job;
  line.width = 64;
  const int64_t rows = elements / line.width;
  split(kernels().gelu, line, rows, 4 * line.width);
  if (const int64_t left = elements - rows * line.width) {
    const int64_t size = job.storage == Storage::kFloat32 ? 4 : 2;
    line.x = static_cast<const char*>(job.x) + rows * line.width * size;
    line.y = static_cast<char*>(job.y) + rows * line.width * size;
    line.width = left;
    kernels().gelu(line, 0, 1);
  }
}

void rope_store(const RopeJob& job, int64_t tokens) {
  split(kernels().rope_store, job, tokens, (job.heads + 2 * job.kv_heads) * job.dim);
}

void embed(const EmbedJob& job, int64_t tokens) { split(kernels().embed, job, tokens, job.width); }

void attention(const AttentionJob& job, const AttentionBatch& batch) {
  const int64_t group = job.heads / job.kv_heads;
  const int64_t heads = std::min(group, kAttentionRows);
  const int64_t tokens = std::max<int64_t>(1, kAttentionRows / heads);
  std::vector<AttentionTile> tiles;
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t start = batch.query_starts[s], end = batch.query_starts[s + 1];
    const int64_t past = batch.context_lens[s] - (end - start);
    // The last tokens have the longest contexts: they go first, so that no thread is left with one at the
    // end.
    for (int64_t token = start + (end - start - 1) / tokens * tokens; end > start && token >= start;
         token -= tokens) {
      for (int64_t head = 0; head < job.heads; head += group) {
        for (int64_t h = head; h < head + group; h += heads) {
          tiles.push_back({batch.block_tables + s * batch.max_blocks, token, std::min(tokens, end - token),
                           past + token - start, h, std::min(heads, head + group - h)});
        }
      }
    }
  }
  const int64_t scratch = kernels().attention_scratch;
  parallel_for(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    kernels().attention(job, tiles[static_cast<size_t>(i)], thread_scratch(scratch));
  });
}

namespace {

template <class T>
void cut_row_of_patches(const PatchJob& job, int64_t image, int64_t patch_row) {
  const int64_t p = job.patch, columns = job.width / p, rows = job.height / p;
  const T* tables = static_cast<const T*>(job.tables);
  T* out = static_cast<T*>(job.out) + (image * rows + patch_row) * columns * 3 * p * p;
  for (int64_t y = 0; y < p; ++y) {
    const uint8_t* line = job.images + ((image * job.height + patch_row * p + y) * job.width) * 3;
    for (int64_t column = 0; column < columns; ++column, line += 3 * p) {
      T* red = out + column * 3 * p * p + y * p;
      T *green = red + p * p, *blue = green + p * p;
      for (int64_t x = 0; x < p; ++x) {
        red[x] = tables[line[3 * x]];
        green[x] = tables[256 + line[3 * x + 1]];
        blue[x] = tables[512 + line[3 * x + 2]];
      }
    }
  }
}

}  // namespace

void image_patches(const PatchJob& job) {
  const int64_t rows = job.height / job.patch;
  parallel_for(job.count * rows, [&](int64_t i) {
    if (job.storage == Storage::kFloat32) {
      cut_row_of_patches<float>(job, i / rows, i % rows);
    } else {
      cut_row_of_patches<uint16_t>(job, i / rows, i % rows);
    }
  });
}

void PackedWeights::Free::operator()(void* memory) const { std::free(memory); }

PackedWeights::PackedWeights(const float* weight, const float* bias, int64_t columns, int64_t depth,
                             Storage storage)
    : PackedWeights(columns, depth, storage) {
  own_weights_.reset(
      std::aligned_alloc(64, static_cast<size_t>(std::max<int64_t>(64, ceil_div(bytes(), 64) * 64))));
  if (!own_weights_) throw std::bad_alloc();
  weights_ = own_weights_.get();
  if (bias) {
    own_bias_.reset(new float[static_cast<size_t>(padded_columns())]());
    std::memcpy(own_bias_.get(), bias, static_cast<size_t>(columns) * sizeof(float));
    bias_ = own_bias_.get();
  }
  parallel_for(panels_, [&](int64_t panel) {
    kernels().pack(weight, columns, depth, own_weights_.get(), storage, panel);
  });
}

PackedWeights::PackedWeights(int64_t columns, int64_t depth, Storage storage)
    : columns_(columns),
      depth_(depth),
      panels_(ceil_div(columns, kernels().panel_width)),
      storage_(storage) {}

PackedWeights PackedWeights::over(const void* panels, const float* bias, int64_t columns, int64_t depth,
                                  Storage storage) {
  PackedWeights weights(columns, depth, storage);
  weights.weights_ = panels;
  weights.bias_ = bias;
  return weights;
}

int64_t PackedWeights::padded_columns() const { return panels_ * kernels().panel_width; }

int64_t PackedWeights::bytes() const {
  if (storage_ == Storage::kFloat32) return padded_columns() * depth_ * 4;
  const int64_t group = kernels().bf16_group;
  return padded_columns() * ceil_div(depth_, group) * group * 2;
}

void PackedWeights::multiply(const float* x, float* y, int64_t rows) const {
  const LinearJob job{x, weights_, storage_, bias_, y, depth_, columns_};
  // Rows whose block of x (kRows x kDepthBlock) stays in the L2 cache while all panels pass by.
  constexpr int64_t kRows = 192;
  const int64_t row_blocks = std::max<int64_t>(1, ceil_div(rows, kRows));
  const int64_t block_rows = ceil_div(rows, row_blocks);
  const bool is_small = rows * depth_ * columns_ < 65536;
  const int64_t wanted = is_small || num_threads() == 1 ? 1 : num_threads() * kTasksPerThread;
  const int64_t groups = std::clamp<int64_t>(ceil_div(wanted, row_blocks), 1, std::max<int64_t>(1, panels_));
  // Whole fours of panels: what a single row runs side by side.
  const int64_t group = std::max<int64_t>(1, ceil_div(ceil_div(panels_, groups), 4) * 4);
  const int64_t used = ceil_div(panels_, group);
  parallel_for(rows == 0 ? 0 : row_blocks * used, [&](int64_t i) {
    const int64_t row = i / used * block_rows, panel = i % used * group;
    kernels().linear(job, row, std::min(rows, row + block_rows), panel, std::min(panels_, panel + group),
                     thread_scratch(kernels().linear_scratch));
  });
}

}  // namespace vila2::cpu
