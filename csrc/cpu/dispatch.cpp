#if defined(VILA2_X86)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace vila2::cpu {
namespace {

#if defined(VILA2_X86)
// The compiler's own check knows neither AMX nor AVX-VNNI before gcc 13. Leaf 7: EDX bit 22 is AMX-BF16;
// whether the system lets a process use the tiles is not asked, as torch does that. Leaf 7, 1: EAX bit 4 is
// AVX-VNNI.
bool has_amx_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

struct Choice {
  const char* name;
  const Kernels* table;
  bool runs;  // on this CPU
};

// The best first. A table that this build has not got is null.
std::vector<Choice> choices() {
#if defined(VILA2_X86)
  const Features cpu = features();
#if defined(VILA2_AVX2_VNNI)
  const Kernels* avx2_vnni = &kAvx2Vnni;
#else
  const Kernels* avx2_vnni = nullptr;
#endif
#if defined(VILA2_AVX512_BF16)
  const Kernels* avx512_bf16 = &kAvx512Bf16;
#else
  const Kernels* avx512_bf16 = nullptr;
#endif
  return {{"avx512_bf16", avx512_bf16, cpu.avx512 && cpu.avx512_vnni && cpu.avx512_bf16 && avx512_bf16},
          {"avx512_vnni", &kAvx512Vnni, cpu.avx512 && cpu.avx512_vnni},
          {"avx512", &kAvx512, cpu.avx512},
          {"avx2_vnni", avx2_vnni, cpu.avx2_vnni && avx2_vnni},
          {"avx2", &kAvx2, cpu.avx2},
          {"scalar", &kScalar, true}};
#else
  return {{"avx512_bf16", nullptr, false}, {"avx512_vnni", nullptr, false}, {"avx512", nullptr, false},
          {"avx2_vnni", nullptr, false},   {"avx2", nullptr, false},        {"scalar", &kScalar, true}};
#endif
}

const Kernels& choose() {
  const char* forced = std::getenv("VILA2_CPU_ISA");
  const std::string name = forced ? forced : "";
  for (const Choice& choice : choices()) {
    if (name.empty() ? choice.runs : name == choice.name) {
      if (!choice.runs) throw std::runtime_error("VILA2_CPU_ISA=" + name + ": this CPU cannot run it");
      return *choice.table;
    }
  }
  throw std::runtime_error("VILA2_CPU_ISA=" + name +
                           ": expected scalar, avx2, avx2_vnni, avx512, avx512_vnni or avx512_bf16");
}

}  // namespace

Features features() {
#if defined(VILA2_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(VILA2_EMULATE)  // with AVX2
  return {avx2, avx2, avx2, avx2, avx2, false};
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  return {avx2,
          avx2 && has_avx_vnni(),
          avx512,
          __builtin_cpu_supports("avx512vnni") != 0,
          __builtin_cpu_supports("avx512bf16") != 0,
          has_amx_bf16()};
#endif
#else
  return {};
#endif
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace vila2::cpu
