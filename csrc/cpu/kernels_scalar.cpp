#define VILA2_ISA "scalar"
#define VILA2_TABLE kScalar
#define VILA2_VEC "cpu/vec_scalar.inl"
#include "cpu/table.inl"
