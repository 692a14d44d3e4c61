// out[r] = x[r] / sqrt(mean(x[r]^2) + epsilon) * weight            (Zhang & Sennrich 2019)
// The sum in f32. The residual is added by the matrix product before it, in its epilogue, which
// reads and writes the stream once less than a kernel that adds and normalises.
// Grid: a block a row. Block: 256 threads. Bound by memory: reads x once, but rows of more packs of 16
// bytes than threads twice, the second time from L2.
#include "generated/shared.cuh"

namespace rms_norm {

constexpr uint32_t kThreads = 256;

// A row, kCount numbers at a time.
template <class T, uint32_t kCount>
__device__ __forceinline__ void normalise(const T* x_row, T* out_row, const Params& params) {
  SHARED(float, sums, kThreads / kWarpSize);
  using Unit = Numbers<T, kCount>;
  const Unit* x = reinterpret_cast<const Unit*>(x_row);
  Unit* out = reinterpret_cast<Unit*>(out_row);
  const uint32_t num_units = params.columns / kCount;
  const bool has_first = threadIdx.x < num_units;
  const auto squares = [](const Unit& unit) {
    float sum = 0;
#pragma unroll
    for (uint32_t k = 0; k < kCount; k++) sum += widened(unit.values[k]) * widened(unit.values[k]);
    return sum;
  };
  Unit first{};
  if (has_first) first = x[threadIdx.x];
  float sum = squares(first);
#pragma unroll 1
  for (uint32_t i = threadIdx.x + kThreads; i < num_units; i += kThreads) sum += squares(x[i]);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (uint32_t warp = 0; warp < kThreads / kWarpSize; warp++) total += sums[warp];
  const float scale = rsqrtf(total / float(params.columns) + params.epsilon);
  constexpr uint32_t kWeights = kCount < 4 ? kCount : 4;
  using Weights = Numbers<float, kWeights>;
  const Weights* weights = reinterpret_cast<const Weights*>(params.weight);
  const auto weighted = [&](Unit unit, uint32_t i) {
#pragma unroll
    for (uint32_t k = 0; k < kCount; k += kWeights) {
      const Weights weight = weights[(i * kCount + k) / kWeights];
#pragma unroll
      for (uint32_t w = 0; w < kWeights; w++)
        unit.values[k + w] = narrowed<T>(widened(unit.values[k + w]) * scale * weight.values[w]);
    }
    return unit;
  };
  if (has_first) out[threadIdx.x] = weighted(first, threadIdx.x);
#pragma unroll 1
  for (uint32_t i = threadIdx.x + kThreads; i < num_units; i += kThreads) out[i] = weighted(x[i], i);
}

template <class T> __device__ __forceinline__ void run(const Params& params) {
  constexpr uint32_t kPack = 16 / sizeof(T);
  const T* x = static_cast<const T*>(params.x) + size_t(blockIdx.x) * params.columns;
  T* out = static_cast<T*>(params.out) + size_t(blockIdx.x) * params.columns;
  // Rows of whole packs begin at packs, as buffers do.
  if (params.columns % kPack == 0) normalise<T, kPack>(x, out, params);
  else normalise<T, 1>(x, out, params);
}

}  // namespace rms_norm

KERNEL(rms_norm_f32, rms_norm::Params, rms_norm::kThreads) { rms_norm::run<float>(params); }
KERNEL(rms_norm_bf16, rms_norm::Params, rms_norm::kThreads) { rms_norm::run<bf16>(params); }
