// Walks the positions of a PixelSource upwards; a division a position costs more than packing it.
#pragma once
#include <cstdint>

#include "gemm.h"

namespace ff {
namespace {

template <class T>
class Cursor {
 public:
  Cursor(const PixelSource& s, int64_t t)
      : s_(s), left_(s.samples - t / s.positions), g_(t % s.positions),
        sample_(static_cast<const T*>(s.data) + t / s.positions * s.pixels * s.channels) {}

  // The pixel here, of channel 0, or null where the grid is zero padding; then steps on.
  const T* next() {
    if (left_ <= 0) return nullptr;
    const int64_t i = s_.index ? s_.index[g_] : g_;
    const T* at = i < 0 ? nullptr : sample_ + (s_.channels_last ? i * s_.channels : i);
    if (++g_ == s_.positions) g_ = 0, --left_, sample_ += s_.pixels * s_.channels;
    return at;
  }

 private:
  const PixelSource& s_;
  int64_t left_, g_;
  const T* sample_;
};

}  // namespace
}  // namespace ff
