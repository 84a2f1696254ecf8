// The default transport against a real etcd in another process.
#include <doctest/doctest.h>

#include <algorithm>
#include <csignal>
#include <random>
#include <thread>

#include "support/live.hpp"
#include "support/local_server.hpp"
#include "support/tcp_proxy.hpp"
#include "support/tls_files.hpp"

using namespace coordination;
using namespace support;

namespace {

const std::string kKeyA = "\"YQ==\"";  // "a"

HttpRequest request(const std::string& url, const std::string& path, const std::string& body) {
  HttpRequest result;
  result.endpoint = url;
  result.path = path;
  result.body = body;
  return result;
}
HttpRequest range_request(const std::string& url) {
  return request(url, "/v3/kv/range", "{\"key\":" + kKeyA + "}");
}
HttpRequest watch_request(const std::string& url) {
  auto result = request(url, "/v3/watch", "{\"create_request\":{\"key\":" + kKeyA + "}}");
  result.headers.emplace_back("Connection", "close");
  return result;
}

int count_of(const std::string& text, const std::string& part) {
  int count = 0;
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

struct Tally {
  std::atomic<int> cancelled{0}, other{0}, late{0};
  std::atomic<long> slowest_ms{0};
};

// Opens a stream and cancels it at some moment of its life, from another thread.
void cancel_one(Transport& transport, const std::string& url, std::chrono::microseconds after,
                Tally& tally) {
  Context ctx;
  std::thread reader([&] {
    const auto answer = transport.perform(
        watch_request(url), [](std::string_view) { return true; }, ctx);
    const bool right = !answer && answer.error().code == ErrorCode::Cancelled;
    ++(right ? tally.cancelled : tally.other);
  });
  std::this_thread::sleep_for(after);
  const Stopwatch since_cancel;
  ctx.cancel();
  reader.join();
  const long took = since_cancel.elapsed().count();
  if (took > tally.slowest_ms) tally.slowest_ms = took;
  if (since_cancel.over(lenient(1s)) > 0) ++tally.late;  // not heard of, it would run on for ever
}

// Arguments: url, CA file, how many. Says "cancelled other late slowest status".
int cancel_streams(const Args& args) {
  std::signal(SIGPIPE, SIG_DFL);
  TlsOptions tls;
  tls.ca_file = args.at(1);
  const auto transport = make_default_transport(tls);
  std::atomic<int> left{std::stoi(args.at(2))};
  Tally tally;
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937 random(seed);
      while (--left >= 0) {
        const std::chrono::microseconds after(random() % 3000);
        cancel_one(*transport, args.at(0), after, tally);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  const auto last = transport->perform(range_request(args.at(0)), nullptr, {});
  say(std::to_string(tally.cancelled) + " " + std::to_string(tally.other) + " " +
      std::to_string(tally.late) + " " + std::to_string(tally.slowest_ms) + " " +
      std::to_string(last ? last->status : 0));
  return 0;
}
const bool cancel_streams_registered = child_main("cancel_streams", cancel_streams);

void check_cancelled_streams(const std::string& url, const std::string& ca, int how_many) {
  auto child = start_child("cancel_streams", {url, ca, std::to_string(how_many)});
  const auto said = child.read_line(120s);
  const auto exit_code = child.wait(5s);
  REQUIRE(exit_code.has_value());
  CHECK_MESSAGE(*exit_code == 0, "128 + 13 is SIGPIPE");
  REQUIRE(said.has_value());
  std::istringstream numbers(*said);
  int cancelled = 0, other = 0, late = 0, slowest = 0, status = 0;
  numbers >> cancelled >> other >> late >> slowest >> status;
  MESSAGE(cancelled, " streams cancelled, the slowest in ", slowest, " ms");
  CHECK(cancelled == how_many);
  CHECK(other == 0);
  CHECK(late == 0);
  CHECK(status == 200);
}

Result<HttpResponse> ask(const EtcdServer& server, const TlsOptions& tls) {
  return make_default_transport(tls)->perform(range_request(server.url()), nullptr,
                                              Context::with_timeout(lenient(20s)));
}

}  // namespace

TEST_CASE("transport: thousands of streams cancelled, SIGPIPE at its default") {
  check_cancelled_streams(shared_etcd().url(), "", scaled(4000));
}

TEST_CASE("transport: thousands of TLS streams cancelled, SIGPIPE at its default") {
  const TlsFiles files;
  const EtcdServer server(EtcdOptions{"", files.etcd_flags(false), "https", "127.0.0.1"});
  check_cancelled_streams(server.url(), files.ca(), scaled(2000));
}

TEST_CASE("transport: an answer, and an error that ends in a trailer") {
  const auto transport = make_default_transport();
  const auto& etcd = shared_etcd();
  const auto good = transport->perform(range_request(etcd.url()), nullptr, {});
  REQUIRE_MESSAGE(good, why(good));
  CHECK(good->status == 200);
  CHECK(good->body.find("\"header\"") != std::string::npos);
  for (int i = 0; i < 20; ++i) {
    const auto bad = transport->perform(request(etcd.url(), "/v3/kv/range", "{}"), nullptr, {});
    REQUIRE_MESSAGE(bad, why(bad));
    CHECK(bad->status == 400);
    CHECK(bad->body.find("etcdserver: key is not provided") != std::string::npos);
  }
}

TEST_CASE("transport: with a sink, a 2xx body goes there and any other is returned") {
  const auto transport = make_default_transport();
  const auto& etcd = shared_etcd();
  std::string bytes;
  const ChunkSink sink = [&](std::string_view piece) {
    bytes += piece;
    return true;
  };
  const auto good = transport->perform(range_request(etcd.url()), sink, {});
  REQUIRE_MESSAGE(good, why(good));
  CHECK(good->status == 200);
  CHECK(good->body.empty());
  CHECK(bytes.find("\"header\"") != std::string::npos);
  bytes.clear();
  const auto bad = transport->perform(request(etcd.url(), "/v3/kv/range", "{}"), sink, {});
  REQUIRE_MESSAGE(bad, why(bad));
  CHECK(bad->status == 400);
  CHECK(bad->body.find("key is not provided") != std::string::npos);
  CHECK(bytes.empty());
}

TEST_CASE("transport: connections are kept, and small requests do not wait for the ACK") {
  TcpProxy proxy(shared_etcd().port());
  const auto transport = make_default_transport();
  const Stopwatch watch;
  for (int i = 0; i < 100; ++i) {
    const auto answer =
        transport->perform(range_request("http://" + proxy.endpoint()), nullptr, {});
    REQUIRE_MESSAGE(answer, why(answer));
  }
  // Without TCP_NODELAY each takes 44 ms.
  CHECK(watch.over(lenient(2s)) == 0);
  CHECK(proxy.accepted() == 1);
}

TEST_CASE("transport: `Connection: close` is sent, so no part of a large body is lost") {
  constexpr int kLeases = 1000;
  std::string body;
  for (int i = 1; i <= kLeases; ++i) body += "{\"ID\":\"" + std::to_string(i) + "\"}\n";
  auto batch = request(shared_etcd().url(), "/v3/lease/keepalive", body);
  batch.headers.emplace_back("Connection", "close");
  const auto transport = make_default_transport();
  for (int i = 0; i < scaled(20); ++i) {
    const auto answer = transport->perform(batch, nullptr, {});
    REQUIRE_MESSAGE(answer, why(answer));
    CHECK(count_of(answer->body, "\"ID\"") == kLeases);
  }
}

TEST_CASE("transport: the sink ends a request by returning false") {
  const auto transport = make_default_transport();
  int calls = 0;
  const Stopwatch watch;
  const auto answer = transport->perform(
      watch_request(shared_etcd().url()),
      [&](std::string_view) {
        ++calls;
        return false;
      },
      Context::with_timeout(10s));
  CHECK(calls == 1);
  CHECK(watch.over(lenient(1s)) == 0);
}

TEST_CASE("transport: deadlines and cancellation where nothing answers") {
  const LocalServer silent("");
  const std::string url = "http://" + silent.endpoint();
  const auto transport = make_default_transport();
  Stopwatch watch;

  SUBCASE("deadline") {
    const auto answer =
        transport->perform(range_request(url), nullptr, Context::with_timeout(200ms));
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Timeout);
    CHECK(answer.error().outcome == Outcome::MaybeApplied);
    CHECK(watch.elapsed() >= 190ms);
    CHECK(watch.over(lenient(300ms)) == 0);
  }
  SUBCASE("idle timeout") {
    auto impatient = range_request(url);
    impatient.idle_timeout = 200ms;
    const auto answer = transport->perform(impatient, nullptr, Context::with_timeout(10s));
    REQUIRE_FALSE(answer);
    CHECK(watch.elapsed() >= 190ms);
    CHECK(watch.over(lenient(400ms)) == 0);
  }
  SUBCASE("cancelled") {
    const Context ctx;
    std::thread canceller([&] {
      std::this_thread::sleep_for(100ms);
      watch.reset();
      ctx.cancel();
    });
    const auto answer = transport->perform(range_request(url), nullptr, ctx);
    const auto late = watch.over(lenient(100ms));
    canceller.join();
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Cancelled);
    CHECK(late == 0);
  }
  SUBCASE("cancelled before") {
    const Context ctx;
    ctx.cancel();
    const auto answer = transport->perform(range_request(url), nullptr, ctx);
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Cancelled);
    CHECK(answer.error().outcome == Outcome::NotApplied);
    CHECK(silent.requests() == 0);
  }
}

