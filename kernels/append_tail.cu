// Appends the keys and values of the beams' newest tokens to their tails: a row a beam, at the
// position of its step. Nothing is copied when beams are put in another order; they know their
// ancestors.
// Grid: a block a row of beams. Block: 128 threads. Bound by memory: reads and writes a row once.
#include "common/batch.cuh"

namespace append_tail {

constexpr uint32_t kThreads = 128;

template <class T> __device__ __forceinline__ void run(const StoreParams& params) {
  const uint32_t row = params.batch.num_prompt_rows + blockIdx.x;
  const T* kv = static_cast<const T*>(params.kv) + size_t(row) * params.columns;
  store_kv(params.batch, params.pages, params.layer, row, kv + params.offset);
}

}  // namespace append_tail

KERNEL(append_tail_f32, StoreParams, append_tail::kThreads) {
  append_tail::run<float>(params);
}
KERNEL(append_tail_bf16, StoreParams, append_tail::kThreads) {
  append_tail::run<bf16>(params);
}
