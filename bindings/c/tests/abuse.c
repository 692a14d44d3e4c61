/* Arguments that no program should give: each is an error with words, or does nothing; none ends the program. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sidereal.h"

#define EXPECT(condition)                                              \
  do {                                                                 \
    if (!(condition)) {                                                \
      const sidereal_text words = sidereal_last_error();               \
      fprintf(stderr, "line %d: %s (%.*s)\n", __LINE__, #condition, (int)words.len, words.data); \
      exit(1);                                                         \
    }                                                                  \
  } while (0)

static sidereal_text text(const char *string) { return (sidereal_text){string, strlen(string)}; }

static int says(const char *code) {
  const sidereal_text found = sidereal_last_error_code();
  return found.len == strlen(code) && memcmp(found.data, code, found.len) == 0;
}

static void nulls(void) {
  sidereal_recommender *recommender = (sidereal_recommender *)1;
  sidereal_answer *answer = (sidereal_answer *)1;
  sidereal_call *call = NULL;
  sidereal_buffer *buffer;
  uint64_t number;
  EXPECT(sidereal_open(NULL, &recommender) == SIDEREAL_CALLER && recommender == NULL);
  sidereal_options options = {.struct_size = sizeof options};
  EXPECT(sidereal_open(&options, NULL) == SIDEREAL_CALLER);
  EXPECT(sidereal_open(&options, &recommender) == SIDEREAL_CALLER && says("invalid_field"));
  sidereal_request request = {.struct_size = sizeof request};
  EXPECT(sidereal_recommend(NULL, &request, &answer) == SIDEREAL_CALLER);
  EXPECT(sidereal_rank(NULL, &request, &answer) == SIDEREAL_CALLER);
  EXPECT(sidereal_submit(NULL, &request, &call) == SIDEREAL_CALLER);
  EXPECT(sidereal_submit_with(NULL, &request, NULL, NULL, NULL) == SIDEREAL_CALLER);
  EXPECT(sidereal_call_wait(NULL, 0, &answer) == SIDEREAL_CALLER && answer == NULL);
  EXPECT(sidereal_call_id(NULL) == 0);
  EXPECT(sidereal_cancel(NULL, 7) == SIDEREAL_CALLER);
  EXPECT(sidereal_change(NULL, text("{}"), NULL) == SIDEREAL_CALLER);
  EXPECT(sidereal_replace_catalog(NULL, text("x"), NULL) == SIDEREAL_CALLER);
  EXPECT(sidereal_sync(NULL) == SIDEREAL_CALLER);
  EXPECT(sidereal_replace_weights(NULL, NULL, 0, &number) == SIDEREAL_CALLER);
  EXPECT(sidereal_status(NULL, &buffer) == SIDEREAL_CALLER && buffer == NULL);
  EXPECT(sidereal_metrics(NULL, &buffer) == SIDEREAL_CALLER);
  EXPECT(sidereal_shutdown(NULL, 1) == SIDEREAL_CALLER);
  EXPECT(sidereal_answer_read(NULL, NULL) == SIDEREAL_CALLER);
  EXPECT(sidereal_answer_item(NULL, 0, NULL) == SIDEREAL_CALLER);
  EXPECT(sidereal_answer_json(NULL).data == NULL && sidereal_buffer_text(NULL).data == NULL);
  sidereal_answer_free(NULL);
  sidereal_call_free(NULL);
  sidereal_buffer_free(NULL);
  sidereal_close(NULL);
}

static void requests(sidereal_recommender *recommender) {
  sidereal_answer *answer;
  sidereal_call *call;
  sidereal_text history[] = {text("168")};
  const sidereal_request good = {.struct_size = sizeof good, .history = history, .history_len = 1};
  sidereal_request request = good;
  EXPECT(sidereal_recommend(recommender, NULL, &answer) == SIDEREAL_CALLER && answer == NULL);
  EXPECT(sidereal_recommend(recommender, &good, NULL) == SIDEREAL_CALLER);
  for (int wrong = 0; wrong < 4; ++wrong) {
    request.struct_size = (size_t[]){0, 7, 1 << 17, (size_t)-1}[wrong];
    EXPECT(sidereal_recommend(recommender, &request, &answer) == SIDEREAL_CALLER);
  }
  request = good;
  request.history = NULL;
  EXPECT(sidereal_recommend(recommender, &request, &answer) == SIDEREAL_CALLER);
  request = good;
  request.history_len = (size_t)-1;
  EXPECT(sidereal_recommend(recommender, &request, &answer) == SIDEREAL_CALLER);
  request = good;
  request.history = (sidereal_text *)((char *)history + 1);
  EXPECT(sidereal_recommend(recommender, &request, &answer) == SIDEREAL_CALLER);
  request = good;
  sidereal_text wrong_texts[] = {{NULL, 3}, {"\xff\xfe", 2}, {"x", (size_t)-1}};
  for (int wrong = 0; wrong < 3; ++wrong) {
    request.history = &wrong_texts[wrong];
    EXPECT(sidereal_recommend(recommender, &request, &answer) == SIDEREAL_CALLER);
  }
  request = good;
  for (int wrong = 0; wrong < 5; ++wrong) {
    request.json = text(((const char *[]){"{", "[]", "{\"history\": [\"1\"]}", "{\"beam\": 1}", "{\"beams\": -1}"})[wrong]);
    EXPECT(sidereal_submit(recommender, &request, &call) == SIDEREAL_CALLER && call == NULL);
  }
  request = good;
  request.beams = 1u << 31;
  EXPECT(sidereal_recommend(recommender, &request, &answer) == SIDEREAL_CALLER && says("beam_width"));
  request = good;
  EXPECT(sidereal_rank(recommender, &request, &answer) == SIDEREAL_CALLER);
  EXPECT(sidereal_submit_with(recommender, &good, NULL, NULL, NULL) == SIDEREAL_CALLER);
  request.deadline_us = 1;
  EXPECT(sidereal_recommend(recommender, &request, &answer) == SIDEREAL_DEADLINE_EXCEEDED);

  /* An older program's struct ends earlier, a newer one's later. */
  struct { size_t struct_size; const sidereal_text *history; size_t history_len; } older =
      {sizeof older, history, 1};
  EXPECT(sidereal_recommend(recommender, (const sidereal_request *)&older, &answer) == SIDEREAL_OK);
  sidereal_answer_info info = {.struct_size = sizeof info};
  EXPECT(sidereal_answer_read(answer, &info) == SIDEREAL_OK && info.num_items == 10);
  struct { size_t struct_size, num_items; uint64_t untouched; } older_info = {2 * sizeof(size_t), 0, 7};
  EXPECT(sidereal_answer_read(answer, (sidereal_answer_info *)&older_info) == SIDEREAL_OK);
  EXPECT(older_info.num_items == 10 && older_info.untouched == 7);
  sidereal_item item = {.struct_size = sizeof item};
  EXPECT(sidereal_answer_item(answer, 10, &item) == SIDEREAL_CALLER);
  EXPECT(sidereal_answer_item(answer, 0, NULL) == SIDEREAL_CALLER);
  EXPECT(sidereal_answer_json(answer).len > 100);
  sidereal_answer_free(answer);
  struct { sidereal_request known; uint64_t unknown; } newer = {good, 0};
  newer.known.struct_size = sizeof newer;
  EXPECT(sidereal_recommend(recommender, &newer.known, &answer) == SIDEREAL_OK);
  sidereal_answer_free(answer);
  newer.unknown = 1;
  EXPECT(sidereal_recommend(recommender, &newer.known, &answer) == SIDEREAL_CALLER);

  /* A call is answered once; freed before, it is cancelled. */
  EXPECT(sidereal_submit(recommender, &good, &call) == SIDEREAL_OK && sidereal_call_id(call) > 0);
  EXPECT(sidereal_call_wait(call, UINT64_MAX, &answer) == SIDEREAL_OK);
  sidereal_answer_free(answer);
  EXPECT(sidereal_call_wait(call, 0, &answer) == SIDEREAL_CALLER && answer == NULL);
  EXPECT(sidereal_cancel(recommender, sidereal_call_id(call)) == SIDEREAL_OK);
  sidereal_call_free(call);
  EXPECT(sidereal_submit(recommender, &good, &call) == SIDEREAL_OK);
  sidereal_call_free(call);
  EXPECT(sidereal_cancel(recommender, UINT64_MAX) == SIDEREAL_OK);
}

