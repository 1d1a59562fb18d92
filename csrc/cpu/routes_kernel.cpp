// routes and along_routes on one sample, channels innermost. Compiled once per instruction set; see
// csrc/cpu/isa.h.
#include "routes_kernel.h"

#include "lanes.h"

namespace ff {
namespace FF_ISA {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

FF_HD void store_bytes(uint8_t* p, Ints v) {
  const Bytes b = __builtin_convertvector(v, Bytes);
  __builtin_memcpy(p, &b, sizeof b);
}
FF_HD Ints load_bytes(const uint8_t* p) {
  Bytes b;
  __builtin_memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, Ints);
}

// of[i]: the window's pixels; a later one wins only where it is larger, a first of 0 stays.
template <class T>
FF_HD void choose(const T* const* of, int64_t c, bool straight, uint8_t* out) {
  float best = load(of[0] + c) > 0.f ? load(of[0] + c) : 0.f;
  int at = 0;
  for (int i = 1; i < 4; ++i)
    if (load(of[i] + c) > best) best = load(of[i] + c), at = i;
  *out = uint8_t(straight || best > 0.f ? at : kBlocked);
}
template <class T>
FF_HD void choose_lanes(const T* const* of, int64_t c, bool straight, uint8_t* out) {
  Floats best = load_lanes(of[0] + c);
  best = best > 0.f ? best : Floats{};
  Ints at{};
#pragma GCC unroll 3
  for (int i = 1; i < 4; ++i) {
    const Floats other = load_lanes(of[i] + c);
    const Ints wins = other > best;
    best = wins ? other : best;
    at = wins ? Ints{} + i : at;
  }
  store_bytes(out, straight ? at : (best > 0.f ? at : Ints{} + kBlocked));
}

template <class T>
void routes_of(const RoutesParams& p, int64_t n) {
  const int64_t size = p.H * p.W * p.C;
  const T* a = static_cast<const T*>(p.a) + n * size;
  if (!p.pool) {
    uint8_t* out = p.routes + n * size;
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth)
      store_bytes(out + i, p.straight || load_lanes(a + i) > 0.f ? Ints{} + 1 : Ints{});
    for (; i < size; ++i) out[i] = p.straight || load(a + i) > 0.f;
    return;
  }
  const int64_t rows = p.H / 2, columns = p.W / 2, line = p.W * p.C;
  uint8_t* out = p.routes + n * rows * columns * p.C;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t w = 0; w < columns; ++w, out += p.C) {
      const T* corner = a + 2 * r * line + 2 * w * p.C;
      const T* of[4] = {corner, corner + p.C, corner + line, corner + line + p.C};
      if (p.C < kWidth) {
        for (int64_t c = 0; c < p.C; ++c) choose(of, c, p.straight, out + c);
        continue;
      }
      over_vectors(p.C, [&](int64_t c) { choose_lanes(of, c, p.straight, out + c); });
    }
}

template <class T>
void along(const RoutesParams& p, int64_t n) {
  const int64_t size = p.H * p.W * p.C;
  T* da = static_cast<T*>(p.da) + n * size;
  if (!p.pool) {
    const T* dz = static_cast<const T*>(p.dz) + n * size;
    const uint8_t* routes = p.routes + n * size;
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth)
      store_exact(da + i, load_bytes(routes + i) > 0 ? load_lanes(dz + i) : Floats{});
    for (; i < size; ++i) store(da + i, routes[i] > 0 ? load(dz + i) : 0.f);
    return;
  }
  const int64_t rows = p.H / 2, columns = p.W / 2, line = p.W * p.C;
  const T* dz = static_cast<const T*>(p.dz) + n * rows * columns * p.C;
  const uint8_t* routes = p.routes + n * rows * columns * p.C;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t w = 0; w < columns; ++w, dz += p.C, routes += p.C) {
      T* corner = da + 2 * r * line + 2 * w * p.C;
      T* of[4] = {corner, corner + p.C, corner + line, corner + line + p.C};
      if (p.C < kWidth) {
        for (int64_t c = 0; c < p.C; ++c)
          for (int i = 0; i < 4; ++i) store(of[i] + c, routes[c] == i ? load(dz + c) : 0.f);
        continue;
      }
      over_vectors(p.C, [&](int64_t c) {
        const Floats d = load_lanes(dz + c);
        const Ints at = load_bytes(routes + c);
        for (int i = 0; i < 4; ++i) store_exact(of[i] + c, at == i ? d : Floats{});
      });
    }
  // a last row or column that no window holds
  for (int64_t y = 0; y < p.H; ++y)
    for (int64_t i = y < 2 * rows ? 2 * columns * p.C : 0; i < line; ++i)
      store(da + y * line + i, 0.f);
}

}  // namespace

void routes_row(const RoutesParams& p, int64_t n) {
  switch (p.dtype) {
    case DType::f32: return routes_of<float>(p, n);
    case DType::bf16: return routes_of<bf16>(p, n);
    case DType::f16: return routes_of<f16>(p, n);
  }
}

void along_row(const RoutesParams& p, int64_t n) {
  switch (p.dtype) {
    case DType::f32: return along<float>(p, n);
    case DType::bf16: return along<bf16>(p, n);
    case DType::f16: return along<f16>(p, n);
  }
}

}  // namespace FF_ISA
}  // namespace ff
