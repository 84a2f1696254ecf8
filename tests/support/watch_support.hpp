// What the tests of watches need: a gateway that does what it is told, a meter for streams, and
// records of events that can be compared.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <sstream>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../../coordination.hpp"
#include "hook.hpp"
#include "wait.hpp"

namespace support {

inline std::string base64(const std::string& bytes) {
  static const char* const kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    unsigned group = 0;
    for (std::size_t k = i; k < i + 3; ++k) {
      group = group << 8 | (k < bytes.size() ? static_cast<unsigned char>(bytes[k]) : 0U);
    }
    for (unsigned k = 0; k < 4; ++k) text += kDigits[group >> (18 - 6 * k) & 63U];
  }
  const std::size_t missing = (3 - bytes.size() % 3) % 3;
  return text.replace(text.size() - missing, missing, missing, '=');
}

// Records of events.

/// One event, in a form that can be compared and printed.
struct Change {
  bool put{true};
  std::string key, value;  // the value of a DELETE is ""
  std::int64_t revision{0};
};
inline bool operator==(const Change& a, const Change& b) {
  return a.put == b.put && a.key == b.key && a.value == b.value && a.revision == b.revision;
}
inline bool operator!=(const Change& a, const Change& b) { return !(a == b); }
inline std::ostream& operator<<(std::ostream& out, const Change& change) {
  return out << change.revision << (change.put ? " PUT " : " DELETE ") << change.key << '='
             << change.value;
}

inline Change change_of(const coordination::WatchEvent& event) {
  const bool put = event.type == coordination::EventType::Put;
  return {put, event.kv.key, put ? event.kv.value : std::string(), event.revision};
}
inline Change change_of(const coordination::ConfigEvent& event) {
  const bool put = event.type == coordination::EventType::Put;
  return {put, event.key, put ? event.value.dump() : std::string(), event.revision};
}

/// Where two histories begin to differ, or "none".
inline std::string first_difference(const std::vector<Change>& got,
                                    const std::vector<Change>& expected) {
  const auto shorter = std::min(got.size(), expected.size());
  std::size_t i = 0;
  while (i < shorter && got[i] == expected[i]) ++i;
  if (i == got.size() && i == expected.size()) return "none";
  const auto show = [i](const std::vector<Change>& list) {
    std::ostringstream text;
    if (i < list.size()) text << list[i];
    return i < list.size() ? text.str() : std::string("the end");
  };
  return "at " + std::to_string(i) + ": got " + show(got) + ", expected " + show(expected);
}

/// What stands after all changes.
inline std::map<std::string, std::string> applied(const std::vector<Change>& changes) {
  std::map<std::string, std::string> state;
  for (const auto& change : changes) {
    if (change.put) {
      state[change.key] = change.value;
    } else {
      state.erase(change.key);
    }
  }
  return state;
}

/// A list that several threads may add to.
template <class T>
class Journal {
 public:
  void add(T entry) {
    std::lock_guard<std::mutex> hold(mutex_);
    entries_.push_back(std::move(entry));
  }
  std::vector<T> all() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return entries_;
  }
  std::size_t size() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return entries_.size();
  }
  bool reaches(std::size_t count, milliseconds limit) const {
    return wait_until([&] { return size() >= count; }, lenient(limit));
  }

 private:
  mutable std::mutex mutex_;
  std::vector<T> entries_;
};
using Changes = Journal<Change>;

inline double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

