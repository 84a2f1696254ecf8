// Section 4: the default transport, against a server that sends what it is told, byte by byte.
#include <dlfcn.h>
#include <doctest/doctest.h>
#include <netdb.h>
#include <sys/resource.h>

#include <atomic>
#include <fstream>
#include <functional>
#include <iterator>
#include <list>
#include <thread>

#include "coordination.hpp"
#include "support/process.hpp"
#include "support/raw_server.hpp"
#include "support/scripted_transport.hpp"

using namespace coordination;
using namespace support;

/// The system's resolver, but for "two.test": that has the addresses 127.0.0.9 and 127.0.0.1.
extern "C" int getaddrinfo(const char* host, const char* service, const addrinfo* hints,
                           addrinfo** result) {
  static const auto real =
      reinterpret_cast<decltype(&getaddrinfo)>(dlsym(RTLD_NEXT, "getaddrinfo"));
  if (host == nullptr || std::string(host) != "two.test") {
    return real(host, service, hints, result);
  }
  addrinfo* second = nullptr;
  const int failed = real("127.0.0.9", service, hints, result);
  if (failed != 0) return failed;
  const int failed_too = real("127.0.0.1", service, hints, &second);
  addrinfo* last = *result;
  while (last->ai_next != nullptr) last = last->ai_next;
  last->ai_next = second;
  return failed_too;
}

namespace {

/// A port where nobody answers, as on a host that is gone: a listener whose queue is full.
class SilentPort {
 public:
  explicit SilentPort(const char* address, int port = 0)
      : listener_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(static_cast<std::uint16_t>(port));
    inet_pton(AF_INET, address, &to.sin_addr);
    socklen_t size = sizeof(to);
    auto* any = reinterpret_cast<sockaddr*>(&to);
    if (bind(listener_, any, size) != 0 || listen(listener_, 0) != 0) {
      throw std::runtime_error("cannot listen");
    }
    getsockname(listener_, any, &size);
    port_ = ntohs(to.sin_port);
    for (int i = 0; i < 4; ++i) {
      fillers_.push_back(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
      static_cast<void>(connect(fillers_.back(), any, size));
    }
  }
  SilentPort(const SilentPort&) = delete;
  SilentPort& operator=(const SilentPort&) = delete;
  ~SilentPort() {
    for (const int fd : fillers_) close(fd);
    close(listener_);
  }
  std::string url(const std::string& host) const {
    return "http://" + host + ":" + std::to_string(port_);
  }

 private:
  const int listener_;
  int port_{0};
  std::vector<int> fillers_;
};

struct Collected {
  std::string bytes;
  int calls{0};
  ChunkSink sink() {
    return [this](std::string_view piece) {
      bytes += piece;
      ++calls;
      return true;
    };
  }
};

}  // namespace

TEST_CASE("transport: what is sent") {
  std::mutex mutex;
  std::vector<std::string> requests;
  const RawServer server([&](Wire& wire) {
    for (auto text = wire.read_request(); !text.empty(); text = wire.read_request()) {
      std::lock_guard<std::mutex> hold(mutex);
      requests.push_back(text);
      wire.send(http("200 OK", "{}"));
    }
  });
  const auto transport = make_default_transport();
  auto request = post(server, "{\"key\":\"YQ==\"}");
  request.headers.emplace_back("Authorization", "token-1");
  for (int i = 0; i < 3; ++i) {
    const auto answer = transport->perform(request, nullptr, {});
    REQUIRE_MESSAGE(answer, text_of(answer));
    CHECK(answer->status == 200);
    CHECK(answer->body == "{}");
  }
  CHECK(server.connections() == 1);
  request.headers.emplace_back("Connection", "close");
  CHECK(transport->perform(request, nullptr, {}));
  CHECK(server.connections() == 2);
  std::lock_guard<std::mutex> hold(mutex);
  REQUIRE(requests.size() == 4);
  CHECK(requests[0].compare(0, 28, "POST /v3/kv/range HTTP/1.1\r\n") == 0);
  CHECK(requests[0].find("\r\nHost: " + server.url().substr(7) + "\r\n") != std::string::npos);
  CHECK(requests[0].find("\r\nAuthorization: token-1\r\n") != std::string::npos);
  CHECK(requests[0].find("\r\nContent-Length: 14\r\n") != std::string::npos);
  CHECK(requests[0].find("\r\n\r\n{\"key\":\"YQ==\"}") != std::string::npos);
  CHECK(requests[0].find("close") == std::string::npos);
  CHECK(requests[0].find("Expect:") == std::string::npos);
  CHECK(requests[3].find("\r\nConnection: close\r\n") != std::string::npos);
}

