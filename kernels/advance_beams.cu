// One step of a search: every legal continuation of every beam, and exactly the best of them all,
// equal scores by smaller semantic ID.
//
//   advance_beams_count    the beams' numbers of continuations, and where each one's begin
//   advance_beams_children the log of the summed exponentials of legal continuations, where wanted
//   advance_beams_expand   continuations are numbered through all beams and dealt out to blocks in
//                          chunks: the work is their number, not beams times the largest fan-out;
//                          each block keeps the best of what it saw
//   advance_beams_select   the best of all blocks, sorted, become the beams of the next position
//
// Nothing is truncated per beam; a block's threshold skips what cannot be among the best. Normalised
// over the vocabulary, a level or the children as the rule says; samples are Gumbel top-k without
// replacement (Kool et al. 2019).
#include "common/search.cuh"

namespace advance_beams {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kChunk = kContinuationsChunk;
// One block has all keys of a search to read: many at a time.
constexpr uint32_t kSelectThreads = 1024;

// One search, as all kernels see it.
struct Own {
  const Search& search;
  const Rule& rule;
  uint32_t count;  // of its beams

  __device__ Own(const Params& params, uint32_t index)
      : search(params.batch.searches[index]),
        rule(params.rules[index]),
        count(search.num_rows == 0 ? 0 : num_beams(params.batch, params.beams, search)) {}

  __device__ uint32_t row(const Params& params, uint32_t beam) const {
    return beam_row(params.batch, search, search.num_steps, beam);
  }
  __device__ uint2 place(const Params& params, uint32_t beam) const {
    if (search.num_steps > 0) return params.beams.places[row(params, beam)];
    return make_uint2(0, rule.flags & kHasAdded ? 0 : kNone);
  }
  __device__ float score(const Params& params, uint32_t beam) const {
    return search.num_steps > 0 ? params.beams.scores[row(params, beam)] : 0.0f;
  }
  __device__ uint32_t rank(const Params& params, uint32_t beam) const {
    return search.num_steps > 0 ? params.beams.ranks[row(params, beam)] : 0;
  }
  __device__ uint64_t prefix(const Params& params, uint32_t beam) const {
    return search.num_steps > 0 ? params.beams.prefixes[row(params, beam)] : rule.seed;
  }
  __device__ float2 sample(const Params& params, uint32_t beam) const {
    return search.num_steps > 0 ? params.beams.samples[row(params, beam)]
                                : make_float2(0.0f, 0.0f);
  }
  // What a beam's scores are normalised by.
  __device__ float normalizer(const Params& params, uint32_t beam) const {
    const uint32_t row = search.first_row + beam;
    switch (rule.normalizer) {
      case kVocabulary: return log_sum(params.vocabulary_sums[row]);
      case kLevel: return log_sum(params.level_sums[row]);
      case kChildren: return params.child_sums[row].x;
      default: return 0.0f;
    }
  }
  // The gain of a choice; a forced token that is certain gains nothing.
  __device__ float gain(float logit, float normalizer) const {
    return rule.normalizer == kCertain ? 0.0f : logit * rule.inverse_temperature - normalizer;
  }
  // The log-probability of a scaled logit over all legal continuations of a beam.
  __device__ float over_legal(const Params& params, uint32_t beam, float scaled) const {
    const uint32_t row = search.first_row + beam;
    switch (rule.choices) {
      case kOfTrie:
      case kOccurring: return scaled - params.child_sums[row].x;
      case kOfVocabulary: return scaled - log_sum(params.vocabulary_sums[row]);
      case kForced: return 0.0f;
      default: return scaled - log_sum(params.level_sums[row]);
    }
  }
  __device__ bool wants_children() const {
    return (rule.choices == kOfTrie || rule.choices == kOccurring) &&
           (rule.normalizer == kChildren || (rule.flags & (kHasSeed | kKeepsLogProbs)));
  }
};

}  // namespace advance_beams

