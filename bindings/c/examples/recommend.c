/* Recommendations in C: open, ask, wait, read. Arguments: the model's folder, the catalog, items of a history. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sidereal.h"

static sidereal_text text(const char *string) { return (sidereal_text){string, strlen(string)}; }

static void check(int32_t status) {
  if (status == SIDEREAL_OK) return;
  const sidereal_text words = sidereal_last_error();
  fprintf(stderr, "status %" PRId32 ": %.*s\n", status, (int)words.len, words.data);
  exit(1);
}

static void print(const sidereal_answer *answer) {
  sidereal_answer_info info = {.struct_size = sizeof info};
  check(sidereal_answer_read(answer, &info));
  for (size_t index = 0; index < info.num_items; ++index) {
    sidereal_item item = {.struct_size = sizeof item};
    check(sidereal_answer_item(answer, index, &item));
    uint32_t bits;
    memcpy(&bits, &item.score, sizeof bits);
    printf("%.*s %08" PRIx32, (int)item.name.len, item.name.data, bits);
    for (size_t level = 0; level < item.num_codes; ++level) printf(" %u", item.codes[level]);
    printf("\n");
  }
}

int main(int argc, char **argv) {
  if (argc < 4) {
    fprintf(stderr, "usage: %s MODEL CATALOG ITEM...\n", argv[0]);
    return 2;
  }
  sidereal_options options = {.struct_size = sizeof options};
  options.model = text(argv[1]);
  options.catalog = text(argv[2]);
  options.threads = 1;
  sidereal_recommender *recommender;
  check(sidereal_open(&options, &recommender));

  sidereal_text history[64];
  sidereal_request request = {.struct_size = sizeof request, .history = history, .beams = 20};
  for (int at = 3; at < argc && request.history_len < 64; ++at) history[request.history_len++] = text(argv[at]);

  /* Waiting for the answer. */
  sidereal_answer *answer;
  check(sidereal_recommend(recommender, &request, &answer));
  print(answer);
  sidereal_answer_free(answer);

  /* Handing over, and looking from time to time. */
  sidereal_call *call;
  check(sidereal_submit(recommender, &request, &call));
  int32_t status;
  while ((status = sidereal_call_wait(call, 1000, &answer)) == SIDEREAL_PENDING) {
  }
  check(status);
  sidereal_call_free(call);
  print(answer);
  sidereal_answer_free(answer);

  sidereal_close(recommender);
  return 0;
}
