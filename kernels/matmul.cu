// The epilogues of matrix products that cuBLASLt does not have: x = activation(x), in place, for
// SiLU, for GELU by the error function, and for shapes that it fuses nothing with.
// Grid: packs of 16 bytes / 256. Block: 256 threads. Bound by memory: reads and writes x once.
#include "common/activation.cuh"

namespace matmul {

struct Params {
  void* x;
  uint32_t count, activation;
};
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

}  // namespace matmul

KERNEL(matmul_activate_f32, matmul::Params, matmul::kThreads) { matmul::run<float>(params); }
KERNEL(matmul_activate_bf16, matmul::Params, matmul::kThreads) { matmul::run<bf16>(params); }
