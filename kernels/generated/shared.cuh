// Made from src/backend/cuda by `SIDEREAL_WRITE_SHARED=1 cargo test --lib shared_header`: edit there.
#pragma once

#include <stddef.h>

#include "../common/device.cuh"

constexpr uint32_t kPageLen = 64;  // tokens of a context's page
constexpr uint32_t kTailPageLen = 16;  // rows of a tail's page
constexpr uint32_t kMaxPositions = 16;  // of a tail: the start, and one for each step
constexpr uint32_t kMaxSplits = 8;  // parts of a context
constexpr uint32_t kMaxLevels = 8;  // of a trie
constexpr uint32_t kContinuationsChunk = 1024;  // that a block of advance_beams_expand takes
constexpr uint32_t kMaxParts = 64;  // that continuations are dealt out to
constexpr uint32_t kSelectChunk = 4096;  // keys that advance_beams_select takes
constexpr uint32_t kVocabularyStretch = 8192;  // tokens that lm_head_sums takes
constexpr uint32_t kPointwiseRows = 8;  // that a block of attend_pointwise takes
constexpr uint32_t kProductTile = 16;  // rows and columns of a block's product
constexpr uint32_t kVocabulary = 0;  // Rule::normalizer
constexpr uint32_t kLevel = 1;  // Rule::normalizer
constexpr uint32_t kChildren = 2;  // Rule::normalizer
constexpr uint32_t kCertain = 3;  // Rule::normalizer
constexpr uint32_t kOfTrie = 0;  // Rule::choices
constexpr uint32_t kOfLevel = 1;  // Rule::choices
constexpr uint32_t kOfVocabulary = 2;  // Rule::choices
constexpr uint32_t kForced = 3;  // Rule::choices
constexpr uint32_t kNamed = 4;  // Rule::choices
constexpr uint32_t kOccurring = 5;  // Rule::choices
constexpr uint32_t kHasAdded = 1;  // Rule::flags
constexpr uint32_t kHasSeed = 2;  // Rule::flags
constexpr uint32_t kKeepsLogProbs = 4;  // Rule::flags
constexpr uint32_t kHasCandidates = 8;  // Rule::flags
constexpr uint32_t kHasList = 16;  // Rule::flags
constexpr uint32_t kRelu = 0;  // nonlinearity
constexpr uint32_t kGelu = 1;  // nonlinearity
constexpr uint32_t kGeluTanh = 2;  // nonlinearity
constexpr uint32_t kSilu = 3;  // nonlinearity

// A slot with rows of its prompt in this pass.
struct Prompt {
  uint32_t first_row;
  uint32_t num_rows;
  // The position of its first row.
  uint32_t start;
  // The first page of its context, among `Batch::pages`.
  uint32_t first_page;
  // Zero where another prompt of the pass stores this KV: one context, two slots.
  uint32_t is_kept;
  // Tokens of its context, whether this pass reads all of them or not.
  uint32_t context_len;
};
static_assert(sizeof(Prompt) == 24);
static_assert(offsetof(Prompt, first_row) == 0);
static_assert(offsetof(Prompt, num_rows) == 4);
static_assert(offsetof(Prompt, start) == 8);
static_assert(offsetof(Prompt, first_page) == 12);
static_assert(offsetof(Prompt, is_kept) == 16);
static_assert(offsetof(Prompt, context_len) == 20);

