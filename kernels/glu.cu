// out[:, j] = activation(x[:, j]) * x[:, columns + j]               (GLU variants, Shazeer 2020)
// Grid: (rows, packs of 16 bytes in a row / 256). Block: 256 threads. Bound by memory: reads x once,
// writes out once.
#include "common/activation.cuh"

namespace glu {

constexpr uint32_t kThreads = 256;

template <class T> __device__ __forceinline__ void run(const Params& params) {
  constexpr uint32_t kPack = 16 / sizeof(T);
  const T* x = static_cast<const T*>(params.x) + size_t(blockIdx.x) * 2 * params.columns;
  const T* factor = x + params.columns;
  T* out = static_cast<T*>(params.out) + size_t(blockIdx.x) * params.columns;
  const uint32_t first = blockIdx.y * kThreads * kPack;
  auto gated = [&](T a, T b) {
    return narrowed<T>(activated(params.activation, widened(a)) * widened(b));
  };
  if (are_packs(x, params.columns) && are_packs(out, params.columns)) {
    const uint32_t column = first + threadIdx.x * kPack;
    if (column >= params.columns) return;
    using Pack = Numbers<T, kPack>;
    Pack pack = *reinterpret_cast<const Pack*>(x + column);
    const Pack factors = *reinterpret_cast<const Pack*>(factor + column);
#pragma unroll
    for (uint32_t i = 0; i < kPack; i++) pack.values[i] = gated(pack.values[i], factors.values[i]);
    *reinterpret_cast<Pack*>(out + column) = pack;
    return;
  }
  const uint32_t end = min(first + kThreads * kPack, params.columns);
  for (uint32_t column = first + threadIdx.x; column < end; column += kThreads)
    out[column] = gated(x[column], factor[column]);
}

}  // namespace glu

KERNEL(glu_f32, glu::Params, glu::kThreads) { glu::run<float>(params); }
KERNEL(glu_bf16, glu::Params, glu::kThreads) { glu::run<bf16>(params); }
