// Attention of a tile of queries over the paged context of one KV head, by online softmax (Milakov
// & Gimelshein 2018; FlashAttention, Dao et al. 2022). Prompts and beams share it.
//
// Query heads that share a KV head stand in one tile with it: row r of a unit's queries is query
// head `r % group` of item `r / group`, an item being a prompt's token or a beam. So a page is read
// once for all of them.
#pragma once

#include "batch.cuh"

constexpr uint32_t kPanel = kSwizzledRowBytes / sizeof(bf16);  // columns side by side where swizzled
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

// How pages lie in shared memory: rows padded so that eight of them lie in distinct banks, or as
// products of warpgroups want them (`swizzled_matrix` in device.cuh), in panels of 64 columns.
enum class Buffering { kPadded, kSwizzled };

// On tensor cores: warps of 16 or 32 rows, four of them by default. With 32, a fragment of keys or
// values that a warp fetches from shared memory serves two products; with 16 there are twice as many
// tiles for a device that is not full. Both do the same arithmetic for a row in the same order, so a
// result does not depend on the size of its tile. The next page is copied while one is worked on.
template <uint32_t kHeadDim, uint32_t kRowsPerWarp, uint32_t kNumWarps = 4,
          Buffering kBuffering = Buffering::kPadded, uint32_t kKeyBuffers = 2, uint32_t kValueBuffers = 2>
struct TensorAttention {
  static constexpr uint32_t kHead = kHeadDim, kWarps = kNumWarps, kThreads = kWarps * kWarpSize;
  static constexpr uint32_t kWarpRows = kRowsPerWarp, kMmas = kWarpRows / 16;
  static constexpr uint32_t kRows = kWarps * kWarpRows;
  static constexpr bool kIsSwizzled = kBuffering == Buffering::kSwizzled;
  static constexpr uint32_t kStride = kHeadDim + 8;  // of queries, and of padded rows
  static constexpr uint32_t kRowElements = kIsSwizzled ? kPanel : kStride;
  static constexpr uint32_t kPageElements = kPageLen * (kIsSwizzled ? kHeadDim : kStride);
  static constexpr uint32_t kBufferRows = kKeyBuffers * kPageLen;
  static constexpr uint32_t kLaneRows = 2 * kMmas;
  // Copies of 16 bytes: a thread copies one column of every kRowsAtOnce-th row.
  static constexpr uint32_t kCopies = kHeadDim / 8, kRowsAtOnce = kThreads / kCopies;
  // Tokens that are scored, weighed and summed up at a time; with 64, 32 rows a warp would spill.
  static constexpr uint32_t kStep = 32;
  // There are registers for the queries of 16 rows; those of 32 are fetched at each step.
  static constexpr bool kKeepsQueries = kMmas == 1;

  bf16 *queries, *keys, *values;
  float accumulated[kMmas][kHeadDim / 8][4];
  // Softmax of this lane's rows, in powers of two: an offset near the largest score; sums over its
  // columns.
  float largest[kLaneRows], sums[kLaneRows];
  uint32_t fragments[kKeepsQueries ? kMmas : 1][kKeepsQueries ? kHeadDim / 16 : 1][4];

  static __device__ uint32_t first_row_of_warp() { return threadIdx.x / kWarpSize * kWarpRows; }
  // Returns one of a lane's rows.
  static __device__ uint32_t row_in_tile(uint32_t which) {
    return first_row_of_warp() + which * 8 + threadIdx.x % kWarpSize / 4;
  }
  static __device__ uint32_t first_column() { return threadIdx.x % 4 * 2; }
  static __device__ uint32_t copied_row() { return threadIdx.x / kCopies; }
  static __device__ uint32_t copied_column() { return threadIdx.x % kCopies * 8; }

  // Where a column of a row of the buffers is.
  static __device__ uint32_t place(uint32_t row, uint32_t column) {
    if constexpr (!kIsSwizzled) return row * kStride + column;
    return row / kPageLen * kPageElements + column / kPanel * (kPageLen * kPanel) +
           row % kPageLen * kPanel + (column % kPanel ^ row % 8 * 8);
  }

  __device__ explicit TensorAttention(SharedMemory& shared) {
    constexpr uint32_t kAlignment = kIsSwizzled ? kSwizzledBytes : 128;
    keys = shared.take<bf16>(kKeyBuffers * kPageElements, "keys", kAlignment);
    values = shared.take<bf16>(kValueBuffers * kPageElements, "values", kAlignment);
    queries = shared.take<bf16>(kRows * kStride, "queries");
  }

