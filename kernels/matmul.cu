// Matrix products are cuBLASLt's. Here is what it does not do.
//
//   matmul           out = activation(x Wᵀ + bias), or out += x Wᵀ + bias, for shapes that it refuses
//   matmul_activate  x = activation(x), in place: SiLU, GELU by the error function, and what it would
//                    fuse but not for this shape or number type
#include "common/activation.cuh"

namespace matmul {

constexpr uint32_t kTile = kProductTile;

template <class T, class Out> __device__ __forceinline__ void run(const Params& params) {
  constexpr uint32_t kStride = kTile + 1;  // so that a column lies in distinct banks
  SHARED(float, xs, kTile * kStride);
  SHARED(float, weights, kTile * kStride);
  const uint32_t x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const uint32_t row = blockIdx.y * kTile + y, column = blockIdx.x * kTile + x;
  const uint32_t weight_row = blockIdx.x * kTile + y;
  const T* x_row = static_cast<const T*>(params.x) + size_t(row) * params.inner;
  const T* of_weight = static_cast<const T*>(params.weight) + size_t(weight_row) * params.inner;
  float sum = 0;
  for (uint32_t first = 0; first < params.inner; first += kTile) {
    const bool is_inside = first + x < params.inner;
    xs[y * kStride + x] = is_inside && row < params.rows ? widened(x_row[first + x]) : 0.0f;
    weights[y * kStride + x] =
        is_inside && weight_row < params.columns ? widened(of_weight[first + x]) : 0.0f;
    __syncthreads();
#pragma unroll
    for (uint32_t k = 0; k < kTile; k++) sum += xs[y * kStride + k] * weights[x * kStride + k];
    __syncthreads();
  }
  if (row >= params.rows || column >= params.columns) return;
  Out* out = static_cast<Out*>(params.out) + size_t(row) * params.stride + column;
  if (params.bias) sum += widened(static_cast<const Out*>(params.bias)[column]);
  if (params.adds) sum += widened(*out);
  if (params.activation) sum = activated(params.activation - 1, sum);
  *out = narrowed<Out>(sum);
}

}  // namespace matmul

// Grid: (columns / 16, rows / 16). Block: 256 threads, a number of the result each. Bound by shared
// memory: it is for shapes too odd for tensor cores.
KERNEL(matmul_f32, matmul::Params, 256) { matmul::run<float, float>(params); }
KERNEL(matmul_bf16, matmul::Params, 256) { matmul::run<bf16, bf16>(params); }
KERNEL(matmul_bf16_f32, matmul::Params, 256) { matmul::run<bf16, float>(params); }

namespace matmul_activate {

constexpr uint32_t kThreads = 256;

template <class T> __device__ __forceinline__ void run(const Params& params) {
  constexpr uint32_t kPack = 16 / sizeof(T);
  const uint32_t at = (blockIdx.x * kThreads + threadIdx.x) * kPack;
  T* x = static_cast<T*>(params.x) + at;
  if (at + kPack <= params.count) {
    using Pack = Numbers<T, kPack>;
    Pack pack = *reinterpret_cast<const Pack*>(x);
#pragma unroll
    for (uint32_t i = 0; i < kPack; i++)
      pack.values[i] = narrowed<T>(activated(params.activation, widened(pack.values[i])));
    *reinterpret_cast<Pack*>(x) = pack;
    return;
  }
  for (uint32_t i = 0; at + i < params.count; i++)
    x[i] = narrowed<T>(activated(params.activation, widened(x[i])));
}

}  // namespace matmul_activate

// Grid: packs of 16 bytes / 256. Block: 256 threads. Bound by memory: reads and writes x once.
KERNEL(matmul_activate_f32, matmul_activate::Params, matmul_activate::kThreads) {
  matmul_activate::run<float>(params);
}
KERNEL(matmul_activate_bf16, matmul_activate::Params, matmul_activate::kThreads) {
  matmul_activate::run<bf16>(params);
}