inline double ms_between(std::chrono::steady_clock::time_point from,
                         std::chrono::steady_clock::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

// What is sent to /v3/watch.

struct Create {
  std::int64_t id{0};
  std::string key;  // in base64
  std::int64_t start_revision{0};
  bool progress_notify{false};
};

inline std::int64_t number_of(const nlohmann::json& json, const char* name) {
  const auto found = json.find(name);
  if (found == json.end()) return 0;
  return found->is_string() ? std::stoll(found->get<std::string>()) : found->get<std::int64_t>();
}

inline std::vector<Create> creates_of(const std::string& body) {
  std::vector<Create> creates;
  std::istringstream lines(body);
  for (std::string line; std::getline(lines, line) && line[0] != ' ';) {
    const auto json = nlohmann::json::parse(line).at("create_request");
    creates.push_back({number_of(json, "watch_id"), json.at("key").get<std::string>(),
                       number_of(json, "start_revision"), json.value("progress_notify", false)});
  }
  return creates;
}

/// Passes everything on, and counts the streams and the watches that are created on them.
class WatchMeter : public coordination::Transport {
 public:
  explicit WatchMeter(
      std::shared_ptr<coordination::Transport> inner = coordination::make_default_transport())
      : inner_(std::move(inner)) {}

  coordination::Result<coordination::HttpResponse> perform(
      const coordination::HttpRequest& request, const coordination::ChunkSink& sink,
      const coordination::Context& ctx) override {
    if (request.path != "/v3/watch") return inner_->perform(request, sink, ctx);
    auto ids = ids_of(request.body);
    creates_ += static_cast<int>(ids.size());
    ++streams_;
    const int now = ++open_;
    for (int most = most_; now > most && !most_.compare_exchange_weak(most, now);) {
    }
    auto response = inner_->perform(request, counting(sink, std::move(ids)), ctx);
    --open_;
    return response;
  }

  /// How many different watches etcd has confirmed.
  int confirmed() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return static_cast<int>(confirmed_.size());
  }
  /// How many create_requests were sent; the same watch can be created on several streams.
  int creates() const { return creates_; }
  int streams() const { return streams_; }
  int most_streams_at_once() const { return most_; }

 private:
  /// Without a JSON parser: there may be ten thousand.
  static std::deque<long> ids_of(const std::string& body) {
    static const std::string kName = "\"watch_id\":";
    std::deque<long> ids;
    for (auto at = body.find(kName); at != std::string::npos; at = body.find(kName, at + 1)) {
      const auto digits = body.find_first_of("0123456789", at + kName.size());
      ids.push_back(std::strtol(body.c_str() + digits, nullptr, 10));
    }
    return ids;
  }
  /// etcd confirms in the order of asking.
  coordination::ChunkSink counting(const coordination::ChunkSink& sink, std::deque<long> ids) {
    return [this, &sink, ids = std::move(ids),
            rest = std::string()](std::string_view piece) mutable {
      static const std::string kCreated = "\"created\":true";
      rest.append(piece);
      std::size_t from = 0;
      for (auto at = rest.find(kCreated); at != std::string::npos; at = rest.find(kCreated, from)) {
        from = at + kCreated.size();
        if (!ids.empty()) confirm(ids.front());
        if (!ids.empty()) ids.pop_front();
      }
      rest.erase(0, std::max(from, rest.size() - std::min(rest.size(), kCreated.size() - 1)));
      return sink(piece);
    };
  }
  void confirm(long id) {
    std::lock_guard<std::mutex> hold(mutex_);
    confirmed_.insert(id);
  }

  std::shared_ptr<coordination::Transport> inner_;
  std::atomic<int> creates_{0}, streams_{0}, open_{0}, most_{0};
  mutable std::mutex mutex_;
  std::unordered_set<long> confirmed_;
};

// A gateway without an etcd.

/// A stream that the test feeds.
class FakeStream {
 public:
  std::string endpoint;
  std::map<std::string, std::string> headers;
  std::vector<Create> creates;
  std::size_t body_size{0};

  /// Bytes for the client, in the piece in which they are given.
  void send(const std::string& bytes) {
    std::lock_guard<std::mutex> hold(mutex_);
    pieces_.push_back(bytes);
    changed_.notify_all();
  }
  /// The stream ends: well, or with an error.
  void end(std::optional<coordination::Error> error = std::nullopt) {
    std::lock_guard<std::mutex> hold(mutex_);
    ended_ = true;
    error_ = std::move(error);
    changed_.notify_all();
  }
  void reset() {
    end(coordination::Error{coordination::ErrorCode::Connection, "reset by the test", "",
                            coordination::Outcome::MaybeApplied, 0});
  }
  /// Everything that was sent has been taken.
  bool drained(milliseconds limit = 5s) {
    return wait_until(
        [&] {
          std::lock_guard<std::mutex> hold(mutex_);
          return pieces_.empty() && !busy_;
        },
        lenient(limit));
  }
  /// The client has left it, or it has ended.
  bool left(milliseconds limit = 5s) {
    return wait_until([&] { return over_.load(); }, lenient(limit));
  }
  /// It goes on for so long.
  bool stays(milliseconds time) {
    return never([&] { return over_.load(); }, time);
  }

  coordination::Result<coordination::HttpResponse> run(const coordination::ChunkSink& sink,
                                                       const coordination::Context& ctx) {
    const auto hook = ctx.on_cancel([this] { end(); });
    auto result = feed(sink, ctx);
    over_ = true;
    return result;
  }