static void changes(sidereal_recommender *recommender) {
  sidereal_changed changed = {.struct_size = sizeof changed};
  for (int wrong = 0; wrong < 4; ++wrong) {
    const char *json = ((const char *[]){"", "{}", "{\"changes\": [{}]}", "{\"changes\": [], \"more\": 1}"})[wrong];
    EXPECT(sidereal_change(recommender, text(json), &changed) == SIDEREAL_CALLER);
  }
  const char *batch = "{\"changes\": [{\"delete\": {\"item\": \"9\"}}], "
                      "\"watermark\": {\"source\": \"s\", \"partition\": 0, \"offset\": 4}}";
  EXPECT(sidereal_change(recommender, text(batch), &changed) == SIDEREAL_OK && changed.snapshot == 2);
  EXPECT(sidereal_change(recommender, text(batch), &changed) == SIDEREAL_OK && changed.is_repeated == 1);
  EXPECT(sidereal_change(recommender, text(batch), NULL) == SIDEREAL_OK);
  EXPECT(sidereal_replace_catalog(recommender, text("/no/such/file"), NULL) == SIDEREAL_FILES);
  const float number = 1;
  const uint64_t shape[] = {1}, huge[] = {UINT64_MAX, UINT64_MAX};
  sidereal_tensor tensor = {.struct_size = sizeof tensor, .name = text("no.such"), .shape = shape, .num_dims = 1,
                            .data = (const uint8_t *)&number, .num_bytes = 4};
  const sidereal_tensor *tensors[] = {&tensor, NULL};
  EXPECT(sidereal_replace_weights(recommender, tensors, 1, NULL) == SIDEREAL_FILES && says("unexpected_tensor"));
  EXPECT(sidereal_replace_weights(recommender, tensors, 2, NULL) == SIDEREAL_CALLER);
  tensor.dtype = 9;
  EXPECT(sidereal_replace_weights(recommender, tensors, 1, NULL) == SIDEREAL_CALLER);
  tensor.dtype = SIDEREAL_BF16;
  EXPECT(sidereal_replace_weights(recommender, tensors, 1, NULL) == SIDEREAL_CALLER);
  tensor.shape = huge;
  tensor.num_dims = 2;
  EXPECT(sidereal_replace_weights(recommender, tensors, 1, NULL) == SIDEREAL_CALLER);
}

