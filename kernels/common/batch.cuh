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

// Where the keys and values of a row of a pass are kept: those of prompts in contexts, those of beams
// in tails.
template <class T> struct KvPlace {
  T* keys;  // of the first head, or null where none are kept
  size_t to_next_head, to_values;

  __device__ T* at(uint32_t head, bool is_value) const {
    return keys + head * to_next_head + (is_value ? to_values : 0);
  }
};

template <class T>
__device__ __forceinline__ KvPlace<T> kv_place(const Batch& batch, const Pages& pages,
                                               uint32_t layer, uint32_t row) {
  const uint32_t head_dim = pages.head_dim;
  if (row < batch.num_prompt_rows) {
    const Prompt& prompt = prompt_of_row(batch, row);
    if (!prompt.is_kept) return {nullptr, 0, 0};
    const uint32_t position = prompt.start + row - prompt.first_row;
    const uint32_t page = batch.pages[prompt.first_page + position / kPageLen];
    T* keys = context_keys<T>(pages, page, layer, 0) + position % kPageLen * head_dim;
    return {keys, size_t(2) * kPageLen * head_dim, size_t(kPageLen) * head_dim};
  }
  const Search* search = search_of_row(batch, row);
  if (!search) return {nullptr, 0, 0};
  const uint32_t at = beam_row(batch, *search, search->num_steps, row - search->first_row);
  return {tail_keys<T>(pages, at, layer), head_dim, size_t(pages.num_kv_heads) * head_dim};
}

// Whether rows of heads, and the memory that they are kept in, are whole packs of 16 bytes.
template <class T> __device__ __forceinline__ bool are_packed(const Pages& pages, const T* heads) {
  return are_packs(heads, pages.head_dim) && are_packs(static_cast<T*>(pages.contexts), 0) &&
         are_packs(static_cast<T*>(pages.tails), 0);
}

// Keeps the keys and values of a row of a pass, `kv`: those of all heads. All threads of a block
// take part.
template <class T>
__device__ __forceinline__ void store_kv(const Batch& batch, const Pages& pages, uint32_t layer,
                                         uint32_t row, const T* kv) {
  const KvPlace<T> to = kv_place<T>(batch, pages, layer, row);
  if (!to.keys) return;
  const uint32_t head_dim = pages.head_dim, num_heads = pages.num_kv_heads;
  auto copy = [&](auto unit) {
    using Unit = decltype(unit);
    constexpr uint32_t kCount = sizeof(Unit) / sizeof(T);
    for (uint32_t i = threadIdx.x * kCount; i < 2 * num_heads * head_dim; i += blockDim.x * kCount) {
      const uint32_t head = i / head_dim;
      T* at = to.at(head % num_heads, head >= num_heads) + i % head_dim;
      *reinterpret_cast<Unit*>(at) = *reinterpret_cast<const Unit*>(kv + i);
    }
  };
  if (are_packed(pages, kv)) copy(uint4{});
  else copy(T{});
}
