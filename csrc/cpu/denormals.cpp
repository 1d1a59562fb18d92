// Denormal numbers taken as zeros: an x86 core computes with them in microcode, ten times slower.
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../ops.h"

namespace ff {

namespace {

#if defined(__x86_64__)
constexpr unsigned kFlush = 0x8040;  // results (FTZ) and operands (DAZ)
unsigned control() { return _mm_getcsr(); }
void set_control(unsigned value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
constexpr uint64_t kFlush = 1u << 24;  // FPCR.FZ
uint64_t control() {
  uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
void set_control(uint64_t value) { asm volatile("msr fpcr, %0" ::"r"(value)); }
#else
constexpr unsigned kFlush = 0;
unsigned control() { return 0; }
void set_control(unsigned) {}
#endif

}  // namespace

bool flush_denormals(bool on) {
  const bool before = (control() & kFlush) == kFlush;
#pragma omp parallel
  set_control(on ? control() | kFlush : control() & ~kFlush);
  return before;
}

}  // namespace ff
