// What each row of logits is normalised by: the log of its summed exponentials, over a stretch of
// the vocabulary at a time, or over the codes of a level (online softmax, Milakov & Gimelshein
// 2018). The logits themselves are a matrix product with the step's rows of the head; those of named
// tokens are copied from the stretches of the vocabulary that they lie in.
#include "common/search.cuh"

namespace lm_head {

constexpr uint32_t kThreads = 256;

// Whether a rule asks for the sum over its level, or over the vocabulary.
__device__ __forceinline__ bool is_wanted(const Rule& rule, bool is_level) {
  const bool is_named = rule.choices == kNamed, keeps_log_probs = rule.flags & kKeepsLogProbs;
  return is_level ? rule.normalizer == kLevel ||
                        (keeps_log_probs && (rule.choices == kOfLevel || is_named))
                  : rule.normalizer == kVocabulary || keeps_log_probs || is_named;
}

// The sum over logits side by side, as this thread sees it: whole packs of 16 bytes, so many of them
// at a time that memory is busy.
__device__ __forceinline__ float2 sum_of_packs(const float* logits, uint32_t count, float scale) {
  constexpr uint32_t kPacks = 8, kPack = 4;
  using Pack = Numbers<float, kPack>;
  float2 parts = make_float2(-INFINITY_F, 0.0f);
  for (uint32_t first = 0; first < count; first += kThreads * kPacks * kPack) {
    Pack packs[kPacks];
#pragma unroll
    for (uint32_t j = 0; j < kPacks; j++) {
      const uint32_t i = first + (j * kThreads + threadIdx.x) * kPack;
      packs[j] = {{-INFINITY_F, -INFINITY_F, -INFINITY_F, -INFINITY_F}};
      if (i < count) packs[j] = *reinterpret_cast<const Pack*>(logits + i);
    }
    float largest = -INFINITY_F;
#pragma unroll
    for (Pack& pack : packs)
#pragma unroll
      for (float& value : pack.values) largest = fmaxf(largest, value *= scale);
    const float offset = largest == -INFINITY_F ? 0.0f : largest;
    float sum = 0;
#pragma unroll
    for (const Pack& pack : packs)
#pragma unroll
      for (const float value : pack.values) sum += expf(value - offset);  // NaN stays NaN
    parts = joined(parts, make_float2(largest, sum));
  }
  return parts;
}

}  // namespace lm_head

// Grid: (rows of beams, stretches of the vocabulary). Block: 256 threads. Bound by memory: reads the
// logits once.
KERNEL(lm_head_sums, lm_head::Params, lm_head::kThreads) {
  using lm_head::kThreads;
  const uint32_t row = blockIdx.x, first = blockIdx.y * kVocabularyStretch;
  const Search* search = search_of_row(params.batch, row);
  if (!search) return;
  const Rule& rule = params.rules[search - params.batch.searches];
  if (!lm_head::is_wanted(rule, params.is_level)) return;
  const uint32_t beam = row - search->first_row;
  const float* logits = params.is_level
                            ? rule.logits + size_t(beam) * rule.logits_stride
                            : params.logits + size_t(row) * params.stride + first;
  const uint32_t count =
      params.is_level ? rule.num_codes : min(params.stride - first, kVocabularyStretch);
  if (rule.choices == kNamed && !params.is_level) {
    float* named = const_cast<float*>(rule.logits) + size_t(beam) * rule.logits_stride;
    for (uint32_t i = threadIdx.x; i < rule.num_codes; i += kThreads) {
      // kNone is beyond all stretches.
      const uint32_t column = rule.columns[i] - params.first_token - first;
      if (column < count) named[i] = logits[column];
    }
  }
  float2 parts = make_float2(-INFINITY_F, 0.0f);
  const bool is_straight = !params.is_level || !rule.columns;
  if (is_straight && are_packs(logits, count)) {
    parts = lm_head::sum_of_packs(logits, count, rule.inverse_temperature);
  } else {
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      const uint32_t column = params.is_level ? column_of(rule, i) : i;
      if (column != kNone) join(parts, logits[column] * rule.inverse_temperature);
    }
  }
  parts = block_joined<kThreads>(parts);
  if (threadIdx.x != 0) return;
  if (params.is_level) params.sums[row] = parts;
  else
    params.parts[row * params.num_stretches + params.first_token / kVocabularyStretch +
                 blockIdx.y] = parts;
}

// The sums over the whole vocabulary, of those over its stretches.
// Grid: a warp a row of beams. Block: 256 threads. Bound by latency.
KERNEL(lm_head_join, lm_head::Params, lm_head::kThreads) {
  const uint32_t row = (blockIdx.x * lm_head::kThreads + threadIdx.x) / kWarpSize;
  if (row >= params.batch.num_rows) return;
  const Search* search = search_of_row(params.batch, row);
  if (!search) return;
  if (!lm_head::is_wanted(params.rules[search - params.batch.searches], false)) return;
  const uint32_t lane = threadIdx.x % kWarpSize;
  float2 sum = make_float2(-INFINITY_F, 0.0f);
  for (uint32_t i = lane; i < params.num_stretches; i += kWarpSize)
    sum = joined(sum, params.parts[row * params.num_stretches + i]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    sum = joined(sum, make_float2(__shfl_xor_sync(kAllLanes, sum.x, distance),
                                  __shfl_xor_sync(kAllLanes, sum.y, distance)));
  if (lane == 0) params.sums[row] = sum;
}
