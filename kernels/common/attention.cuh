// Attention of a tile of queries over the paged context of one KV head, by online softmax (Milakov
// & Gimelshein 2018; FlashAttention, Dao et al. 2022). Prompts and beams share it.
//
// Query heads that share a KV head stand in one tile with it: row r of a unit's queries is query
// head `r % group` of item `r / group`, an item being a prompt's token or a beam. So a page is read
// once for all of them.
#pragma once

#include "batch.cuh"

constexpr float kLog2E = 1.4426950408889634f;

// Rows `first` on of one unit, for one KV head.
struct Tile {
  uint32_t first, num_rows;  // of the unit's rows: those of the tile, those of the unit
  uint32_t group, kv_head, num_heads, layer;
  uint32_t first_item_row;  // of the unit, among the pass's rows
  uint32_t first_page;      // of its context, among `pages`
  uint32_t page_from, page_to;  // the pages to read
  uint32_t context_len;
  bool is_causal;
  uint32_t start;  // the position of item 0, where causal or biased
  float scale;
  const float* bias;  // [num_heads, 2 * longest - 1] over key minus query position, or null
  uint32_t longest;

  __device__ uint32_t row_of(uint32_t row) const { return first_item_row + (first + row) / group; }
  __device__ uint32_t head_of(uint32_t row) const {
    return kv_head * group + (first + row) % group;
  }
  // How many tokens a row sees.
  __device__ uint32_t reach_of(uint32_t row) const {
    const uint32_t position = start + (first + row) / group;
    return is_causal ? min(position + 1, context_len) : context_len;
  }
  // The bias of a row, by token.
  __device__ const float* bias_of(uint32_t row) const {
    if (!bias) return nullptr;
    const uint32_t position = start + (first + row) / group;
    return bias + size_t(head_of(row)) * (2 * longest - 1) + (longest - 1 - position);
  }
};

