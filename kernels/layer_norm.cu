// out[r] = (x[r] - mean) / sqrt(variance + epsilon) * scale + shift          (Ba et al. 2016)
// The variance is the mean square of x[r] - mean, so that it survives a mean far from zero. Sums in
// f32.
// Grid: a block a row. Block: 256 threads. Bound by memory: reads x three times, all but the first from
// the caches.
#include "common/block_sum.cuh"
#include "generated/shared.cuh"

namespace layer_norm {

constexpr uint32_t kThreads = 256;

template <class T> __device__ __forceinline__ void run(const Params& params) {
  SHARED(float, sums, kThreads / kWarpSize);
  SHARED(float, squares, kThreads / kWarpSize);
  const T* x = static_cast<const T*>(params.x) + size_t(blockIdx.x) * params.columns;
  T* out = static_cast<T*>(params.out) + size_t(blockIdx.x) * params.columns;
  float sum = 0;
  for (uint32_t i = threadIdx.x; i < params.columns; i += kThreads) sum += widened(x[i]);
  const float mean = block_sum<kThreads>(sum, sums) / float(params.columns);
  float square = 0;
  for (uint32_t i = threadIdx.x; i < params.columns; i += kThreads) {
    const float difference = widened(x[i]) - mean;
    square += difference * difference;
  }
  const float variance = block_sum<kThreads>(square, squares) / float(params.columns);
  const float scale = 1.0f / sqrtf(variance + params.epsilon);
  for (uint32_t i = threadIdx.x; i < params.columns; i += kThreads) {
    float value = (widened(x[i]) - mean) * scale;
    if (params.scale) value = value * params.scale[i] + params.shift[i];
    out[i] = narrowed<T>(value);
  }
}

}  // namespace layer_norm

KERNEL(layer_norm_f32, layer_norm::Params, layer_norm::kThreads) { layer_norm::run<float>(params); }
KERNEL(layer_norm_bf16, layer_norm::Params, layer_norm::kThreads) { layer_norm::run<bf16>(params); }
