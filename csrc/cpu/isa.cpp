#include "isa.h"

#include <omp.h>

#include <atomic>

#include "../check.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ff {
namespace {

bool available(Isa level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(FF_HAS_AVX512)
  if (level == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16") && available(Isa::avx2);
#endif
#if defined(FF_HAS_AVX2)
  if (level == Isa::avx2) {
    unsigned a, b, c, d;
    // gcc 12 has no name for F16C: leaf 1, ECX bit 29
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1u);
  }
#endif
#endif
  return level == Isa::baseline;
}

Isa best() {
  for (Isa level : {Isa::avx512, Isa::avx2})
    if (available(level)) return level;
  return Isa::baseline;
}

// Linux hands out the tile registers only on request (arch_prctl ARCH_REQ_XCOMP_PERM, tile data).
bool request_amx() {
#if defined(__x86_64__) && defined(__linux__) && defined(FF_HAS_AMX)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d >> 24 & 1u, bf16 = d >> 22 & 1u;
  return tile && bf16 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
std::atomic<Isa> current{best()};
std::atomic<int> threads{0};

}  // namespace

Isa isa() { return current.load(std::memory_order_relaxed); }
const char* isa_name() { return kNames[int(isa())]; }

void set_isa(const std::string& name) {
  if (name == "auto") {
    current = best();
    return;
  }
  for (Isa level : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (name == kNames[int(level)]) {
      FF_CHECK(available(level), "[isa] " << name << " is not available here; the best is "
                                          << kNames[int(best())]);
      current = level;
      return;
    }
  FF_CHECK(false, "[isa] expected auto, baseline, avx2 or avx512, got '" << name << "'");
}

bool amx_bf16() {
  static const bool allowed = request_amx();
  return allowed && isa() == Isa::avx512;
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
