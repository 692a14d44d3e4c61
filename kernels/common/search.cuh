// The continuations of a step of a search, and their order.
#pragma once

#include "batch.cuh"

// The log of summed exponentials on its way: the largest, and the sum relative to it.
__device__ __forceinline__ float log_sum(const float2& parts) { return parts.x + logf(parts.y); }

__device__ __forceinline__ float2 joined(const float2& a, const float2& b) {
  const float largest = fmaxf(a.x, b.x);
  if (largest == -INFINITY_F) return make_float2(largest, a.y + b.y);
  return make_float2(largest, a.y * expf(a.x - largest) + b.y * expf(b.x - largest));
}

// Over all threads of a block of kThreads; every thread gets it. A value that is NaN makes the sum
// NaN.
template <uint32_t kThreads>
__device__ __forceinline__ float2 block_joined(float2 parts) {
  SHARED(float2, of_warps, kThreads / kWarpSize);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    parts = joined(parts, make_float2(__shfl_xor_sync(kAllLanes, parts.x, distance),
                                      __shfl_xor_sync(kAllLanes, parts.y, distance)));
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = parts;
  __syncthreads();
  parts = of_warps[0];
#pragma unroll
  for (uint32_t warp = 1; warp < kThreads / kWarpSize; warp++) parts = joined(parts, of_warps[warp]);
  __syncthreads();
  return parts;
}

// One more value.
__device__ __forceinline__ void join(float2& parts, float value) {
  if (value > parts.x) {
    parts.y = parts.y * expf(parts.x - value) + 1.0f;
    parts.x = value;
  } else if (value == -INFINITY_F) {
  } else {
    parts.y += expf(value - parts.x);  // NaN stays NaN
  }
}

// Tries.

__device__ __forceinline__ uint32_t num_children(const Trie& trie, uint32_t node) {
  return trie.first_edge[node + 1] - trie.first_edge[node];
}

__device__ __forceinline__ uint32_t child_by_code(const Trie& trie, uint32_t node, uint32_t code) {
  uint32_t low = trie.first_edge[node];
  const uint32_t end = trie.first_edge[node + 1];
  uint32_t high = end;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (trie.codes[middle] < code) low = middle + 1;
    else high = middle;
  }
  return low < end && trie.codes[low] == code ? low + 1 : kNone;
}

// The items below a node that `depth` codes lead to: from x to y.
__device__ __forceinline__ uint2 items_below(const Trie& trie, uint32_t node, uint32_t depth) {
  const uint32_t first_leaf = trie.depth_start[trie.num_levels];
  if (depth + 1 < trie.num_levels)
    return make_uint2(trie.first_item[node + depth], trie.first_item[node + depth + 1]);
  uint2 leaves;
  if (depth == trie.num_levels)
    leaves = make_uint2(node - first_leaf, node - first_leaf + 1);
  else
    leaves = make_uint2(trie.first_edge[node] + 1 - first_leaf,
                        trie.first_edge[node + 1] + 1 - first_leaf);
  if (!trie.leaf_item) return leaves;
  return make_uint2(trie.leaf_item[leaves.x], trie.leaf_item[leaves.y]);
}

__device__ __forceinline__ uint32_t rank(const Allowed& allowed, uint32_t position) {
  const uint32_t word = position / 64, group = word / 8;
  uint32_t count = allowed.counts[group];
  for (uint32_t i = group * 8; i < word; i++) count += __popcll(allowed.words[i]);
  if (position % 64 != 0)
    count += __popcll(allowed.words[word] & ((uint64_t(1) << position % 64) - 1));
  return count;
}

// Whether an allowed item is below a node: a node is legal if and only if its run has more members
// than are excluded of them.
__device__ __forceinline__ bool is_legal(const Trie& trie, const Allowed& allowed, uint32_t node,
                                         uint32_t depth) {
  if (node == kNone) return false;
  if (allowed.nodes && !(allowed.nodes[node / 64] >> node % 64 & 1)) return false;
  if (!allowed.words && allowed.num_excluded == 0) return true;
  const uint2 items = items_below(trie, node, depth);
  uint32_t count = items.y - items.x;
  if (allowed.words) count = rank(allowed, items.y) - rank(allowed, items.x);
  if (count == 0 || allowed.num_excluded == 0) return count > 0;
  const uint32_t from = lower_bound(allowed.excluded, allowed.num_excluded, items.x);
  const uint32_t to = lower_bound(allowed.excluded, allowed.num_excluded, items.y);
  return count > to - from;
}