struct received {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  int count, failed, waited;
  sidereal_recommender *recommender;
};

static void receive(void *user_data, int32_t status, sidereal_answer *answer) {
  struct received *received = user_data;
  sidereal_text history[] = {text("168")};
  const sidereal_request request = {.struct_size = sizeof request, .history = history, .history_len = 1};
  sidereal_answer *none;
  /* A call that waits would never end on this thread. */
  const int waited = sidereal_recommend(received->recommender, &request, &none) == SIDEREAL_OK;
  sidereal_answer_free(answer);
  pthread_mutex_lock(&received->lock);
  received->count += 1;
  received->failed += status != SIDEREAL_OK;
  received->waited += waited;
  pthread_cond_signal(&received->changed);
  pthread_mutex_unlock(&received->lock);
}

static void *many(void *argument) {
  struct received *received = argument;
  sidereal_text history[] = {text("168"), text("278")};
  const sidereal_request request = {.struct_size = sizeof request, .history = history, .history_len = 2};
  for (int at = 0; at < 50; ++at) {
    EXPECT(sidereal_submit_with(received->recommender, &request, receive, received, NULL) == SIDEREAL_OK);
    sidereal_answer *answer;
    EXPECT(sidereal_recommend(received->recommender, &request, &answer) == SIDEREAL_OK);
    sidereal_answer_free(answer);
  }
  return NULL;
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  nulls();
  sidereal_options options = {.struct_size = sizeof options, .model = text(argv[1]), .catalog = text(argv[2])};
  options.threads = 1;
  sidereal_recommender *recommender;
  options.device = text("tpu");
  EXPECT(sidereal_open(&options, &recommender) != SIDEREAL_OK && recommender == NULL);
  options.device = text("cpu");
  options.model = text("/no/such/folder");
  EXPECT(sidereal_open(&options, &recommender) == SIDEREAL_FILES);
  options.model = text(argv[1]);
  EXPECT(sidereal_open(&options, &recommender) == SIDEREAL_OK);
  requests(recommender);
  changes(recommender);

  struct received received = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
  received.recommender = recommender;
  pthread_t threads[4];
  for (int at = 0; at < 4; ++at) pthread_create(&threads[at], NULL, many, &received);
  for (int at = 0; at < 4; ++at) pthread_join(threads[at], NULL);
  pthread_mutex_lock(&received.lock);
  while (received.count < 200) pthread_cond_wait(&received.changed, &received.lock);
  pthread_mutex_unlock(&received.lock);
  EXPECT(received.failed == 0 && received.waited == 0);

  sidereal_buffer *buffer;
  EXPECT(sidereal_status(recommender, &buffer) == SIDEREAL_OK && sidereal_buffer_text(buffer).len > 50);
  sidereal_buffer_free(buffer);
  EXPECT(sidereal_metrics(recommender, &buffer) == SIDEREAL_OK && sidereal_buffer_text(buffer).len > 1000);
  sidereal_buffer_free(buffer);

  /* A call outlives its recommender. */
  sidereal_text history[] = {text("168")};
  const sidereal_request request = {.struct_size = sizeof request, .history = history, .history_len = 1};
  sidereal_call *call;
  sidereal_answer *answer;
  EXPECT(sidereal_submit(recommender, &request, &call) == SIDEREAL_OK);
  EXPECT(sidereal_shutdown(recommender, 10000) == SIDEREAL_OK);
  EXPECT(sidereal_recommend(recommender, &request, &answer) == SIDEREAL_OVERLOADED && says("shutting_down"));
  sidereal_close(recommender);
  EXPECT(sidereal_call_wait(call, UINT64_MAX, &answer) == SIDEREAL_OK);
  sidereal_answer_free(answer);
  sidereal_call_free(call);
  EXPECT(sidereal_abi_version() == 0 && sidereal_version().len > 0);
  return 0;
}