TEST_CASE("transport: answers with a length, in chunks, in pieces") {
  const std::string body = "{\"header\":{}}";
  const std::string whole = http("200 OK", body);
  const std::string chunked =
      kChunkedHead + chunk(body.substr(0, 3)) + chunk(body.substr(3)) + "0\r\n\r\n";
  for (const auto& bytes : {whole, chunked}) {
    const RawServer server(after_request([&](Wire& wire) {
      for (const char c : bytes) wire.send(std::string(1, c));
    }));
    const auto answer = make_default_transport()->perform(post(server), nullptr, {});
    REQUIRE_MESSAGE(answer, text_of(answer));
    CHECK(answer->status == 200);
    CHECK(answer->body == body);
    Collected collected;
    const auto streamed = make_default_transport()->perform(post(server), collected.sink(), {});
    REQUIRE_MESSAGE(streamed, text_of(streamed));
    CHECK(streamed->status == 200);
    CHECK(streamed->body.empty());
    CHECK(collected.bytes == body);
  }
}

TEST_CASE("transport: an error of etcd 3.4 ends in a trailer, and is read all the same") {
  const std::string error =
      R"({"error":"etcdserver: key is not provided","message":"etcdserver: key is not provided",)"
      R"("code":3})";
  const RawServer server([&](Wire& wire) {
    while (!wire.read_request().empty()) {
      wire.send(
          "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
          "Trailer: Grpc-Trailer-Content-Type\r\nTransfer-Encoding: chunked\r\n\r\n" +
          chunk(error) + "0\r\nGrpc-Trailer-Content-Type: application/grpc\r\n\r\n");
    }
  });
  const auto transport = make_default_transport();
  for (int i = 0; i < 3; ++i) {
    Collected collected;
    const auto answer = transport->perform(post(server), i == 1 ? collected.sink() : nullptr, {});
    REQUIRE_MESSAGE(answer, text_of(answer));
    CHECK(answer->status == 400);
    CHECK(answer->body == error);
    CHECK(collected.calls == 0);
  }
}

TEST_CASE("transport: a status without a body") {
  const RawServer server(after_request([](Wire& wire) { wire.send(http("503 Unavailable", "")); }));
  const auto answer = make_default_transport()->perform(post(server), nullptr, {});
  REQUIRE_MESSAGE(answer, text_of(answer));
  CHECK(answer->status == 503);
  CHECK(answer->body.empty());
}

TEST_CASE("transport: a connection that ends early is an error, and says 'maybe'") {
  const std::string head = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n";
  for (const auto& bytes : {std::string(), std::string("HTTP/1.1 200"), head, head + "{\"hea",
                            std::string(kChunkedHead), kChunkedHead + chunk("{\"hea")}) {
    for (const bool hard : {false, true}) {
      INFO("after " << bytes.size() << " bytes");
      const RawServer server(after_request([&](Wire& wire) {
        wire.send(bytes);
        if (hard) wire.reset();
      }));
      const auto answer = make_default_transport()->perform(post(server), nullptr, {});
      REQUIRE_FALSE(answer);
      CHECK_MESSAGE(answer.error().code == ErrorCode::Connection, text_of(answer));
      CHECK(answer.error().outcome == Outcome::MaybeApplied);
      CHECK(text_of(answer).find(server.url()) != std::string::npos);
    }
  }
}