__device__ __forceinline__ bool leads_to_listed(const Trie& trie, const Allowed& allowed,
                                                uint32_t node, uint32_t depth) {
  if (node == kNone) return false;
  const uint2 items = items_below(trie, node, depth);
  const uint32_t next = lower_bound(allowed.listed, allowed.num_listed, items.x);
  return next < allowed.num_listed && allowed.listed[next] < items.y;
}

// Continuations.

__device__ __forceinline__ uint32_t num_continuations(const Rule& rule, const uint2& place) {
  switch (rule.choices) {
    case kForced: return 1;
    case kOfTrie:
      return (place.x == kNone ? 0 : num_children(rule.base, place.x)) +
             (place.y == kNone ? 0 : num_children(rule.added, place.y));
    case kOccurring: return rule.num_occurring;
    default: return rule.num_codes;
  }
}

struct Continuation {
  uint32_t choice;  // a code, a token, or zero where it is forced
  uint2 place;
  bool exists;
};

// Continuation `index` of a beam at a place: the children in the compiled trie, then those that
// only the added items have.
__device__ __forceinline__ Continuation continuation(const Rule& rule, const uint2& place,
                                                     uint32_t index) {
  if (rule.choices == kOccurring) return {rule.occurring[index], place, true};
  if (rule.choices != kOfTrie) return {index, place, true};
  const uint32_t num_base = place.x == kNone ? 0 : num_children(rule.base, place.x);
  if (index < num_base) {
    const uint32_t edge = rule.base.first_edge[place.x] + index;
    const uint32_t code = rule.base.codes[edge];
    const uint32_t twin = place.y == kNone ? kNone : child_by_code(rule.added, place.y, code);
    return {code, make_uint2(edge + 1, twin), true};
  }
  const uint32_t edge = rule.added.first_edge[place.y] + index - num_base;
  const uint32_t code = rule.added.codes[edge];
  const bool is_twin = place.x != kNone && child_by_code(rule.base, place.x, code) != kNone;
  return {code, make_uint2(kNone, edge + 1), !is_twin};
}

// The place that a choice leads to.
__device__ __forceinline__ uint2 place_after(const Rule& rule, const uint2& place,
                                             uint32_t choice) {
  if (rule.choices != kOfTrie) return place;
  return make_uint2(place.x == kNone ? kNone : child_by_code(rule.base, place.x, choice),
                    place.y == kNone ? kNone : child_by_code(rule.added, place.y, choice));
}

__device__ __forceinline__ bool leads_to_listed(const Rule& rule, const uint2& place,
                                                uint32_t depth) {
  return leads_to_listed(rule.base, rule.base_allowed, place.x, depth) ||
         leads_to_listed(rule.added, rule.added_allowed, place.y, depth);
}

// `depth`: codes that lead to the continuation.
__device__ __forceinline__ bool is_legal(const Rule& rule, const uint2& place, uint32_t depth) {
  if (rule.choices != kOfTrie) return true;
  if (rule.flags & kHasList) return leads_to_listed(rule, place, depth);
  return is_legal(rule.base, rule.base_allowed, place.x, depth) ||
         is_legal(rule.added, rule.added_allowed, place.y, depth);
}

__device__ __forceinline__ bool is_offered(const Rule& rule, const uint2& place, uint32_t depth) {
  if (rule.choices != kOfTrie || !(rule.flags & kHasCandidates))
    return is_legal(rule, place, depth);
  return leads_to_listed(rule, place, depth);
}

// The column of a choice among those of the step, or kNone where the model cannot write it.
__device__ __forceinline__ uint32_t column_of(const Rule& rule, uint32_t choice) {
  if (rule.choices == kOfVocabulary || rule.choices == kForced || !rule.columns)
    return choice < rule.num_codes ? choice : kNone;
  if (choice >= rule.num_codes) return kNone;
  const uint32_t column = rule.columns[choice];
  return rule.choices == kNamed && column != kNone ? choice : column;
}

// The token of a choice that the model can write.
__device__ __forceinline__ uint32_t token_of(const Rule& rule, uint32_t choice) {
  if (rule.choices == kNamed) return rule.columns[choice];
  const uint32_t column = column_of(rule, choice);
  return rule.first_token + (column == kNone ? 0 : column);
}

__device__ __forceinline__ float logit_of(const Rule& rule, uint32_t beam, uint32_t column) {
  return rule.logits[size_t(beam) * rule.logits_stride + column];
}

// Order: one number a continuation, the smaller the better: score, falling, then place.

