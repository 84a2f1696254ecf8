// Section 4: the default transport, against a server that sends what it is told, byte by byte.
#include <doctest/doctest.h>

#include <atomic>
#include <functional>
#include <list>
#include <thread>

#include "coordination.hpp"
#include "support/process.hpp"
#include "support/scripted_transport.hpp"

using namespace coordination;
using namespace support;

namespace {

/// One connection, as the server sees it.
class Wire {
 public:
  Wire(int fd, const std::atomic<bool>& stop) : fd_(fd), stop_(stop) {}

  /// The next request, head and body; "" when the client is gone.
  std::string read_request() {
    std::string bytes = std::exchange(rest_, {});
    while (!complete(bytes)) {
      char buffer[4096];
      const ssize_t n = recv(fd_, buffer, sizeof(buffer), 0);
      if (n <= 0) return "";
      bytes.append(buffer, static_cast<std::size_t>(n));
    }
    return bytes;
  }
  bool send(const std::string& bytes) const {
    return ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL) ==
           static_cast<ssize_t>(bytes.size());
  }
  /// One byte every few milliseconds, until the client has had enough (or seconds later).
  void dribble(const std::string& bytes) const {
    const Stopwatch watch;
    for (std::size_t i = 0; !stop_ && watch.elapsed() < 3s; i = (i + 1) % bytes.size()) {
      if (!send(bytes.substr(i, 1))) return;
      std::this_thread::sleep_for(5ms);
    }
  }
  /// Until the client has closed the connection (or seconds later).
  void wait_for_end() const {
    pollfd readable{fd_, POLLIN, 0};
    poll(&readable, 1, 3000);
  }
  /// Ends the connection with an RST.
  void reset() const {
    const linger hard{1, 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
  }

 private:
  static bool complete(const std::string& bytes) {
    const auto head = bytes.find("\r\n\r\n");
    if (head == std::string::npos) return false;
    const auto length = bytes.find("Content-Length: ");
    const auto body = length < head ? std::stoul(bytes.substr(length + 16)) : std::size_t{0};
    return bytes.size() >= head + 4 + body;
  }

  const int fd_;
  const std::atomic<bool>& stop_;
  std::string rest_;
};

/// Gives each connection to `serve`, in a thread of its own, and closes it then.
class RawServer {
 public:
  using Serve = std::function<void(Wire&)>;

  explicit RawServer(Serve serve) : serve_(std::move(serve)) {
    listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < 10; ++i) {
      port_ = free_port();
      address.sin_port = htons(static_cast<std::uint16_t>(port_));
      if (bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) break;
    }
    if (listen(listener_, 16) != 0) throw std::runtime_error("cannot listen");
    threads_.emplace_back([this] { accept_all(); });
  }
  RawServer(const RawServer&) = delete;
  RawServer& operator=(const RawServer&) = delete;
  ~RawServer() {
    stop_ = true;
    shutdown(listener_, SHUT_RDWR);
    threads_.front().join();
    for (const int fd : fds_) shutdown(fd, SHUT_RDWR);
    for (auto thread = std::next(threads_.begin()); thread != threads_.end(); ++thread) {
      thread->join();
    }
    for (const int fd : fds_) close(fd);
    close(listener_);
  }

  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_); }
  int connections() const { return connections_; }

 private:
  void accept_all() {
    while (!stop_) {
      const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd < 0) return;
      ++connections_;
      fds_.push_back(fd);
      threads_.emplace_back([this, fd] {
        Wire wire(fd, stop_);
        serve_(wire);
        shutdown(fd, SHUT_RDWR);
        if (!stop_) wire.reset();
      });
    }
  }

  const Serve serve_;
  int listener_{-1};
  int port_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> connections_{0};
  std::list<std::thread> threads_;  // the first one accepts; of its thread alone until it is joined
  std::list<int> fds_;
};

HttpRequest post(const RawServer& server, const std::string& body = "{}") {
  HttpRequest request;
  request.endpoint = server.url();
  request.path = "/v3/kv/range";
  request.body = body;
  return request;
}

std::string http(const std::string& status, const std::string& body) {
  return "HTTP/1.1 " + status + "\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" +
         body;
}
const char* const kChunkedHead = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
std::string chunk(const std::string& bytes) {
  char size[20];
  std::snprintf(size, sizeof(size), "%zx\r\n", bytes.size());
  return size + bytes + "\r\n";
}

/// A server that does this to the first request of each connection.
RawServer::Serve after_request(std::function<void(Wire&)> then) {
  return [then = std::move(then)](Wire& wire) {
    if (!wire.read_request().empty()) then(wire);
  };
}

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
      make_default_transport()->perform(post(server), nullptr, Context::with_timeout(200ms));
  REQUIRE_FALSE(answer);
  CHECK(answer.error().outcome == Outcome::MaybeApplied);
}