// A slot with beams in this pass.
struct Search {
  // The first row of its beams, among the pass's rows.
  uint32_t first_row;
  // Rows for beams at this step: there may be fewer beams.
  uint32_t num_rows;
  // Steps taken so far.
  uint32_t num_steps;
  // Tokens of its context.
  uint32_t context_len;
  // The first page of its context, among `Batch::pages`.
  uint32_t first_context_page;
  // The first page of its tails, among `Batch::pages`.
  uint32_t first_tail_page;
  // The token of the one beam that it starts with.
  uint32_t start_token;
  // The first position with KV in the tail; above `num_steps` where there is none.
  uint32_t tail_from;
  // By position: its first page, counted from `first_tail_page`.
  uint32_t position_page[16];
  // Parts that attention splits its context into.
  uint32_t num_splits;
  // Pages of each part but the last.
  uint32_t pages_per_split;
  // The first of its part rows, [num_splits, num_rows], where there are several parts.
  uint32_t first_part_row;
};
static_assert(sizeof(Search) == 108);
static_assert(offsetof(Search, first_row) == 0);
static_assert(offsetof(Search, num_rows) == 4);
static_assert(offsetof(Search, num_steps) == 8);
static_assert(offsetof(Search, context_len) == 12);
static_assert(offsetof(Search, first_context_page) == 16);
static_assert(offsetof(Search, first_tail_page) == 20);
static_assert(offsetof(Search, start_token) == 24);
static_assert(offsetof(Search, tail_from) == 28);
static_assert(offsetof(Search, position_page) == 32);
static_assert(offsetof(Search, num_splits) == 96);
static_assert(offsetof(Search, pages_per_split) == 100);
static_assert(offsetof(Search, first_part_row) == 104);

// Names the prompt or slot of each row of a pass.
struct Batch {
  const Prompt* prompts;
  const Search* searches;
  const uint32_t* pages;
  uint32_t num_prompts;
  uint32_t num_searches;
  uint32_t num_prompt_rows;
  uint32_t num_rows;
};
static_assert(sizeof(Batch) == 40);
static_assert(offsetof(Batch, prompts) == 0);
static_assert(offsetof(Batch, searches) == 8);
static_assert(offsetof(Batch, pages) == 16);
static_assert(offsetof(Batch, num_prompts) == 24);
static_assert(offsetof(Batch, num_searches) == 28);
static_assert(offsetof(Batch, num_prompt_rows) == 32);
static_assert(offsetof(Batch, num_rows) == 36);

// Keys and values. A context's page: `[context sets][kv heads][keys, values][kPageLen][head_dim]`; a
// tail's: `[tail layers][kTailPageLen][keys, values][kv heads][head_dim]`.
struct Pages {
  void* contexts;
  void* tails;
  uint32_t context_sets;
  uint32_t tail_layers;
  uint32_t num_kv_heads;
  uint32_t head_dim;
};
static_assert(sizeof(Pages) == 32);
static_assert(offsetof(Pages, contexts) == 0);
static_assert(offsetof(Pages, tails) == 8);
static_assert(offsetof(Pages, context_sets) == 16);
static_assert(offsetof(Pages, tail_layers) == 20);
static_assert(offsetof(Pages, num_kv_heads) == 24);
static_assert(offsetof(Pages, head_dim) == 28);

// Beams, in arrays over the rows of all tail pages: a beam that stands at a position has the row
// that its keys and values would have.
struct Beams {
  float* scores;
  // Nodes of the compiled trie and of the added items', or kNone.
  uint2* places;
  // The newest.
  uint32_t* tokens;
  // The beam at the position before.
  uint32_t* parents;
  // By tokens, among the beams of the position.
  uint32_t* ranks;
  // The inverse of `ranks`.
  uint32_t* by_rank;
  // Log-probability over legal continuations; the same with its noise.
  float2* samples;
  // Log-probabilities of the newest token: over the vocabulary, over legal continuations.
  float2* log_probs;
  // A hash of the tokens, mixed with the seed of a sample.
  uint64_t* prefixes;
  // By page, at the first page of a position: its beams.
  uint32_t* counts;
  // By page, at the first page of a position: the step whose scores were not finite plus one, or
  // zero.
  uint32_t* failures;
};
static_assert(sizeof(Beams) == 88);
static_assert(offsetof(Beams, scores) == 0);
static_assert(offsetof(Beams, places) == 8);
static_assert(offsetof(Beams, tokens) == 16);
static_assert(offsetof(Beams, parents) == 24);
static_assert(offsetof(Beams, ranks) == 32);
static_assert(offsetof(Beams, by_rank) == 40);
static_assert(offsetof(Beams, samples) == 48);
static_assert(offsetof(Beams, log_probs) == 56);
static_assert(offsetof(Beams, prefixes) == 64);
static_assert(offsetof(Beams, counts) == 72);
static_assert(offsetof(Beams, failures) == 80);

