// Attention of the rows of prompts over their contexts: causal, or bidirectional over all of a
// context; with a bias over relative positions where one is given; softmax in f32.
// FlashAttention-2 (Dao 2023) over pages (vLLM, Kwon et al. 2023), prompts of any lengths.
// Grid: (tiles, KV heads); a tile is 128 or 64 rows of (token, query head) for tensor cores, else
// 16. Block: 128 threads, or a warpgroup for 64 rows. Bound by tensor cores for long prompts. Reads a
// page of keys and values once a tile.
#include "common/warpgroup_attention.cuh"

namespace attend_prefill {

__device__ __forceinline__ Tile tile_of(const Params& params, uint32_t rows_per_tile) {
  // The longest tiles come first: those of all heads.
  const uint32_t block = blockIdx.y * gridDim.x + blockIdx.x, num_kv_heads = gridDim.y;
  const uint2 place = params.tiles[block / num_kv_heads];
  const Prompt& prompt = params.batch.prompts[place.x];
  Tile tile;
  tile.group = params.num_heads / params.pages.num_kv_heads;
  tile.first = place.y;
  tile.num_rows = prompt.num_rows * tile.group;
  tile.kv_head = block % num_kv_heads;
  tile.num_heads = params.num_heads;
  tile.layer = params.layer;
  tile.first_item_row = prompt.first_row;
  tile.first_page = prompt.first_page;
  tile.is_causal = params.is_causal != 0;
  // A row of an encoder sees rows that other passes have read.
  tile.context_len = tile.is_causal ? prompt.start + prompt.num_rows : prompt.context_len;
  tile.start = prompt.start;
  tile.scale = params.scale;
  tile.bias = params.bias;
  tile.longest = params.longest;
  const uint32_t last = min(tile.first + rows_per_tile, tile.num_rows) - 1 - tile.first;
  tile.page_from = 0;
  tile.page_to = (tile.reach_of(last) + kPageLen - 1) / kPageLen;
  return tile;
}

template <class T> __device__ __forceinline__ void run_plain(const Params& params) {
  SharedMemory shared;
  const uint32_t head_dim = params.pages.head_dim;
  PlainAttention<T> attention(shared, head_dim);
  const Tile tile = tile_of(params, PlainAttention<T>::kRows);
  attention.attend(tile, params.batch, params.pages, static_cast<const T*>(params.queries),
                   params.query_columns);
  const uint32_t rows = min(PlainAttention<T>::kRows, tile.num_rows - tile.first);
  for (uint32_t i = threadIdx.x; i < rows * head_dim; i += blockDim.x) {
    const uint32_t row = i / head_dim, column = i % head_dim;
    T* out = static_cast<T*>(params.out) +
             (size_t(tile.row_of(row)) * params.num_heads + tile.head_of(row)) * head_dim;
    out[column] = narrowed<T>(attention.accumulated[i] / attention.sums[row]);
  }
}

template <class Attention> __device__ __forceinline__ void run_tensor(const Params& params) {
  constexpr uint32_t kHeadDim = Attention::kHead;
  SharedMemory shared;
  Attention attention(shared);
  const Tile tile = tile_of(params, Attention::kRows);
  attention.begin(tile, params.batch, params.pages, static_cast<const bf16*>(params.queries),
                  params.query_columns);
  attention.attend(tile, params.batch, params.pages);
  attention.finish();
#pragma unroll
  for (uint32_t which = 0; which < Attention::kLaneRows; which++) {
    const uint32_t row = Attention::row_in_tile(which);
    if (tile.first + row >= tile.num_rows) continue;
    bf16* out = static_cast<bf16*>(params.out) +
                (size_t(tile.row_of(row)) * params.num_heads + tile.head_of(row)) * kHeadDim;
    attention.for_each_pair(which, 1.0f / attention.sums[which],
                            [&](uint32_t column, float x, float y) {
                              *reinterpret_cast<bf16x2*>(out + column) = __floats2bfloat162_rn(x, y);
                            });
  }
}

}  // namespace attend_prefill

KERNEL(attend_prefill_f32, attend_prefill::Params, 128) {
  attend_prefill::run_plain<float>(params);
}
KERNEL(attend_prefill_bf16, attend_prefill::Params, 128) {
  attend_prefill::run_plain<bf16>(params);
}
KERNEL(attend_prefill_bf16_64, attend_prefill::Params, 128) {
  attend_prefill::run_tensor<TensorAttention<64, 16>>(params);
}
KERNEL(attend_prefill_bf16_128, attend_prefill::Params, 128) {
  attend_prefill::run_tensor<TensorAttention<128, 16>>(params);
}
KERNEL(attend_prefill_bf16_64_wide, attend_prefill::Params, 128) {
  attend_prefill::run_tensor<TensorAttention<64, 32>>(params);
}
KERNEL(attend_prefill_bf16_128_wide, attend_prefill::Params, 128) {
  attend_prefill::run_tensor<TensorAttention<128, 32>>(params);
}

// By warpgroups, which Hopper alone has: they are never launched elsewhere.
#if HAS_WARPGROUPS
#define RUN_ON_WARPGROUPS(...) attend_prefill::run_tensor<WarpgroupAttention<__VA_ARGS__>>(params)
#else
#define RUN_ON_WARPGROUPS(...) __trap()
#endif
KERNEL(attend_prefill_bf16_64_warpgroup, attend_prefill::Params, 128) {
  RUN_ON_WARPGROUPS(64, 1);
}
KERNEL(attend_prefill_bf16_128_warpgroup, attend_prefill::Params, 128) {
  RUN_ON_WARPGROUPS(128, 1);
}
KERNEL(attend_prefill_bf16_64_warpgroups, attend_prefill::Params, 256) {
  RUN_ON_WARPGROUPS(64, 2);
}
KERNEL(attend_prefill_bf16_128_warpgroups, attend_prefill::Params, 256) {
  RUN_ON_WARPGROUPS(128, 2);
}
#undef RUN_ON_WARPGROUPS
