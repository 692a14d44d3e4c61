// out[:, j] = activation(x[:, j]) * x[:, columns + j]               (GLU variants, Shazeer 2020)
// Grid: (rows, columns / 256). Block: 256 threads. Bound by memory: reads x once, writes out once.
#include "common/activation.cuh"

namespace gate {

struct Params {
  void* out;
  const void* x;
  uint32_t columns, activation;
};
constexpr uint32_t kThreads = 256;

template <class T> __device__ __forceinline__ void run(const Params& params) {
  const uint32_t column = blockIdx.y * kThreads + threadIdx.x;
  if (column >= params.columns) return;
  const T* x = static_cast<const T*>(params.x) + size_t(blockIdx.x) * 2 * params.columns + column;
  T* out = static_cast<T*>(params.out) + size_t(blockIdx.x) * params.columns + column;
  *out = narrowed<T>(activated(params.activation, widened(x[0])) * widened(x[params.columns]));
}

}  // namespace gate

KERNEL(gate_f32, gate::Params, gate::kThreads) { gate::run<float>(params); }
KERNEL(gate_bf16, gate::Params, gate::kThreads) { gate::run<bf16>(params); }
