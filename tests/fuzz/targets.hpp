// What is fuzzed: every place where bytes of a stranger come in. Each target takes any bytes, and
// ends the process when what it looks at is not as it should be.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "coordination.hpp"

namespace fuzz {

using namespace coordination;
using namespace coordination::detail;

inline void must(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "fuzz: not true: %s\n", what);
  std::abort();
}

/// Takes one byte off the front: a choice.
inline unsigned take(std::string_view& bytes) {
  if (bytes.empty()) return 0;
  const auto first = static_cast<unsigned char>(bytes.front());
  bytes.remove_prefix(1);
  return first;
}

/// Of 1 to 31 bytes, and sometimes of as many as there are; with 0 always.
class PieceSizes {
 public:
  explicit PieceSizes(unsigned seed) : state_(seed) {}
  std::size_t next() {
    if (state_ == 0) return std::string::npos;
    state_ = state_ * 1103515245u + 12345u;
    const std::size_t size = 1 + (state_ >> 16) % 32;
    return size == 32 ? std::string::npos : size;
  }

 private:
  unsigned state_;
};

inline void base64(std::string_view bytes) {
  must(wire::base64_decode(wire::base64_encode(bytes)) == bytes, "bytes come back");
  const auto decoded = wire::base64_decode(bytes);
  if (!decoded) return;
  must(decoded->size() <= bytes.size() / 4 * 3, "no more bytes than the text has room for");
  const auto text = wire::base64_encode(*decoded);
  must(text.size() == bytes.size(), "the text is as long as what it was read from");
}

/// A stream of lines, first whole and then in pieces.
inline void lines(std::string_view bytes) {
  const auto seed = take(bytes);
  const auto read = [&](PieceSizes sizes) {
    wire::Lines reader;
    std::vector<std::string> result;
    const auto keep = [&](std::string_view line) {
      result.emplace_back(line);
      static_cast<void>(wire::decode_line<wire::WatchLine>(line));
      static_cast<void>(wire::decode_line<wire::LeaseReply>(line));
      return true;
    };
    for (auto rest = bytes; !rest.empty();) {
      const auto piece = rest.substr(0, sizes.next());
      reader.feed(piece, keep);
      rest.remove_prefix(piece.size());
    }
    reader.finish(keep);
    return result;
  };
  must(read(PieceSizes(0)) == read(PieceSizes(seed)), "lines are the same in any pieces");
}

template <class Reply>
void reply(std::string_view body) {
  Reply decoded;
  static_cast<void>(wire::decode_reply(body, decoded));
}

inline void replies(std::string_view bytes) {
  static constexpr int kStatus[] = {200, 400, 401, 404, 413, 500, 503};
  using Decoder = void (*)(std::string_view);
  static constexpr Decoder kDecoders[] = {
      reply<RangeResponse>,    reply<PutResponse>, reply<RemoveResponse>, reply<TxnResponse>,
      reply<wire::LeaseReply>, reply<Status>,      reply<wire::Token>,    reply<wire::Nothing>};
  const auto choice = take(bytes);
  kDecoders[choice % std::size(kDecoders)](bytes);
  const HttpResponse response{kStatus[choice % std::size(kStatus)], std::string(bytes)};
  const auto verdict = judge_status(response, "http://a:1");
  must(printable(verdict.error.cause) == verdict.error.cause, "an error has no control characters");
  must(verdict.error.cause.size() < bytes.size() * 4 + 300,
       "an error is not longer than its cause");
}

inline void endpoints(std::string_view bytes) {
  const bool tls = take(bytes) % 2 == 1;
  const auto endpoint = normal_endpoint(std::string(bytes), tls);
  if (endpoint.empty()) return;
  must(normal_endpoint(endpoint, !tls) == endpoint, "what is normal stays as it is");
  must(printable(endpoint) == endpoint, "an endpoint has no control characters");
  must(endpoint.find_first_of(" ?#@\\,\"") == std::string::npos, "an endpoint is no other URL");
#if COORDINATION_USE_HTTPLIB
  const auto parts = split_endpoint(endpoint);
  must(!parts.host.empty() && parts.port > 0 && parts.port < 65536, "an endpoint has its parts");
#endif
}

inline void service(std::string_view bytes) {
  const auto service = wire::decode_service(bytes);
  if (!service) return;
  const auto record = wire::encode_service(*service);
  const auto again = wire::decode_service(record);
  must(again.has_value(), "a service that was read can be written");
  must(wire::encode_service(*again) == record, "a service comes back as it was");
}

inline void config(std::string_view bytes) {
  const auto value = wire::decode_config(std::string(bytes));
  const auto text = wire::encode_config(value);
  if (!text) return;  // a text that is not UTF-8
  must(wire::decode_config(*text) == value, "a value comes back as it was");
}

inline void records(std::string_view bytes) {
  service(bytes);
  config(bytes);
}

