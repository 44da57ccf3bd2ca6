// As avx512, with products of bytes in one instruction.
#define VILA2_ISA "avx512_vnni"
#define VILA2_TABLE kAvx512Vnni
#define VILA2_VEC "cpu/vec_avx512.inl"
#include "cpu/table.inl"
