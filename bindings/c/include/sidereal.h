/*
 * Sidereal: recommendations from generative models. The rules that hold everywhere:
 *
 * - A function returns a status, SIDEREAL_OK or what went wrong; sidereal_last_error() has the words, on the thread
 *   that called. Where a function fails, what it should have written is NULL or as it was.
 * - Every struct begins with its size: set it to sizeof(the struct), and everything else that you do not set to zero
 *   (`sidereal_options options = {sizeof options};`). Programs and libraries of different versions agree by it.
 * - Texts are UTF-8 with a length, not ended by zero. {NULL, 0} is no text.
 * - What a function hands out is freed by the function of its type, once; NULL may be freed. Texts and arrays belong to
 *   the thing that they were read from, and end with it.
 * - A recommender may be used from all threads at once. A call and an answer belong to one thread at a time.
 * - No function calls back while it holds a lock.
 */

#ifndef SIDEREAL_H
#define SIDEREAL_H

#include <stddef.h>
#include <stdint.h>


// All is well.
#define SIDEREAL_OK 0

// The caller can put it right: change the request, the change or the option.
#define SIDEREAL_CALLER 1

// The owner of the files can: repair or replace them.
#define SIDEREAL_FILES 2

// Nobody can: send the request again later, or to another machine.
#define SIDEREAL_OVERLOADED 3

// The operator of the machine can: its device is missing, lost or out of memory.
#define SIDEREAL_DEVICE 4

// The authors can: report it.
#define SIDEREAL_INTERNAL 5

// The request was cancelled.
#define SIDEREAL_CANCELLED 6

// The deadline went by, or would have.
#define SIDEREAL_DEADLINE_EXCEEDED 7

// Not an error: the answer is not there yet.
#define SIDEREAL_PENDING 8

// IEEE single precision.
#define SIDEREAL_F32 0

// IEEE half precision.
#define SIDEREAL_F16 1

// The upper half of single precision.
#define SIDEREAL_BF16 2

// An answer, until it is freed.
typedef struct sidereal_answer sidereal_answer;

// A text that was made for the program, until it is freed.
typedef struct sidereal_buffer sidereal_buffer;

// A request that was handed over, until it is freed.
typedef struct sidereal_call sidereal_call;

// A model and a catalog on a device, until it is closed.
typedef struct sidereal_recommender sidereal_recommender;

// A text: UTF-8, not ended by zero.
typedef struct sidereal_text {
  // The first byte; NULL for no text.
  const char *data;
  // Bytes.
  size_t len;
} sidereal_text;

// How a recommender is opened.
typedef struct sidereal_options {
  // sizeof(sidereal_options).
  size_t struct_size;
  // The model folder.
  struct sidereal_text model;
  // The catalog: a compiled one, or a file of items.
  struct sidereal_text catalog;
  // "cpu", "cuda" or "cuda:1"; no text for the CPU.
  struct sidereal_text device;
  // The folder of the base, where the model's folder is that of a LoRA adapter.
  struct sidereal_text base;
  // Threads to compute on; 0 for all cores.
  uint32_t threads;
  // Nonzero opens the catalog for reading alone, so that another process may change its files.
  int32_t read_only;
  // The most input tokens of a request; 0 for 8192.
  uint64_t max_context;
  // Tokens of all contexts together; 0 for the default.
  uint64_t context_tokens;
  // Requests that may wait; 0 for 1024.
  uint64_t max_queued;
  // How long a new request may be expected to wait, in milliseconds; 0 for any time.
  uint64_t max_wait_ms;
  // Nonzero makes an acknowledged change survive the end of the machine, zero the end of the process.
  int32_t machine_durability;
} sidereal_options;

// The counts, versions and times of an answer.
typedef struct sidereal_answer_info {
  // sizeof(sidereal_answer_info).
  size_t struct_size;
  // Items.
  size_t num_items;
  // The state of the catalog that was searched.
  uint64_t snapshot;
  // The weights that answered: 1 as the model was opened.
  uint64_t weights_version;
  // Tokens of the context.
  size_t tokens;
  // Those of them that the prefix cache had.
  size_t cached_tokens;
  // Names of the history that the catalog does not have and that were left out.
  size_t num_skipped;
  // From submission to admission, in microseconds.
  uint64_t queue_us;
  // From admission to the answer.
  uint64_t engine_us;
  // Both together.
  uint64_t total_us;
} sidereal_answer_info;