namespace {

// A port whose accept queue is full: a connection to it neither succeeds nor fails.
class FullPort {
 public:
  FullPort() {
    port_ = free_port();
    address_.sin_family = AF_INET;
    address_.sin_port = htons(static_cast<std::uint16_t>(port_));
    address_.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    fds_.push_back(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const auto* address = reinterpret_cast<const sockaddr*>(&address_);
    if (bind(fds_[0], address, sizeof(address_)) != 0) throw std::runtime_error("bind");
    listen(fds_[0], 0);
    for (int i = 0; i < 8; ++i) {
      fds_.push_back(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
      if (::connect(fds_.back(), address, sizeof(address_)) == 0) continue;
    }
  }
  ~FullPort() {
    for (const int fd : fds_) ::close(fd);
  }
  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_); }

 private:
  int port_;
  sockaddr_in address_{};
  std::vector<int> fds_;
};

}  // namespace

TEST_CASE("transport: deadlines and cancellation while connecting") {
  const FullPort full;
  const auto transport = make_default_transport();
  Stopwatch watch;

  SUBCASE("deadline") {
    const auto answer =
        transport->perform(range_request(full.url()), nullptr, Context::with_timeout(300ms));
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Timeout);
    CHECK(answer.error().outcome == Outcome::NotApplied);
    CHECK(watch.over(lenient(400ms)) == 0);
  }
  SUBCASE("cancelled") {
    const Context ctx;
    std::thread canceller([&] {
      std::this_thread::sleep_for(100ms);
      watch.reset();
      ctx.cancel();
    });
    const auto answer = transport->perform(range_request(full.url()), nullptr, ctx);
    const auto late = watch.over(lenient(100ms));
    canceller.join();
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Cancelled);
    CHECK(late == 0);
  }
}

