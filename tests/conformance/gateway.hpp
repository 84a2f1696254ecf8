// Raw requests to etcd's JSON gateway, through any Transport: what goes over the wire and no more.
#pragma once

#include <condition_variable>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "coordination.hpp"

namespace gateway {

using Json = nlohmann::json;
using Jsons = std::vector<Json>;  // Json{x} is x, not an array of it
using std::chrono::milliseconds;

inline std::string b64(const std::string& bytes) {
  static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    unsigned group = 0;
    for (std::size_t k = i; k < i + 3; ++k) {
      group = group << 8 | (k < bytes.size() ? static_cast<unsigned char>(bytes[k]) : 0u);
    }
    for (std::size_t k = 0; k < 4; ++k) {
      text += i + k <= bytes.size() ? digits[group >> (18 - 6 * k) & 63] : '=';
    }
  }
  return text;
}

inline std::string unb64(const std::string& text) {
  std::string bytes;
  unsigned group = 0;
  int bits = 0;
  for (const char c : text) {
    if (c == '=') break;
    const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    group = group << 6 | static_cast<unsigned>(digits.find(c));
    bits += 6;
    if (bits < 8) continue;
    bits -= 8;
    bytes += static_cast<char>(group >> bits & 255);
  }
  return bytes;
}

/// A number as the gateway writes it: a string, or nothing if it is zero.
inline std::int64_t number(const Json& object, const char* name) {
  if (!object.contains(name)) return 0;
  const Json& value = object[name];
  return value.is_string() ? std::stoll(value.get<std::string>()) : value.get<std::int64_t>();
}

inline std::int64_t revision_of(const Json& reply) { return number(reply["header"], "revision"); }

struct Reply {
  int status{0};  // 0: no answer; see error
  std::string body;
  Json json;  // null if the body is no JSON
  std::optional<coordination::Error> error{};

  std::int64_t revision() const { return revision_of(json); }
  /// Of an error of etcd's, in the shape of either version.
  int code() const {
    const Json& from = json.contains("error") && json["error"].is_object() ? json["error"] : json;
    return from.value("code", from.value("grpc_code", 0));
  }
  std::string message() const {
    const Json& from = json.contains("error") && json["error"].is_object() ? json["error"] : json;
    return from.value("message", "");
  }
};

class Lines {
 public:
  /// Adds what has come. A line that is no JSON is kept as a string.
  void feed(std::string_view piece) {
    const std::lock_guard<std::mutex> lock(mutex_);
    rest_ += piece;
    for (std::size_t end; (end = rest_.find('\n')) != std::string::npos;) {
      add(rest_.substr(0, end));
      rest_.erase(0, end + 1);
    }
    changed_.notify_all();
  }
  /// At the end of the stream. etcd 3.4 does not end the last line of one that failed.
  void finish() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (Json::accept(rest_)) add(std::exchange(rest_, {}));
    finished_ = true;
    changed_.notify_all();
  }
  std::vector<Json> all() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return lines_;
  }
  /// What has come since the last complete line.
  std::string rest() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return rest_;
  }
  /// Waits until `enough(lines)` or the end of the stream; false if neither comes.
  template <class Enough>
  bool wait(Enough enough, milliseconds limit) const {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, limit, [&] { return finished_ || enough(lines_); });
    return enough(lines_);
  }

 private:
  void add(const std::string& line) {
    Json json = Json::parse(line, nullptr, false);
    lines_.push_back(json.is_discarded() ? Json(line) : std::move(json));
  }

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::vector<Json> lines_;
  std::string rest_;
  bool finished_{false};
};

/// One etcd, and perhaps a token to show it.
class Gateway {
 public:
  Gateway(std::shared_ptr<coordination::Transport> transport, std::string endpoint)
      : transport_(std::move(transport)), endpoint_(std::move(endpoint)) {}

  Gateway with_token(const std::string& token) const {
    Gateway other = *this;
    other.token_ = token;
    return other;
  }
  Gateway with_header(const std::string& name, const std::string& value) const {
    Gateway other = *this;
    other.headers_.emplace_back(name, value);
    return other;
  }

  coordination::HttpRequest request(const std::string& path, std::string body) const {
    coordination::HttpRequest request;
    request.endpoint = endpoint_;
    request.path = path;
    request.body = std::move(body);
    request.headers = {{"Content-Type", "application/json"}};
    if (!token_.empty()) request.headers.emplace_back("Authorization", token_);
    request.headers.insert(request.headers.end(), headers_.begin(), headers_.end());
    return request;
  }

  Reply post(const std::string& path, const std::string& body,
             const coordination::Context& ctx =
                 coordination::Context::with_timeout(milliseconds(30000))) const {
    return to_reply(transport_->perform(request(path, body), {}, ctx));
  }
  Reply call(const std::string& path, const Json& body) const { return post(path, body.dump()); }

  /// A streaming call that ends by itself; etcd keeps all of a long body only if the connection
  /// is to be closed.
  std::vector<Json> stream(const std::string& path, const std::string& body,
                           Reply* reply = nullptr) const {
    auto streaming = request(path, body);
    streaming.headers.emplace_back("Connection", "close");
    Lines lines;
    const auto sink = [&](std::string_view piece) { return lines.feed(piece), true; };
    const auto ctx = coordination::Context::with_timeout(milliseconds(30000));
    const Reply end = to_reply(transport_->perform(streaming, sink, ctx));
    lines.finish();
    if (reply) *reply = end;
    return lines.all();
  }

