// Attention of each beam over its request's context and its own tail, under one softmax in f32.
//
// All beams of a search share its context: a tile of up to 128 (beam, query head) rows reads each
// page once, on tensor cores (Hydragen, Juravsky et al. 2024). A beam's tail is found through its
// ancestors: the row at each position that it descends from, so nothing is copied when beams are
// put in another order. Where a slot alone has too few tiles to fill the device, its context is
// split (Flash-Decoding, Dao et al. 2023) and attend_beams_combine merges the parts in order. The
// parts follow from the slot alone, so its result does not depend on the other slots of the pass.
// Grid: (tiles, KV heads, parts of the context that is split most). Block: 128 threads, or a warpgroup
// for 64 rows. Bound by memory below about 150 rows a search and KV head, by tensor cores above.
#include "common/warpgroup_attention.cuh"

namespace attend_beams {

constexpr uint32_t kThreads = 128;

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

  // By beam, from one on, and position: the row of its ancestor there, found from the newest back.
  __device__ void find_ancestors(const Params& params, const Search& search, uint32_t first_beam,
                                 uint32_t count, uint32_t* ancestors) const {
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
      uint32_t beam = first_beam + i;
      for (uint32_t back = 0; back < len; back++) {
        const uint32_t position = search.num_steps - back;
        const uint32_t at = beam_row(params.batch, search, position, beam);
        ancestors[i * kMaxPositions + back] = at;
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
  const uint32_t first_beam = tile.first / tile.group;
  const uint32_t end_row = min(tile.first + Attention::kRows, tile.num_rows);
  tail.find_ancestors(params, search, first_beam, (end_row - 1) / tile.group - first_beam + 1,
                      ancestors);
  attention.attend(tile, params.batch, params.pages, static_cast<const T*>(params.queries),
                   params.query_columns);
  const uint32_t rows = min(Attention::kRows, tile.num_rows - tile.first);
  const uint32_t lane = threadIdx.x % kWarpSize;
  for (uint32_t row = threadIdx.x / kWarpSize; row < rows; row += kThreads / kWarpSize) {
    const uint32_t head = tile.head_of(row);
    const uint32_t beam = (tile.first + row) / tile.group - first_beam;
    float* accumulated = attention.accumulated + row * head_dim;
    float largest = attention.largest[row], sum = attention.sums[row];
    for (uint32_t back = 0; back < tail.len; back++) {
      const T* keys = tail_keys<T>(params.pages, ancestors[beam * kMaxPositions + back], tile.layer) +
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

// Takes the beams' tails in. Keys and values of as many positions as there is room for are brought
// where the context's pages were; a row sees its own beam's alone.
template <class Attention>
__device__ __forceinline__ void attend_tail(Attention& attention, const Params& params,
                                            const Tail& tail, const Tile& tile,
                                            const uint32_t* ancestors, uint32_t first_beam,
                                            uint32_t num_tile_beams, uint32_t num_live) {
  constexpr uint32_t kChunk = 16;  // tokens at a time
  const uint32_t to_values = params.pages.num_kv_heads * Attention::kHead;
  const uint32_t positions_at_once = max(Attention::kBufferRows / num_tile_beams, 1u);
  const uint32_t first_row = tile.first + Attention::first_row_of_warp();
  const uint32_t end_row = min(first_row + Attention::kWarpRows, tile.num_rows);
  for (uint32_t from = 0; from < tail.len; from += positions_at_once) {
    const uint32_t num_positions = min(positions_at_once, tail.len - from);
    const uint32_t num_rows = num_positions * num_tile_beams;
    __syncthreads();  // nobody reads the buffers any more
    // The last chunk is padded with zeros.
    for (uint32_t row = Attention::copied_row();
         row < min(num_rows + kChunk, Attention::kBufferRows); row += Attention::kRowsAtOnce) {
      const uint32_t position = row / num_tile_beams, beam = row - position * num_tile_beams;
      const bool is_wanted = row < num_rows && beam < num_live;
      const bf16* keys = static_cast<const bf16*>(params.pages.tails);
      if (is_wanted)
        keys = tail_keys<bf16>(params.pages, ancestors[beam * kMaxPositions + from + position],
                               tile.layer) +
               tile.kv_head * Attention::kHead + Attention::copied_column();
      const uint32_t to = Attention::place(row, Attention::copied_column());
      copy_async(attention.keys + to, keys, is_wanted);
      copy_async(attention.values + to, is_wanted ? keys + to_values : keys, is_wanted);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    if (first_row >= end_row) continue;
    const uint32_t end_beam = (end_row - 1) / tile.group - first_beam + 1;
    for (uint32_t position = 0; position < num_positions; position++) {
      for (uint32_t beam = first_row / tile.group - first_beam; beam < end_beam; beam += kChunk) {
        const uint32_t wanted = position * num_tile_beams + beam;
        const uint32_t at = min(wanted, Attention::kBufferRows - kChunk);
        float scores[Attention::kLaneRows / 2][kChunk / 8][4];
        attention.template score<kChunk>(at, scores);
#pragma unroll
        for (uint32_t which = 0; which < Attention::kLaneRows; which++) {
          const uint32_t row = tile.first + Attention::row_in_tile(which), item = row / tile.group;
          const uint32_t own = item - first_beam - beam;
          const float bias =
              tail_bias(params, tile.kv_head * tile.group + row - item * tile.group, from + position);
#pragma unroll
          for (uint32_t n = 0; n < kChunk / 8; n++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
              const uint32_t token = n * 8 + Attention::first_column() + e;
              float& score = scores[which / 2][n][which % 2 * 2 + e];
              score = own < kChunk && token == own + wanted - at
                          ? (score * tile.scale + bias) * kLog2E
                          : -INFINITY_F;
            }
          }
        }
        attention.template weigh_and_rescale<kChunk>(scores, 1.0f);
        attention.template accumulate<kChunk>(scores, at);
      }
    }
  }
}

template <class Attention> __device__ __forceinline__ void run_tensor(const Params& params) {
  constexpr uint32_t kHeadDim = Attention::kHead;
  const uint2 place = params.tiles[blockIdx.x];
  if (place.x == kNone) return;
  const Search& search = params.batch.searches[place.x];
  if (blockIdx.z >= num_splits(params, search)) return;
  SharedMemory shared;
  Attention attention(shared);
  uint32_t* ancestors = shared.take<uint32_t>(Attention::kRows * kMaxPositions, "ancestors");
  const Tile tile = tile_of(params, place);
  const Tail tail(params, search);
  attention.begin(tile, params.batch, params.pages, static_cast<const bf16*>(params.queries),
                  params.query_columns);
  const uint32_t first_beam = tile.first / tile.group;
  const uint32_t end_row = min(tile.first + Attention::kRows, tile.num_rows);
  const uint32_t num_tile_beams = (end_row - 1) / tile.group - first_beam + 1;
  uint32_t num_live = 0;
  if (tail.len > 0) {
    // Tails of rows without a beam may hold NaN, which must not reach the sums.
    const uint32_t num_all = num_beams(params.batch, params.beams, search);
    num_live = min(num_tile_beams, num_all > first_beam ? num_all - first_beam : 0);
    tail.find_ancestors(params, search, first_beam, num_live, ancestors);
  }
  attention.attend(tile, params.batch, params.pages);
  if (tail.len > 0) {
    if (tile.page_from == tile.page_to) {
      wait_for_copies<0>();
      __syncthreads();
      attention.keep_queries();
    }
    attend_tail(attention, params, tail, tile, ancestors, first_beam, num_tile_beams, num_live);
  }
  wait_for_copies<0>();
  attention.finish();
#pragma unroll
  for (uint32_t which = 0; which < Attention::kLaneRows; which++) {
    const uint32_t row_in_tile = Attention::row_in_tile(which);
    if (tile.first + row_in_tile >= tile.num_rows) continue;
    const uint32_t row = tile.row_of(row_in_tile), head = tile.head_of(row_in_tile);
    const float sum = attention.sums[which];
    if (num_splits(params, search) == 1) {
      const size_t at = size_t(row) * params.num_heads + head;
      bf16* out = static_cast<bf16*>(params.out) + at * kHeadDim;
      attention.for_each_pair(which, sum > 0 ? 1.0f / sum : 0.0f,
                              [&](uint32_t column, float x, float y) {
                                *reinterpret_cast<bf16x2*>(out + column) =
                                    __floats2bfloat162_rn(x, y);
                              });
      continue;
    }
    const size_t part = part_of(search, params.num_heads, blockIdx.z, row, head);
    float* out = params.parts + part * kHeadDim;
    attention.for_each_pair(which, 1.0f, [&](uint32_t column, float x, float y) {
      *reinterpret_cast<float2*>(out + column) = make_float2(x, y);
    });
    if (Attention::first_column() == 0)
      params.part_sums[part] = make_float2(attention.largest[which], sum);
  }
}

// Merges the parts of contexts that were split, in order, a warp a row and query head.
// Grid: (rows of beams times query heads, by four). Block: 128 threads. Bound by memory: reads the
// parts once.
constexpr uint32_t kCombineThreads = 128;

template <class T> __device__ __forceinline__ void combine(const CombineParams& params) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t at = blockIdx.x * (kCombineThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const uint32_t row = params.batch.num_prompt_rows + at / params.num_heads;
  const uint32_t head = at % params.num_heads;
  if (row >= params.batch.num_rows) return;
  const Search* search = search_of_row(params.batch, row);
  if (!search || search->num_splits == 1) return;
  const size_t first_part = part_of(*search, params.num_heads, 0, row, head);
  const size_t to_next = size_t(search->num_rows) * params.num_heads;
  static_assert(kMaxSplits <= kWarpSize);  // a part a lane
  float2 part = make_float2(-INFINITY_F, 0);
  if (lane < search->num_splits) part = params.part_sums[first_part + lane * to_next];
  const float largest = warp_max(part.x);
  const float share = exp2_approx(part.x - (largest == -INFINITY_F ? 0.0f : largest));
  const float sum = warp_sum(part.y * share);
  T* out = static_cast<T*>(params.out) + (size_t(row) * params.num_heads + head) * params.head_dim;
  const float* parts = params.parts + first_part * params.head_dim;
  auto merge = [&](auto unit) {
    using Unit = decltype(unit);
    constexpr uint32_t kCount = sizeof(Unit) / sizeof(float);
    for (uint32_t first = 0; first < params.head_dim; first += kWarpSize * kCount) {
      const uint32_t d = first + lane * kCount;
      const bool is_live = d < params.head_dim;
      Unit units[kMaxSplits];
      // All are on their way before the first is looked at.
#pragma unroll
      for (uint32_t split = 0; split < kMaxSplits; split++)
        if (is_live && split < search->num_splits)
          units[split] =
              *reinterpret_cast<const Unit*>(parts + split * to_next * params.head_dim + d);
      float values[kCount] = {};
#pragma unroll
      for (uint32_t split = 0; split < kMaxSplits; split++) {
        if (split >= search->num_splits) break;
        const float share_of_split = __shfl_sync(kAllLanes, share, split);
        if (!is_live) continue;
#pragma unroll
        for (uint32_t k = 0; k < kCount; k++) values[k] += units[split].values[k] * share_of_split;
      }
      if (!is_live) continue;
      Numbers<T, kCount> merged;
#pragma unroll
      for (uint32_t k = 0; k < kCount; k++)
        merged.values[k] = narrowed<T>(sum > 0 ? values[k] / sum : 0.0f);
      *reinterpret_cast<Numbers<T, kCount>*>(out + d) = merged;
    }
  };
  if (params.head_dim % 4 == 0) merge(Numbers<float, 4>{});
  else merge(Numbers<float, 1>{});
}

}  // namespace attend_beams

KERNEL(attend_beams_f32, attend_beams::Params, attend_beams::kThreads) {
  attend_beams::run_plain<float>(params);
}
KERNEL(attend_beams_bf16, attend_beams::Params, attend_beams::kThreads) {
  attend_beams::run_plain<bf16>(params);
}
KERNEL(attend_beams_bf16_64, attend_beams::Params, attend_beams::kThreads) {
  attend_beams::run_tensor<TensorAttention<64, 16>>(params);
}
KERNEL(attend_beams_bf16_128, attend_beams::Params, attend_beams::kThreads) {
  attend_beams::run_tensor<TensorAttention<128, 16>>(params);
}
KERNEL(attend_beams_bf16_64_wide, attend_beams::Params, attend_beams::kThreads) {
  attend_beams::run_tensor<TensorAttention<64, 32>>(params);
}
KERNEL(attend_beams_bf16_128_wide, attend_beams::Params, attend_beams::kThreads) {
  attend_beams::run_tensor<TensorAttention<128, 32>>(params);
}
KERNEL(attend_beams_combine_f32, attend_beams::CombineParams, attend_beams::kCombineThreads) {
  attend_beams::combine<float>(params);
}
KERNEL(attend_beams_combine_bf16, attend_beams::CombineParams, attend_beams::kCombineThreads) {
  attend_beams::combine<bf16>(params);
}

// By warpgroups, which Hopper alone has: they are never launched elsewhere.
#if HAS_WARPGROUPS
#define RUN_ON_WARPGROUPS(...) attend_beams::run_tensor<WarpgroupAttention<__VA_ARGS__>>(params)
#else
#define RUN_ON_WARPGROUPS(...) __trap()
#endif
KERNEL(attend_beams_bf16_64_warpgroup, attend_beams::Params, 128) { RUN_ON_WARPGROUPS(64, 1); }
KERNEL(attend_beams_bf16_128_warpgroup, attend_beams::Params, 128) {
  RUN_ON_WARPGROUPS(128, 1);
}
KERNEL(attend_beams_bf16_64_warpgroups, attend_beams::Params, 256) { RUN_ON_WARPGROUPS(64, 2); }
KERNEL(attend_beams_bf16_128_warpgroups, attend_beams::Params, 256) {
  RUN_ON_WARPGROUPS(128, 2);
}
#undef RUN_ON_WARPGROUPS
