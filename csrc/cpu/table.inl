// One instruction set's table, from the vector type VILA2_VEC. Each kernels_<isa>.cpp includes this once, and
// has compiler flags of its own. Everything here but the table has internal linkage: a function that the
// linker could share with another file would be compiled for this instruction set and might run on a CPU that
// lacks it.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"
#include "cpu/resize.h"
#include "cpu/train.h"

namespace vila2::cpu {
namespace {

// clang-format off: in the order of use
#include VILA2_VEC
#include "cpu/math.inl"
#include "cpu/rows.inl"
#include "cpu/tokens.inl"
#include "cpu/linear.inl"
#include "cpu/bf16_pairs.inl"
#include "cpu/attention.inl"
#include "cpu/bytes.inl"
#include "cpu/train_rows.inl"
#include "cpu/train_attention.inl"
#include "cpu/resize.inl"
// clang-format on

}  // namespace

// clang-format off: an entry a line
extern const Kernels VILA2_TABLE = {
    VILA2_ISA,
    kPanel,
    kAttentionScratch,
    kLinearScratch,
    kBf16Group,
    pack_any,
    linear_any,
    rms_norm,
    add_rms_norm,
    layer_norm,
    add_layer_norm,
    silu_mul,
    gelu,
    rope_store,
    attention,
    quantize,
    byte_linear,
    first_above,
    embed,
    find_loop,
    &kTrain,
    &kResize,
};
// clang-format on

}  // namespace vila2::cpu
