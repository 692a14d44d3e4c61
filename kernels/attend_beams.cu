// Attention of each beam over its request's context and its own tail, under one softmax in f32.
//
// All beams of a search share its context: a tile of up to 128 (beam, query head) rows reads each
// page once, on tensor cores (Hydragen, Juravsky et al. 2024). A beam's tail is found through its
// ancestors: the row at each position that it descends from, so nothing is copied when beams are
// put in another order. Where a slot alone has too few tiles to fill the device, its context is
// split (Flash-Decoding, Dao et al. 2023) and attend_beams_combine merges the parts in order. The
// parts follow from the slot alone, so its result does not depend on the other slots of the pass.
// Grid: (tiles, KV heads, parts of the context that is split most). Block: 256 threads for tiles of
// 128 rows, else 128. Bound by memory below about 150 rows a search and KV head, by tensor cores
// above.
#include "common/attention.cuh"

namespace attend_beams {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kWideThreads = 256;

__device__ __forceinline__ Tile tile_of(const Params& params, const uint2& place) {
  const Search& search = params.batch.searches[place.x];
  Tile tile;
  tile.group = params.num_heads / params.pages.num_kv_heads;
  tile.first = place.y;
  tile.num_rows = search.num_rows * tile.group;
  tile.kv_head = blockIdx.y;
  tile.num_heads = params.num_heads;
  tile.layer = params.layer;
  tile.first_item_row = search.first_row;
  tile.first_page = search.first_context_page;
  tile.context_len = search.context_len;
  tile.is_causal = false;
  tile.start = 0;
  tile.scale = params.scale;
  tile.bias = nullptr;
  tile.longest = 0;
  const uint32_t pages = params.reaches_context ? (search.context_len + kPageLen - 1) / kPageLen : 0;
  tile.page_from = min(blockIdx.z * search.pages_per_split, pages);
  tile.page_to = min(tile.page_from + search.pages_per_split, pages);
  return tile;
}

// The parts that a slot's context is read in.
__device__ __forceinline__ uint32_t num_splits(const Params& params, const Search& search) {
  return params.reaches_context ? search.num_splits : 1;
}

// The place of a part of a row of beams and a query head among all parts.
__device__ __forceinline__ size_t part_of(const Search& search, uint32_t num_heads, uint32_t split,
                                          uint32_t row, uint32_t head) {
  const size_t part_row =
      search.first_part_row + size_t(split) * search.num_rows + (row - search.first_row);
  return part_row * num_heads + head;
}

// The tail of a search's beams, as this block needs it.
struct Tail {
  uint32_t from, len;  // the first position, and how many there are

  __device__ Tail(const Params& params, const Search& search) {
    const bool is_wanted = params.reaches_tail && blockIdx.z == 0;
    from = search.tail_from;
    len = is_wanted && from <= search.num_steps ? search.num_steps + 1 - from : 0;
  }

