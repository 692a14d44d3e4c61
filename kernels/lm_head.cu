// What each row of logits is normalised by: the log of its summed exponentials, over a stretch of
// the vocabulary at a time, or over the codes of a level (online softmax, Milakov & Gimelshein
// 2018). The logits themselves are a matrix product with the step's rows of the head; those of named
// tokens are copied from the stretches of the vocabulary that they lie in.
// Grid: a block a row of beams. Block: 256 threads. Bound by memory: reads the logits twice, the
// second time from L2.
#include "common/search.cuh"

namespace lm_head {

constexpr uint32_t kThreads = 256;

}  // namespace lm_head

KERNEL(lm_head_sums, lm_head::Params, lm_head::kThreads) {
  using lm_head::kThreads;
  const uint32_t row = blockIdx.x;
  const Search* search = search_of_row(params.batch, row);
  if (!search) return;
  const Rule& rule = params.rules[search - params.batch.searches];
  const bool is_named = rule.choices == kNamed, keeps_log_probs = rule.flags & kKeepsLogProbs;
  const bool is_wanted =
      params.is_level
          ? rule.normalizer == kLevel ||
                (keeps_log_probs && (rule.choices == kOfLevel || is_named))
          : rule.normalizer == kVocabulary || keeps_log_probs || is_named;
  if (!is_wanted) return;
  const uint32_t beam = row - search->first_row;
  const float* logits = params.is_level
                            ? rule.logits + size_t(beam) * rule.logits_stride
                            : params.logits + size_t(row) * params.stride;
  const uint32_t count = params.is_level ? rule.num_codes : params.width;
  float2 parts = make_float2(-INFINITY_F, 0.0f);
  if (is_named && !params.is_level) {
    float* named = const_cast<float*>(rule.logits) + size_t(beam) * rule.logits_stride;
    for (uint32_t i = threadIdx.x; i < rule.num_codes; i += kThreads) {
      const uint32_t column = rule.columns[i] - params.first_token;  // kNone is beyond all stretches
      if (column < params.width) named[i] = logits[column];
    }
  }
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    const uint32_t column = params.is_level ? column_of(rule, i) : i;
    if (column != kNone) join(parts, logits[column] * rule.inverse_temperature);
  }
  parts = block_joined<kThreads>(parts);
  if (threadIdx.x != 0) return;
  params.sums[row] = params.is_first ? parts : joined(params.sums[row], parts);
}
