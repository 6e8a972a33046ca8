// One source, several instruction sets: each cpu/<op>.cpp is compiled once per entry here, in its own namespace.
#pragma once

namespace sslfast {

enum class Isa { baseline, avx2, avx512 };

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // compiled in, and this CPU has it
Isa active_isa();  // SSLFAST_CPU_ISA where set (throws std::invalid_argument if unknown or missing), else the best

}  // namespace sslfast

// SSLFAST_PER_ISA(declaration;) declares the same name in the namespace of each instruction set compiled in, and
// SSLFAST_CHOOSE(isa, name()) calls the one of `isa`.
#if defined(SSLFAST_X86)
#define SSLFAST_PER_ISA(...) \
  namespace baseline {       \
  __VA_ARGS__                \
  }                          \
  namespace avx2 {           \
  __VA_ARGS__                \
  }                          \
  namespace avx512 {         \
  __VA_ARGS__                \
  }
#define SSLFAST_CHOOSE(isa, ...) \
  ((isa) == Isa::avx512 ? avx512::__VA_ARGS__ : (isa) == Isa::avx2 ? avx2::__VA_ARGS__ : baseline::__VA_ARGS__)
#else
#define SSLFAST_PER_ISA(...) \
  namespace baseline {       \
  __VA_ARGS__                \
  }
#define SSLFAST_CHOOSE(isa, ...) ((void)(isa), baseline::__VA_ARGS__)
#endif
