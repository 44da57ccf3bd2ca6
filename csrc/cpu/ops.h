// The operations on whole arrays: what to split, and how finely, before the kernels run on the threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cpu/kernels.h"

namespace vila2::cpu {

void rms_norm(const NormJob& job, int64_t rows);
void add_rms_norm(const NormJob& job, int64_t rows);
void layer_norm(const NormJob& job, int64_t rows);
void add_layer_norm(const NormJob& job, int64_t rows);
void silu_mul(const ActivationJob& job, int64_t rows);
void gelu(const ActivationJob& job, int64_t elements);
void rope_store(const RopeJob& job, int64_t tokens);
void embed(const EmbedJob& job, int64_t tokens);

struct AttentionBatch {
  const int32_t* block_tables;  // (sequences, max_blocks)
  const int32_t* query_starts;  // (sequences + 1)
  const int32_t* context_lens;  // (sequences)
  int64_t sequences, max_blocks;
};
void attention(const AttentionJob& job, const AttentionBatch& batch);

// Images (count, height, width, 3) to patches (count, rows * columns, 3 * patch * patch): each byte goes
// through the table of its channel (3, 256), which holds the normalised values.
struct PatchJob {
  const uint8_t* images;
  int64_t count, height, width, patch;
  const void* tables;
  void* out;
  Storage storage;
};
void image_patches(const PatchJob& job);

// Weights of a linear in the layout of the table in use.
class PackedWeights {
 public:
  // `weight` is (columns, depth); `bias` is (columns) or null. Both are copied.
  PackedWeights(const float* weight, const float* bias, int64_t columns, int64_t depth, Storage storage);

  // Weights that are packed already, used where they lie: bytes() of panels; padded_columns() of bias, or
  // null.
  static PackedWeights over(const void* panels, const float* bias, int64_t columns, int64_t depth,
                            Storage storage);

  void multiply(const float* x, float* y, int64_t rows) const;

  int64_t columns() const { return columns_; }
  int64_t padded_columns() const;
  int64_t depth() const { return depth_; }
  Storage storage() const { return storage_; }
  int64_t bytes() const;
  const void* panels() const { return weights_; }
  const float* bias() const { return bias_; }

 private:
  struct Free {
    void operator()(void* memory) const;
  };
  PackedWeights(int64_t columns, int64_t depth, Storage storage);

  int64_t columns_, depth_, panels_;
  Storage storage_;
  std::unique_ptr<void, Free> own_weights_;
  std::unique_ptr<float[]> own_bias_;
  const void* weights_ = nullptr;
  const float* bias_ = nullptr;  // padded to whole panels
};

}  // namespace vila2::cpu