TEST_CASE("transport: what is no HTTP is an error") {
  const RawServer server(after_request([](Wire& wire) {
    wire.send("SSH-2.0-OpenSSH_9.2\r\n");
    wire.wait_for_end();
  }));
  const auto answer =
      make_default_transport()->perform(post(server), nullptr, Context::with_timeout(lenient(2s)));
  REQUIRE_FALSE(answer);
  CHECK(answer.error().outcome == Outcome::MaybeApplied);
}

TEST_CASE("transport: a kept connection that the server has closed is replaced") {
  const RawServer server(after_request([](Wire& wire) { wire.send(http("200 OK", "{}")); }));
  const auto transport = make_default_transport();
  int good = 0;
  for (int i = 0; i < 5; ++i) {
    if (transport->perform(post(server), nullptr, {})) ++good;
    CHECK(wait_until([&] { return connection_count(server.port()) == 0; }, lenient(5s)));
  }
  CHECK(good == 5);
  CHECK(server.connections() == 5);
}

TEST_CASE("transport: nobody listens: not one byte was sent") {
  HttpRequest request;
  request.endpoint = "http://127.0.0.1:" + std::to_string(closed_port());
  request.path = "/v3/kv/range";
  const auto answer =
      make_default_transport()->perform(request, nullptr, Context::with_timeout(5s));
  REQUIRE_FALSE(answer);
  CHECK_MESSAGE(answer.error().code == ErrorCode::Connection, text_of(answer));
  CHECK(answer.error().outcome == Outcome::NotApplied);
  request.endpoint = "http://no-such-host.invalid:1";
  const auto unknown =
      make_default_transport()->perform(request, nullptr, Context::with_timeout(5s));
  REQUIRE_FALSE(unknown);
  CHECK(unknown.error().outcome == Outcome::NotApplied);
}

// Time.

namespace {

void check_deadline(const RawServer& server, const ChunkSink& sink) {
  const Stopwatch watch;
  const auto answer =
      make_default_transport()->perform(post(server), sink, Context::with_timeout(lenient(100ms)));
  CHECK(watch.over(lenient(200ms)) == 0);
  CHECK(watch.elapsed() >= lenient(100ms));
  REQUIRE_FALSE(answer);
  CHECK_MESSAGE(answer.error().code == ErrorCode::Timeout, text_of(answer));
  CHECK(answer.error().outcome == Outcome::MaybeApplied);
}

}  // namespace

TEST_CASE("transport: the deadline holds, however slowly the answer comes") {
  RawServer::Serve serve;
  SUBCASE("nothing comes") {
    serve = after_request([](Wire& wire) { wire.wait_for_end(); });
  }
  SUBCASE("the body dribbles") {
    serve = after_request([](Wire& wire) {
      wire.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n");
      wire.dribble("x");
    });
  }
  SUBCASE("the body dribbles in chunks") {
    serve = after_request([](Wire& wire) {
      wire.send(kChunkedHead);
      wire.dribble(chunk("x"));
    });
  }
  SUBCASE("an error's body dribbles") {
    serve = after_request([](Wire& wire) {
      wire.send("HTTP/1.1 500 Oh\r\nContent-Length: 1000000\r\n\r\n");
      wire.dribble("x");
    });
  }
  const RawServer server(serve);
  check_deadline(server, nullptr);
  Collected collected;
  check_deadline(server, collected.sink());
}

// No handler of httplib's runs while it reads the head: there the client's watchdog helps.
TEST_CASE("transport: a head that dribbles does not keep a call of the client's") {
  const RawServer server(after_request([](Wire& wire) {
    wire.send("HTTP/1.1 200 OK\r\n");
    wire.dribble("X-Filler: 123456789\r\n");
  }));
  CoordinatorOptions options;
  options.endpoints = {server.url()};
  const Stopwatch watch;
  const auto connected = Coordinator::connect(options, Context::with_timeout(100ms));
  CHECK(watch.over(lenient(200ms)) == 0);
  REQUIRE_FALSE(connected);
  CHECK_MESSAGE(connected.error().code == ErrorCode::Timeout, text_of(connected));
}

