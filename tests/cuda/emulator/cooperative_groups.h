#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  static void sync() { emulator::sync(emulator::state.cluster->barrier); }
  static void barrier_arrive() {
    emulator::state.fiber->waits_for = emulator::arrive(emulator::state.cluster->barrier);
  }
  static void barrier_wait() {
    emulator::wait(emulator::state.cluster->barrier, emulator::state.fiber->waits_for);
  }
  static unsigned block_rank() { return unsigned(emulator::state.fiber->rank); }
  // A neighbour's copy of what lies in this block's dynamic shared memory.
  template <class T> static T* map_shared_rank(T* address, int rank) {
    auto& blocks = emulator::state.cluster->blocks;
    const auto aligned = [](emulator::Block& b) {
      return (reinterpret_cast<uintptr_t>(b.shared.data()) + 15) / 16 * 16;
    };
    const auto offset = reinterpret_cast<uintptr_t>(address) - aligned(emulator::block());
    return reinterpret_cast<T*>(aligned(blocks[size_t(rank)]) + offset);
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
