// The beams of finished searches, put where one copy brings them to the host.
// Grid: a block a search. Block: 128 threads. Bound by latency: a chain of parents a beam.
#include "common/search.cuh"

namespace read_beams {

constexpr uint32_t kThreads = 128;

}  // namespace read_beams

// A search's part: the number of its beams and its failure; then for each beam its score, its place
// and its tokens; then, where they are kept, two log-probabilities a token.
KERNEL(read_beams_u32, read_beams::Params, read_beams::kThreads) {
  using namespace read_beams;
  const Search& search = params.batch.searches[blockIdx.x];
  const uint32_t steps = search.num_steps;
  const uint32_t count = num_beams(params.batch, params.beams, search);
  const Part& part = params.parts[blockIdx.x];
  uint32_t* out = params.out + part.first_word;
  if (threadIdx.x == 0) {
    out[0] = count;
    out[1] = steps == 0 ? 0 : params.beams.failures[position_page(params.batch, search, steps)];
  }
  if (steps == 0) return;
  const uint32_t words = 3 + steps + (part.keeps_log_probs ? 2 * steps : 0);
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    uint32_t* of_beam = out + 2 + i * words;
    uint32_t beam = i;
    for (uint32_t position = steps; position > 0; position--) {
      const uint32_t row = beam_row(params.batch, search, position, beam);
      if (position == steps) {
        of_beam[0] = __float_as_uint(params.beams.scores[row]);
        of_beam[1] = params.beams.places[row].x;
        of_beam[2] = params.beams.places[row].y;
      }
      of_beam[2 + position] = params.beams.tokens[row];
      if (part.keeps_log_probs) {
        const float2 log_probs = params.beams.log_probs[row];
        of_beam[3 + steps + 2 * (position - 1)] = __float_as_uint(log_probs.x);
        of_beam[3 + steps + 2 * (position - 1) + 1] = __float_as_uint(log_probs.y);
      }
      beam = params.beams.parents[row];
    }
  }
}