TEST_CASE("transport: the idle timeout counts from the last byte") {
  const RawServer server(after_request([](Wire& wire) {
    wire.send(kChunkedHead);
    for (int i = 0; i < 10; ++i) {
      wire.send(chunk("line\n"));
      std::this_thread::sleep_for(160ms);
    }
    wire.wait_for_end();
  }));
  auto request = post(server);
  request.idle_timeout = 1500ms;
  Collected collected;
  const Stopwatch watch;
  const auto answer =
      make_default_transport()->perform(request, collected.sink(), Context::with_timeout(10s));
  REQUIRE_FALSE(answer);
  CHECK(collected.calls == 10);
  CHECK(watch.elapsed().count() >= 9 * 160 + 1500);
  CHECK(watch.over(lenient(3600ms)) == 0);
}

TEST_CASE("transport: the sink ends the request") {
  const RawServer server(after_request([](Wire& wire) {
    wire.send(kChunkedHead);
    wire.send(chunk("one\n"));
    wire.wait_for_end();
  }));
  int calls = 0;
  const Stopwatch watch;
  const auto answer = make_default_transport()->perform(
      post(server), [&](std::string_view) { return ++calls, false; }, Context::with_timeout(10s));
  CHECK(calls == 1);
  CHECK(watch.over(lenient(500ms)) == 0);
}

TEST_CASE("transport: the sink may use the transport") {
  const RawServer stream(after_request([](Wire& wire) {
    wire.send(kChunkedHead);
    wire.send(chunk("one\n") + chunk("two\n") + "0\r\n\r\n");
  }));
  const RawServer other(after_request([](Wire& wire) { wire.send(http("200 OK", "{}")); }));
  const auto transport = make_default_transport();
  int good = 0;
  const auto answer = transport->perform(post(stream),
                                         [&](std::string_view) {
                                           if (transport->perform(post(other), nullptr, {})) ++good;
                                           return true;
                                         },
                                         {});
  CHECK(answer);
  CHECK(good >= 1);
}

TEST_CASE("transport: cancelled before, while and after") {
  std::atomic<bool> asked{false};
  const RawServer server(after_request([&](Wire& wire) {
    wire.send(kChunkedHead);
    wire.send(chunk("line\n"));
    asked = true;
    wire.wait_for_end();
  }));
  const auto transport = make_default_transport();
  SUBCASE("before") {
    const Context ctx;
    ctx.cancel();
    const auto answer = transport->perform(post(server), nullptr, ctx);
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Cancelled);
    CHECK(answer.error().outcome == Outcome::NotApplied);
    CHECK(server.connections() == 0);
    const auto late = transport->perform(post(server), nullptr, Context::with_timeout(0ms));
    REQUIRE_FALSE(late);
    CHECK(late.error().code == ErrorCode::Timeout);
    CHECK(late.error().outcome == Outcome::NotApplied);
    CHECK(server.connections() == 0);
  }
  SUBCASE("while") {
    for (const bool streamed : {false, true}) {
      const Context ctx;
      Stopwatch watch;
      asked = false;
      std::thread canceller([&] {
        wait_until([&] { return asked.load(); }, lenient(5s));
        watch.reset();
        ctx.cancel();
      });
      Collected collected;
      const auto answer =
          transport->perform(post(server), streamed ? collected.sink() : nullptr, ctx);
      canceller.join();
      CHECK(watch.over(lenient(100ms)) == 0);
      REQUIRE_FALSE(answer);
      CHECK(answer.error().code == ErrorCode::Cancelled);
      CHECK(answer.error().outcome == Outcome::MaybeApplied);
    }
  }
  SUBCASE("from the sink") {
    const Context ctx;
    const Stopwatch watch;
    const auto answer = transport->perform(
        post(server), [&](std::string_view) { return ctx.cancel(), true; }, ctx);
    CHECK(watch.over(lenient(500ms)) == 0);
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Cancelled);
  }
  SUBCASE("after") {
    const RawServer good(after_request([](Wire& wire) {
      while (wire.send(http("200 OK", "{}")) && !wire.read_request().empty()) {
      }
    }));
    const Context ctx;
    CHECK(transport->perform(post(good), nullptr, ctx));
    ctx.cancel();  // must not touch the connection, which is another's by now
    CHECK(transport->perform(post(good), nullptr, {}));
    CHECK(good.connections() == 1);
  }
}

