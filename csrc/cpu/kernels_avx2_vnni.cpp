// As avx2, with products of bytes in one instruction.
#define VILA2_ISA "avx2_vnni"
#define VILA2_TABLE kAvx2Vnni
#define VILA2_VEC "cpu/vec_avx2.inl"
#include "cpu/table.inl"