// A rank trie: edge e leads to node e + 1, and the items below a node are one run.
struct Trie {
  // By inner node, and the end.
  const uint32_t* first_edge;
  // By edge.
  const uint16_t* codes;
  // Of node n at depth d: at n + d, but for parents of leaves.
  const uint32_t* first_item;
  // By leaf, and the end; null where leaf l is item l.
  const uint32_t* leaf_item;
  uint32_t num_levels;
  uint32_t depth_start[10];
  uint32_t padding;
};
static_assert(sizeof(Trie) == 80);
static_assert(offsetof(Trie, first_edge) == 0);
static_assert(offsetof(Trie, codes) == 8);
static_assert(offsetof(Trie, first_item) == 16);
static_assert(offsetof(Trie, leaf_item) == 24);
static_assert(offsetof(Trie, num_levels) == 32);
static_assert(offsetof(Trie, depth_start) == 36);
static_assert(offsetof(Trie, padding) == 76);

// Of a trie's items, those that may be answered with.
struct Allowed {
  // A bit an item; null where all are.
  const uint64_t* words;
  // Members before each eight words.
  const uint32_t* counts;
  // A bit a node: whether a filter passes anything below; or null.
  const uint64_t* nodes;
  // Sorted members that are not allowed after all.
  const uint32_t* excluded;
  // Sorted: the items that are scored, where no search is made, or all that are allowed.
  const uint32_t* listed;
  uint32_t num_excluded;
  uint32_t num_listed;
};
static_assert(sizeof(Allowed) == 48);
static_assert(offsetof(Allowed, words) == 0);
static_assert(offsetof(Allowed, counts) == 8);
static_assert(offsetof(Allowed, nodes) == 16);
static_assert(offsetof(Allowed, excluded) == 24);
static_assert(offsetof(Allowed, listed) == 32);
static_assert(offsetof(Allowed, num_excluded) == 40);
static_assert(offsetof(Allowed, num_listed) == 44);

// How one slot takes its step.
struct Rule {
  Trie base;
  Trie added;
  Allowed base_allowed;
  Allowed added_allowed;
  uint64_t seed;
  // Of the slot's first beam.
  const float* logits;
  // By code: its column, or kNone; null where code c is column c. Of named tokens, which are
  // columns in their order: the tokens.
  const uint32_t* columns;
  // Sorted codes that occur at the level, where these are the choices.
  const uint16_t* occurring;
  uint32_t logits_stride;
  // Of the first column of the step.
  uint32_t first_token;
  // That a level has, or tokens that are named or that a vocabulary has.
  uint32_t num_codes;
  uint32_t normalizer;
  uint32_t choices;
  uint32_t flags;
  float inverse_temperature;
  // Beams to keep.
  uint32_t width;
  // Rows that the next position has.
  uint32_t room;
  // Of the slot's keys among those of a part.
  uint32_t first_key;
  // A candidate's place is its beam's rank times this, plus its choice.
  uint32_t num_choices;
  // Codes that lead to the beams' places.
  uint32_t depth;
  uint32_t num_occurring;
  uint32_t padding;
};
static_assert(sizeof(Rule) == 344);
static_assert(offsetof(Rule, base) == 0);
static_assert(offsetof(Rule, added) == 80);
static_assert(offsetof(Rule, base_allowed) == 160);
static_assert(offsetof(Rule, added_allowed) == 208);
static_assert(offsetof(Rule, seed) == 256);
static_assert(offsetof(Rule, logits) == 264);
static_assert(offsetof(Rule, columns) == 272);
static_assert(offsetof(Rule, occurring) == 280);
static_assert(offsetof(Rule, logits_stride) == 288);
static_assert(offsetof(Rule, first_token) == 292);
static_assert(offsetof(Rule, num_codes) == 296);
static_assert(offsetof(Rule, normalizer) == 300);
static_assert(offsetof(Rule, choices) == 304);
static_assert(offsetof(Rule, flags) == 308);
static_assert(offsetof(Rule, inverse_temperature) == 312);
static_assert(offsetof(Rule, width) == 316);
static_assert(offsetof(Rule, room) == 320);
static_assert(offsetof(Rule, first_key) == 324);
static_assert(offsetof(Rule, num_choices) == 328);
static_assert(offsetof(Rule, depth) == 332);
static_assert(offsetof(Rule, num_occurring) == 336);
static_assert(offsetof(Rule, padding) == 340);

