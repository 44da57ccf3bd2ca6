#include "cpu/top.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace vila2::cpu {
namespace {

constexpr int64_t kTasksPerThread = 4;  // so that a thread that loses its core for a while holds up little
constexpr int64_t kMostRows = 64;
constexpr int64_t kTileFloats = 16384;  // of the product: they stay in the L2 cache beside the rows
constexpr float kNothing = -std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The best `count` so far, in order. Columns come in rising order, so an equal one comes too late.
struct Best {
  float* values;
  int64_t* columns;
  int64_t count;

  void clear() const {
    std::fill_n(values, count, kNothing);
    std::fill_n(columns, count, int64_t{-1});
  }
  float least() const { return values[count - 1]; }
  void insert(float value, int64_t column) const {
    int64_t at = count - 1;
    for (; at > 0 && values[at - 1] < value; --at) {
      values[at] = values[at - 1];
      columns[at] = columns[at - 1];
    }
    values[at] = value;
    columns[at] = column;
  }
  void scan(const float* row, int64_t width, int64_t column) const {
    for (int64_t i = 0; (i += kernels().first_above(row + i, width - i, least())) < width; ++i)
      insert(row[i], column + i);
  }
  // Columns of minus infinity, the lowest first, where nothing else is left.
  void fill() const {
    for (int64_t at = 0, column = 0; at < count; ++at) {
      if (columns[at] >= 0) continue;
      while (std::find(columns, columns + at, column) != columns + at) ++column;
      columns[at] = column;
    }
  }
};

// product(row, rows, panel, panels, y, scratch) computes a tile: `rows` rows of `panels` panels.
template <class Product>
void top_of(const Product& product, int64_t rows, int64_t columns, int64_t width, int64_t scratch_floats,
            const TopJob& out) {
  if (rows == 0) return;
  const int64_t panels = ceil_div(columns, width);
  const int64_t row_blocks = ceil_div(rows, kMostRows), block_rows = ceil_div(rows, row_blocks);
  const int64_t wanted = num_threads() == 1 ? 1 : ceil_div(num_threads() * kTasksPerThread, row_blocks);
  // Whole fours of panels: what a single row runs side by side.
  const int64_t group = ceil_div(ceil_div(panels, wanted), 4) * 4;
  const int64_t tile = std::clamp<int64_t>(kTileFloats / (block_rows * width) / 4 * 4, 4, group);
  const int64_t used = ceil_div(panels, group);
  std::vector<float> values(static_cast<size_t>(used * rows * out.count));
  std::vector<int64_t> found(values.size());
  const auto best_of = [&](int64_t part, int64_t row) {
    const int64_t at = (part * rows + row) * out.count;
    return Best{values.data() + at, found.data() + at, out.count};
  };
  parallel_for(row_blocks * used, [&](int64_t i) {
    const int64_t part = i % used, row = i / used * block_rows, row_end = std::min(rows, row + block_rows);
    const int64_t panel_end = std::min(panels, (part + 1) * group);
    float* scratch = thread_scratch(scratch_floats + block_rows * tile * width);
    float* y = scratch + scratch_floats;
    for (int64_t r = row; r < row_end; ++r) best_of(part, r).clear();
    for (int64_t panel = part * group; panel < panel_end; panel += tile) {
      const int64_t count = std::min(tile, panel_end - panel), column = panel * width;
      const int64_t in_tile = std::min(columns - column, count * width);
      product(row, row_end - row, panel, count, in_tile, y, scratch);
      for (int64_t r = row; r < row_end; ++r) {
        float* line = y + (r - row) * in_tile;
        if (out.is_banned[r]) {
          for (int64_t b = 0; b < out.num_banned; ++b) {
            const int64_t at = out.banned[b] - column;
            if (at >= 0 && at < in_tile) line[at] = kNothing;
          }
        }
        best_of(part, r).scan(line, in_tile, column);
      }
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    const Best best{out.values + r * out.count, out.columns + r * out.count, out.count};
    best.clear();
    for (int64_t part = 0; part < used; ++part) {
      const Best other = best_of(part, r);
      for (int64_t j = 0; j < out.count && other.values[j] > best.least(); ++j)
        best.insert(other.values[j], other.columns[j]);
    }
    best.fill();
  }
}

}  // namespace

void top(const PackedWeights& weights, const float* x, int64_t rows, const TopJob& out) {
  const int64_t width = kernels().panel_width, depth = weights.depth();
  const int64_t panel_bytes = weights.bytes() / weights.padded_columns() * width;
  const auto product = [&](int64_t row, int64_t count, int64_t panel, int64_t panels, int64_t columns,
                           float* y, float* scratch) {
    const char* from = static_cast<const char*>(weights.panels()) + panel * panel_bytes;
    const float* bias = weights.bias() ? weights.bias() + panel * width : nullptr;
    const LinearJob job{x + row * depth, from, weights.storage(), bias, y, depth, columns};
    kernels().linear(job, 0, count, 0, panels, scratch);
  };
  top_of(product, rows, weights.columns(), width, kernels().linear_scratch, out);
}

void byte_top(const ByteLinearJob& whole, int64_t rows, const TopJob& out) {
  const auto product = [&](int64_t row, int64_t count, int64_t panel, int64_t panels, int64_t columns,
                           float* y, float*) {
    ByteLinearJob job = whole;
    const int64_t first = panel * kBytePanel;
    job.x.bytes += row * job.x.stride, job.x.scales += row, job.x.zeros += row;
    job.panels += first * job.x.stride, job.scales += first, job.sums += first;
    if (job.bias) job.bias += first;
    job.y = y, job.columns = columns, job.finish = Finish::kNone;
    kernels().byte_linear(job, 0, count, 0, panels);
  };
  top_of(product, rows, whole.columns, kBytePanel, 0, out);
}

}  // namespace vila2::cpu