// On tensor cores: warps of 16 rows, pages of keys and values on their way while the one before is
// worked on. Eight warps read a page half as often as four; four waste less on few rows.
template <uint32_t kHeadDim, uint32_t kWarps> struct TensorAttention {
  static constexpr uint32_t kThreads = kWarps * kWarpSize, kRows = kWarps * 16;
  static constexpr uint32_t kStride = kHeadDim + 8;  // so that eight rows lie in distinct banks
  static constexpr uint32_t kPageElements = kPageLen * kStride;

  bf16 *queries, *keys, *values;
  float accumulated[kHeadDim / 8][4];
  // Of rows lane / 4 and lane / 4 + 8 of the warp, in powers of two; sums over this lane's columns.
  float largest[2], sums[2];

  static __device__ uint32_t row_in_tile(uint32_t which) {
    return threadIdx.x / kWarpSize * 16 + threadIdx.x % kWarpSize / 4 + which * 8;
  }
  static __device__ uint32_t first_column() { return threadIdx.x % 4 * 2; }

  __device__ explicit TensorAttention(SharedMemory& shared) {
    queries = shared.take<bf16>(kRows * kStride, "queries");
    keys = shared.take<bf16>(2 * kPageElements, "keys");
    values = shared.take<bf16>(2 * kPageElements, "values");
  }

  __device__ void load_queries(const Tile& tile, const bf16* all, uint32_t columns) {
    for (uint32_t i = threadIdx.x; i < kRows * (kHeadDim / 8); i += kThreads) {
      const uint32_t row = i / (kHeadDim / 8), column = i % (kHeadDim / 8) * 8;
      const bool is_wanted = tile.first + row < tile.num_rows;
      const bf16* from = all;
      if (is_wanted)
        from += size_t(tile.row_of(row)) * columns + tile.head_of(row) * kHeadDim + column;
      copy_async(queries + row * kStride + column, from, is_wanted);
    }
  }

  __device__ void load_page(const Tile& tile, const Batch& batch, const Pages& pages,
                            uint32_t page, uint32_t buffer) {
    const bf16* from = context_keys<bf16>(pages, batch.pages[tile.first_page + page], tile.layer,
                                          tile.kv_head);
    for (uint32_t i = threadIdx.x; i < kPageLen * (kHeadDim / 8); i += kThreads) {
      const uint32_t token = i / (kHeadDim / 8), column = i % (kHeadDim / 8) * 8;
      const bool is_wanted = page * kPageLen + token < tile.context_len;
      const uint32_t to = buffer * kPageElements + token * kStride + column;
      const bf16* at = from + token * kHeadDim + column;
      copy_async(keys + to, at, is_wanted);
      copy_async(values + to, at + kPageLen * kHeadDim, is_wanted);
    }
  }

  // The scores of the warp's rows with a page, times `scale`, in powers of two.
  __device__ void score(const Tile& tile, const uint32_t (&fragments)[kHeadDim / 16][4],
                        uint32_t page, uint32_t buffer, float (&scores)[kPageLen / 8][4]) const {
    const uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (uint32_t n = 0; n < kPageLen / 8; n++)
      scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0;
#pragma unroll
    for (uint32_t n = 0; n < kPageLen / 8; n += 2) {
      const bf16* row = keys + buffer * kPageElements +
                        (n * 8 + lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
      for (uint32_t k = 0; k < kHeadDim / 16; k++) {
        uint32_t b[4];
        ldmatrix(b, row + k * 16);
        mma(scores[n], fragments[k], b[0], b[1]);
        mma(scores[n + 1], fragments[k], b[2], b[3]);
      }
    }
#pragma unroll
    for (uint32_t which = 0; which < 2; which++) {
      const uint32_t row = row_in_tile(which), reach = tile.reach_of(row);
      const float* bias = tile.first + row < tile.num_rows ? tile.bias_of(row) : nullptr;
      const uint32_t first_token = page * kPageLen + first_column();
      if (!bias && first_token - first_column() + kPageLen <= reach) {
#pragma unroll
        for (uint32_t n = 0; n < kPageLen / 8; n++) {
          scores[n][2 * which] *= tile.scale * kLog2E;
          scores[n][2 * which + 1] *= tile.scale * kLog2E;
        }
        continue;
      }
#pragma unroll
      for (uint32_t n = 0; n < kPageLen / 8; n++) {
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
          const uint32_t token = first_token + n * 8 + e;
          float& score = scores[n][2 * which + e];
          if (token >= reach) score = -INFINITY_F;
          else score = (score * tile.scale + (bias ? bias[token] : 0.0f)) * kLog2E;
        }
      }
    }
  }

  // Takes scores into the running softmax; they become weights.
  __device__ void weigh(float (&scores)[kPageLen / 8][4]) {
#pragma unroll
    for (uint32_t which = 0; which < 2; which++) {
      float most = largest[which];
#pragma unroll
      for (uint32_t n = 0; n < kPageLen / 8; n++)
        most = fmaxf(most, fmaxf(scores[n][2 * which], scores[n][2 * which + 1]));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      // A row that has seen no token yet keeps weights of zero.
      const float offset = most == -INFINITY_F ? 0.0f : most;
      const float share = exp2f(largest[which] - offset);
      float sum = 0;
#pragma unroll
      for (uint32_t n = 0; n < kPageLen / 8; n++) {
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
          const float weight = exp2f(scores[n][2 * which + e] - offset);
          scores[n][2 * which + e] = weight;
          sum += weight;
        }
      }
      sums[which] = sums[which] * share + sum;
      largest[which] = most;
#pragma unroll
      for (uint32_t d = 0; d < kHeadDim / 8; d++) {
        accumulated[d][2 * which] *= share;
        accumulated[d][2 * which + 1] *= share;
      }
    }
  }

  static __device__ uint32_t pair(float x, float y) {
    const bf16x2 both = __floats2bfloat162_rn(x, y);
    uint32_t bits;
    memcpy(&bits, &both, sizeof bits);
    return bits;
  }

  __device__ void accumulate(const float (&weights)[kPageLen / 8][4], uint32_t buffer) {
    const uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (uint32_t n = 0; n < kPageLen / 8; n += 2) {
      const uint32_t a[4] = {
          pair(weights[n][0], weights[n][1]), pair(weights[n][2], weights[n][3]),
          pair(weights[n + 1][0], weights[n + 1][1]), pair(weights[n + 1][2], weights[n + 1][3])};
      const bf16* row =
          values + buffer * kPageElements + (n * 8 + lane % 16) * kStride + lane / 16 * 8;
#pragma unroll
      for (uint32_t d = 0; d < kHeadDim / 8; d += 2) {
        uint32_t b[4];
        ldmatrix_transposed(b, row + d * 8);
        mma(accumulated[d], a, b[0], b[1]);
        mma(accumulated[d + 1], a, b[2], b[3]);
      }
    }
  }

  // Afterwards `accumulated` holds weighted sums, and `sums` the weights' sums of whole rows.
  __device__ void attend(const Tile& tile, const Batch& batch, const Pages& pages,
                         const bf16* all_queries, uint32_t query_columns) {
#pragma unroll
    for (uint32_t d = 0; d < kHeadDim / 8; d++)
      accumulated[d][0] = accumulated[d][1] = accumulated[d][2] = accumulated[d][3] = 0;
    largest[0] = largest[1] = -INFINITY_F;
    sums[0] = sums[1] = 0;
    load_queries(tile, all_queries, query_columns);
    if (tile.page_from < tile.page_to) load_page(tile, batch, pages, tile.page_from, 0);
    commit_copies();
    uint32_t fragments[kHeadDim / 16][4];
    for (uint32_t page = tile.page_from; page < tile.page_to; page++) {
      const uint32_t buffer = (page - tile.page_from) % 2;
      if (page + 1 < tile.page_to) load_page(tile, batch, pages, page + 1, buffer ^ 1);
      commit_copies();
      wait_for_copies<1>();
      __syncthreads();
      if (page == tile.page_from) load_fragments(fragments);
      float scores[kPageLen / 8][4];
      score(tile, fragments, page, buffer, scores);
      weigh(scores);
      accumulate(scores, buffer);
      __syncthreads();  // nobody reads this buffer any more: the next round fills it
    }
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll
    for (uint32_t which = 0; which < 2; which++) {
      sums[which] += __shfl_xor_sync(kAllLanes, sums[which], 1);
      sums[which] += __shfl_xor_sync(kAllLanes, sums[which], 2);
    }
  }

  __device__ void load_fragments(uint32_t (&fragments)[kHeadDim / 16][4]) const {
    const uint32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (uint32_t k = 0; k < kHeadDim / 16; k++)
      ldmatrix(fragments[k], queries + (warp * 16 + lane % 16) * kStride + k * 16 + lane / 16 * 8);
  }

  // Calls `each(column, x, y)` for this lane's pairs of columns of a row, times `factor`.
  template <class Each>
  __device__ void for_each_pair(uint32_t which, float factor, Each each) const {
#pragma unroll
    for (uint32_t d = 0; d < kHeadDim / 8; d++)
      each(d * 8 + first_column(), accumulated[d][2 * which] * factor,
           accumulated[d][2 * which + 1] * factor);
  }
};