namespace embed {
// A lookup of embeddings.
struct Params {
  void* out;
  const void* table;
  // Of the rows of prompts.
  const uint32_t* tokens;
  Batch batch;
  Beams beams;
  uint32_t columns;
  uint32_t num_tokens;
};
static_assert(sizeof(Params) == 160);
static_assert(offsetof(Params, out) == 0);
static_assert(offsetof(Params, table) == 8);
static_assert(offsetof(Params, tokens) == 16);
static_assert(offsetof(Params, batch) == 24);
static_assert(offsetof(Params, beams) == 64);
static_assert(offsetof(Params, columns) == 152);
static_assert(offsetof(Params, num_tokens) == 156);
}  // namespace embed

namespace add_embedding {
// A lookup whose rows are added.
struct Params {
  void* x;
  const void* table;
  // Of the rows of prompts.
  const uint32_t* indices;
  uint32_t columns;
  uint32_t padding;
};
static_assert(sizeof(Params) == 32);
static_assert(offsetof(Params, x) == 0);
static_assert(offsetof(Params, table) == 8);
static_assert(offsetof(Params, indices) == 16);
static_assert(offsetof(Params, columns) == 24);
static_assert(offsetof(Params, padding) == 28);
}  // namespace add_embedding

namespace layer_norm {
// A layer norm of rows.
struct Params {
  void* out;
  const void* x;
  // `[columns]`, or null, as the shift is then.
  const float* scale;
  const float* shift;
  uint32_t columns;
  float epsilon;
};
static_assert(sizeof(Params) == 40);
static_assert(offsetof(Params, out) == 0);
static_assert(offsetof(Params, x) == 8);
static_assert(offsetof(Params, scale) == 16);
static_assert(offsetof(Params, shift) == 24);
static_assert(offsetof(Params, columns) == 32);
static_assert(offsetof(Params, epsilon) == 36);
}  // namespace layer_norm

namespace rms_norm {
// An RMS norm of rows.
struct Params {
  void* out;
  const void* x;
  const float* weight;
  uint32_t columns;
  float epsilon;
};
static_assert(sizeof(Params) == 32);
static_assert(offsetof(Params, out) == 0);
static_assert(offsetof(Params, x) == 8);
static_assert(offsetof(Params, weight) == 16);
static_assert(offsetof(Params, columns) == 24);
static_assert(offsetof(Params, epsilon) == 28);
}  // namespace rms_norm

namespace matmul {
// A product without cuBLASLt.
struct Params {
  // `[rows, stride]`
  void* out;
  // `[rows, inner]`
  const void* x;
  // `[columns, inner]`
  const void* weight;
  // `[columns]`, or null.
  const void* bias;
  uint32_t rows;
  uint32_t columns;
  uint32_t inner;
  uint32_t stride;
  uint32_t adds;
  // One more than its number; zero for none.
  uint32_t activation;
};
static_assert(sizeof(Params) == 56);
static_assert(offsetof(Params, out) == 0);
static_assert(offsetof(Params, x) == 8);
static_assert(offsetof(Params, weight) == 16);
static_assert(offsetof(Params, bias) == 24);
static_assert(offsetof(Params, rows) == 32);
static_assert(offsetof(Params, columns) == 36);
static_assert(offsetof(Params, inner) == 40);
static_assert(offsetof(Params, stride) == 44);
static_assert(offsetof(Params, adds) == 48);
static_assert(offsetof(Params, activation) == 52);
}  // namespace matmul

