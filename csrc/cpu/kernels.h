// What a kernel is: one table of function pointers per instruction set, chosen once at run time.
//
// A kernel sees pointers and sizes; it never allocates, throws, starts threads or touches Python. The
// algorithms are written once, in the .inl files, over the small Vec interface of vec_<isa>.inl, and compiled
// once per table.
#pragma once

#include <cstdint>

namespace vila2::cpu {

struct bf16 {
  uint16_t bits;
};

enum class Storage { kFloat32, kBfloat16 };

inline constexpr int64_t kKeyTile = 64;  // keys per step of the online softmax; part of what a result is
inline constexpr int64_t kAttentionRows = 48;  // most (token, head) rows that one attention call takes
inline constexpr int64_t kMaxHeadDim = 256;
inline constexpr int64_t kDepthBlock =
    256;  // of a linear: a weight panel of this depth stays in the L1 cache

// y = x @ weight.T + bias with weights in panels (panel, depth, panel_width); see linear.inl, and
// bf16_pairs.inl for those of bfloat16 where Kernels::bf16_group is 2.
struct LinearJob {
  const float* x;  // (rows, depth)
  const void* panels;
  Storage storage;
  const float* bias;  // (columns) or null
  float* y;           // (rows, columns)
  int64_t depth, columns;
};

struct NormJob {
  const void* x;  // (rows, width)
  void* residual;
  const void* weight;
  const void* bias;
  void* y;
  Storage storage;
  int64_t width;
  float eps;
};

enum class Gelu { kTanh, kQuick };

struct ActivationJob {
  const void* x;  // silu_mul: (rows, 2 * width), gelu: (rows, width)
  void* y;        // (rows, width)
  Storage storage;
  int64_t width;
  Gelu kind;
};

struct RopeJob {
  const void *q, *k, *v;  // (tokens, heads | kv_heads, dim), rows `*_stride` elements apart
  int64_t q_stride, k_stride, v_stride;
  Storage storage;  // of q, k, v and q_out
  const int64_t *positions, *slots;
  const float *cos, *sin;  // (positions, dim / 2)
  void *k_cache, *v_cache;
  Storage cache_storage;
  void* q_out;  // (tokens, heads, dim)
  int64_t heads, kv_heads, dim, block_size;
};

struct AttentionJob {
  const void* q;  // (tokens, heads, dim), rows q_stride elements apart
  int64_t q_stride;
  Storage storage;  // of q and out
  const void *k_cache, *v_cache;
  Storage cache_storage;
  void* out;  // (tokens, heads * dim)
  int64_t heads, kv_heads, dim, block_size;
  float scale;
};

// Query tokens [token, token + tokens), at positions [position, ...), times query heads [head, head + heads),
// all of which read the same KV head; at most kAttentionRows rows.
struct AttentionTile {
  const int32_t* block_table;
  int64_t token, tokens, position, head, heads;
};

// Rows of float32 to rows of bytes: byte = round(x / scale) + zero, in [0, 255], padded with zeros.
struct ByteRows {
  uint8_t* bytes;  // (rows, stride), stride a multiple of kByteGroup
  float* scales;
  int32_t* zeros;
  int64_t stride;
};

// What happens to the rows on their way to bytes.
enum class Source { kRows, kAddRmsNorm, kLayerNorm };

// Before a row becomes bytes it may be turned: elements kTurnStride apart, in blocks of `turn` of them, are
// mixed by a Hadamard matrix of 1 and -1. Large values, which sit in a few channels, are spread over the
// block.
inline constexpr int64_t kTurnStride = 16;
inline constexpr int64_t kMostTurn = 64;

struct QuantizeJob {
  Source source;
  NormJob norm;  // of float32; kRows reads x and width only, and nobody y
  ByteRows out;
  int64_t turn;  // a power of two; 1 leaves rows as they are
};

inline constexpr int64_t kByteGroup = 4;   // neighbours along the depth that one 32-bit sum takes in
inline constexpr int64_t kBytePanel = 16;  // columns of a panel of bytes, on every instruction set
// A pair of neighbours along the depth is narrow if its positive and its negative weights each sum to at most
// this: then no instruction set loses a bit of 255 * first + 255 * second in 16 of them.
inline constexpr int kNarrowPair = 128;

// What becomes of a product before it is stored.
enum class Finish { kNone, kAdd, kGeluTanh, kGeluQuick, kSiluMul };

// y = finish(x @ weight.T + bias) with weights in bytes: panels (panel, depth / kByteGroup, kBytePanel,
// kByteGroup). Under kSiluMul the first half of each panel are gates, the second half what they multiply.
struct ByteLinearJob {
  ByteRows x;
  const int8_t* panels;
  const float* scales;    // these three padded to whole panels
  const int32_t* sums;    // of a column's weights
  const float* bias;      // or null
  const float* residual;  // (rows, columns) for kAdd
  float* y;               // (rows, columns); (rows, columns / 2) under kSiluMul
  int64_t columns;        // of the weights
  Finish finish;
  bool is_narrow;  // every pair of the weights is
};

struct EmbedJob {
  const int64_t* ids;  // rows of the table
  const void* table;   // (rows, width)
  Storage table_storage;
  void* out;  // (tokens, width)
  Storage storage;
  int64_t width;
};

// See vila2/engine/repetition.py.
struct LoopJob {
  int32_t* runs;           // (periods)
  const int32_t* earlier;  // (count): the token before the newest, the one before that, ...
  int32_t newest;
  int64_t count, periods, min_repeats, min_tokens;
};

struct TrainKernels;   // train.h
struct ResizeKernels;  // resize.h

struct Kernels {
  const char* isa;
  int64_t panel_width;
  int64_t attention_scratch;  // floats
  int64_t linear_scratch;     // floats
  int64_t bf16_group;  // neighbours along the depth that lie side by side in panels of bfloat16: 1 or 2
  void (*pack)(const float* weight, int64_t columns, int64_t depth, void* panels, Storage storage,
               int64_t panel);
  void (*linear)(const LinearJob& job, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end,
                 float* scratch);
  void (*rms_norm)(const NormJob& job, int64_t row, int64_t row_end);
  void (*add_rms_norm)(const NormJob& job, int64_t row, int64_t row_end);
  void (*layer_norm)(const NormJob& job, int64_t row, int64_t row_end);
  void (*add_layer_norm)(const NormJob& job, int64_t row, int64_t row_end);  // the sum stays in residual
  void (*silu_mul)(const ActivationJob& job, int64_t row, int64_t row_end);
  void (*gelu)(const ActivationJob& job, int64_t row, int64_t row_end);
  void (*rope_store)(const RopeJob& job, int64_t token, int64_t token_end);
  void (*attention)(const AttentionJob& job, const AttentionTile& tile, float* scratch);
  void (*quantize)(const QuantizeJob& job, int64_t row, int64_t row_end, float* scratch);  // of a row's width
  void (*byte_linear)(const ByteLinearJob& job, int64_t row, int64_t row_end, int64_t panel,
                      int64_t panel_end);
  // The place of the first number above `limit`, or `count`; NaN is above nothing.
  int64_t (*first_above)(const float* row, int64_t count, float limit);
  void (*embed)(const EmbedJob& job, int64_t token, int64_t token_end);
  // Brings the runs up to date with the newest token; how many tokens at the end are a loop, or 0.
  int64_t (*find_loop)(const LoopJob& job);
  const TrainKernels* train;
  const ResizeKernels* resize;
};

extern const Kernels kScalar;
extern const Kernels kAvx2;
extern const Kernels kAvx2Vnni;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vnni;
extern const Kernels kAvx512Bf16;

// The table in use: the best that this CPU runs, or the one VILA2_CPU_ISA names. Throws std::runtime_error
// for a name that is unknown or that this CPU cannot run.
const Kernels& kernels();

// What the CPU offers, whichever table is in use.
struct Features {
  bool avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16, amx_bf16;
};
Features features();

}  // namespace vila2::cpu