TEST_CASE("transport: a refused connection, and one that is reset") {
  const auto transport = make_default_transport();
  std::atomic<bool> asked{false};
  TcpProxy proxy(shared_etcd().port(), [&](std::string_view) { return asked = true, ""; });
  const std::string url = "http://" + proxy.endpoint();
  proxy.refuse();
  const auto refused = transport->perform(range_request(url), nullptr, {});
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == ErrorCode::Connection);
  CHECK(refused.error().outcome == Outcome::NotApplied);
  CHECK(to_string(refused.error()).find(proxy.endpoint()) != std::string::npos);

  proxy.refuse(false);
  proxy.pause(TcpProxy::Way::Down);
  Result<HttpResponse> answer = Error{};
  std::thread caller([&] { answer = transport->perform(range_request(url), nullptr, {}); });
  const bool connected = wait_until([&] { return asked.load(); }, lenient(5s));
  proxy.cut();
  caller.join();
  REQUIRE(connected);
  REQUIRE_FALSE(answer);
  CHECK(answer.error().code == ErrorCode::Connection);
  CHECK(answer.error().outcome == Outcome::MaybeApplied);
}

TEST_CASE("transport: a stream that is cut ends at once") {
  const auto transport = make_default_transport();
  TcpProxy proxy(shared_etcd().port());
  std::atomic<bool> created{false};
  std::atomic<bool> ended{false};
  std::thread reader([&] {
    const auto answer = transport->perform(
        watch_request("http://" + proxy.endpoint()),
        [&](std::string_view) { return created = true, true; }, Context::with_timeout(20s));
    ended = true;
  });
  CHECK(wait_until([&] { return created.load(); }, lenient(5s)));
  proxy.cut();
  CHECK(wait_until([&] { return ended.load(); }, lenient(500ms)));
  reader.join();
}

