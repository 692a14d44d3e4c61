// The rows of a table for the tokens of prompts, then for the newest token of each beam.
// Grid: a block a row. Block: 128 threads. Bound by memory: reads and writes a row once.
#include "common/batch.cuh"

namespace embed {

constexpr uint32_t kThreads = 128;

template <class T> __device__ __forceinline__ void run(const Params& params) {
  const Batch& batch = params.batch;
  const uint32_t row = blockIdx.x;
  uint32_t token = 0;  // of a row that nobody has
  if (row < params.num_tokens) {
    token = params.tokens[row];
  } else if (const Search* search = search_of_row(batch, row)) {
    const uint32_t beam = row - search->first_row;
    token = search->num_steps == 0
                ? search->start_token
                : params.beams.tokens[beam_row(batch, *search, search->num_steps, beam)];
  }
  const T* from = static_cast<const T*>(params.table) + size_t(token) * params.columns;
  T* out = static_cast<T*>(params.out) + size_t(row) * params.columns;
  copy_row(out, from, params.columns);
}

}  // namespace embed

KERNEL(embed_f32, embed::Params, embed::kThreads) { embed::run<float>(params); }
KERNEL(embed_bf16, embed::Params, embed::kThreads) { embed::run<bf16>(params); }