// One item of an answer. What it points to belongs to the answer.
typedef struct sidereal_item {
  // sizeof(sidereal_item).
  size_t struct_size;
  // The item's name.
  struct sidereal_text name;
  // Its title, where the request asks for titles and the catalog has one.
  struct sidereal_text title;
  // Its semantic ID.
  const uint16_t *codes;
  // Levels of the semantic ID.
  size_t num_codes;
  // Natural log of the probability of the semantic ID.
  float score;
} sidereal_item;

// A request. It has one input: `history`, `tokens`, or one in `json`.
typedef struct sidereal_request {
  // sizeof(sidereal_request).
  size_t struct_size;
  // The user's items by name, oldest first.
  const struct sidereal_text *history;
  // Items of the history.
  size_t history_len;
  // The model's input as it is, instead of a history.
  const uint32_t *tokens;
  // Tokens.
  size_t tokens_len;
  // Items that must not come back.
  const struct sidereal_text *exclude;
  // Their number.
  size_t exclude_len;
  // Items to score instead of searching; sidereal_rank needs some.
  const struct sidereal_text *candidates;
  // Their number.
  size_t candidates_len;
  // Tags combined, as "tag:garden & !tag:adult".
  struct sidereal_text filter;
  // Finds the context of the user's earlier requests again.
  struct sidereal_text user;
  // Beam width; 0 for 50.
  uint32_t beams;
  // Items that come back at most; 0 for 10.
  uint32_t top_k;
  // Time until the answer must be there, in microseconds; 0 for no deadline.
  uint64_t deadline_us;
  // Nonzero adds titles to the items.
  int32_t titles;
  // Nonzero adds the log-probabilities of the codes, which the answer's JSON shows.
  int32_t log_probs;
  // All other fields of a request line, as a JSON object: {"only": ["9"], "seed": 7}.
  struct sidereal_text json;
} sidereal_request;

// Takes an answer, on the engine's own thread, for which all requests wait: hand it to a thread of your own.
// `answer` is the callback's to free, NULL where `status` is not SIDEREAL_OK. It may submit and cancel; calls
// that wait fail there.
typedef void (*sidereal_callback)(void *user_data, int32_t status, struct sidereal_answer *answer);

// The result of a batch of changes.
typedef struct sidereal_changed {
  // sizeof(sidereal_changed).
  size_t struct_size;
  // The snapshot that has the batch.
  uint64_t snapshot;
  // 1 where the batch's watermark says that the catalog has it already, and nothing was done.
  int32_t is_repeated;
} sidereal_changed;

// A tensor: dense and row-major.
typedef struct sidereal_tensor {
  // sizeof(sidereal_tensor).
  size_t struct_size;
  // Its name in the checkpoint.
  struct sidereal_text name;
  // Sizes of its dimensions.
  const uint64_t *shape;
  // Dimensions.
  size_t num_dims;
  // SIDEREAL_F32, SIDEREAL_F16 or SIDEREAL_BF16.
  int32_t dtype;
  // Its numbers, aligned for their type.
  const uint8_t *data;
  // Bytes of the numbers.
  size_t num_bytes;
} sidereal_tensor;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Returns the message of the last error on this thread: what happened, the limit, the way out. It holds
// until the next error on the thread. Inside of a callback it says why the request failed.
struct sidereal_text sidereal_last_error(void);

// Returns the stable name of the last error on this thread, such as "unknown_item".
struct sidereal_text sidereal_last_error_code(void);

// Returns in how many milliseconds a request may come again, as predicted, after SIDEREAL_OVERLOADED or
// SIDEREAL_DEADLINE_EXCEEDED; 0 where nothing is predicted.
uint64_t sidereal_last_retry_after_ms(void);

// Opens a model and a catalog. This takes as long as reading them.
int32_t sidereal_open(const struct sidereal_options *options, struct sidereal_recommender **out);

// Takes no more requests, and waits until those that were accepted are answered; those that take longer
// than `within_ms` fail. The recommender still has to be closed.
int32_t sidereal_shutdown(const struct sidereal_recommender *recommender, uint64_t within_ms);

// Ends a recommender and frees it. Requests that run fail; calls that are open stay valid until they are
// freed. No other thread may use the recommender during this call or after it, and no callback may make it.
void sidereal_close(struct sidereal_recommender *recommender);

