#define VILA2_ISA "avx512"
#define VILA2_TABLE kAvx512
#define VILA2_VEC "cpu/vec_avx512.inl"
#include "cpu/table.inl"
