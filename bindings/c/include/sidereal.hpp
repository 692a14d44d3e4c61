// Sidereal for C++17: the C interface with owners and exceptions. All of it is in this header.
#ifndef SIDEREAL_HPP
#define SIDEREAL_HPP

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sidereal.h"

namespace sidereal {

inline std::string_view view(sidereal_text text) {
  return text.data == nullptr ? std::string_view() : std::string_view(text.data, text.len);
}

inline sidereal_text text(std::string_view view) { return {view.data(), view.size()}; }

// What went wrong: what(), the status, and the stable code.
class Error : public std::runtime_error {
 public:
  // The last error of this thread.
  explicit Error(int32_t status)
      : std::runtime_error(std::string(view(sidereal_last_error()))),
        status_(status),
        code_(view(sidereal_last_error_code())),
        retry_after_(sidereal_last_retry_after_ms()) {}

  int32_t status() const { return status_; }
  const std::string& code() const { return code_; }
  std::chrono::milliseconds retry_after() const { return std::chrono::milliseconds(retry_after_); }

 private:
  int32_t status_;
  std::string code_;
  uint64_t retry_after_;
};

inline void check(int32_t status) {
  if (status != SIDEREAL_OK) throw Error(status);
}

struct Item {
  std::string name;
  std::string title;
  std::vector<uint16_t> codes;
  float score;
};

class Answer {
 public:
  // Takes over an answer of the C interface.
  explicit Answer(sidereal_answer* answer) : answer_(answer, sidereal_answer_free) {}

  sidereal_answer_info info() const {
    sidereal_answer_info info = {};
    info.struct_size = sizeof info;
    check(sidereal_answer_read(answer_.get(), &info));
    return info;
  }

  std::vector<Item> items() const {
    std::vector<Item> items;
    const size_t num_items = info().num_items;
    items.reserve(num_items);
    for (size_t index = 0; index < num_items; ++index) {
      sidereal_item item = {};
      item.struct_size = sizeof item;
      check(sidereal_answer_item(answer_.get(), index, &item));
      items.push_back({std::string(view(item.name)), std::string(view(item.title)),
                       {item.codes, item.codes + item.num_codes}, item.score});
    }
    return items;
  }

  std::string_view json() const { return view(sidereal_answer_json(answer_.get())); }

 private:
  std::unique_ptr<sidereal_answer, void (*)(sidereal_answer*)> answer_;
};

struct Request {
  std::vector<std::string> history;
  std::vector<uint32_t> tokens;
  std::vector<std::string> exclude;
  std::vector<std::string> candidates;
  std::string filter;
  std::string user;
  uint32_t beams = 0;
  uint32_t top_k = 0;
  std::chrono::microseconds deadline{0};
  bool titles = false;
  bool log_probs = false;
  std::string json;  // all other fields of a request line
};

// A request on its way. Dropped before its answer is there, it is cancelled.
class Call {
 public:
  explicit Call(sidereal_call* call) : call_(call, sidereal_call_free) {}

  Answer wait() {
    sidereal_answer* answer = nullptr;
    check(sidereal_call_wait(call_.get(), UINT64_MAX, &answer));
    return Answer(answer);
  }

  // The answer, or nothing where it is not there in time.
  std::optional<Answer> wait_for(std::chrono::microseconds timeout) {
    sidereal_answer* answer = nullptr;
    const auto us = timeout.count() < 0 ? 0 : static_cast<uint64_t>(timeout.count());
    const int32_t status = sidereal_call_wait(call_.get(), us, &answer);
    if (status == SIDEREAL_PENDING) return std::nullopt;
    check(status);
    return Answer(answer);
  }

  uint64_t id() const { return sidereal_call_id(call_.get()); }

 private:
  std::unique_ptr<sidereal_call, void (*)(sidereal_call*)> call_;
};

class Recommender {
 public:
  // `options.model` and `options.catalog` are set from the two paths.
  Recommender(std::string_view model, std::string_view catalog, sidereal_options options = {})
      : recommender_(nullptr, sidereal_close) {
    options.struct_size = sizeof options;
    options.model = text(model);
    options.catalog = text(catalog);
    sidereal_recommender* recommender = nullptr;
    check(sidereal_open(&options, &recommender));
    recommender_.reset(recommender);
  }

