#pragma once

#include "causal_conv1d.cuh"

// The next STEPS of x and dy, on their way through shared memory: no registers wait for them.
struct Ring {
  INPUT* slots;  // of this thread
  METHOD INPUT* slot(int i, int tensor) const { return slots + (i % STEPS * 2 + tensor) * 32 * WARPS * V; }
  METHOD Group read(int i, int tensor) const { return load_group<INPUT>(slot(i, tensor), V); }
  METHOD void ask(int i, int tensor, const INPUT* from, int count, bool wanted) const {
    INPUT* to = slot(i, tensor);
    if constexpr (ALIGNED) {
      copy_async<V * sizeof(INPUT)>(to, from, wanted);
    } else {
      UNROLL for (int v = 0; v < V; v++)
        to[v] = wanted && v < count ? from[v] : INPUT{};
    }
  }
};

// The sums of all blocks: a block of threads adds up 32 channels of one row.
extern "C" __global__ void __launch_bounds__(256) causal_conv1d_sums(const __grid_constant__ Conv p) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);  // (8, 32)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64 lines = over(p.width, 32), channel = blockIdx.x % lines * 32 + lane;
  const int j = int(blockIdx.x / lines);
  float sum[4] = {};
  if (channel < p.width) {
#pragma unroll 8
    for (int64 i = warp; i < p.blocks; i += 8) sum[0] += p.sums[(i * ROWS + j) * p.width + channel];
  }
  shared[threadIdx.x] = sum[0];
  __syncthreads();
  if (warp > 0 || channel >= p.width) return;
  UNROLL for (int i = 1; i < 8; i++)
    sum[0] += shared[32 * i + lane];
  if (j < W) {
    store_four<false>(p.dweight + channel * W + j, sum, 1);
  } else {
    store_four<false>(p.dbias + channel, sum, 1);
  }
}
