#if defined(VILA2_X86)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace vila2::cpu {
namespace {

#if defined(VILA2_X86)
// The compiler's own check knows no AMX before gcc 13. Leaf 7: EDX bit 22 is AMX-BF16; whether the system
// lets a process use the tiles is not asked, as torch does that.
bool has_amx_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}
#endif

const Kernels& choose() {
  const Features cpu = features();
  const char* forced = std::getenv("VILA2_CPU_ISA");
  const std::string name = forced ? forced : "";
  if (!name.empty() && name != "scalar" && name != "avx2" && name != "avx512") {
    throw std::runtime_error("VILA2_CPU_ISA=" + name + ": expected scalar, avx2 or avx512");
  }
  if ((name == "avx2" && !cpu.avx2) || (name == "avx512" && !cpu.avx512)) {
    throw std::runtime_error("VILA2_CPU_ISA=" + name + ": this CPU cannot run it");
  }
#if defined(VILA2_X86)
  if (name == "avx512" || (name.empty() && cpu.avx512)) return kAvx512;
  if (name == "avx2" || (name.empty() && cpu.avx2)) return kAvx2;
#endif
  return kScalar;
}

}  // namespace

Features features() {
#if defined(VILA2_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  return {avx2, avx512, __builtin_cpu_supports("avx512vnni") != 0, __builtin_cpu_supports("avx512bf16") != 0,
          has_amx_bf16()};
#else
  return {};
#endif
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace vila2::cpu
