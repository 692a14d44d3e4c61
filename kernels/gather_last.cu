// out[r] = x[rows[r]]: the last row of each prompt, then the rows of beams.
// Grid: a block a row. Block: 128 threads. Bound by memory: reads and writes a row once.
#include "generated/shared.cuh"

namespace gather_last {

constexpr uint32_t kThreads = 128;

template <class T> __device__ __forceinline__ void run(const Params& params) {
  const T* x = static_cast<const T*>(params.x) + size_t(params.rows[blockIdx.x]) * params.columns;
  T* out = static_cast<T*>(params.out) + size_t(blockIdx.x) * params.columns;
  copy_row(out, x, params.columns);
}

}  // namespace gather_last

KERNEL(gather_last_f32, gather_last::Params, gather_last::kThreads) { gather_last::run<float>(params); }
KERNEL(gather_last_bf16, gather_last::Params, gather_last::kThreads) { gather_last::run<bf16>(params); }