TEST_CASE("transport: a cancel while it connects") {
  const SilentPort silent("127.0.0.1");
  const auto request = post_to(silent.url("127.0.0.1"));
  const auto transport = make_default_transport();
  const Stopwatch watch;
  const auto late = transport->perform(request, nullptr, Context::with_timeout(50ms));
  REQUIRE_FALSE(late);
  CHECK_MESSAGE(late.error().code == ErrorCode::Timeout, text_of(late));
  CHECK(late.error().outcome == Outcome::NotApplied);
  CHECK(watch.over(lenient(150ms)) == 0);
  const Context ctx;
  Stopwatch since_cancel;
  std::thread canceller([&] {
    std::this_thread::sleep_for(20ms);
    since_cancel.reset();
    ctx.cancel();
  });
  const auto cancelled = transport->perform(request, nullptr, ctx);
  CHECK(since_cancel.over(lenient(100ms)) == 0);
  canceller.join();
  REQUIRE_FALSE(cancelled);
  CHECK_MESSAGE(cancelled.error().code == ErrorCode::Cancelled, text_of(cancelled));
  CHECK(cancelled.error().outcome == Outcome::NotApplied);
}

TEST_CASE("transport: an address that does not answer has 1.5 s, not the whole call") {
  const SilentPort silent("127.0.0.1");
  const Stopwatch watch;
  const auto answer = make_default_transport()->perform(post_to(silent.url("127.0.0.1")), nullptr,
                                                        Context::with_timeout(20s));
  CHECK(watch.elapsed().count() >= 1450);
  CHECK(watch.over(lenient(1900ms)) == 0);
  REQUIRE_FALSE(answer);
  CHECK(answer.error().code == ErrorCode::Connection);
  CHECK(answer.error().outcome == Outcome::NotApplied);
  CHECK(answer.error().cause == "no answer in 1.5 s to the connection attempt");
}

TEST_CASE("transport: all addresses of a name are tried, and the good one first the next time") {
  const RawServer server(after_request([](Wire& wire) { wire.send(http("200 OK", "{}")); }));
  const SilentPort silent("127.0.0.9", server.port());
  auto request = post_to(silent.url("two.test"));
  request.headers.emplace_back("Connection", "close");
  const auto transport = make_default_transport();
  const Stopwatch first;
  const auto answer = transport->perform(request, nullptr, Context::with_timeout(10s));
  REQUIRE_MESSAGE(answer, text_of(answer));
  CHECK(first.over(lenient(1s)) == 0);
  CHECK(first.elapsed().count() >= 200);
  const Stopwatch second;
  for (int i = 0; i < 10; ++i) CHECK(transport->perform(request, nullptr, {}));
  CHECK(second.over(lenient(1000ms)) == 0);  // not ten head starts of 250 ms
  CHECK(server.connections() == 11);
}

TEST_CASE("transport: a name of which no address serves has all their causes") {
  const SilentPort silent("127.0.0.9", closed_port());
  const auto answer = make_default_transport()->perform(post_to(silent.url("two.test")), nullptr,
                                                        Context::with_timeout(1s));
  REQUIRE_FALSE(answer);
  CHECK(answer.error().code == ErrorCode::Timeout);
  CHECK(answer.error().outcome == Outcome::NotApplied);
  const std::string cause = answer.error().cause;
  CHECK(cause.find("connection refused; no answer in ") == 0);
  CHECK(cause.find(" s to the connection attempt") != std::string::npos);
}