__device__ __forceinline__ uint64_t key_of(float score, uint32_t place) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  const uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(~rising) << 32 | place;
}
__device__ __forceinline__ float score_of(uint64_t key) {
  const uint32_t rising = ~uint32_t(key >> 32);
  return __uint_as_float(rising >> 31 ? rising & 0x7fffffffu : ~rising);
}

// Noise (Kool et al. 2019), the same as in src/backend/noise.rs.

__device__ __forceinline__ uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
__device__ __forceinline__ uint64_t extended(uint64_t prefix, uint32_t token) {
  return mixed(prefix + (uint64_t(token) + 1) * 0x9e3779b97f4a7c15ull);
}
__device__ __forceinline__ double gumbel(uint64_t prefix, uint32_t choice) {
  const uint64_t bits = mixed(extended(prefix, choice) ^ 0xd1b54a32d192ed03ull);
  const double uniform = (double(bits >> 12) + 0.5) / 4503599627370496.0;
  return -log(-log(uniform));
}
// Noise that is at most `ceiling`, from noise whose greatest is `greatest`.
__device__ __forceinline__ double under_ceiling(double noise, double greatest, double ceiling) {
  const double v = ceiling - noise + log1p(-exp(noise - greatest));
  return ceiling - fmax(v, 0.0) - log1p(exp(-fabs(v)));
}

// The best keys of a stream, in shared memory: those below the threshold are kept, and when there
// is room for no more chunk of kChunk they are sorted and cut.
template <uint32_t kThreads, uint32_t kChunk> struct BestKeys {
  uint64_t* keys;
  uint32_t* count;
  uint32_t capacity, width;
  uint64_t threshold;

  // `capacity`: a power of two, at least width + kChunk.
  __device__ BestKeys(SharedMemory& shared, uint32_t width, uint32_t capacity)
      : capacity(capacity), width(width), threshold(~uint64_t(0)) {
    keys = shared.take<uint64_t>(capacity, "keys");
    count = shared.take<uint32_t>(1, "count");
    if (threadIdx.x == 0) *count = 0;
    __syncthreads();
  }

  // All lanes of a warp come here; at most kChunk keys a block between two `make_room`.
  __device__ void offer(uint64_t key, bool is_offered) {
    is_offered = is_offered && key < threshold;
    const uint32_t lanes = __ballot_sync(kAllLanes, is_offered);
    if (lanes == 0) return;
    const uint32_t lane = threadIdx.x % kWarpSize;
    const int leader = __ffs(int(lanes)) - 1;
    uint32_t first = 0;
    if (int(lane) == leader) first = atomicAdd(count, uint32_t(__popc(lanes)));
    first = __shfl_sync(kAllLanes, first, leader);
    if (is_offered) keys[first + __popc(lanes & ((1u << lane) - 1))] = key;
  }

  __device__ void make_room() {
    __syncthreads();
    if (*count + kChunk > capacity) cut();
    __syncthreads();
  }

  // Sorts what is there, and keeps the best `width`. Begins with a barrier passed.
  __device__ void cut() {
    const uint32_t have = *count;
    if (have == 0) return;
    uint32_t length = 1;
    while (length < have) length *= 2;
    for (uint32_t i = have + threadIdx.x; i < length; i += kThreads) keys[i] = ~uint64_t(0);
    sort(keys, length);
    if (have >= width) threshold = keys[width - 1];
    if (threadIdx.x == 0) *count = min(have, width);
    __syncthreads();
  }

  // Ascending; `length` is a power of two (Batcher 1968). Begins and ends with a barrier. Up to a
  // distance of a warp's lanes, a warp compares keys of its own alone, and waits for no other.
  static __device__ void sort(uint64_t* keys, uint32_t length) {
    __syncthreads();
    for (uint32_t run = 2; run <= length; run *= 2)
      for (uint32_t distance = run / 2; distance > 0; distance /= 2) {
        const uint32_t last_distance = distance == run / 2 ? 1 : 2 * distance;
        if (max(distance, last_distance) > kWarpSize) __syncthreads();
        else __syncwarp();
        for (uint32_t i = threadIdx.x; i < length / 2; i += kThreads) {
          const uint32_t low = 2 * i - (i & (distance - 1));
          const uint64_t a = keys[low], b = keys[low + distance];
          const bool is_rising = (low & run) == 0;
          if ((a > b) == is_rising) {
            keys[low] = b;
            keys[low + distance] = a;
          }
        }
      }
    __syncthreads();
  }
};
