// Attention of a tile by warpgroups: Hopper's products of 64 rows with a matrix in shared memory, which
// run while the warps go on (FlashAttention-3, Shah et al. 2024).
#pragma once

#include "attention.cuh"

#if HAS_WARPGROUPS

// A warpgroup has 64 rows, and computes a row as any other number of warpgroups does: a result does
// not depend on the size of its tile. Tails are taken in with products of single warps, as in
// `TensorAttention`.
template <uint32_t kHeadDim, uint32_t kWarpgroups>
struct WarpgroupAttention
    : TensorAttention<kHeadDim, 16, 4 * kWarpgroups, Buffering::kSwizzled, kWarpgroups + 1,
                      kWarpgroups + 2> {
  // Pages on their way: as many as there is shared memory for, with two blocks of one warpgroup a
  // processor, or one block of two.
  static constexpr uint32_t kPagesAhead = kWarpgroups;
  // The keys of a page are read beside the values of the page before it.
  static constexpr uint32_t kKeyBuffers = kPagesAhead + 1, kValueBuffers = kPagesAhead + 2;
  using Base = TensorAttention<kHeadDim, 16, 4 * kWarpgroups, Buffering::kSwizzled, kKeyBuffers,
                               kValueBuffers>;
  static constexpr uint32_t kWarpgroupRows = 64;
  static constexpr uint32_t kPanelBytes = kPageLen * kSwizzledRowBytes;
  static constexpr uint32_t kPageBytes = Base::kPageElements * sizeof(bf16);
  // A page's weights, for a product each 16 tokens.
  uint32_t weights[kPageLen / 16][4];
  // Where the page is that is asked for next: known a page ahead, so that nothing waits for it.
  uint32_t next_page;

  __device__ explicit WarpgroupAttention(SharedMemory& shared) : Base(shared) {}

  // The same in all lanes, and the compiler knows: products must not stand where lanes may part.
  static __device__ uint32_t first_row_of_warpgroup() {
    return __shfl_sync(kAllLanes, threadIdx.x / (4 * kWarpSize), 0) * kWarpgroupRows;
  }

  // Asks for the queries and the first pages.
  __device__ void begin(const Tile& tile, const Batch& batch, const Pages& pages,
                        const bf16* all_queries, uint32_t query_columns) {
    Base::load_queries(tile, all_queries, query_columns);
#pragma unroll
    for (uint32_t ahead = 0; ahead < kPagesAhead; ahead++) {
      const uint32_t page = tile.page_from + ahead;
      if (page < tile.page_to)
        Base::load_page(Base::page_at(tile, batch, pages, page), page, tile.context_len, ahead,
                        ahead);
      commit_copies();
    }
    find_page(tile.page_from + kPagesAhead, tile, batch);
    Base::reset();
  }

  // Looks up where a page is, if there is one.
  __device__ void find_page(uint32_t page, const Tile& tile, const Batch& batch) {
    if (page < tile.page_to) next_page = batch.pages[tile.first_page + page];
  }

  // The products of the warpgroup's queries and the keys in a buffer.
  __device__ void ask_for_scores(uint32_t buffer, float (&scores)[kPageLen / 8][4]) const {
    const uint32_t from = shared_address(Base::keys) + buffer * kPageBytes;
#pragma unroll
    for (uint32_t k = 0; k < kHeadDim / 16; k++) {
      const uint32_t at = from + k * 16 / kPanel * kPanelBytes + k * 16 % kPanel * 2;
      multiply_async<false>(scores, Base::fragments[0][k], swizzled_matrix(at, 0), k > 0);
    }
    commit_products();
  }

  // Adds the weights' products with the values in a buffer.
  __device__ void ask_for_sums(uint32_t buffer) {
    const uint32_t from = shared_address(Base::values) + buffer * kPageBytes;
#pragma unroll
    for (uint32_t n = 0; n < kPageLen / 16; n++)
      multiply_async<true>(Base::accumulated[0], weights[n],
                           swizzled_matrix(from + n * 16 * kSwizzledRowBytes, kPanelBytes), true);
    commit_products();
  }

  // Waits until the next page is there, and nobody reads what `load_next` writes any more.
  __device__ void wait_for_page() {
    wait_for_copies<kPagesAhead - 1>();
    show_to_products();
    __syncthreads();
  }

  // Asks for the page that is so many ahead of one, if it is there.
  __device__ void load_next(uint32_t page, const Tile& tile, const Batch& batch,
                            const Pages& pages) {
    const uint32_t next = page + kPagesAhead;
    if (next < tile.page_to)
      Base::load_page(context_keys<bf16>(pages, next_page, tile.layer, tile.kv_head), next,
                      tile.context_len, (next - tile.page_from) % kKeyBuffers,
                      (next - tile.page_from) % kValueBuffers);
    commit_copies();
    find_page(next + 1, tile, batch);
  }

  // Takes in the pages of the context.
  __device__ void attend(const Tile& tile, const Batch& batch, const Pages& pages) {
    if (tile.page_from >= tile.page_to) return;
    // All rows of the warp see what its first row sees. None of the warpgroup sees more than its last
    // row, which may be a page less than the block's last row sees.
    const uint32_t seen_by_all = tile.bias ? 0 : tile.reach_of(Base::first_row_of_warp());
    const uint32_t seen_by_any = tile.reach_of(first_row_of_warpgroup() + kWarpgroupRows - 1);
    const uint32_t page_end = min(tile.page_to, (seen_by_any + kPageLen - 1) / kPageLen);
    const float factor = tile.bias ? 1.0f : tile.scale * kLog2E;
    float scores[1][kPageLen / 8][4], shares[Base::kLaneRows];
    uint32_t page = tile.page_from;
    wait_for_page();
    Base::keep_queries();
    begin_products();
    ask_for_scores(0, scores[0]);
    load_next(page, tile, batch, pages);
    wait_for_products<0>(scores[0]);
    weigh_page(tile, page, seen_by_all, factor, scores, shares);
    narrow_weights(scores[0]);
    for (page++; page < page_end; page++) {
      wait_for_page();
      begin_products();
      ask_for_scores((page - tile.page_from) % kKeyBuffers, scores[0]);
      ask_for_sums((page - 1 - tile.page_from) % kValueBuffers);
      load_next(page, tile, batch, pages);
      wait_for_products<1>(scores[0]);
      const bool is_larger = weigh_page(tile, page, seen_by_all, factor, scores, shares);
      wait_for_products<0>(Base::accumulated[0]);
      if (is_larger) Base::rescale(shares);
      narrow_weights(scores[0]);
    }
    begin_products();
    ask_for_sums((page - 1 - tile.page_from) % kValueBuffers);
    wait_for_products<0>(Base::accumulated[0]);
    for (; page < tile.page_to; page++) wait_for_page();  // with the other warpgroup
  }

  // Takes the scores of a page into the running softmax, as far as rows see it.
  __device__ bool weigh_page(const Tile& tile, uint32_t page, uint32_t seen_by_all, float factor,
                             float (&scores)[1][kPageLen / 8][4],
                             float (&shares)[Base::kLaneRows]) {
    const uint32_t first_token = page * kPageLen;
    if (first_token + kPageLen > seen_by_all)
      Base::template mask<kPageLen>(tile, first_token, scores);
    return Base::template weigh<kPageLen>(scores, factor, shares);
  }

  // Makes the weights of a page what a product takes.
  __device__ void narrow_weights(const float (&scores)[kPageLen / 8][4]) {
#pragma unroll
    for (uint32_t n = 0; n < kPageLen / 16; n++)
      Base::template narrow<kPageLen>(weights[n], scores, 2 * n);
  }
};

#endif