TEST_CASE("transport: with more than a thousand files open") {
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
  rlimit more = before;
  more.rlim_cur = std::min<rlim_t>(before.rlim_max, 4096);
  REQUIRE(setrlimit(RLIMIT_NOFILE, &more) == 0);
  std::vector<int> files;
  while (files.empty() || files.back() < 1100) {
    files.push_back(open("/dev/null", O_RDONLY | O_CLOEXEC));
    REQUIRE(files.back() >= 0);
  }
  const RawServer server(after_request([](Wire& wire) { wire.send(http("200 OK", "{}")); }));
  const auto answer = make_default_transport()->perform(post(server), nullptr, {});
  CHECK_MESSAGE(answer, text_of(answer));
  for (const int file : files) close(file);
  setrlimit(RLIMIT_NOFILE, &before);
}

// What the cause says.

TEST_CASE("transport: why there is no connection, in plain words") {
  const auto transport = make_default_transport();
  const auto cause = [&](const std::string& endpoint) {
    const auto answer = transport->perform(post_to(endpoint), nullptr, Context::with_timeout(10s));
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Connection);
    CHECK(answer.error().outcome == Outcome::NotApplied);
    CHECK(answer.error().message == "cannot connect to " + endpoint);
    return answer.error().cause;
  };
  const auto port = ":" + std::to_string(closed_port());
  CHECK(cause("http://127.0.0.1" + port) == "connection refused");
  CHECK(cause("https://127.0.0.1" + port) == "connection refused");
  const auto unknown = cause("http://no-such-host.invalid:1");
  CHECK_MESSAGE(unknown.find("host name not found: ") == 0, unknown);
  CHECK(unknown.size() > 25);  // the resolver's words

  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
  const rlimit none{3, before.rlim_max};
  REQUIRE(setrlimit(RLIMIT_NOFILE, &none) == 0);
  const auto starved =
      transport->perform(post_to("http://127.0.0.1" + port), nullptr, Context::with_timeout(10s));
  setrlimit(RLIMIT_NOFILE, &before);
  REQUIRE_FALSE(starved);
  CHECK(starved.error().cause == "no file descriptors left");
  CHECK(starved.error().outcome == Outcome::NotApplied);
}

