// out = gate * activation(layer norm of x), over all columns or by block; perhaps with the gate and the
// normed columns, or those of x, before it                          (HSTU, Zhai et al. 2024, equation 3)
// Sums in f32.
// Grid: a block a row. Block: 256 threads. Bound by memory: reads x three times, all but the first from
// the caches.
#include "common/block_sum.cuh"
#include "generated/shared.cuh"

namespace gated_norm {

constexpr uint32_t kThreads = 256;

template <class T> __device__ __forceinline__ void run(const Params& params) {
  SHARED(float, sums, kThreads / kWarpSize);
  SHARED(float, squares, kThreads / kWarpSize);
  const uint32_t per_block = params.block_columns, columns = params.num_blocks * per_block;
  const T* x = static_cast<const T*>(params.x) +
               size_t(blockIdx.x) * params.num_blocks * params.block_width;
  const T* gate = static_cast<const T*>(params.gate) + size_t(blockIdx.x) * columns;
  const uint32_t num_parts = params.output == 0 ? 1 : 3;
  T* out = static_cast<T*>(params.out) + size_t(blockIdx.x) * num_parts * columns;
  T* gated = out + (num_parts - 1) * columns;
  auto input = [&](uint32_t column) {
    return widened(x[column / per_block * params.block_width + column % per_block]);
  };
  const uint32_t per_norm = params.is_by_block ? per_block : columns;
  for (uint32_t first = 0; first < columns; first += per_norm) {
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < per_norm; i += kThreads) sum += input(first + i);
    const float mean = block_sum<kThreads>(sum, sums) / float(per_norm);
    float square = 0;
    for (uint32_t i = threadIdx.x; i < per_norm; i += kThreads) {
      const float difference = input(first + i) - mean;
      square += difference * difference;
    }
    const float variance = block_sum<kThreads>(square, squares) / float(per_norm);
    const float deviation = 1.0f / sqrtf(variance + params.epsilon);
    for (uint32_t i = threadIdx.x; i < per_norm; i += kThreads) {
      const uint32_t column = first + i, weight = params.is_by_block ? first / per_block : column;
      float normed = (input(column) - mean) * deviation;
      if (params.scale) normed = normed * params.scale[weight] + params.shift[weight];
      const float factor = params.has_sigmoid ? 1.0f / (1.0f + expf(-normed)) : normed;
      if (params.output != 0) {
        out[column] = gate[column];
        out[columns + column] = narrowed<T>(params.output == 1 ? normed : input(column));
      }
      gated[column] = narrowed<T>(widened(gate[column]) * factor);
    }
    // The next block's sums overwrite what a thread may still read.
    __syncthreads();
  }
}

}  // namespace gated_norm

KERNEL(gated_norm_f32, gated_norm::Params, gated_norm::kThreads) { gated_norm::run<float>(params); }
KERNEL(gated_norm_bf16, gated_norm::Params, gated_norm::kThreads) { gated_norm::run<bf16>(params); }