  // By row of the tile and position: the row of its ancestor there, found from the newest back.
  __device__ void find_ancestors(const Params& params, const Search& search, const Tile& tile,
                                 uint32_t rows, uint32_t* ancestors) const {
    for (uint32_t row = threadIdx.x; row < rows; row += blockDim.x) {
      if (tile.first + row >= tile.num_rows) continue;
      uint32_t beam = (tile.first + row) / tile.group;
      for (uint32_t back = 0; back < len; back++) {
        const uint32_t position = search.num_steps - back;
        const uint32_t at = beam_row(params.batch, search, position, beam);
        ancestors[row * kMaxPositions + back] = at;
        if (back + 1 < len) beam = params.beams.parents[at];
      }
    }
  }
};

__device__ __forceinline__ float tail_bias(const Params& params, uint32_t head, uint32_t back) {
  return params.tail_bias ? params.tail_bias[head * params.num_biases + min(back, params.num_biases - 1)] : 0.0f;
}

template <class T> __device__ __forceinline__ void run_plain(const Params& params) {
  using Attention = PlainAttention<T>;
  const uint2 place = params.tiles[blockIdx.x];
  if (place.x == kNone) return;
  const Search& search = params.batch.searches[place.x];
  if (blockIdx.z >= num_splits(params, search)) return;
  SharedMemory shared;
  const uint32_t head_dim = params.pages.head_dim;
  Attention attention(shared, head_dim);
  uint32_t* ancestors = shared.take<uint32_t>(Attention::kRows * kMaxPositions, "ancestors");
  const Tile tile = tile_of(params, place);
  const Tail tail(params, search);
  tail.find_ancestors(params, search, tile, Attention::kRows, ancestors);
  attention.attend(tile, params.batch, params.pages, static_cast<const T*>(params.queries),
                   params.query_columns);
  const uint32_t rows = min(Attention::kRows, tile.num_rows - tile.first);
  const uint32_t lane = threadIdx.x % kWarpSize;
  for (uint32_t row = threadIdx.x / kWarpSize; row < rows; row += kThreads / kWarpSize) {
    const uint32_t head = tile.head_of(row);
    float* accumulated = attention.accumulated + row * head_dim;
    float largest = attention.largest[row], sum = attention.sums[row];
    for (uint32_t back = 0; back < tail.len; back++) {
      const T* keys = tail_keys<T>(params.pages, ancestors[row * kMaxPositions + back], tile.layer) +
                      tile.kv_head * head_dim;
      const T* values = keys + params.pages.num_kv_heads * head_dim;
      float score = 0;
      for (uint32_t d = lane; d < head_dim; d += kWarpSize)
        score += attention.queries[row * head_dim + d] * widened(keys[d]);
      score = warp_sum(score) * tile.scale + tail_bias(params, head, back);
      const float most = fmaxf(largest, score);
      const float share = expf(largest - most), weight = expf(score - most);
      for (uint32_t d = lane; d < head_dim; d += kWarpSize)
        accumulated[d] = accumulated[d] * share + weight * widened(values[d]);
      sum = sum * share + weight;
      largest = most;
    }
    const size_t at = size_t(tile.row_of(row)) * params.num_heads + head;
    if (num_splits(params, search) == 1) {
      T* out = static_cast<T*>(params.out) + at * head_dim;
      for (uint32_t d = lane; d < head_dim; d += kWarpSize)
        out[d] = narrowed<T>(sum > 0 ? accumulated[d] / sum : 0.0f);
      continue;
    }
    const size_t part = part_of(search, params.num_heads, blockIdx.z, tile.row_of(row), head);
    for (uint32_t d = lane; d < head_dim; d += kWarpSize)
      params.parts[part * head_dim + d] = accumulated[d];
    if (lane == 0) params.part_sums[part] = make_float2(largest * kLog2E, sum);
  }
}

template <uint32_t kHeadDim, uint32_t kWarps>
__device__ __forceinline__ void run_tensor(const Params& params) {
  using Attention = TensorAttention<kHeadDim, kWarps>;
  const uint2 place = params.tiles[blockIdx.x];
  if (place.x == kNone) return;
  const Search& search = params.batch.searches[place.x];
  if (blockIdx.z >= num_splits(params, search)) return;
  SharedMemory shared;
  Attention attention(shared);
  uint32_t* ancestors = shared.take<uint32_t>(Attention::kRows * kMaxPositions, "ancestors");
  const Tile tile = tile_of(params, place);
  const Tail tail(params, search);
  tail.find_ancestors(params, search, tile, Attention::kRows, ancestors);
  attention.attend(tile, params.batch, params.pages, static_cast<const bf16*>(params.queries),
                   params.query_columns);
  const uint32_t first_column = Attention::first_column();
  uint32_t heads[2];
  bool is_wanted[2];
#pragma unroll
  for (uint32_t which = 0; which < 2; which++) {
    const uint32_t row = Attention::row_in_tile(which);
    is_wanted[which] = tile.first + row < tile.num_rows;
    heads[which] = tile.head_of(row);
  }
  for (uint32_t back = 0; back < tail.len; back++) {
    // The four lanes of a row share its columns. All loads are on their way before one is needed.
    bf16x2 keys[2][kHeadDim / 8], values[2][kHeadDim / 8];
#pragma unroll
    for (uint32_t which = 0; which < 2; which++) {
      if (!is_wanted[which]) continue;
      const uint32_t row = Attention::row_in_tile(which);
      const bf16* of_ancestor =
          tail_keys<bf16>(params.pages, ancestors[row * kMaxPositions + back], tile.layer) +
          tile.kv_head * kHeadDim + first_column;
      const uint32_t to_values = params.pages.num_kv_heads * kHeadDim;
#pragma unroll
      for (uint32_t d = 0; d < kHeadDim / 8; d++) {
        keys[which][d] = *reinterpret_cast<const bf16x2*>(of_ancestor + d * 8);
        values[which][d] = *reinterpret_cast<const bf16x2*>(of_ancestor + to_values + d * 8);
      }
    }
#pragma unroll
    for (uint32_t which = 0; which < 2; which++) {
      float score = 0;
      if (is_wanted[which]) {
        const bf16* query =
            attention.queries + Attention::row_in_tile(which) * Attention::kStride + first_column;
#pragma unroll
        for (uint32_t d = 0; d < kHeadDim / 8; d++) {
          const float2 q = __bfloat1622float2(*reinterpret_cast<const bf16x2*>(query + d * 8));
          const float2 k = __bfloat1622float2(keys[which][d]);
          score += q.x * k.x + q.y * k.y;
        }
      }
      // Rows that are not wanted keep them company.
      score += __shfl_xor_sync(kAllLanes, score, 1);
      score += __shfl_xor_sync(kAllLanes, score, 2);
      if (!is_wanted[which]) continue;
      score = (score * tile.scale + tail_bias(params, heads[which], back)) * kLog2E;
      const float most = fmaxf(attention.largest[which], score);
      const float share = exp2f(attention.largest[which] - most), weight = exp2f(score - most);
#pragma unroll
      for (uint32_t d = 0; d < kHeadDim / 8; d++) {
        const float2 v = __bfloat1622float2(values[which][d]);
        float(&sums)[4] = attention.accumulated[d];
        sums[2 * which] = sums[2 * which] * share + weight * v.x;
        sums[2 * which + 1] = sums[2 * which + 1] * share + weight * v.y;
      }
      attention.sums[which] = attention.sums[which] * share + weight;
      attention.largest[which] = most;
    }
  }
#pragma unroll
  for (uint32_t which = 0; which < 2; which++) {
    if (!is_wanted[which]) continue;
    const uint32_t row = tile.row_of(Attention::row_in_tile(which));
    const float sum = attention.sums[which];
    if (num_splits(params, search) == 1) {
      const size_t at = size_t(row) * params.num_heads + heads[which];
      bf16* out = static_cast<bf16*>(params.out) + at * kHeadDim;
      attention.for_each_pair(which, sum > 0 ? 1.0f / sum : 0.0f,
                              [&](uint32_t column, float x, float y) {
                                *reinterpret_cast<bf16x2*>(out + column) =
                                    __floats2bfloat162_rn(x, y);
                              });
      continue;
    }
    const size_t part = part_of(search, params.num_heads, blockIdx.z, row, heads[which]);
    float* out = params.parts + part * kHeadDim;
    attention.for_each_pair(which, 1.0f, [&](uint32_t column, float x, float y) {
      *reinterpret_cast<float2*>(out + column) = make_float2(x, y);
    });
    if (first_column == 0) params.part_sums[part] = make_float2(attention.largest[which], sum);
  }
}

// Merges the parts of contexts that were split, in order.
// Grid: (rows of beams, query heads). Block: 64 threads. Bound by memory: reads the parts once.
constexpr uint32_t kCombineThreads = 64;

template <class T> __device__ __forceinline__ void combine(const CombineParams& params) {
  const uint32_t row = params.batch.num_prompt_rows + blockIdx.x;
  const Search* search = search_of_row(params.batch, row);
  if (!search || search->num_splits == 1) return;
  const size_t at = size_t(row) * params.num_heads + blockIdx.y;
  auto part_in = [&](uint32_t split) {
    return part_of(*search, params.num_heads, split, row, blockIdx.y);
  };
  float largest = -INFINITY_F, sum = 0;
  for (uint32_t split = 0; split < search->num_splits; split++)
    largest = fmaxf(largest, params.part_sums[part_in(split)].x);
  const float offset = largest == -INFINITY_F ? 0.0f : largest;
  for (uint32_t split = 0; split < search->num_splits; split++) {
    const float2 part = params.part_sums[part_in(split)];
    sum += part.y * exp2f(part.x - offset);
  }
  for (uint32_t d = threadIdx.x; d < params.head_dim; d += kCombineThreads) {
    float value = 0;
    for (uint32_t split = 0; split < search->num_splits; split++) {
      const size_t part = part_in(split);
      value += params.parts[part * params.head_dim + d] *
               exp2f(params.part_sums[part].x - offset);
    }
    static_cast<T*>(params.out)[at * params.head_dim + d] =
        narrowed<T>(sum > 0 ? value / sum : 0.0f);
  }
}

}  // namespace attend_beams