TEST_CASE("transport: why there is no answer, in plain words") {
  const auto cause = [](std::function<void(Wire&)> then, milliseconds limit = lenient(5s)) {
    const RawServer server(after_request(std::move(then)));
    const auto answer =
        make_default_transport()->perform(post(server), nullptr, Context::with_timeout(limit));
    REQUIRE_FALSE(answer);
    CHECK(answer.error().outcome == Outcome::MaybeApplied);
    CHECK(answer.error().message == "the request to " + server.url() + " failed");
    return answer.error().cause;
  };
  const std::string some = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{";
  const auto stay = [](Wire& wire) { wire.wait_for_end(); };
  CHECK(cause([](Wire&) {}) ==
        "the connection was closed before an answer came: is it an https port?");
  CHECK(cause([&](Wire& wire) { wire.send(some); }) ==
        "the connection was closed in the middle of the answer");
  double waited = 0;
  REQUIRE(std::sscanf(cause(stay, 200ms).c_str(), "no answer in %lf s", &waited) == 1);
  CHECK(waited >= 0.1);
  CHECK(cause([&](Wire& wire) { wire.send(some), stay(wire); }, lenient(200ms))
            .find("nothing more came in ") == 0);
  CHECK(cause([&](Wire& wire) { wire.send("\x15\x03\x01\x02"), stay(wire); }) ==
        "http spoken to an https port");
  CHECK(cause([&](Wire& wire) { wire.send("SSH-2.0 \x1b[31m\r\n"), stay(wire); }) ==
        "the answer is no HTTP, but \"SSH-2.0 \\x1b[31m\\x0d\\x0a\"");
  CHECK(cause([&](Wire& wire) {
          wire.send("HTTP/1.1 2000 OK\r\n\r\n"), stay(wire);
        }).find("the answer is no HTTP, but ") == 0);
}

TEST_CASE("transport: whoever has answered http is not asked whether it is https") {
  const RawServer server([](Wire& wire) {
    wire.read_request();
    wire.send(http("200 OK", "{}"));
    wire.read_request();
  });
  const auto transport = make_default_transport();
  CHECK(transport->perform(post(server), nullptr, {}));
  const auto answer = transport->perform(post(server), nullptr, {});
  REQUIRE_FALSE(answer);
  CHECK(answer.error().cause == "the connection was closed before an answer came");
}

// What is too much.

namespace {

/// The error of a server that sends `first` and then `more` for ever.
Error flood(const std::string& first, const std::string& more) {
  const RawServer server(after_request([&](Wire& wire) {
    wire.send(first);
    while (wire.send(more)) {
    }
  }));
  LimitOptions limits;
  limits.body = 4 * 1024 * 1024;
  const Stopwatch watch;
  const auto answer = make_default_transport({}, limits)
                          ->perform(post(server), nullptr, Context::with_timeout(lenient(5s)));
  REQUIRE_FALSE(answer);
  CHECK(watch.over(lenient(2s)) == 0);
  CHECK(answer.error().outcome == Outcome::MaybeApplied);
  return answer.error();
}

}  // namespace

TEST_CASE("transport: an answer without end is not read without end") {
  const std::string much(100000, 'A');
  const std::string head = "the head of the answer is longer than 65536 bytes";
  CHECK(flood("HTTP/1.1 200 ", much).cause == head);
  CHECK(flood("HTTP/1.1 200 OK\r\n", "X-Filler: 123456789\r\n" + much).cause == head);
  CHECK(flood("", "HTTP/1.1 103 Early Hints\r\n\r\n").cause == head);
  for (const char* chunks : {"", "1;"}) {  // newer versions of httplib have a limit of their own
    const auto cause = flood(kChunkedHead, chunks + much).cause;
    const bool ours = cause == "a chunk of the answer has no length";
    CHECK_MESSAGE((ours || cause == "the answer is no HTTP"), cause);
  }
  const auto body = flood(kChunkedHead, chunk(much));
  CHECK(body.code == ErrorCode::Internal);
  CHECK(body.cause == "the answer is longer than 4194304 bytes (CoordinatorOptions::limits)");
  CHECK(flood("HTTP/1.1 500 Oh\r\nContent-Length: 1000000000\r\n\r\n", much).cause == body.cause);
}

TEST_CASE("transport: a line of a stream without end is not read without end") {
  const std::string much(100000, 'A');
  for (const bool lines : {false, true}) {
    const RawServer server(after_request([&](Wire& wire) {
      wire.send(kChunkedHead);
      for (int i = 0; i < 1000 && wire.send(chunk(lines ? "x\n" + much : much)); ++i) {
      }
      wire.send("0\r\n\r\n");
    }));
    LimitOptions limits;
    limits.body = 150000;
    std::size_t passed = 0;
    const auto answer =
        make_default_transport({}, limits)
            ->perform(post(server),
                      [&](std::string_view piece) { return passed += piece.size(), true; }, {});
    if (lines) {
      REQUIRE_MESSAGE(answer, text_of(answer));
      CHECK(passed == 1000 * (much.size() + 2));
      continue;
    }
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Connection);
    CHECK(answer.error().cause.find("the answer is longer than 150000 bytes") == 0);
    CHECK(passed <= limits.body);
  }
}

#if defined(CPPHTTPLIB_ZLIB_SUPPORT)
TEST_CASE("transport: what is unpacked counts, not what is sent") {
  const TempDir folder;
  const auto file = folder.file("bomb.gz");
  REQUIRE(run({"sh", "-c", "head -c 50000000 /dev/zero | gzip -9 > " + file}).ok());
  std::ifstream stream(file, std::ios::binary);
  const std::string bomb{std::istreambuf_iterator<char>(stream), {}};
  REQUIRE(bomb.size() < 100000);
  const RawServer server(after_request([&](Wire& wire) {
    wire.send("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: " +
              std::to_string(bomb.size()) + "\r\n\r\n" + bomb);
  }));
  LimitOptions limits;
  limits.body = 4 * 1024 * 1024;
  const auto transport = make_default_transport({}, limits);
  const auto answer = transport->perform(post(server), nullptr, {});
  REQUIRE_FALSE(answer);
  CHECK(answer.error().code == ErrorCode::Internal);
  CHECK(answer.error().cause.find("the answer is longer than 4194304 bytes") == 0);
}
#endif