// Grid: a block a search. Block: 256 threads. Bound by latency: a place and an edge a beam.
KERNEL(advance_beams_count, advance_beams::Params, advance_beams::kThreads) {
  using namespace advance_beams;
  SHARED(uint32_t, of_warps, kThreads / kWarpSize);
  const Own own(params, blockIdx.x);
  uint32_t* offsets = params.offsets + own.search.first_row + blockIdx.x;
  const uint32_t warp = threadIdx.x / kWarpSize;
  uint32_t before = 0;
  bool is_broken = false;
  for (uint32_t first = 0; first < own.count; first += kThreads) {
    const uint32_t beam = first + threadIdx.x;
    uint32_t number = 0;
    if (beam < own.count) {
      number = num_continuations(own.rule, own.place(params, beam));
      const bool is_known = own.rule.normalizer == kVocabulary || own.rule.normalizer == kLevel;
      is_broken = is_broken || (is_known && !is_finite(own.normalizer(params, beam)));
    }
    const uint32_t upto = warp_inclusive_sum(number);
    if (threadIdx.x % kWarpSize == kWarpSize - 1) of_warps[warp] = upto;
    __syncthreads();
    uint32_t start = before;
    for (uint32_t i = 0; i < kThreads / kWarpSize; i++) {
      if (i < warp) start += of_warps[i];
      before += of_warps[i];
    }
    if (beam < own.count) offsets[beam] = start + upto - number;
    __syncthreads();
  }
  const int num_broken = __syncthreads_count(is_broken);
  if (threadIdx.x == 0) {
    offsets[own.count] = before;
    params.failures[blockIdx.x] = num_broken > 0;
  }
}

// Grid: a block a row of beams. Block: 256 threads. Bound by memory: reads a code and a logit a
// continuation, twice for a sample, and of bitmaps what allowed_set needs.
KERNEL(advance_beams_children, advance_beams::Params, advance_beams::kThreads) {
  using namespace advance_beams;
  SHARED(double, of_warps, kThreads / kWarpSize);
  const Search* search = search_of_row(params.batch, blockIdx.x);
  if (!search) return;
  const Own own(params, uint32_t(search - params.batch.searches));
  const uint32_t beam = blockIdx.x - search->first_row;
  if (beam >= own.count || !own.wants_children()) return;
  const uint2 place = own.place(params, beam);
  const uint32_t number = num_continuations(own.rule, place), depth = own.rule.depth + 1;
  const float scale = own.rule.inverse_temperature;
  // The scaled logit of a continuation that is legal; -infinity stands for none.
  auto scaled_logit = [&](uint32_t index, uint32_t& choice) {
    const Continuation next = continuation(own.rule, place, index);
    choice = next.choice;
    if (!next.exists || !is_legal(own.rule, next.place, depth)) return -INFINITY_F;
    const uint32_t column = column_of(own.rule, next.choice);
    return column == kNone ? __uint_as_float(0x7fc00000u)
                           : logit_of(own.rule, beam, column) * scale;
  };
  float2 parts = make_float2(-INFINITY_F, 0.0f);
  uint32_t choice;
  for (uint32_t i = threadIdx.x; i < number; i += kThreads) join(parts, scaled_logit(i, choice));
  parts = block_joined<kThreads>(parts);
  const bool has_none = parts.x == -INFINITY_F && parts.y == 0.0f;
  const float normalizer = log_sum(parts);
  if (threadIdx.x == 0) {
    params.child_sums[blockIdx.x] = make_float2(normalizer, 0.0f);
    if (has_none) params.greatest[blockIdx.x] = 0;
    if (!has_none && !is_finite(normalizer)) atomicMax(params.failures + (search - params.batch.searches), 1u);
  }
  if (!(own.rule.flags & kHasSeed) || has_none) return;
  const uint64_t prefix = own.prefix(params, beam);
  const float log_prob = own.sample(params, beam).x;
  double greatest = -INFINITY_F;
  for (uint32_t i = threadIdx.x; i < number; i += kThreads) {
    const float scaled = scaled_logit(i, choice);
    if (scaled == -INFINITY_F) continue;
    greatest = fmax(greatest, double(log_prob + (scaled - normalizer)) + gumbel(prefix, choice));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    greatest = fmax(greatest, __shfl_xor_sync(kAllLanes, greatest, distance));
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = greatest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (uint32_t warp = 1; warp < kThreads / kWarpSize; warp++)
    greatest = fmax(greatest, of_warps[warp]);
  params.greatest[blockIdx.x] = greatest;
}

// Grid: (parts, searches). Block: 256 threads. Bound by memory: reads a code and a logit a
// continuation, and of bitmaps what allowed_set needs.
KERNEL(advance_beams_expand, advance_beams::Params, advance_beams::kThreads) {
  using namespace advance_beams;
  const Own own(params, blockIdx.y);
  const Search& search = own.search;
  const Rule& rule = own.rule;
  SharedMemory shared;
  BestKeys<kThreads, kChunk> best(shared, max(rule.width, 1u), params.capacity);
  const uint32_t* offsets = params.offsets + search.first_row + blockIdx.y;
  const uint32_t total = own.count == 0 ? 0 : offsets[own.count];
  const uint32_t depth = rule.depth + 1;
  for (uint32_t first = blockIdx.x * kChunk; first < total; first += params.num_parts * kChunk) {
    for (uint32_t i = threadIdx.x; i < kChunk; i += kThreads) {
      const uint32_t index = first + i;
      uint64_t key = 0;
      bool offers = index < total;
      if (offers) {
        // The last beam whose continuations begin at or before this one.
        uint32_t low = 0, high = own.count;
        while (high - low > 1) {
          const uint32_t middle = (low + high) / 2;
          if (offsets[middle] <= index) low = middle;
          else high = middle;
        }
        const uint32_t beam = low;
        const uint2 place = own.place(params, beam);
        const Continuation next = continuation(rule, place, index - offsets[beam]);
        const uint32_t column = column_of(rule, next.choice);
        offers = next.exists && (column != kNone || (rule.flags & kHasSeed));
        if (offers) {
          const float logit =
              column == kNone ? __uint_as_float(0x7fc00000u) : logit_of(rule, beam, column);
          float score;
          if (rule.flags & kHasSeed) {
            const float2 sample = own.sample(params, beam);
            score = sample.y;
            if (rule.choices != kForced) {
              const uint32_t row = search.first_row + beam;
              const float scaled = logit * rule.inverse_temperature;
              const double noise = double(sample.x + (scaled - params.child_sums[row].x)) +
                                   gumbel(own.prefix(params, beam), next.choice);
              score = float(under_ceiling(noise, params.greatest[row], double(sample.y)));
            }
          } else {
            score = own.score(params, beam) + own.gain(logit, own.normalizer(params, beam));
          }
          key = key_of(score, own.rank(params, beam) * rule.num_choices + next.choice);
          offers = key < best.threshold && is_offered(rule, next.place, depth);
        }
      }
      best.offer(key, offers);
    }
    best.make_room();
  }
  best.make_room();
  best.cut();
  uint64_t* out = params.keys + size_t(blockIdx.x) * params.num_keys + rule.first_key;
  const uint32_t count = *best.count;
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) out[i] = best.keys[i];
  if (threadIdx.x == 0)
    params.num_keys_of_part[blockIdx.x * params.batch.num_searches + blockIdx.y] = count;
}

