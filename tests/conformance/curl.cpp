// The Transport of examples/curl_transport.hpp: what Transport::perform asks of it, beside what the
// conformance tests on an etcd by libcurl show.
#if COORDINATION_TEST_CURL
#include <doctest/doctest.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>

#include "examples/curl_transport.hpp"
#include "support/etcd_server.hpp"
#include "support/raw_server.hpp"
#include "support/tcp_proxy.hpp"

using namespace coordination;
using namespace support;
using namespace std::chrono_literals;

namespace {

const ChunkSink kAnySink = [](std::string_view) { return true; };

void check_error(const Result<HttpResponse>& answer, ErrorCode code, Outcome outcome) {
  REQUIRE_FALSE(answer);
  CHECK_MESSAGE(answer.error().code == code, to_string(answer.error()));
  CHECK(answer.error().outcome == outcome);
}

RawServer::Serve then_silent(const std::string& bytes) {
  return after_request([bytes](Wire& wire) {
    wire.send(bytes);
    wire.wait_for_end();
  });
}

}  // namespace

TEST_CASE("libcurl: a deadline, with nothing and with half of an answer") {
  for (const std::string& bytes : {std::string(), kChunkedHead + chunk("line\n")}) {
    for (const ChunkSink& sink : {ChunkSink(), kAnySink}) {
      const RawServer server(then_silent(bytes));
      const Stopwatch watch;
      check_error(CurlTransport().perform(post(server), sink, Context::with_timeout(100ms)),
                  ErrorCode::Timeout, Outcome::MaybeApplied);
      CHECK(watch.elapsed() >= 100ms);
      CHECK(watch.over(lenient(500ms)) == 0);
    }
  }
}

TEST_CASE("libcurl: cancelled before, while it streams, and by the sink") {
  std::atomic<bool> asked{false};
  const RawServer server(after_request([&](Wire& wire) {
    wire.send(kChunkedHead + chunk("line\n"));
    asked = true;
    wire.wait_for_end();
  }));
  CurlTransport transport;
  const Context ctx;
  SUBCASE("before") {
    ctx.cancel();
    check_error(transport.perform(post(server), nullptr, ctx), ErrorCode::Cancelled,
                Outcome::NotApplied);
    CHECK(server.connections() == 0);
  }
  SUBCASE("while it streams") {
    Stopwatch watch;
    std::thread canceller([&] {
      wait_until([&] { return asked.load(); }, lenient(2s));
      watch.reset();
      ctx.cancel();
    });
    const auto answer = transport.perform(post(server), kAnySink, ctx);
    canceller.join();
    CHECK(watch.over(lenient(200ms)) == 0);
    check_error(answer, ErrorCode::Cancelled, Outcome::MaybeApplied);
  }
  SUBCASE("by the sink") {
    const auto cancel = [&](std::string_view) { return ctx.cancel(), true; };
    check_error(transport.perform(post(server), cancel, ctx), ErrorCode::Cancelled,
                Outcome::MaybeApplied);
  }
}

TEST_CASE("libcurl: the sink ends the request, and may use the transport") {
  const RawServer server(then_silent(kChunkedHead + chunk("one\n")));
  const RawServer other(after_request([](Wire& wire) { wire.send(http("200 OK", "{}")); }));
  CurlTransport transport;
  int calls = 0, good = 0;
  const auto sink = [&](std::string_view) {
    if (transport.perform(post(other), nullptr, {})) ++good;
    return ++calls, false;
  };
  static_cast<void>(transport.perform(post(server), sink, Context::with_timeout(10s)));
  CHECK(calls == 1);
  CHECK(good == 1);
}

TEST_CASE("libcurl: the body of an error is returned, not streamed") {
  const RawServer server(
      after_request([](Wire& wire) { wire.send(http("503 Service Unavailable", "{\"a\":1}")); }));
  int calls = 0;
  const auto count = [&](std::string_view) { return ++calls, true; };
  const auto answer = CurlTransport().perform(post(server), count, {});
  REQUIRE(answer);
  CHECK(answer->status == 503);
  CHECK(answer->body == "{\"a\":1}");
  CHECK(calls == 0);
}

TEST_CASE("libcurl: nobody listens, and an answer that ends early") {
  CurlTransport transport;
  const std::string nobody = "http://127.0.0.1:" + std::to_string(closed_port());
  check_error(transport.perform(post_to(nobody), nullptr, Context::with_timeout(5s)),
              ErrorCode::Connection, Outcome::NotApplied);
  const RawServer server(after_request(
      [](Wire& wire) { wire.send("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"); }));
  check_error(transport.perform(post(server), nullptr, Context::with_timeout(5s)),
              ErrorCode::Connection, Outcome::MaybeApplied);
}

TEST_CASE("libcurl: a stream that is half-open ends when it was idle for too long") {
  const RawServer server(then_silent(kChunkedHead + chunk("one\n")));
  auto request = post(server);
  request.idle_timeout = 300ms;
  const Stopwatch watch;
  check_error(CurlTransport().perform(request, kAnySink, Context::with_timeout(10s)),
              ErrorCode::Connection, Outcome::MaybeApplied);
  CHECK(watch.elapsed() >= 300ms);
  CHECK(watch.over(lenient(1s)) == 0);
}

TEST_CASE("libcurl: a lock and a watch of the library, also when the connections break") {
  if (etcd_program().empty()) {
    MESSAGE("SKIPPED: no etcd");
    return;
  }
  const EtcdServer etcd;
  TcpProxy proxy(etcd.port());
  CoordinatorOptions options;
  options.endpoints = {proxy.endpoint()};
  options.transport = std::make_shared<CurlTransport>();
  auto coordinator = Coordinator::connect(options).value();
  auto watch = coordinator.config().watch("rate").value();
  auto lock = coordinator.lock().acquire("jobs", 10s).value();
  proxy.cut();
  coordinator.config().set("rate", 2).value();
  const auto event = watch.next(Context::with_timeout(lenient(10s)));
  REQUIRE_MESSAGE(event, to_string(event.error()));
  CHECK(event->key == "rate");
  CHECK(lock.held());
  CHECK(lock.unlock());
}
#endif