TEST_CASE("TLS: what is accepted and what is refused") {
  static const TlsFiles files;  // one for all subcases
  static const EtcdServer server(EtcdOptions{"", files.etcd_flags(false), "https", "127.0.0.1"});
  TlsOptions tls;

  SUBCASE("the right CA") {
    tls.ca_file = files.ca();
    const auto answer = ask(server, tls);
    REQUIRE_MESSAGE(answer, why(answer));
    CHECK(answer->status == 200);
  }
  SUBCASE("no CA: the system's certificates do not know it") {
    const auto answer = ask(server, tls);
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Connection);
    CHECK(answer.error().outcome == Outcome::NotApplied);
    CHECK(to_string(answer.error()).find(server.endpoint()) != std::string::npos);
  }
  SUBCASE("the wrong CA") {
    tls.ca_file = files.other_ca();
    const auto answer = ask(server, tls);
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Connection);
  }
  SUBCASE("the wrong CA, and no verification") {
    tls.ca_file = files.other_ca();
    tls.verify_server = false;
    const auto answer = ask(server, tls);
    REQUIRE_MESSAGE(answer, why(answer));
    CHECK(answer->status == 200);
  }
  SUBCASE("a CA file that is not there") {
    tls.ca_file = files.file("missing.pem");
    const auto answer = ask(server, tls);
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Validation);
    CHECK(why(answer).find(tls.ca_file) != std::string::npos);
  }
  SUBCASE("a client certificate that is not there") {
    tls.ca_file = files.ca();
    tls.cert_file = files.file("missing.pem");
    tls.key_file = files.file("missing.key");
    const auto answer = ask(server, tls);
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Validation);
    CHECK(answer.error().outcome == Outcome::NotApplied);
    CHECK(why(answer).find(tls.cert_file) != std::string::npos);
  }
  SUBCASE("a certificate for another host") {
    const EtcdServer foreign(
        EtcdOptions{"", files.etcd_flags(false, "foreign"), "https", "127.0.0.1"});
    tls.ca_file = files.ca();
    const auto answer = ask(foreign, tls);
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Connection);
  }
}

TEST_CASE("TLS: a client certificate") {
  const TlsFiles files;
  const EtcdServer server(EtcdOptions{"", files.etcd_flags(true), "https", "127.0.0.1"});
  TlsOptions tls;
  tls.ca_file = files.ca();
  SUBCASE("shown") {
    tls.cert_file = files.client_cert();
    tls.key_file = files.client_key();
    const auto answer = ask(server, tls);
    REQUIRE_MESSAGE(answer, why(answer));
    CHECK(answer->status == 200);
  }
  SUBCASE("missing") {
    const auto answer = ask(server, tls);
    REQUIRE_FALSE(answer);
    CHECK(answer.error().code == ErrorCode::Connection);
  }
}

TEST_CASE("TLS: the whole library over it") {
  const TlsFiles files;
  const EtcdServer server(EtcdOptions{"", files.etcd_flags(true), "https", "127.0.0.1"});
  auto options = options_for(server);
  options.tls.ca_file = files.ca();
  options.tls.cert_file = files.client_cert();
  options.tls.key_file = files.client_key();
  auto coordinator = connect(options);
  auto watch = coordinator.client().watch("k").value();
  coordinator.client().put("k", "over TLS").value();
  CHECK(watch.next(Context::with_timeout(lenient(20s))).value().kv.value == "over TLS");
  auto lock = coordinator.lock().acquire("x", 5s).value();
  CHECK(lock.held());
  lock.unlock().value();
}

TEST_CASE("TLS: a write after etcd has come back does not meet a connection of before") {
  const TlsFiles files;
  EtcdServer server(EtcdOptions{"", files.etcd_flags(false), "https", "127.0.0.1"});
  auto options = options_for(server);
  options.tls.ca_file = files.ca();
  auto coordinator = connect(options);
  coordinator.client().put("k", "before").value();
  server.terminate();  // says farewell on every connection
  REQUIRE(wait_until([&] { return !server.running(); }, lenient(10s)));
  server.restart();
  const auto put = coordinator.client().put("k", "after");
  CHECK_MESSAGE(put, why(put));
}

TEST_CASE("TLS: https to a plain port, and http to a TLS port") {
  const auto transport = make_default_transport();
  const auto& plain = shared_etcd();
  const auto wrong = transport->perform(range_request("https://" + plain.endpoint()), nullptr, {});
  REQUIRE_FALSE(wrong);
  CHECK(wrong.error().code == ErrorCode::Connection);
  CHECK(wrong.error().outcome == Outcome::NotApplied);
  CHECK(wrong.error().cause.find("is it an http port?") != std::string::npos);

  const TlsFiles files;
  const EtcdServer server(EtcdOptions{"", files.etcd_flags(false), "https", "127.0.0.1"});
  CoordinatorOptions options;
  options.endpoints = {"http://" + server.endpoint()};
  const auto connected = Coordinator::connect(options);
  REQUIRE_FALSE(connected);
  CHECK(to_string(connected.error()).find(server.endpoint()) != std::string::npos);
  CHECK(to_string(connected.error()).find("https port") != std::string::npos);
}