 private:
  coordination::Result<coordination::HttpResponse> feed(const coordination::ChunkSink& sink,
                                                        const coordination::Context& ctx) {
    std::unique_lock<std::mutex> hold(mutex_);
    for (;;) {
      changed_.wait(hold, [&] { return ended_ || !pieces_.empty(); });
      if (ctx.cancelled()) {
        return coordination::Error{coordination::ErrorCode::Cancelled, "left", "",
                                   coordination::Outcome::MaybeApplied, 0};
      }
      if (pieces_.empty()) break;
      const std::string piece = std::move(pieces_.front());
      pieces_.pop_front();
      busy_ = true;
      hold.unlock();
      const bool more = sink(piece);
      hold.lock();
      busy_ = false;
      if (!more) break;
    }
    if (error_) return *error_;
    return coordination::HttpResponse{200, ""};
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::string> pieces_;
  bool ended_{false}, busy_{false};
  std::optional<coordination::Error> error_;
  std::atomic<bool> over_{false};
};
using FakeStreamPtr = std::shared_ptr<FakeStream>;

/// Answers reads and logins as it was told to, and gives its watch streams to the test.
class FakeGateway : public coordination::Transport {
 public:
  using ReadOf = std::function<coordination::Result<coordination::HttpResponse>(
      const nlohmann::json& request)>;

  /// The next stream that was opened, or null.
  FakeStreamPtr next_stream(milliseconds limit = 5s) {
    if (!wait_until([&] { return opens(); }, lenient(limit))) return nullptr;
    std::lock_guard<std::mutex> hold(mutex_);
    auto stream = opened_.front();
    opened_.pop_front();
    return stream;
  }
  /// Another stream is there.
  bool opens() {
    std::lock_guard<std::mutex> hold(mutex_);
    return !opened_.empty();
  }
  /// What answers all reads from now on, in any thread; see hang_in.
  template <class F>
  auto on_read_of(F read) {
    return hang_in<ReadOf>(std::move(read), [this](ReadOf made) {
      std::lock_guard<std::mutex> hold(mutex_);
      read_ = std::move(made);
    });
  }
  /// The same, but for looks at the past.
  template <class F>
  Hook on_read(F read) {
    return on_read_of([read = std::move(read)](const nlohmann::json& request) {
      using Answer = coordination::Result<coordination::HttpResponse>;
      return request.contains("revision") ? history(request) : Answer(read());
    });
  }
  /// What a range answers from now on.
  void set_range(std::int64_t revision, nlohmann::json kvs = nlohmann::json::array()) {
    on_read_of(ReadOf([revision, kvs = std::move(kvs)](const nlohmann::json& request) {
      return request.contains("revision") ? history(request) : range_answer(revision, kvs);
    }));
  }
  /// A look at the past: the key was written at just that revision.
  static coordination::Result<coordination::HttpResponse> history(const nlohmann::json& request) {
    const auto revision = number_of(request, "revision");
    const nlohmann::json kv{{"key", request.at("key")},
                            {"create_revision", std::to_string(revision)},
                            {"mod_revision", std::to_string(revision)},
                            {"version", "1"}};
    return range_answer(revision, nlohmann::json::array({kv}));
  }
  /// Reads at this endpoint are not answered any more; "" = all are.
  void freeze(std::string endpoint) {
    std::lock_guard<std::mutex> hold(mutex_);
    frozen_ = std::move(endpoint);
  }
  int logins() const { return logins_; }
  int streams() const { return streams_; }

  static coordination::Result<coordination::HttpResponse> range_answer(
      std::int64_t revision, const nlohmann::json& kvs = nlohmann::json::array()) {
    const nlohmann::json answer{{"header", {{"revision", std::to_string(revision)}}},
                                {"kvs", kvs},
                                {"count", std::to_string(kvs.size())}};
    return coordination::HttpResponse{200, answer.dump()};
  }

  coordination::Result<coordination::HttpResponse> perform(
      const coordination::HttpRequest& request, const coordination::ChunkSink& sink,
      const coordination::Context& ctx) override {
    if (request.path == "/v3/watch") return open(request)->run(sink, ctx);
    if (request.path == "/v3/auth/authenticate") {
      return coordination::HttpResponse{
          200, R"({"header":{},"token":"t)" + std::to_string(++logins_) + "\"}"};
    }
    ReadOf read;
    while (is_frozen(request.endpoint)) {
      if (ctx.done()) {
        return coordination::Error{coordination::ErrorCode::Timeout, "frozen", "",
                                   coordination::Outcome::MaybeApplied, 0};
      }
      std::this_thread::sleep_for(2ms);
    }
    {
      std::lock_guard<std::mutex> hold(mutex_);
      read = read_;
    }
    return read ? read(nlohmann::json::parse(request.body)) : range_answer(1);
  }

