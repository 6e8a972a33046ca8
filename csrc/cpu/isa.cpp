#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace sslfast {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

bool isa_supported(Isa isa) {
#if defined(SSLFAST_X86)
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::baseline;
}

Isa active_isa() {
  const Isa best_first[] = {Isa::avx512, Isa::avx2, Isa::baseline};
  const char* forced = std::getenv("SSLFAST_CPU_ISA");
  const bool any = !forced || !*forced;
  std::string here;
  for (Isa isa : best_first) {
    if (!isa_supported(isa)) continue;
    if (any || isa_name(isa) == std::string(forced)) return isa;
    here += std::string(here.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("SSLFAST_CPU_ISA: expected one of " + here + " on this CPU, got " + forced);
}

}  // namespace sslfast
