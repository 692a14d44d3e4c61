// Sums over a block.
#pragma once

#include "device.cuh"

// The sum of the values of all threads of a block, in every thread; `sums` has room for one a warp.
template <uint32_t kThreads> __device__ __forceinline__ float block_sum(float value, float* sums) {
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (uint32_t warp = 0; warp < kThreads / kWarpSize; warp++) total += sums[warp];
  return total;
}
