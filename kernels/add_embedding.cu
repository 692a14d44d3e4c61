// x[r] += table[indices[r]], for the rows of prompts. The sum in f32.
// Grid: a block a row of a prompt. Block: 128 threads. Bound by memory: reads a row of the table and of
// x, and writes it, once.
#include "generated/shared.cuh"

namespace add_embedding {

constexpr uint32_t kThreads = 128;

template <class T> __device__ __forceinline__ void run(const Params& params) {
  const size_t from = size_t(params.indices[blockIdx.x]) * params.columns;
  const T* added = static_cast<const T*>(params.table) + from;
  T* x = static_cast<T*>(params.x) + size_t(blockIdx.x) * params.columns;
  for (uint32_t i = threadIdx.x; i < params.columns; i += kThreads)
    x[i] = narrowed<T>(widened(x[i]) + widened(added[i]));
}

}  // namespace add_embedding

KERNEL(add_embedding_f32, add_embedding::Params, add_embedding::kThreads) {
  add_embedding::run<float>(params);
}
KERNEL(add_embedding_bf16, add_embedding::Params, add_embedding::kThreads) {
  add_embedding::run<bf16>(params);
}