KERNEL(attend_beams_f32, attend_beams::Params, attend_beams::kThreads) {
  attend_beams::run_plain<float>(params);
}
KERNEL(attend_beams_bf16, attend_beams::Params, attend_beams::kThreads) {
  attend_beams::run_plain<bf16>(params);
}
KERNEL(attend_beams_bf16_64, attend_beams::Params, attend_beams::kThreads) {
  attend_beams::run_tensor<64, 4>(params);
}
KERNEL(attend_beams_bf16_128, attend_beams::Params, attend_beams::kThreads) {
  attend_beams::run_tensor<128, 4>(params);
}
KERNEL(attend_beams_bf16_64_wide, attend_beams::Params, attend_beams::kWideThreads) {
  attend_beams::run_tensor<64, 8>(params);
}
KERNEL(attend_beams_bf16_128_wide, attend_beams::Params, attend_beams::kWideThreads) {
  attend_beams::run_tensor<128, 8>(params);
}
KERNEL(attend_beams_combine_f32, attend_beams::CombineParams, attend_beams::kCombineThreads) {
  attend_beams::combine<float>(params);
}
KERNEL(attend_beams_combine_bf16, attend_beams::CombineParams, attend_beams::kCombineThreads) {
  attend_beams::combine<bf16>(params);
}
