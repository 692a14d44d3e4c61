// Keeps the keys and values of a layer for the rows of prompts, in their contexts' pages.
// Grid: a block a row. Block: 128 threads. Bound by memory: reads and writes a row once.
#include "common/batch.cuh"

namespace store_context {

constexpr uint32_t kThreads = 128;

template <class T> __device__ __forceinline__ void run(const StoreParams& params) {
  const T* row = static_cast<const T*>(params.kv) + size_t(blockIdx.x) * params.columns;
  store_kv(params.batch, params.pages, params.layer, blockIdx.x, row + params.offset);
}

}  // namespace store_context

KERNEL(store_context_f32, StoreParams, store_context::kThreads) {
  store_context::run<float>(params);
}
KERNEL(store_context_bf16, StoreParams, store_context::kThreads) {
  store_context::run<bf16>(params);
}
