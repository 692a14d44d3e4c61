// Which row of a pass belongs to which prompt or slot, and the memory of contexts, tails and beams.
#pragma once

#include "../generated/shared.cuh"

__device__ __forceinline__ const Prompt& prompt_of_row(const Batch& batch, uint32_t row) {
  uint32_t low = 0, high = batch.num_prompts;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (batch.prompts[middle].first_row <= row) low = middle;
    else high = middle;
  }
  return batch.prompts[low];
}

// The search whose room a row is in, or null.
__device__ __forceinline__ const Search* search_of_row(const Batch& batch, uint32_t row) {
  if (batch.num_searches == 0) return nullptr;
  uint32_t low = 0, high = batch.num_searches;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (batch.searches[middle].first_row <= row) low = middle;
    else high = middle;
  }
  const Search* search = batch.searches + low;
  return row >= search->first_row && row < search->first_row + search->num_rows ? search : nullptr;
}

// The first page of a position.
__device__ __forceinline__ uint32_t position_page(const Batch& batch, const Search& search,
                                                  uint32_t position) {
  return batch.pages[search.first_tail_page + search.position_page[position]];
}

// The row of a beam among those of all tail pages.
__device__ __forceinline__ uint32_t beam_row(const Batch& batch, const Search& search,
                                             uint32_t position, uint32_t beam) {
  const uint32_t at = search.first_tail_page + search.position_page[position];
  return batch.pages[at + beam / kTailPageLen] * kTailPageLen + beam % kTailPageLen;
}

// The beams that a search has: a search that has taken no step has one.
__device__ __forceinline__ uint32_t num_beams(const Batch& batch, const Beams& beams,
                                              const Search& search) {
  return search.num_steps == 0
             ? 1
             : beams.counts[position_page(batch, search, search.num_steps)];
}

template <class T>
__device__ __forceinline__ T* context_keys(const Pages& pages, uint32_t page, uint32_t layer,
                                           uint32_t head) {
  const size_t at = (size_t(page) * pages.context_sets + layer) * pages.num_kv_heads + head;
  return static_cast<T*>(pages.contexts) + at * 2 * kPageLen * pages.head_dim;
}
template <class T> __device__ __forceinline__ T* values_behind(const Pages& pages, T* keys) {
  return keys + kPageLen * pages.head_dim;
}

// `row` counts the rows of all pages. The keys of all heads, then the values.
template <class T>
__device__ __forceinline__ T* tail_keys(const Pages& pages, uint32_t row, uint32_t layer) {
  const size_t at = (size_t(row / kTailPageLen) * pages.tail_layers + layer) * kTailPageLen +
                    row % kTailPageLen;
  return static_cast<T*>(pages.tails) + at * 2 * pages.num_kv_heads * pages.head_dim;
}

// Writes a token's keys and values, `kv`, into a context's page, a `Unit` at a time.
template <class Unit, class T>
__device__ __forceinline__ void store_in_page(const Pages& pages, uint32_t page, uint32_t layer,
                                              uint32_t token, const T* kv) {
  const uint32_t per_unit = sizeof(Unit) / sizeof(T), head_dim = pages.head_dim;
  const uint32_t kv_dim = pages.num_kv_heads * head_dim;
  for (uint32_t i = threadIdx.x * per_unit; i < 2 * kv_dim; i += blockDim.x * per_unit) {
    const uint32_t column = i % kv_dim;
    T* keys = context_keys<T>(pages, page, layer, column / head_dim);
    T* to = (i < kv_dim ? keys : values_behind(pages, keys)) + token * head_dim + column % head_dim;
    *reinterpret_cast<Unit*>(to) = *reinterpret_cast<const Unit*>(kv + i);
  }
}

// Keeps the keys and values of a row of a pass, `kv`: those of all heads. All threads of a block
// take part.
template <class T>
__device__ __forceinline__ void store_kv(const Batch& batch, const Pages& pages, uint32_t layer,
                                         uint32_t row, const T* kv) {
  const uint32_t head_dim = pages.head_dim, kv_dim = pages.num_kv_heads * head_dim;
  if (row < batch.num_prompt_rows) {
    const Prompt& prompt = prompt_of_row(batch, row);
    if (!prompt.is_kept) return;
    const uint32_t position = prompt.start + row - prompt.first_row;
    const uint32_t page = batch.pages[prompt.first_page + position / kPageLen];
    const bool is_packed = are_packs(kv, head_dim) && are_packs(static_cast<T*>(pages.contexts), 0);
    if (is_packed) store_in_page<uint4>(pages, page, layer, position % kPageLen, kv);
    else store_in_page<T>(pages, page, layer, position % kPageLen, kv);
    return;
  }
  const Search* search = search_of_row(batch, row);
  if (!search) return;
  const uint32_t at = beam_row(batch, *search, search->num_steps, row - search->first_row);
  T* keys = tail_keys<T>(pages, at, layer);
  copy_row(keys, kv, 2 * kv_dim);
}