TEST_CASE("transport: a long reason, 1xx heads: read as what they are") {
  for (const auto& head : {"HTTP/1.1 200 " + std::string(60000, 'A') + "\r\n",
                           std::string("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
                                       "HTTP/1.1 100 Continue\r\nX-A: b\r\n\r\n"
                                       "HTTP/1.1 200\r\n")}) {
    const RawServer server(
        after_request([&](Wire& wire) { wire.send(head + "Content-Length: 2\r\n\r\n{}"); }));
    const auto answer = make_default_transport()->perform(post(server), nullptr, {});
    REQUIRE_MESSAGE(answer, text_of(answer));
    CHECK(answer->status == 200);
    CHECK(answer->body == "{}");
  }
}

TEST_CASE("transport: an answer that comes before the request is whole is read") {
  const RawServer server([](Wire& wire) {
    wire.read_some();
    wire.send(http("413 Too Large", "no more than this"));
    wire.hang_up();
  });
  const auto answer =
      make_default_transport()->perform(post(server, std::string(20000000, 'x')), nullptr, {});
  REQUIRE_MESSAGE(answer, text_of(answer));
  CHECK(answer->status == 413);
  CHECK(answer->body == "no more than this");
}

TEST_CASE("transport: many threads, one transport") {
  std::atomic<int> served{0};
  const RawServer server([&](Wire& wire) {
    for (auto text = wire.read_request(); !text.empty(); text = wire.read_request()) {
      const auto body = text.substr(text.find("\r\n\r\n") + 4);
      ++served;
      wire.send(http("200 OK", body));
    }
  });
  const auto transport = make_default_transport();
  std::atomic<int> good{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) {
        const auto body = std::to_string(1000 * t + i);
        const auto answer = transport->perform(post(server, body), nullptr, {});
        if (answer && answer->body == body) ++good;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(good == 200);
  CHECK(served == 200);
  CHECK(server.connections() <= 4);
}

TEST_CASE("transport: TLS to what speaks none is an error, not an exception") {
  const RawServer server([](Wire& wire) {
    wire.send(http("400 Bad Request", ""));
    wire.wait_for_end();
  });
  auto request = post(server);
  request.endpoint = "https://" + server.url().substr(7);
  const auto answer =
      make_default_transport()->perform(request, nullptr, Context::with_timeout(1s));
  REQUIRE_FALSE(answer);
  CHECK(answer.error().outcome == Outcome::NotApplied);
  TlsOptions missing;
  missing.ca_file = "/no/such/file";
  const auto no_ca =
      make_default_transport(missing)->perform(request, nullptr, Context::with_timeout(1s));
  CHECK_FALSE(no_ca);
}

TEST_CASE("transport: a TLS handshake that is never answered ends at the deadline") {
  const RawServer server([](Wire& wire) { wire.read_request(); });
  auto request = post(server);
  request.endpoint = "https://" + server.url().substr(7);
  TlsOptions tls;
  tls.verify_server = false;  // reading the system's certificates takes its time, too
  const auto transport = make_default_transport(tls);
  const Stopwatch watch;
  const auto late = transport->perform(request, nullptr, Context::with_timeout(100ms));
  CHECK(watch.over(lenient(200ms)) == 0);
  REQUIRE_FALSE(late);
  CHECK_MESSAGE(late.error().code == ErrorCode::Timeout, text_of(late));
  CHECK(late.error().outcome == Outcome::NotApplied);
  const Context ctx;
  Stopwatch since_cancel;
  std::thread canceller([&] {
    wait_until([&] { return server.connections() == 2; }, lenient(5s));
    since_cancel.reset();
    ctx.cancel();
  });
  const auto cancelled = transport->perform(request, nullptr, ctx);
  CHECK(since_cancel.over(lenient(100ms)) == 0);
  canceller.join();
  REQUIRE_FALSE(cancelled);
  CHECK_MESSAGE(cancelled.error().code == ErrorCode::Cancelled, text_of(cancelled));
}