// The text of a buffer; {NULL, 0} for NULL.
struct sidereal_text sidereal_buffer_text(const struct sidereal_buffer *buffer);

// Frees a buffer.
void sidereal_buffer_free(struct sidereal_buffer *buffer);

// Writes the engine's state as JSON: requests that wait and run, free pages, snapshot. Does not wait.
int32_t sidereal_status(const struct sidereal_recommender *recommender, struct sidereal_buffer **out);

// Writes counters and histograms as Prometheus' text. Does not wait.
int32_t sidereal_metrics(const struct sidereal_recommender *recommender, struct sidereal_buffer **out);

// The library's version, such as "0.1.0".
struct sidereal_text sidereal_version(void);

// The number of the ABI, which is that of the shared library's name too: it changes where old programs
// have to be compiled again.
uint32_t sidereal_abi_version(void);

// Writes the counts, versions and times of an answer.
int32_t sidereal_answer_read(const struct sidereal_answer *answer, struct sidereal_answer_info *info);

// Writes the item at an index, best first.
int32_t sidereal_answer_item(const struct sidereal_answer *answer, size_t index, struct sidereal_item *item);

// The whole answer as JSON, as the command line writes it: groups, log-probabilities and read tokens
// are there. {NULL, 0} for NULL.
struct sidereal_text sidereal_answer_json(const struct sidereal_answer *answer);

// Frees an answer.
void sidereal_answer_free(struct sidereal_answer *answer);

// Answers a request and waits for it, and for room in the queue before it.
int32_t sidereal_recommend(const struct sidereal_recommender *recommender, const struct sidereal_request *request, struct sidereal_answer **out);

// Scores the request's candidates and waits for it: those that are available come back, best first.
int32_t sidereal_rank(const struct sidereal_recommender *recommender, const struct sidereal_request *request, struct sidereal_answer **out);

// Hands a request over and does not wait: a full queue is SIDEREAL_OVERLOADED.
int32_t sidereal_submit(const struct sidereal_recommender *recommender, const struct sidereal_request *request, struct sidereal_call **out);

// Waits for the answer to a call for at most `timeout_us`: SIDEREAL_PENDING where it is not there then, at
// once for 0, and never for UINT64_MAX. Other statuses end the call, which still has to be freed.
int32_t sidereal_call_wait(struct sidereal_call *call, uint64_t timeout_us, struct sidereal_answer **out);

// Names a call's request, for sidereal_cancel; 0 for NULL.
uint64_t sidereal_call_id(const struct sidereal_call *call);

// Frees a call. A request that was not answered yet is cancelled.
void sidereal_call_free(struct sidereal_call *call);

// Hands a request over whose answer goes to `callback`, which is called exactly once unless this returns
// an error. `id`, where it is not NULL, gets the request's name for sidereal_cancel.
int32_t sidereal_submit_with(const struct sidereal_recommender *recommender, const struct sidereal_request *request, sidereal_callback callback, void *user_data, uint64_t *id);

// Ends a request by its name: it fails with SIDEREAL_CANCELLED, and what it held is free at the next step.
// The name of a request that was answered does nothing.
int32_t sidereal_cancel(const struct sidereal_recommender *recommender, uint64_t id);

// Applies a batch of changes, all of them or with an error none:
// {"changes": [{"put": {"item": "9", "sid": [1, 2, 3]}}, {"delete": {"item": "4"}}],
// "watermark": {"source": "items", "partition": 0, "offset": 41}}. Waits for the log. `changed` may be NULL.
int32_t sidereal_change(const struct sidereal_recommender *recommender, struct sidereal_text json, struct sidereal_changed *changed);

// Puts a new full catalog, a file, in the place of the one that is searched; changes after its watermarks
// are kept. Waits for the end; requests go on meanwhile. `changed` may be NULL.
int32_t sidereal_replace_catalog(const struct sidereal_recommender *recommender, struct sidereal_text path, struct sidereal_changed *changed);

// Waits until the disk has every change so far.
int32_t sidereal_sync(const struct sidereal_recommender *recommender);

// Puts other tensors in the place of those of the same names. Waits for requests that run, which are
// finished with the old weights. `version`, where it is not NULL, gets the number that answers carry.
int32_t sidereal_replace_weights(const struct sidereal_recommender *recommender, const struct sidereal_tensor *const *tensors, size_t num_tensors, uint64_t *version);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* SIDEREAL_H */
