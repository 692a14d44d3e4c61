// Recommendations in C++: waits, callbacks, changes of the catalog. Arguments: the model's folder, the catalog, items of
// a history.
#include <cstdio>
#include <cstring>
#include <future>

#include "sidereal.hpp"

static void print(const sidereal::Answer& answer) {
  for (const auto& item : answer.items()) {
    uint32_t bits;
    std::memcpy(&bits, &item.score, sizeof bits);
    std::printf("%s %08x", item.name.c_str(), bits);
    for (const uint16_t code : item.codes) std::printf(" %u", code);
    std::printf("\n");
  }
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s MODEL CATALOG ITEM...\n", argv[0]);
    return 2;
  }
  try {
    sidereal_options options = {};
    options.threads = 1;
    const sidereal::Recommender recommender(argv[1], argv[2], options);
    sidereal::Request request;
    request.history.assign(argv + 3, argv + argc);
    request.beams = 20;
    print(recommender.recommend(request));

    std::promise<sidereal::Answer> promise;
    recommender.submit(request, [&](int32_t status, std::optional<sidereal::Answer> answer) {
      if (status == SIDEREAL_OK) {
        promise.set_value(std::move(*answer));
      } else {
        promise.set_exception(std::make_exception_ptr(sidereal::Error(status)));
      }
    });
    print(promise.get_future().get());

    // A new item is found by the next request.
    recommender.change(R"({"changes": [{"put": {"item": "new", "sid": [1, 2, 3], "tags": ["fresh"]}}]})");
    request.filter = "tag:fresh";
    const auto fresh = recommender.recommend(request).items();
    if (fresh.size() != 1 || fresh[0].name != "new") return 1;

    // Errors say whose they are.
    request.history = {"no such item"};
    try {
      recommender.recommend(request);
      return 1;
    } catch (const sidereal::Error& error) {
      std::fprintf(stderr, "%s (status %d): %s\n", error.code().c_str(), error.status(), error.what());
    }
    recommender.shutdown(std::chrono::seconds(1));
  } catch (const sidereal::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
