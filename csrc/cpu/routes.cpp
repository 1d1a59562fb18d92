// routes and along_routes on the CPU: public ops, and the same in plain PyTorch, in
// ffengine/ops/routes.py; kernel csrc/cpu/routes_kernel.cpp. A thread takes whole samples.
#include "../ops.h"
#include "routes_kernel.h"

namespace ff {

namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay

bool shared(const RoutesParams& p) { return p.N > 1 && p.N * p.C * p.H * p.W > kGrain; }

}  // namespace

void routes_cpu(const RoutesParams& p) {
#pragma omp parallel for num_threads(num_threads()) schedule(static) if (shared(p))
  for (int64_t n = 0; n < p.N; ++n) {
    FF_ISA_CALL(routes_row(p, n))
  }
}

void along_routes_cpu(const RoutesParams& p) {
#pragma omp parallel for num_threads(num_threads()) schedule(static) if (shared(p))
  for (int64_t n = 0; n < p.N; ++n) {
    FF_ISA_CALL(along_row(p, n))
  }
}

}  // namespace ff