// For any size of heads and any number type, in f32 without tensor cores: four warps, 16 rows.
template <class T> struct PlainAttention {
  static constexpr uint32_t kThreads = 128, kRows = 16;

  float *queries, *accumulated, *page_values, *weights;
  float *largest, *sums, *shares;  // [kRows]; natural logarithms
  uint32_t head_dim;

  __device__ PlainAttention(SharedMemory& shared, uint32_t head_dim) : head_dim(head_dim) {
    queries = shared.take<float>(kRows * head_dim, "queries");
    accumulated = shared.take<float>(kRows * head_dim, "accumulated");
    page_values = shared.take<float>(kPageLen * (head_dim + 1), "page");
    weights = shared.take<float>(kRows * kPageLen, "weights");
    largest = shared.take<float>(kRows, "largest");
    sums = shared.take<float>(kRows, "sums");
    shares = shared.take<float>(kRows, "shares");
  }

  __device__ void load_page(const T* from, uint32_t tokens) {
    for (uint32_t i = threadIdx.x; i < tokens * head_dim; i += kThreads)
      page_values[i / head_dim * (head_dim + 1) + i % head_dim] = widened(from[i]);
  }

  __device__ void attend(const Tile& tile, const Batch& batch, const Pages& pages,
                         const T* all_queries, uint32_t query_columns) {
    const uint32_t rows = min(kRows, tile.num_rows - tile.first);
    for (uint32_t i = threadIdx.x; i < rows * head_dim; i += kThreads) {
      const uint32_t row = i / head_dim, column = i % head_dim;
      queries[i] = widened(all_queries[size_t(tile.row_of(row)) * query_columns +
                                       tile.head_of(row) * head_dim + column]);
      accumulated[i] = 0;
    }
    if (threadIdx.x < kRows) {
      largest[threadIdx.x] = -INFINITY_F;
      sums[threadIdx.x] = 0;
    }
    __syncthreads();
    for (uint32_t page = tile.page_from; page < tile.page_to; page++) {
      const T* keys = context_keys<T>(pages, batch.pages[tile.first_page + page], tile.layer,
                                      tile.kv_head);
      const uint32_t first_token = page * kPageLen;
      const uint32_t tokens = min(kPageLen, tile.context_len - first_token);
      load_page(keys, tokens);
      __syncthreads();
      for (uint32_t i = threadIdx.x; i < rows * kPageLen; i += kThreads) {
        const uint32_t row = i / kPageLen, token = i % kPageLen;
        float score = -INFINITY_F;
        if (token < tokens && first_token + token < tile.reach_of(row)) {
          score = 0;
          for (uint32_t d = 0; d < head_dim; d++)
            score += queries[row * head_dim + d] * page_values[token * (head_dim + 1) + d];
          const float* bias = tile.bias_of(row);
          score = score * tile.scale + (bias ? bias[first_token + token] : 0.0f);
        }
        weights[i] = score;
      }
      __syncthreads();
      load_page(values_behind(pages, keys), tokens);
      weigh(rows);
      __syncthreads();
      for (uint32_t i = threadIdx.x; i < rows * head_dim; i += kThreads) {
        const uint32_t row = i / head_dim, column = i % head_dim;
        float sum = accumulated[i] * shares[row];
        for (uint32_t token = 0; token < tokens; token++)
          sum += weights[row * kPageLen + token] * page_values[token * (head_dim + 1) + column];
        accumulated[i] = sum;
      }
      __syncthreads();
    }
  }

  // Takes the scores of a page into the running softmax, a warp a row.
  __device__ void weigh(uint32_t rows) {
    const uint32_t lane = threadIdx.x % kWarpSize;
    for (uint32_t row = threadIdx.x / kWarpSize; row < rows; row += kThreads / kWarpSize) {
      float* of_row = weights + row * kPageLen;
      const float x = of_row[lane], y = of_row[kWarpSize + lane];
      const float before = largest[row], most = fmaxf(before, warp_max(fmaxf(x, y)));
      const float offset = most == -INFINITY_F ? 0.0f : most;
      const float weight_x = expf(x - offset), weight_y = expf(y - offset);
      of_row[lane] = weight_x;
      of_row[kWarpSize + lane] = weight_y;
      const float sum = warp_sum(weight_x + weight_y);
      __syncwarp();
      if (lane == 0) {
        const float share = expf(before - offset);
        shares[row] = share;
        sums[row] = sums[row] * share + sum;
        largest[row] = most;
      }
    }
  }
};