  __device__ void load_queries(const Tile& tile, const bf16* all, uint32_t columns) {
    const uint32_t group = tile.group;
    uint32_t item = (tile.first + copied_row()) / group;
    uint32_t head = tile.first + copied_row() - item * group;
    const uint32_t items = kRowsAtOnce / group, heads = kRowsAtOnce - items * group;
    all += tile.kv_head * group * kHeadDim + copied_column();
#pragma unroll
    for (uint32_t j = 0; j < kRows / kRowsAtOnce; j++) {
      const uint32_t row = copied_row() + j * kRowsAtOnce;
      const bool is_wanted = tile.first + row < tile.num_rows;
      const size_t at = size_t(tile.first_item_row + item) * columns + head * kHeadDim;
      copy_async(queries + row * kStride + copied_column(), is_wanted ? all + at : all, is_wanted);
      item += items;
      head += heads;
      if (head >= group) {
        head -= group;
        item++;
      }
    }
  }

  // Copies a page of keys and values; tokens behind the context's end become zeros.
  __device__ void load_page(const bf16* from, uint32_t page, uint32_t context_len,
                            uint32_t key_buffer, uint32_t value_buffer) {
    from += copied_row() * kHeadDim + copied_column();
    static_assert(kRowsAtOnce % 8 == 0);  // a thread's rows are swizzled alike
    const uint32_t to = place(copied_row(), copied_column());
    bf16* to_keys = keys + key_buffer * kPageElements + to;
    bf16* to_values = values + value_buffer * kPageElements + to;
    const uint32_t first_token = page * kPageLen + copied_row();
#pragma unroll
    for (uint32_t j = 0; j < kPageLen / kRowsAtOnce; j++) {
      const bool is_wanted = first_token + j * kRowsAtOnce < context_len;
      copy_async(to_keys + j * kRowsAtOnce * kRowElements, from + j * kRowsAtOnce * kHeadDim,
                 is_wanted);
    }
#pragma unroll
    for (uint32_t j = 0; j < kPageLen / kRowsAtOnce; j++) {
      const bool is_wanted = first_token + j * kRowsAtOnce < context_len;
      copy_async(to_values + j * kRowsAtOnce * kRowElements,
                 from + (kPageLen + j * kRowsAtOnce) * kHeadDim, is_wanted);
    }
  }

  __device__ void load_fragments(uint32_t (&a)[4], uint32_t tile, uint32_t k) const {
    const uint32_t lane = threadIdx.x % kWarpSize;
    ldmatrix(a, queries + (first_row_of_warp() + tile * 16 + lane % 16) * kStride + k * 16 +
                    lane / 16 * 8);
  }
  __device__ void keep_queries() {
    if constexpr (kKeepsQueries) {
#pragma unroll
      for (uint32_t m = 0; m < kMmas; m++)
#pragma unroll
        for (uint32_t k = 0; k < kHeadDim / 16; k++) load_fragments(fragments[m][k], m, k);
    }
  }

