// What both sweeps of batch_pass share: vectors, 2x2 windows, and a thread's way through a map.
#pragma once
#include "../common/batch_norm.h"
#include "sweep.cuh"

namespace ff {

// The positions that one of `lanes` threads visits in a map `columns` wide: `first`, then every
// lanes-th, without a division a position.
struct Walk {
  int row, column, step_row, step_column, columns;

  __device__ __forceinline__ Walk(int first, int lanes, int columns)
      : row(first / columns), column(first % columns), step_row(lanes / columns),
        step_column(lanes % columns), columns(columns) {}
  __device__ __forceinline__ void next() {
    row += step_row, column += step_column;
    if (column >= columns) column -= columns, ++row;
  }
};

template <class T, int V> __device__ __forceinline__ Pack<T, V> load_pack(const T* at) {
  return *reinterpret_cast<const Pack<T, V>*>(at);
}
template <class T, int V>
__device__ __forceinline__ void store_pack(T* at, const Pack<T, V>& x) {
  *reinterpret_cast<Pack<T, V>*>(at) = x;
}
template <class T, int V>
__device__ __forceinline__ float h_of(const Pack<T, V>& raw, int v) {
  return rectified(to_float(raw.v[v]));
}

// Elements from a pixel to its neighbour on the right and to the one below.
struct Steps {
  int right, down;
};
__device__ __forceinline__ Steps steps_of(const BatchPassParams& p) {
  const int right = p.channels_last ? int(p.C) : 1;
  return {right, int(p.W) * right};
}

// Place in a sample of the first pixel of window (row, column) of channel c.
__device__ __forceinline__ int window_at(const BatchPassParams& p, int c, int row, int column) {
  const int pixel = 2 * row * int(p.W) + 2 * column;
  return p.channels_last ? pixel * int(p.C) + c : c * int(p.H * p.W) + pixel;
}

// The four pixels of a window of V channels side by side (NHWC), or of one.
template <class T, int V> struct Corners {
  Pack<T, V> raw[4];

  __device__ __forceinline__ Corners(const T* at, const Steps& steps) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      raw[i] = load_pack<T, V>(at + (i / 2) * steps.down + (i % 2) * steps.right);
  }
  __device__ __forceinline__ Choice best(int v, float direction) const {
    return choose(h_of(raw[0], v), h_of(raw[1], v), h_of(raw[2], v), h_of(raw[3], v), direction);
  }
};

}  // namespace ff