namespace matmul_activate {
// A nonlinearity, in place.
struct Params {
  void* x;
  uint32_t count;
  uint32_t activation;
};
static_assert(sizeof(Params) == 16);
static_assert(offsetof(Params, x) == 0);
static_assert(offsetof(Params, count) == 8);
static_assert(offsetof(Params, activation) == 12);
}  // namespace matmul_activate

namespace glu {
// A gated linear unit.
struct Params {
  void* out;
  const void* x;
  uint32_t columns;
  uint32_t activation;
};
static_assert(sizeof(Params) == 24);
static_assert(offsetof(Params, out) == 0);
static_assert(offsetof(Params, x) == 8);
static_assert(offsetof(Params, columns) == 16);
static_assert(offsetof(Params, activation) == 20);
}  // namespace glu

namespace rope_tables {
// Cosines and sines of positions.
struct Params {
  // `[rows, 2 * num_frequencies]`
  float* out;
  // `[num_frequencies]`
  const float* frequencies;
  Batch batch;
  uint32_t num_frequencies;
  uint32_t padding;
};
static_assert(sizeof(Params) == 64);
static_assert(offsetof(Params, out) == 0);
static_assert(offsetof(Params, frequencies) == 8);
static_assert(offsetof(Params, batch) == 16);
static_assert(offsetof(Params, num_frequencies) == 56);
static_assert(offsetof(Params, padding) == 60);
}  // namespace rope_tables

namespace apply_rope {
// Rotation of queries and keys.
struct Params {
  // `[rows, (num_heads + 2 * num_kv_heads) * head_dim]`
  void* qkv;
  // `[rows, head_dim]`: cosines, then sines.
  const float* rope;
  // `[head_dim]`, or null.
  const float* query_norm;
  // `[head_dim]`, or null.
  const float* key_norm;
  Batch batch;
  Pages pages;
  uint32_t num_heads;
  uint32_t layer;
  float epsilon;
  uint32_t padding;
};
static_assert(sizeof(Params) == 120);
static_assert(offsetof(Params, qkv) == 0);
static_assert(offsetof(Params, rope) == 8);
static_assert(offsetof(Params, query_norm) == 16);
static_assert(offsetof(Params, key_norm) == 24);
static_assert(offsetof(Params, batch) == 32);
static_assert(offsetof(Params, pages) == 72);
static_assert(offsetof(Params, num_heads) == 104);
static_assert(offsetof(Params, layer) == 108);
static_assert(offsetof(Params, epsilon) == 112);
static_assert(offsetof(Params, padding) == 116);
}  // namespace apply_rope

// Keys and values on their way into contexts or tails.
struct StoreParams {
  // `[rows, columns]`; from `offset` on the key heads, then the value heads.
  const void* kv;
  Batch batch;
  Pages pages;
  uint32_t columns;
  uint32_t offset;
  uint32_t layer;
  uint32_t padding;
};
static_assert(sizeof(StoreParams) == 96);
static_assert(offsetof(StoreParams, kv) == 0);
static_assert(offsetof(StoreParams, batch) == 8);
static_assert(offsetof(StoreParams, pages) == 48);
static_assert(offsetof(StoreParams, columns) == 80);
static_assert(offsetof(StoreParams, offset) == 84);
static_assert(offsetof(StoreParams, layer) == 88);
static_assert(offsetof(StoreParams, padding) == 92);

namespace attend_prefill {
// Attention of prompts.
struct Params {
  // `[rows, num_heads * head_dim]`
  void* out;
  // `[rows, query_columns]`
  const void* queries;
  // The prompt, and the first of its rows.
  const uint2* tiles;
  // `[num_heads, 2 * longest - 1]`, or null.
  const float* bias;
  Batch batch;
  Pages pages;
  uint32_t query_columns;
  uint32_t num_heads;
  uint32_t layer;
  uint32_t longest;
  uint32_t is_causal;
  float scale;
};
static_assert(sizeof(Params) == 128);
static_assert(offsetof(Params, out) == 0);
static_assert(offsetof(Params, queries) == 8);
static_assert(offsetof(Params, tiles) == 16);
static_assert(offsetof(Params, bias) == 24);
static_assert(offsetof(Params, batch) == 32);
static_assert(offsetof(Params, pages) == 72);
static_assert(offsetof(Params, query_columns) == 104);
static_assert(offsetof(Params, num_heads) == 108);
static_assert(offsetof(Params, layer) == 112);
static_assert(offsetof(Params, longest) == 116);
static_assert(offsetof(Params, is_causal) == 120);
static_assert(offsetof(Params, scale) == 124);
}  // namespace attend_prefill

