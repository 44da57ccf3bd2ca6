#define VILA2_ISA "avx2"
#define VILA2_TABLE kAvx2
#define VILA2_VEC "cpu/vec_avx2.inl"
#include "cpu/table.inl"