 private:
  bool is_frozen(const std::string& endpoint) {
    std::lock_guard<std::mutex> hold(mutex_);
    return endpoint == frozen_;
  }
  FakeStreamPtr open(const coordination::HttpRequest& request) {
    auto stream = std::make_shared<FakeStream>();
    stream->endpoint = request.endpoint;
    for (const auto& [name, value] : request.headers) stream->headers[name] = value;
    stream->creates = creates_of(request.body);
    stream->body_size = request.body.size();
    ++streams_;
    std::lock_guard<std::mutex> hold(mutex_);
    opened_.push_back(stream);
    return stream;
  }

  std::mutex mutex_;
  ReadOf read_;
  std::string frozen_;
  std::deque<FakeStreamPtr> opened_;
  std::atomic<int> logins_{0}, streams_{0};
};

// Lines of a stream, as etcd writes them.

inline nlohmann::json header(std::int64_t revision) {
  return {{"cluster_id", "1"},
          {"member_id", "2"},
          {"revision", std::to_string(revision)},
          {"raft_term", "2"}};
}
inline std::string result_line(nlohmann::json result) {
  return nlohmann::json{{"result", std::move(result)}}.dump() + "\n";
}
inline std::string created_line(std::int64_t id, std::int64_t revision) {
  return result_line(
      {{"header", header(revision)}, {"watch_id", std::to_string(id)}, {"created", true}});
}
/// The creation of all of them.
inline std::string created_lines(const FakeStream& stream, std::int64_t revision) {
  std::string lines;
  for (const auto& create : stream.creates) lines += created_line(create.id, revision);
  return lines;
}
inline std::string refused_line(const std::string& reason) {
  return result_line({{"header", header(1)},
                      {"watch_id", "-1"},
                      {"created", true},
                      {"canceled", true},
                      {"cancel_reason", reason}});
}
inline std::string compacted_line(std::int64_t id, std::int64_t revision) {
  return result_line({{"header", {{"raft_term", "2"}}},
                      {"watch_id", std::to_string(id)},
                      {"canceled", true},
                      {"compact_revision", std::to_string(revision)}});
}
inline std::string progress_line(std::int64_t id, std::int64_t revision) {
  return result_line({{"header", header(revision)}, {"watch_id", std::to_string(id)}});
}
inline nlohmann::json kv_json(const std::string& key, const std::string& value,
                              std::int64_t mod_revision, std::int64_t create_revision = 0) {
  nlohmann::json kv{{"key", base64(key)},
                    {"mod_revision", std::to_string(mod_revision)},
                    {"version", "1"},
                    {"value", base64(value)}};
  kv["create_revision"] = std::to_string(create_revision == 0 ? mod_revision : create_revision);
  return kv;
}
inline std::string event_line(std::int64_t id, const std::vector<Change>& changes) {
  auto events = nlohmann::json::array();
  for (const auto& change : changes) {
    if (change.put) {
      events.push_back({{"kv", kv_json(change.key, change.value, change.revision)}});
    } else {
      events.push_back(
          {{"type", "DELETE"},
           {"kv",
            {{"key", base64(change.key)}, {"mod_revision", std::to_string(change.revision)}}}});
    }
  }
  return result_line({{"header", header(changes.back().revision)},
                      {"watch_id", std::to_string(id)},
                      {"events", std::move(events)}});
}
/// The same, to be continued by the next line of this watch.
inline std::string fragment_line(std::int64_t id, const std::vector<Change>& changes) {
  auto json = nlohmann::json::parse(event_line(id, changes));
  json["result"]["fragment"] = true;
  return json.dump() + "\n";
}
inline Change put_at(std::int64_t revision, const std::string& key = "k") {
  return {true, key, "v" + std::to_string(revision), revision};
}
inline std::vector<Change> puts_at(const std::vector<std::int64_t>& revisions,
                                   const std::string& key = "k") {
  std::vector<Change> changes;
  for (const auto revision : revisions) changes.push_back(put_at(revision, key));
  return changes;
}

}  // namespace support