TEST_CASE("transport: a kept connection that the server has closed is replaced") {
  const RawServer server(after_request([](Wire& wire) { wire.send(http("200 OK", "{}")); }));
  const auto transport = make_default_transport();
  int good = 0;
  for (int i = 0; i < 5; ++i) {
    if (transport->perform(post(server), nullptr, {})) ++good;
    std::this_thread::sleep_for(5ms);  // until its end is known here
  }
  CHECK(good == 5);
  CHECK(server.connections() == 5);
}

TEST_CASE("transport: nobody listens: not one byte was sent") {
  HttpRequest request;
  request.endpoint = "http://127.0.0.1:" + std::to_string(free_port());
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
      make_default_transport()->perform(post(server), sink, Context::with_timeout(100ms));
  const auto took = watch.elapsed();
  CHECK(took.count() >= 100);
  CHECK(took.count() <= lenient(200ms).count());
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
  CHECK(watch.elapsed().count() <= lenient(200ms).count());
  REQUIRE_FALSE(connected);
  CHECK_MESSAGE(connected.error().code == ErrorCode::Timeout, text_of(connected));
}

TEST_CASE("transport: the idle timeout counts from the last byte") {
  const RawServer server(after_request([](Wire& wire) {
    wire.send(kChunkedHead);
    for (int i = 0; i < 10; ++i) {
      wire.send(chunk("line\n"));
      std::this_thread::sleep_for(20ms);
    }
    wire.wait_for_end();
  }));
  auto request = post(server);
  request.idle_timeout = 100ms;
  Collected collected;
  const Stopwatch watch;
  const auto answer =
      make_default_transport()->perform(request, collected.sink(), Context::with_timeout(10s));
  REQUIRE_FALSE(answer);
  CHECK(collected.calls == 10);
  CHECK(watch.elapsed().count() >= milliseconds(270).count());
  CHECK(watch.elapsed().count() <= lenient(500ms).count());
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
  CHECK(watch.elapsed().count() < lenient(500ms).count());
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
        wait_until([&] { return asked.load(); }, lenient(1s));
        watch.reset();
        ctx.cancel();
      });
      Collected collected;
      const auto answer =
          transport->perform(post(server), streamed ? collected.sink() : nullptr, ctx);
      canceller.join();
      CHECK(watch.elapsed().count() <= lenient(100ms).count());
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
    CHECK(watch.elapsed().count() <= lenient(500ms).count());
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
  // A listener whose backlog is full does not answer.
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  auto* any = reinterpret_cast<sockaddr*>(&address);
  REQUIRE(bind(listener, any, size) == 0);
  REQUIRE(listen(listener, 0) == 0);
  REQUIRE(getsockname(listener, any, &size) == 0);
  std::vector<int> fillers;
  for (int i = 0; i < 4; ++i) {
    fillers.push_back(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    static_cast<void>(connect(fillers.back(), any, size));
  }
  HttpRequest request;
  request.endpoint = "http://127.0.0.1:" + std::to_string(ntohs(address.sin_port));
  request.path = "/";
  const auto transport = make_default_transport();
  const Stopwatch watch;
  const auto late = transport->perform(request, nullptr, Context::with_timeout(50ms));
  REQUIRE_FALSE(late);
  CHECK_MESSAGE(late.error().code == ErrorCode::Timeout, text_of(late));
  CHECK(late.error().outcome == Outcome::NotApplied);
  CHECK(watch.elapsed().count() <= lenient(150ms).count());
  const Context ctx;
  Stopwatch since_cancel;
  std::thread canceller([&] {
    std::this_thread::sleep_for(20ms);
    since_cancel.reset();
    ctx.cancel();
  });
  const auto cancelled = transport->perform(request, nullptr, ctx);
  CHECK(since_cancel.elapsed().count() <= lenient(100ms).count());
  canceller.join();
  REQUIRE_FALSE(cancelled);
  CHECK_MESSAGE(cancelled.error().code == ErrorCode::Cancelled, text_of(cancelled));
  for (const int fd : fillers) close(fd);
  close(listener);
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
  CHECK(watch.elapsed().count() <= lenient(200ms).count());
  REQUIRE_FALSE(late);
  CHECK_MESSAGE(late.error().code == ErrorCode::Timeout, text_of(late));
  CHECK(late.error().outcome == Outcome::NotApplied);
  const Context ctx;
  Stopwatch since_cancel;
  std::thread canceller([&] {
    wait_until([&] { return server.connections() == 2; }, lenient(1s));
    since_cancel.reset();
    ctx.cancel();
  });
  const auto cancelled = transport->perform(request, nullptr, ctx);
  CHECK(since_cancel.elapsed().count() <= lenient(100ms).count());
  canceller.join();
  REQUIRE_FALSE(cancelled);
  CHECK_MESSAGE(cancelled.error().code == ErrorCode::Cancelled, text_of(cancelled));
}