// What a row of a prompt attends to.
struct PointwiseRow {
  uint32_t position;
  // Positions before the targets.
  uint32_t from;
  uint32_t to;
  // The row of the first target that it sees.
  uint32_t target_row;
  uint32_t num_targets;
  uint32_t prompt;
  // Multiplies the weights.
  float share;
  // Where the times of its prompt begin.
  uint32_t first_time;
};
static_assert(sizeof(PointwiseRow) == 32);
static_assert(offsetof(PointwiseRow, position) == 0);
static_assert(offsetof(PointwiseRow, from) == 4);
static_assert(offsetof(PointwiseRow, to) == 8);
static_assert(offsetof(PointwiseRow, target_row) == 12);
static_assert(offsetof(PointwiseRow, num_targets) == 16);
static_assert(offsetof(PointwiseRow, prompt) == 20);
static_assert(offsetof(PointwiseRow, share) == 24);
static_assert(offsetof(PointwiseRow, first_time) == 28);

namespace attend_pointwise {
// Pointwise attention of prompts.
struct Params {
  // `[rows, num_heads * head_dim]`
  void* out;
  // `[rows, query_columns]`: queries, keys, values
  const void* queries;
  const PointwiseRow* rows;
  // The first row, and how many.
  const uint2* tiles;
  // `[2 * longest - 1]`, or null, as what follows is then.
  const float* positions;
  const float* times;
  const uint64_t* thresholds;
  const int64_t* seconds;
  Batch batch;
  Pages pages;
  uint32_t query_columns;
  uint32_t num_heads;
  uint32_t layer;
  uint32_t longest;
  uint32_t num_thresholds;
  float scale;
};
static_assert(sizeof(Params) == 160);
static_assert(offsetof(Params, out) == 0);
static_assert(offsetof(Params, queries) == 8);
static_assert(offsetof(Params, rows) == 16);
static_assert(offsetof(Params, tiles) == 24);
static_assert(offsetof(Params, positions) == 32);
static_assert(offsetof(Params, times) == 40);
static_assert(offsetof(Params, thresholds) == 48);
static_assert(offsetof(Params, seconds) == 56);
static_assert(offsetof(Params, batch) == 64);
static_assert(offsetof(Params, pages) == 104);
static_assert(offsetof(Params, query_columns) == 136);
static_assert(offsetof(Params, num_heads) == 140);
static_assert(offsetof(Params, layer) == 144);
static_assert(offsetof(Params, longest) == 148);
static_assert(offsetof(Params, num_thresholds) == 152);
static_assert(offsetof(Params, scale) == 156);
}  // namespace attend_pointwise

namespace gated_norm {
// A layer norm of rows whose result is multiplied by a gate.
struct Params {
  void* out;
  const void* gate;
  const void* x;
  // `[columns]` or `[num_blocks]`, or null, as the shift is then.
  const float* scale;
  const float* shift;
  uint32_t num_blocks;
  uint32_t block_columns;
  // Of a block of `x`.
  uint32_t block_width;
  uint32_t is_by_block;
  uint32_t has_sigmoid;
  // 0: gated columns alone; 1: also the normed ones; 2: also those of `x`.
  uint32_t output;
  float epsilon;
  uint32_t padding;
};
static_assert(sizeof(Params) == 72);
static_assert(offsetof(Params, out) == 0);
static_assert(offsetof(Params, gate) == 8);
static_assert(offsetof(Params, x) == 16);
static_assert(offsetof(Params, scale) == 24);
static_assert(offsetof(Params, shift) == 32);
static_assert(offsetof(Params, num_blocks) == 40);
static_assert(offsetof(Params, block_columns) == 44);
static_assert(offsetof(Params, block_width) == 48);
static_assert(offsetof(Params, is_by_block) == 52);
static_assert(offsetof(Params, has_sigmoid) == 56);
static_assert(offsetof(Params, output) == 60);
static_assert(offsetof(Params, epsilon) == 64);
static_assert(offsetof(Params, padding) == 68);
}  // namespace gated_norm

