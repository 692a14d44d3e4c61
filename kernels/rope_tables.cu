// out[r] = cosines, then sines, of position[r] * frequencies: what queries and keys are turned by
// (RoPE, Su et al. 2021).
// The position of a beam's newest token is the context's length plus its steps less one.
// Grid: a block a row. Block: 64 threads. Bound by memory: writes out once.
#include "common/batch.cuh"

namespace rope_tables {

constexpr uint32_t kThreads = 64;

}  // namespace rope_tables

KERNEL(rope_tables_f32, rope_tables::Params, rope_tables::kThreads) {
  const Batch& batch = params.batch;
  const uint32_t row = blockIdx.x;
  uint32_t position = 0;
  if (row < batch.num_prompt_rows) {
    const Prompt& prompt = prompt_of_row(batch, row);
    position = prompt.start + row - prompt.first_row;
  } else if (const Search* search = search_of_row(batch, row)) {
    position = search->context_len + search->num_steps - 1;
  }
  float* out = params.out + size_t(row) * 2 * params.num_frequencies;
  for (uint32_t i = threadIdx.x; i < params.num_frequencies; i += rope_tables::kThreads) {
    const float angle = float(position) * params.frequencies[i];
    out[i] = cosf(angle);
    out[params.num_frequencies + i] = sinf(angle);
  }
}