  Answer recommend(const Request& request) const { return ask(sidereal_recommend, request); }
  Answer rank(const Request& request) const { return ask(sidereal_rank, request); }

  Call submit(const Request& request) const {
    sidereal_call* call = nullptr;
    with(request, [&](const sidereal_request& request) {
      check(sidereal_submit(recommender_.get(), &request, &call));
    });
    return Call(call);
  }

  // `callback` gets the status and, where it is SIDEREAL_OK, the answer, on the engine's own thread: hand it on. It
  // must not throw. The number names the request, for `cancel`.
  uint64_t submit(const Request& request,
                  std::function<void(int32_t status, std::optional<Answer>)> callback) const {
    using Callback = decltype(callback);
    auto kept = std::make_unique<Callback>(std::move(callback));
    uint64_t id = 0;
    with(request, [&](const sidereal_request& request) {
      const auto deliver = [](void* user_data, int32_t status, sidereal_answer* answer) {
        std::unique_ptr<Callback> callback(static_cast<Callback*>(user_data));
        (*callback)(status, answer == nullptr ? std::nullopt : std::make_optional(Answer(answer)));
      };
      check(sidereal_submit_with(recommender_.get(), &request, deliver, kept.get(), &id));
      kept.release();  // the callback frees it
    });
    return id;
  }

  void cancel(uint64_t id) const { check(sidereal_cancel(recommender_.get(), id)); }

  // Applies {"changes": [...]} and returns the snapshot that has them.
  uint64_t change(std::string_view json) const {
    sidereal_changed changed = {};
    changed.struct_size = sizeof changed;
    check(sidereal_change(recommender_.get(), text(json), &changed));
    return changed.snapshot;
  }

  std::string status() const { return buffer(sidereal_status); }
  std::string metrics() const { return buffer(sidereal_metrics); }

  void shutdown(std::chrono::milliseconds within) const {
    check(sidereal_shutdown(recommender_.get(), static_cast<uint64_t>(within.count())));
  }

  sidereal_recommender* get() const { return recommender_.get(); }

 private:
  template <class Use>
  static void with(const Request& from, Use use) {
    const auto texts = [](const std::vector<std::string>& strings) {
      std::vector<sidereal_text> texts;
      for (const auto& string : strings) texts.push_back(text(string));
      return texts;
    };
    const auto history = texts(from.history), exclude = texts(from.exclude);
    const auto candidates = texts(from.candidates);
    const auto optional = [](const std::string& string) {
      return string.empty() ? sidereal_text{nullptr, 0} : text(string);
    };
    sidereal_request request = {};
    request.struct_size = sizeof request;
    request.history = history.data();
    request.history_len = history.size();
    request.tokens = from.tokens.data();
    request.tokens_len = from.tokens.size();
    request.exclude = exclude.data();
    request.exclude_len = exclude.size();
    request.candidates = candidates.data();
    request.candidates_len = candidates.size();
    request.filter = optional(from.filter);
    request.user = optional(from.user);
    request.beams = from.beams;
    request.top_k = from.top_k;
    request.deadline_us = static_cast<uint64_t>(from.deadline.count());
    request.titles = from.titles;
    request.log_probs = from.log_probs;
    request.json = optional(from.json);
    use(request);
  }

  template <class Entry>
  Answer ask(Entry entry, const Request& request) const {
    sidereal_answer* answer = nullptr;
    with(request, [&](const sidereal_request& request) {
      check(entry(recommender_.get(), &request, &answer));
    });
    return Answer(answer);
  }

  template <class Entry>
  std::string buffer(Entry entry) const {
    sidereal_buffer* buffer = nullptr;
    check(entry(recommender_.get(), &buffer));
    std::string text(view(sidereal_buffer_text(buffer)));
    sidereal_buffer_free(buffer);
    return text;
  }

  std::unique_ptr<sidereal_recommender, void (*)(sidereal_recommender*)> recommender_;
};

}  // namespace sidereal

#endif  // SIDEREAL_HPP
