// As avx512_vnni, with products of bfloat16 in one instruction.
#define VILA2_ISA "avx512_bf16"
#define VILA2_TABLE kAvx512Bf16
#define VILA2_VEC "cpu/vec_avx512.inl"
#include "cpu/table.inl"