/// One request of MemoryEtcd's: its path and token, and the body.
inline void ask(MemoryEtcd& etcd, const char* path, unsigned choice, std::string_view body) {
  HttpRequest request;
  request.endpoint = "http://a:1";
  request.path = path;
  request.body = body;
  if (choice % 2 == 1) request.headers.emplace_back("Authorization", "memory.1");
  const bool watch = request.path == "/v3/watch";
  // So there is always something to read, and an end.
  if (watch) request.body = "{\"create_request\":{\"key\":\"YQ==\"}}" + request.body;
  std::string streamed;
  const auto keep = [&](std::string_view piece) { return streamed.append(piece), false; };
  const auto answer = etcd.perform(request, watch ? ChunkSink(keep) : nullptr, {});
  must(answer.has_value(), "every request has an answer");
  if (answer->status != 200) {
    must(wire::decode_error_body(answer->body).has_value(), "a refusal is etcd's");
  } else if (!watch && request.path != "/v3/lease/keepalive") {
    wire::Nothing nothing;
    must(wire::decode_reply(answer->body, nothing).has_value(), "an answer is etcd's");
  }
  wire::Lines().feed(streamed, [](std::string_view line) {
    must(wire::decode_line<wire::WatchLine>(line).index() == 1, "a line is etcd's");
    return true;
  });
}

/// Requests, one a line: what it asks for, and its body.
inline void memory_etcd(std::string_view bytes) {
  static constexpr const char* kPaths[] = {
      "/v3/kv/range",      "/v3/kv/put",          "/v3/kv/deleterange",    "/v3/kv/txn",
      "/v3/kv/compaction", "/v3/lease/grant",     "/v3/lease/revoke",      "/v3/lease/timetolive",
      "/v3/lease/leases",  "/v3/lease/keepalive", "/v3/auth/authenticate", "/v3/maintenance/status",
      "/v3/watch",         "/v3/nowhere"};
  static const auto clock = std::make_shared<SteadyClock>();
  MemoryEtcd etcd(clock);
  const auto choice = take(bytes);
  if (choice % 4 == 3) {
    etcd.enable_auth("secret");
    etcd.add_user("user", "word", "a");
  }
  wire::Lines requests;
  const auto ask_line = [&](std::string_view line) {
    const auto which = take(line);
    ask(etcd, kPaths[which % 16 % std::size(kPaths)], which / 16, line);
    return true;
  };
  requests.feed(bytes, ask_line);
  requests.finish(ask_line);
}

#if COORDINATION_USE_HTTPLIB

/// A server that says these bytes, in pieces, and then closes the connection.
class Speaker : public Connection {
 public:
  Speaker(std::string_view bytes, unsigned seed) : bytes_(bytes), sizes_(seed) {}

 private:
  int receive(char* to, std::size_t size) override {
    const auto piece = bytes_.substr(0, (std::min)(size, sizes_.next()));
    std::memcpy(to, piece.data(), piece.size());
    bytes_.remove_prefix(piece.size());
    return static_cast<int>(piece.size());
  }
  int send(const char*, std::size_t size) override { return static_cast<int>(size); }
  short blocked_on(int, short) override { return 0; }

  std::string_view bytes_;
  PieceSizes sizes_;
};

struct Heard {
  int status{0};
  std::string body;
  bool whole{false};
};

inline Heard hear(std::string_view bytes, unsigned seed, bool close) {
  static constexpr std::size_t kMost = 100'000;
  Speaker speaker(bytes, seed);
  HttpStream stream(speaker, (SteadyTime::max)(), milliseconds(0), 1000);
  HttpEngine engine;
  Heard heard;
  httplib::Request request;
  request.method = "POST";
  request.path = "/v3/kv/range";
  request.body = "{}";
  request.response_handler = [&](const httplib::Response& response) {
    heard.status = response.status;
    return true;
  };
  request.content_receiver = [&](const char* data, std::size_t size, std::uint64_t, std::uint64_t) {
    if (size > kMost - heard.body.size()) return false;
    heard.body.append(data, size);
    return true;
  };
  httplib::Response response;
  auto error = httplib::Error::Success;
  heard.whole = engine.process_request(stream, request, response, close, error);
  must(printable(stream.cause()) == stream.cause(), "a cause has no control characters");
  return heard;
}

/// An answer of HTTP, first in large pieces and then in others.
inline void http(std::string_view bytes) {
  const auto seed = take(bytes);
  const bool close = take(bytes) % 2 == 1;
  const auto one = hear(bytes, 0, close), other = hear(bytes, seed, close);
  must(one.whole == other.whole, "an answer is whole in any pieces");
  must(one.status == other.status, "a status is the same in any pieces");
  // What zlib has unpacked before it finds a fault depends on the pieces.
  must(!one.whole || one.body == other.body, "a body is the same in any pieces");
}

#endif

struct Target {
  const char* name;
  void (*run)(std::string_view);
};

inline constexpr Target kTargets[] = {
    {"base64", base64}, {"endpoints", endpoints},
#if COORDINATION_USE_HTTPLIB
    {"http", http},
#endif
    {"lines", lines},   {"memory_etcd", memory_etcd}, {"records", records}, {"replies", replies},
};

}  // namespace fuzz
