#include "isa.h"

#include <omp.h>

#include <atomic>
#include <cstdlib>

#include "../check.h"

#if defined(__linux__)
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#endif

namespace ff {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};

// Linux hands out the tile registers only on request (arch_prctl ARCH_REQ_XCOMP_PERM, tile data).
[[maybe_unused]] bool request_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d >> 24 & 1u, bf16 = d >> 22 & 1u;
  return tile && bf16 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

// The level was compiled in, and the processor has what it adds to the one below.
bool has(Isa level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (level) {
    case Isa::baseline: return true;
#if defined(FF_HAS_AVX2)
    case Isa::avx2: {
      unsigned a, b, c, d;
      // gcc 12 has no name for F16C: leaf 1, ECX bit 29
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1u);
    }
#endif
#if defined(FF_HAS_AVX512)
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(FF_HAS_AVX512BF16)
    case Isa::avx512bf16: return __builtin_cpu_supports("avx512bf16");
#endif
#if defined(FF_HAS_AMX)
    case Isa::amx: {
      static const bool allowed = request_amx();
      return allowed;
    }
#endif
    default: return false;
  }
#else
  return level == Isa::baseline;
#endif
}

Isa best() {
  Isa level = Isa::baseline;
  while (level < Isa::amx && has(Isa(int(level) + 1))) level = Isa(int(level) + 1);
  return level;
}

std::atomic<Isa> current{best()};
std::atomic<int> threads{0};

}  // namespace

Isa isa() { return current.load(std::memory_order_relaxed); }
const char* isa_name() { return kNames[int(isa())]; }
std::vector<std::string> isas() { return {kNames, kNames + int(best()) + 1}; }

void set_isa(const std::string& name) {
  std::string wanted = name, said = "";
  if (name == "auto") {
    const char* environment = std::getenv("FFENGINE_ISA");
    wanted = environment == nullptr ? "" : environment;
    said = "FFENGINE_ISA: ";
    if (wanted.empty() || wanted == "auto") {
      current = best();
      return;
    }
  }
  for (int level = 0; level <= int(Isa::amx); ++level)
    if (wanted == kNames[level]) {
      FF_CHECK(level <= int(best()), "[isa] " << said << "expected an instruction set of this "
                                              << "machine and build, at most "
                                              << kNames[int(best())] << ", got '" << wanted << "'");
      current = Isa(level);
      return;
    }
  FF_CHECK(false, "[isa] " << said << "expected auto, baseline, avx2, avx512, avx512bf16 or amx, got '"
                           << wanted << "'");
}

int64_t l2_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long told = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (told > 0) return int64_t(told);
#endif
    return int64_t(1) << 20;
  }();
  return bytes;
}

int num_threads() {
  const int n = threads.load(std::memory_order_relaxed);
  return n > 0 ? n : omp_get_max_threads();
}

void set_num_threads(int n) {
  FF_CHECK(n >= 0, "[set_num_threads] expected 0 or more threads, got " << n);
  threads = n;
}

}  // namespace ff