  // The products of the warp's rows with keys, from a row of the buffers on.
  template <uint32_t kTokens>
  __device__ void score(uint32_t first, float (&scores)[kMmas][kTokens / 8][4]) const {
    const uint32_t lane = threadIdx.x % kWarpSize;
    const uint32_t row = first + lane % 8 + lane / 16 * 8, column = lane / 8 % 2 * 8;
#pragma unroll
    for (uint32_t m = 0; m < kMmas; m++)
#pragma unroll
      for (uint32_t n = 0; n < kTokens / 8; n++)
        scores[m][n][0] = scores[m][n][1] = scores[m][n][2] = scores[m][n][3] = 0;
#pragma unroll
    for (uint32_t k = 0; k < kHeadDim / 16; k++) {
      uint32_t a[kMmas][4];
#pragma unroll
      for (uint32_t m = 0; m < kMmas; m++) {
        if constexpr (kKeepsQueries) {
#pragma unroll
          for (uint32_t i = 0; i < 4; i++) a[m][i] = fragments[m][k][i];
        } else {
          load_fragments(a[m], m, k);
        }
      }
#pragma unroll
      for (uint32_t n = 0; n < kTokens / 8; n += 2) {
        uint32_t b[4];
        ldmatrix(b, keys + place(row + n * 8, column + k * 16));
#pragma unroll
        for (uint32_t m = 0; m < kMmas; m++) {
          mma(scores[m][n], a[m], b[0], b[1]);
          mma(scores[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Takes out what rows do not see. Where there is a bias, scores come out of it in powers of two.
  template <uint32_t kTokens>
  __device__ void mask(const Tile& tile, uint32_t first_token,
                       float (&scores)[kMmas][kTokens / 8][4]) const {
#pragma unroll
    for (uint32_t which = 0; which < kLaneRows; which++) {
      const uint32_t row = row_in_tile(which), reach = tile.reach_of(row);
      const float* bias = tile.first + row < tile.num_rows ? tile.bias_of(row) : nullptr;
#pragma unroll
      for (uint32_t n = 0; n < kTokens / 8; n++) {
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
          const uint32_t token = first_token + n * 8 + first_column() + e;
          float& score = scores[which / 2][n][which % 2 * 2 + e];
          if (token >= reach) score = -INFINITY_F;
          else if (bias) score = (score * tile.scale + bias[token]) * kLog2E;
        }
      }
    }
  }

  // Takes scores, times `factor` in powers of two, into the running softmax; they become weights.
  // Returns whether what any row of the warp has accumulated must be scaled by `shares`.
  template <uint32_t kTokens>
  __device__ bool weigh(float (&scores)[kMmas][kTokens / 8][4], float factor,
                        float (&shares)[kLaneRows]) {
    bool is_larger = false;
#pragma unroll
    for (uint32_t which = 0; which < kLaneRows; which++) {
      float most = -INFINITY_F;
#pragma unroll
      for (uint32_t n = 0; n < kTokens / 8; n++)
        most = fmaxf(most, fmaxf(scores[which / 2][n][which % 2 * 2],
                                 scores[which / 2][n][which % 2 * 2 + 1]));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2)) * factor;
      // Weights of up to 2^8 are as exact as those of up to 1: sums are scaled anew only where a
      // score is larger than that (FlashAttention-4). The first score always is.
      const bool is_largest = most > largest[which] + 8;
      const float before = largest[which];
      largest[which] = is_largest ? most : before;
      is_larger |= is_largest;
      // A row that has seen no token yet keeps weights of zero.
      const float offset = largest[which] == -INFINITY_F ? 0.0f : largest[which];
      const float share = exp2_approx(before - offset);
      shares[which] = is_largest ? share : 1.0f;
      float sum = 0;
#pragma unroll
      for (uint32_t n = 0; n < kTokens / 8; n++) {
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
          float& score = scores[which / 2][n][which % 2 * 2 + e];
          score = exp2_approx(fmaf(score, factor, -offset));
          sum += score;
        }
      }
      sums[which] = fmaf(sums[which], shares[which], sum);
    }
    return __ballot_sync(kAllLanes, is_larger) != 0;
  }

  __device__ void rescale(const float (&shares)[kLaneRows]) {
#pragma unroll
    for (uint32_t which = 0; which < kLaneRows; which++) {
#pragma unroll
      for (uint32_t d = 0; d < kHeadDim / 8; d++) {
        accumulated[which / 2][d][which % 2 * 2] *= shares[which];
        accumulated[which / 2][d][which % 2 * 2 + 1] *= shares[which];
      }
    }
  }

  template <uint32_t kTokens>
  __device__ void weigh_and_rescale(float (&scores)[kMmas][kTokens / 8][4], float factor) {
    float shares[kLaneRows];
    if (weigh<kTokens>(scores, factor, shares)) rescale(shares);
  }

  static __device__ uint32_t pair(float x, float y) {
    const bf16x2 both = __floats2bfloat162_rn(x, y);
    uint32_t bits;
    memcpy(&bits, &both, sizeof bits);
    return bits;
  }
  // 16 columns of weights, from column 8 n on, as a product takes them.
  template <uint32_t kTokens>
  static __device__ void narrow(uint32_t (&a)[4], const float (&weights)[kTokens / 8][4],
                                uint32_t n) {
    a[0] = pair(weights[n][0], weights[n][1]);
    a[1] = pair(weights[n][2], weights[n][3]);
    a[2] = pair(weights[n + 1][0], weights[n + 1][1]);
    a[3] = pair(weights[n + 1][2], weights[n + 1][3]);
  }

  // Adds values times weights, from a row of the buffers on.
  template <uint32_t kTokens>
  __device__ void accumulate(const float (&weights)[kMmas][kTokens / 8][4], uint32_t first) {
    const uint32_t lane = threadIdx.x % kWarpSize;
    const uint32_t row = first + lane % 16, column = lane / 16 * 8;
#pragma unroll
    for (uint32_t n = 0; n < kTokens / 8; n += 2) {
      uint32_t a[kMmas][4];
#pragma unroll
      for (uint32_t m = 0; m < kMmas; m++) narrow<kTokens>(a[m], weights[m], n);
#pragma unroll
      for (uint32_t d = 0; d < kHeadDim / 8; d += 2) {
        uint32_t b[4];
        ldmatrix_transposed(b, values + place(row + n * 8, column + d * 8));
#pragma unroll
        for (uint32_t m = 0; m < kMmas; m++) {
          mma(accumulated[m][d], a[m], b[0], b[1]);
          mma(accumulated[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Asks for the queries and the first page: `attend` comes next, with something between that need
  // not wait.
  __device__ void begin(const Tile& tile, const Batch& batch, const Pages& pages,
                        const bf16* all_queries, uint32_t query_columns) {
    load_queries(tile, all_queries, query_columns);
    if (tile.page_from < tile.page_to)
      load_page(page_at(tile, batch, pages, tile.page_from), tile.page_from, tile.context_len, 0,
                0);
    commit_copies();
    reset();
  }

  // Nothing is accumulated.
  __device__ void reset() {
#pragma unroll
    for (uint32_t m = 0; m < kMmas; m++)
#pragma unroll
      for (uint32_t d = 0; d < kHeadDim / 8; d++)
        accumulated[m][d][0] = accumulated[m][d][1] = accumulated[m][d][2] = accumulated[m][d][3] =
            0;
#pragma unroll
    for (uint32_t which = 0; which < kLaneRows; which++) {
      largest[which] = -INFINITY_F;
      sums[which] = 0;
    }
  }

  static __device__ const bf16* page_at(const Tile& tile, const Batch& batch, const Pages& pages,
                                        uint32_t page) {
    return context_keys<bf16>(pages, batch.pages[tile.first_page + page], tile.layer,
                              tile.kv_head);
  }

  // Takes in the pages of the context.
  __device__ void attend(const Tile& tile, const Batch& batch, const Pages& pages) {
    const uint32_t first_row = first_row_of_warp();
    // All rows of the warp see what its first row sees; none sees more than the last.
    const uint32_t seen_by_all = tile.bias ? 0 : tile.reach_of(first_row);
    const uint32_t seen_by_any = tile.reach_of(first_row + kWarpRows - 1);
    const float factor = tile.bias ? 1.0f : tile.scale * kLog2E;
    // Where a page is, is asked for a page ahead: keys are on their way without a wait for it.
    uint32_t next = 0;
    if (tile.page_from + 1 < tile.page_to) next = batch.pages[tile.first_page + tile.page_from + 1];
    for (uint32_t page = tile.page_from; page < tile.page_to; page++) {
      const uint32_t buffer = (page - tile.page_from) % 2;
      wait_for_copies<0>();
      __syncthreads();  // the page is there, and nobody reads the one before any more
      if (page + 1 < tile.page_to) {
        load_page(context_keys<bf16>(pages, next, tile.layer, tile.kv_head), page + 1,
                  tile.context_len, buffer ^ 1, buffer ^ 1);
        if (page + 2 < tile.page_to) next = batch.pages[tile.first_page + page + 2];
      }
      commit_copies();
      if (page == tile.page_from) keep_queries();
#pragma unroll
      for (uint32_t step = 0; step < kPageLen; step += kStep) {
        const uint32_t first_token = page * kPageLen + step, at = buffer * kPageLen + step;
        if (first_token >= seen_by_any) break;
        float scores[kMmas][kStep / 8][4];
        score<kStep>(at, scores);
        if (first_token + kStep > seen_by_all) mask<kStep>(tile, first_token, scores);
        weigh_and_rescale<kStep>(scores, factor);
        accumulate<kStep>(scores, at);
      }
    }
  }

  // Afterwards `accumulated` holds weighted sums, and `sums` the weights' sums of whole rows.
  __device__ void finish() {
#pragma unroll
    for (uint32_t which = 0; which < kLaneRows; which++) {
      sums[which] += __shfl_xor_sync(kAllLanes, sums[which], 1);
      sums[which] += __shfl_xor_sync(kAllLanes, sums[which], 2);
    }
  }

  // Calls `each(column, x, y)` for this lane's pairs of columns of a row, times `factor`.
  template <class Each>
  __device__ void for_each_pair(uint32_t which, float factor, Each each) const {
#pragma unroll
    for (uint32_t d = 0; d < kHeadDim / 8; d++)
      each(d * 8 + first_column(), accumulated[which / 2][d][which % 2 * 2] * factor,
           accumulated[which / 2][d][which % 2 * 2 + 1] * factor);
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
