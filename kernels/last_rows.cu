// out[r] = x[rows[r]]: the last row of each prompt, then the rows of beams.
// Grid: a block a row. Block: 128 threads. Bound by memory: reads and writes a row once.
#include "common/device.cuh"

namespace last_rows {

struct Params {
  void* out;
  const void* x;
  const uint32_t* rows;
  uint32_t columns, padding;
};
constexpr uint32_t kThreads = 128;

template <class T> __device__ __forceinline__ void run(const Params& params) {
  const T* x = static_cast<const T*>(params.x) + size_t(params.rows[blockIdx.x]) * params.columns;
  T* out = static_cast<T*>(params.out) + size_t(blockIdx.x) * params.columns;
  copy_row(out, x, params.columns);
}

}  // namespace last_rows

KERNEL(last_rows_f32, last_rows::Params, last_rows::kThreads) { last_rows::run<float>(params); }
KERNEL(last_rows_bf16, last_rows::Params, last_rows::kThreads) { last_rows::run<bf16>(params); }