namespace gru {
// The states of a recurrent cell.
struct Params {
  void* out;
  // `[rows, 3 * width]`
  const void* inputs;
  // `[3 * width, width]`
  const void* weight;
  // `[3 * width]`, or null.
  const float* bias;
  Batch batch;
  uint32_t width;
  uint32_t padding;
};
static_assert(sizeof(Params) == 80);
static_assert(offsetof(Params, out) == 0);
static_assert(offsetof(Params, inputs) == 8);
static_assert(offsetof(Params, weight) == 16);
static_assert(offsetof(Params, bias) == 24);
static_assert(offsetof(Params, batch) == 32);
static_assert(offsetof(Params, width) == 72);
static_assert(offsetof(Params, padding) == 76);
}  // namespace gru

namespace gather_last {
// A copy of some rows.
struct Params {
  void* out;
  const void* x;
  const uint32_t* rows;
  uint32_t columns;
  uint32_t padding;
};
static_assert(sizeof(Params) == 32);
static_assert(offsetof(Params, out) == 0);
static_assert(offsetof(Params, x) == 8);
static_assert(offsetof(Params, rows) == 16);
static_assert(offsetof(Params, columns) == 24);
static_assert(offsetof(Params, padding) == 28);
}  // namespace gather_last

namespace attend_beams {
// Attention of beams.
struct Params {
  // `[rows, num_heads * head_dim]`
  void* out;
  // `[rows, query_columns]`
  const void* queries;
  // `[part rows, num_heads, head_dim]`: unscaled sums.
  float* parts;
  // `[part rows, num_heads]`: largest in powers of two, sum.
  float2* part_sums;
  // The slot, or kNone, and the first of its rows.
  const uint2* tiles;
  // `[num_heads, num_biases]` over the distance back, or null.
  const float* tail_bias;
  Batch batch;
  Pages pages;
  Beams beams;
  uint32_t query_columns;
  uint32_t num_heads;
  uint32_t layer;
  uint32_t num_biases;
  uint32_t reaches_context;
  uint32_t reaches_tail;
  float scale;
  uint32_t padding;
};
static_assert(sizeof(Params) == 240);
static_assert(offsetof(Params, out) == 0);
static_assert(offsetof(Params, queries) == 8);
static_assert(offsetof(Params, parts) == 16);
static_assert(offsetof(Params, part_sums) == 24);
static_assert(offsetof(Params, tiles) == 32);
static_assert(offsetof(Params, tail_bias) == 40);
static_assert(offsetof(Params, batch) == 48);
static_assert(offsetof(Params, pages) == 88);
static_assert(offsetof(Params, beams) == 120);
static_assert(offsetof(Params, query_columns) == 208);
static_assert(offsetof(Params, num_heads) == 212);
static_assert(offsetof(Params, layer) == 216);
static_assert(offsetof(Params, num_biases) == 220);
static_assert(offsetof(Params, reaches_context) == 224);
static_assert(offsetof(Params, reaches_tail) == 228);
static_assert(offsetof(Params, scale) == 232);
static_assert(offsetof(Params, padding) == 236);
}  // namespace attend_beams

namespace attend_beams {
// Merging the parts of contexts.
struct CombineParams {
  // `[rows, num_heads * head_dim]`
  void* out;
  // `[part rows, num_heads, head_dim]`
  const float* parts;
  // `[part rows, num_heads]`
  const float2* part_sums;
  Batch batch;
  uint32_t num_heads;
  uint32_t head_dim;
};
static_assert(sizeof(CombineParams) == 72);
static_assert(offsetof(CombineParams, out) == 0);
static_assert(offsetof(CombineParams, parts) == 8);
static_assert(offsetof(CombineParams, part_sums) == 16);
static_assert(offsetof(CombineParams, batch) == 24);
static_assert(offsetof(CombineParams, num_heads) == 64);
static_assert(offsetof(CombineParams, head_dim) == 68);
}  // namespace attend_beams