  // The requests that most tests need.
  Reply range(Json fields) const { return call("/v3/kv/range", fields); }
  Reply get(const std::string& key) const { return range({{"key", b64(key)}}); }
  Reply put(const std::string& key, const std::string& value, Json fields = Json::object()) const {
    fields["key"] = b64(key);
    if (!value.empty()) fields["value"] = b64(value);
    return call("/v3/kv/put", fields);
  }
  Reply remove(const std::string& key, Json fields = Json::object()) const {
    fields["key"] = b64(key);
    return call("/v3/kv/deleterange", fields);
  }
  Reply txn(const Jsons& compare, const Jsons& success, const Jsons& failure = {}) const {
    return call("/v3/kv/txn", {{"compare", compare}, {"success", success}, {"failure", failure}});
  }
  Reply compact(std::int64_t revision) const {
    return call("/v3/kv/compaction", {{"revision", std::to_string(revision)}});
  }
  Reply grant(std::int64_t id, std::int64_t ttl) const {
    return call("/v3/lease/grant", {{"ID", std::to_string(id)}, {"TTL", std::to_string(ttl)}});
  }
  Reply revoke(std::int64_t id) const {
    return call("/v3/lease/revoke", {{"ID", std::to_string(id)}});
  }
  Reply time_to_live(std::int64_t id, bool keys = false) const {
    return call("/v3/lease/timetolive", {{"ID", std::to_string(id)}, {"keys", keys}});
  }
  std::vector<Json> keep_alive(const std::vector<std::int64_t>& ids, Reply* reply = nullptr) const {
    std::string body;
    for (const auto id : ids) body += Json{{"ID", std::to_string(id)}}.dump() + "\n";
    return stream("/v3/lease/keepalive", body, reply);
  }
  std::int64_t revision() const { return range({{"key", b64("no such key")}}).revision(); }

  coordination::Transport& transport() const { return *transport_; }

 private:
  static Reply to_reply(const coordination::Result<coordination::HttpResponse>& result) {
    Reply reply;
    if (!result) {
      reply.error = result.error();
      return reply;
    }
    reply.status = result->status;
    reply.body = result->body;
    reply.json = Json::parse(result->body, nullptr, false);
    if (reply.json.is_discarded()) reply.json = nullptr;
    return reply;
  }

  std::shared_ptr<coordination::Transport> transport_;
  std::string endpoint_;
  std::string token_;
  decltype(coordination::HttpRequest::headers) headers_;
};

inline Json create_request(std::int64_t id, const std::string& key, Json fields = Json::object()) {
  fields["watch_id"] = std::to_string(id);
  if (!key.empty()) fields["key"] = b64(key);
  return {{"create_request", std::move(fields)}};
}

/// A watch request that runs in a thread of its own; its destructor ends it.
class WatchCall {
 public:
  WatchCall(const Gateway& gateway, const std::vector<Json>& orders,
            milliseconds idle_timeout = milliseconds(0), bool ask_for_leader = true) {
    std::string body;
    for (const Json& order : orders) body += order.dump() + "\n";
    auto request = gateway.request("/v3/watch", body);
    request.headers.emplace_back("Connection", "close");
    if (ask_for_leader) request.headers.emplace_back("Grpc-Metadata-hasleader", "true");
    request.idle_timeout = idle_timeout;
    thread_ = std::thread([this, &transport = gateway.transport(), request] {
      const auto sink = [this](std::string_view piece) { return lines_.feed(piece), true; };
      auto result = transport.perform(request, sink, ctx_);
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        result_ =
            std::make_unique<coordination::Result<coordination::HttpResponse>>(std::move(result));
      }
      lines_.finish();
      ended_.notify_all();
    });
  }
  WatchCall(const WatchCall&) = delete;
  WatchCall& operator=(const WatchCall&) = delete;
  ~WatchCall() { cancel(); }

  void cancel() {
    ctx_.cancel();
    if (thread_.joinable()) thread_.join();
  }
  /// The results in the lines so far.
  std::vector<Json> results() const {
    std::vector<Json> results;
    for (const Json& line : lines_.all()) {
      if (line.is_object() && line.contains("result")) results.push_back(line["result"]);
    }
    return results;
  }
  const Lines& lines() const { return lines_; }
  bool wait_lines(std::size_t count, milliseconds limit = milliseconds(20000)) const {
    return lines_.wait([&](const auto& lines) { return lines.size() >= count; }, limit);
  }
  /// Waits until the watch `id` has had so many events, and returns those that it has had.
  std::vector<Json> events(std::int64_t id, std::size_t count,
                           milliseconds limit = milliseconds(20000)) const {
    lines_.wait([&](const auto& lines) { return events_in(lines, id).size() >= count; }, limit);
    return events_in(lines_.all(), id);
  }
  /// How perform() ended; null if it did not within the limit.
  const coordination::Result<coordination::HttpResponse>* end(
      milliseconds limit = milliseconds(20000)) {
    std::unique_lock<std::mutex> lock(mutex_);
    ended_.wait_for(lock, limit, [this] { return result_ != nullptr; });
    return result_.get();
  }

 private:
  static std::vector<Json> events_in(const std::vector<Json>& lines, std::int64_t id) {
    std::vector<Json> events;
    for (const Json& line : lines) {
      if (!line.is_object() || !line.contains("result")) continue;
      const Json& result = line["result"];
      if (number(result, "watch_id") != id || !result.contains("events")) continue;
      for (const Json& event : result["events"]) events.push_back(event);
    }
    return events;
  }

  coordination::Context ctx_;
  Lines lines_;
  std::mutex mutex_;
  std::condition_variable ended_;
  std::unique_ptr<coordination::Result<coordination::HttpResponse>> result_;
  std::thread thread_;
};

}  // namespace gateway