// Grid: a block a search. Block: 1024 threads. Bound by latency: reads the keys of all parts as one
// list, and sorts in shared memory.
KERNEL(advance_beams_select, advance_beams::Params, advance_beams::kSelectThreads) {
  using namespace advance_beams;
  constexpr uint32_t kThreads = kSelectThreads;
  SHARED(uint32_t, ends, kMaxParts + 1);  // where each part's keys begin in the list, and the end
  const Own own(params, blockIdx.x);
  const Search& search = own.search;
  const Rule& rule = own.rule;
  if (search.num_rows == 0) return;  // pads the pass
  SharedMemory shared;
  BestKeys<kThreads, kSelectChunk> best(shared, max(rule.width, 1u), params.capacity);
  if (threadIdx.x < kWarpSize) {
    uint32_t before = 0;
    for (uint32_t first = 0; first < params.num_parts; first += kWarpSize) {
      const uint32_t part = first + threadIdx.x;
      const uint32_t number =
          part < params.num_parts
              ? params.num_keys_of_part[part * params.batch.num_searches + blockIdx.x]
              : 0;
      const uint32_t upto = before + warp_inclusive_sum(number);
      if (part < params.num_parts) ends[part + 1] = upto;
      before = __shfl_sync(kAllLanes, upto, kWarpSize - 1);
    }
    if (threadIdx.x == 0) ends[0] = 0;
  }
  __syncthreads();
  const uint32_t total = ends[params.num_parts];
  for (uint32_t first = 0; first < total; first += kSelectChunk) {
    // All are on their way before the first is looked at.
    uint64_t keys[kSelectChunk / kThreads];
#pragma unroll
    for (uint32_t i = 0; i < kSelectChunk / kThreads; i++) {
      const uint32_t index = first + i * kThreads + threadIdx.x;
      keys[i] = ~uint64_t(0);
      if (index >= total) continue;
      uint32_t low = 0, high = params.num_parts;
      while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (ends[middle] <= index) low = middle;
        else high = middle;
      }
      keys[i] = params.keys[size_t(low) * params.num_keys + rule.first_key + index - ends[low]];
    }
#pragma unroll
    for (uint32_t i = 0; i < kSelectChunk / kThreads; i++)
      best.offer(keys[i], first + i * kThreads + threadIdx.x < total);
    best.make_room();
  }
  best.cut();
  const uint32_t step = search.num_steps, position = step + 1;
  const uint32_t page = position_page(params.batch, search, position);
  const uint32_t earlier =
      step == 0 ? 0 : params.beams.failures[position_page(params.batch, search, step)];
  bool is_broken = params.failures[blockIdx.x] != 0;
  const uint32_t count = min(*best.count, rule.room);
  auto& beams = params.beams;
  for (uint32_t i = threadIdx.x; i < rule.room; i += kThreads) {
    const uint32_t row = beam_row(params.batch, search, position, i);
    if (i >= count) {  // a row without a beam is as a beam that nothing leads to
      beams.tokens[row] = beams.parents[row] = 0;
      beams.ranks[row] = beams.by_rank[row] = 0;
      beams.scores[row] = -INFINITY_F;
      beams.places[row] = make_uint2(kNone, kNone);
      continue;
    }
    const uint64_t key = best.keys[i];
    const uint32_t choice = uint32_t(key) % rule.num_choices;
    const uint32_t rank = uint32_t(key) / rule.num_choices;
    const uint32_t parent =
        step == 0 ? 0 : beams.by_rank[beam_row(params.batch, search, step, rank)];
    const uint32_t column = column_of(rule, choice), parent_row = search.first_row + parent;
    const uint32_t token = token_of(rule, choice);
    float score = score_of(key);
    is_broken = is_broken || !is_finite(score);
    if (rule.flags & (kHasSeed | kKeepsLogProbs)) {
      const float logit = column == kNone ? 0.0f : logit_of(rule, parent, column);
      const float scaled = logit * rule.inverse_temperature;
      const float over_children = own.over_legal(params, parent, scaled);
      if (rule.flags & kKeepsLogProbs) {
        const float over_vocabulary = scaled - log_sum(params.vocabulary_sums[parent_row]);
        beams.log_probs[row] = make_float2(over_vocabulary, over_children);
        is_broken = is_broken || !is_finite(over_vocabulary) || !is_finite(over_children);
      }
      if (rule.flags & kHasSeed) {
        const float gain = rule.normalizer == kChildren || rule.normalizer == kCertain
                               ? over_children
                               : scaled - own.normalizer(params, parent);
        beams.samples[row] =
            make_float2(own.sample(params, parent).x + over_children, score);
        score = own.score(params, parent) + gain;
        is_broken = is_broken || !is_finite(score);
        beams.prefixes[row] = extended(own.prefix(params, parent), token);
      }
    }
    beams.scores[row] = score;
    beams.tokens[row] = token;
    beams.parents[row] = parent;
    beams.places[row] = place_after(rule, own.place(params, parent), choice);
  }
  const int num_broken = __syncthreads_count(is_broken);
  if (threadIdx.x == 0) {
    beams.counts[page] = earlier || num_broken ? 0 : count;
    beams.failures[page] = earlier ? earlier : num_broken ? step + 1 : 0;
  }
  // The order by tokens: that of the keys' lower halves.
  __syncthreads();
  uint32_t length = 1;
  while (length < count) length *= 2;
  for (uint32_t i = threadIdx.x; i < length; i += kThreads)
    best.keys[i] = i < count ? best.keys[i] << 32 | i : ~uint64_t(0);
  BestKeys<kThreads, kSelectChunk>::sort(best.keys, length);
  for (uint32_t rank = threadIdx.x; rank < count; rank += kThreads) {
    const uint32_t beam = uint32_t(best.keys[rank]);
    beams.ranks[beam_row(params.batch, search, position, beam)] = rank;
    beams.by_rank[beam_row(params.batch, search, position, rank)] = beam;
  }
}
