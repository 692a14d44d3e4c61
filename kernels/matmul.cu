// The epilogues of matrix products that cuBLASLt does not have: x = activation(x), in place, for
// SiLU and for GELU by the error function.
// Grid: values / 256. Block: 256 threads. Bound by memory: reads and writes x once.
#include "common/activation.cuh"

namespace matmul {

struct Params {
  void* x;
  uint32_t count, activation;
};
constexpr uint32_t kThreads = 256;

template <class T> __device__ __forceinline__ void run(const Params& params) {
  const uint32_t at = blockIdx.x * kThreads + threadIdx.x;
  if (at >= params.count) return;
  T* x = static_cast<T*>(params.x) + at;
  *x = narrowed<T>(activated(params.activation, widened(*x)));
}

}  // namespace matmul

KERNEL(matmul_activate_f32, matmul::Params, matmul::kThreads) { matmul::run<float>(params); }
KERNEL(matmul_activate_bf16, matmul::Params, matmul::kThreads) { matmul::run<bf16>(params); }