namespace lm_head {
// Sums of exponentials of logits.
struct Params {
  // `[rows, stride]`, of stretches of the vocabulary; those of levels are the rules' own.
  const float* logits;
  // By row: what `log_sum` makes the log of.
  float2* sums;
  // `[rows, num_stretches]`: those of the vocabulary, to be joined.
  float2* parts;
  // By slot.
  const Rule* rules;
  Batch batch;
  uint32_t stride;
  uint32_t is_level;
  // The token of the first column of `logits`: where a stretch begins.
  uint32_t first_token;
  uint32_t num_stretches;
};
static_assert(sizeof(Params) == 88);
static_assert(offsetof(Params, logits) == 0);
static_assert(offsetof(Params, sums) == 8);
static_assert(offsetof(Params, parts) == 16);
static_assert(offsetof(Params, rules) == 24);
static_assert(offsetof(Params, batch) == 32);
static_assert(offsetof(Params, stride) == 72);
static_assert(offsetof(Params, is_level) == 76);
static_assert(offsetof(Params, first_token) == 80);
static_assert(offsetof(Params, num_stretches) == 84);
}  // namespace lm_head

namespace advance_beams {
// The choice of beams.
struct Params {
  // By slot.
  const Rule* rules;
  // By row.
  const float2* vocabulary_sums;
  // By row.
  const float2* level_sums;
  // By row: the log of the sum and, for a sample, its greatest noise.
  float2* child_sums;
  // By row.
  double* greatest;
  // By row and slot: where a beam's continuations begin, and the end.
  uint32_t* offsets;
  // By slot.
  uint32_t* failures;
  // `[parts, num_keys]`
  uint64_t* keys;
  // `[parts, slots]`
  uint32_t* num_keys_of_part;
  Batch batch;
  Beams beams;
  uint32_t num_parts;
  uint32_t num_keys;
  // Of a block's keys.
  uint32_t capacity;
  uint32_t padding;
};
static_assert(sizeof(Params) == 216);
static_assert(offsetof(Params, rules) == 0);
static_assert(offsetof(Params, vocabulary_sums) == 8);
static_assert(offsetof(Params, level_sums) == 16);
static_assert(offsetof(Params, child_sums) == 24);
static_assert(offsetof(Params, greatest) == 32);
static_assert(offsetof(Params, offsets) == 40);
static_assert(offsetof(Params, failures) == 48);
static_assert(offsetof(Params, keys) == 56);
static_assert(offsetof(Params, num_keys_of_part) == 64);
static_assert(offsetof(Params, batch) == 72);
static_assert(offsetof(Params, beams) == 112);
static_assert(offsetof(Params, num_parts) == 200);
static_assert(offsetof(Params, num_keys) == 204);
static_assert(offsetof(Params, capacity) == 208);
static_assert(offsetof(Params, padding) == 212);
}  // namespace advance_beams

namespace read_beams {
// Where the beams of a slot go.
struct Part {
  // Of `out`.
  uint32_t first_word;
  uint32_t keeps_log_probs;
};
static_assert(sizeof(Part) == 8);
static_assert(offsetof(Part, first_word) == 0);
static_assert(offsetof(Part, keeps_log_probs) == 4);
}  // namespace read_beams

namespace read_beams {
// Beams on their way to the host.
struct Params {
  uint32_t* out;
  // By slot.
  const Part* parts;
  Batch batch;
  Beams beams;
};
static_assert(sizeof(Params) == 144);
static_assert(offsetof(Params, out) == 0);
static_assert(offsetof(Params, parts) == 8);
static_assert(offsetof(Params, batch) == 16);
static_assert(offsetof(Params, beams) == 56);
}  // namespace read_beams
