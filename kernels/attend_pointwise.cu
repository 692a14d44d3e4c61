// The sum over the positions that a row of a prompt sees of silu(scale * q . k + bias) / divisor * v:
// pointwise aggregated attention                                    (HSTU, Zhai et al. 2024, equation 2)
// Positions before the targets are read from the context's pages, targets from the rows of the pass.
// Grid: (tiles of 8 rows, heads). Block: 128 threads. Bound by the caches: a page of keys and values is
// read once a tile, without tensor cores.
#include "common/batch.cuh"

namespace attend_pointwise {

constexpr uint32_t kThreads = 128, kRows = kPointwiseRows;

__device__ __forceinline__ float weight_of(float score, float share) {
  return score / (1.0f + expf(-score)) * share;
}

// The bias between a row and the position of a key.
__device__ __forceinline__ float bias_of(const Params& params, const PointwiseRow& row,
                                         uint32_t key) {
  if (params.positions == nullptr) return 0.0f;
  const int64_t* seconds = params.seconds + row.first_time;
  const int64_t following = seconds[row.position + 1], own = seconds[key];
  const uint64_t apart = following > own ? uint64_t(following) - uint64_t(own)
                                         : uint64_t(own) - uint64_t(following);
  uint32_t low = 0, high = params.num_thresholds;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (params.thresholds[middle] <= apart) low = middle + 1;
    else high = middle;
  }
  return params.positions[params.longest - 1 + key - row.position] + params.times[low];
}

template <class T> __device__ __forceinline__ void run(const Params& params) {
  const uint2 tile = params.tiles[blockIdx.x];
  const uint32_t head = blockIdx.y, head_dim = params.pages.head_dim;
  const uint32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const PointwiseRow* rows = params.rows + tile.x;
  SharedMemory shared;
  float* queries = shared.take<float>(kRows * head_dim, "queries");
  float* sums = shared.take<float>(kRows * head_dim, "sums");
  float* weights = shared.take<float>(kRows * kPageLen, "weights");
  const T* of_rows = static_cast<const T*>(params.queries) + head * head_dim;
  for (uint32_t i = threadIdx.x; i < kRows * head_dim; i += kThreads) {
    const uint32_t row = i / head_dim;
    const size_t at = size_t(tile.x + row) * params.query_columns + i % head_dim;
    queries[i] = row < tile.y ? widened(of_rows[at]) : 0.0f;
    sums[i] = 0;
  }
  uint32_t from = rows[0].from, to = rows[0].to;
  for (uint32_t row = 1; row < tile.y; row++) {
    from = min(from, rows[row].from);
    to = max(to, rows[row].to);
  }
  const Prompt& prompt = params.batch.prompts[rows[0].prompt];
  for (uint32_t first = from / kPageLen * kPageLen; first < to; first += kPageLen) {
    __syncthreads();
    const uint32_t page = params.batch.pages[prompt.first_page + first / kPageLen];
    const T* keys = context_keys<T>(params.pages, page, params.layer, head);
    const T* values = values_behind<const T>(params.pages, keys);
    for (uint32_t i = threadIdx.x; i < kRows * kPageLen; i += kThreads) {
      const uint32_t row = i / kPageLen, token = i % kPageLen, position = first + token;
      float weight = 0;
      if (row < tile.y && position >= rows[row].from && position < rows[row].to) {
        float product = 0;
        for (uint32_t column = 0; column < head_dim; column++)
          product += queries[row * head_dim + column] * widened(keys[token * head_dim + column]);
        const float score = product * params.scale + bias_of(params, rows[row], position);
        weight = weight_of(score, rows[row].share);
      }
      weights[i] = weight;
    }
    __syncthreads();
    const uint32_t num_tokens = min(kPageLen, to - first);
    for (uint32_t column = threadIdx.x; column < head_dim; column += kThreads) {
      float added[kRows] = {};
      for (uint32_t token = 0; token < num_tokens; token++) {
        const float value = widened(values[token * head_dim + column]);
#pragma unroll
        for (uint32_t row = 0; row < kRows; row++) added[row] += weights[row * kPageLen + token] * value;
      }
#pragma unroll
      for (uint32_t row = 0; row < kRows; row++) sums[row * head_dim + column] += added[row];
    }
  }
  __syncthreads();
  // Targets, a row a warp.
  const uint32_t to_keys = params.num_heads * head_dim;
  for (uint32_t row = warp; row < tile.y; row += kThreads / kWarpSize) {
    const PointwiseRow entry = rows[row];
    for (uint32_t target = 0; target < entry.num_targets; target++) {
      const uint32_t target_row = entry.target_row + target;
      const T* key = of_rows + size_t(target_row) * params.query_columns + to_keys;
      float product = 0;
      for (uint32_t column = lane; column < head_dim; column += kWarpSize)
        product += queries[row * head_dim + column] * widened(key[column]);
      const uint32_t position = entry.position + target_row - (tile.x + row);
      const float score =
          warp_sum(product) * params.scale + bias_of(params, entry, position);
      const float weight = weight_of(score, entry.share);
      const T* value = key + to_keys;
      for (uint32_t column = lane; column < head_dim; column += kWarpSize)
        sums[row * head_dim + column] += weight * widened(value[column]);
    }
    T* out = static_cast<T*>(params.out) + (size_t(tile.x + row) * params.num_heads + head) * head_dim;
    for (uint32_t column = lane; column < head_dim; column += kWarpSize)
      out[column] = narrowed<T>(sums[row * head_dim + column]);
  }
}

}  // namespace attend_pointwise

KERNEL(attend_pointwise_f32, attend_pointwise::Params, attend_pointwise::kThreads) {
  attend_pointwise::run<float>(params);
}
KERNEL(attend_pointwise_bf16, attend_pointwise::Params, attend_pointwise::kThreads) {
  attend_pointwise::run<bf16>(params);
}
