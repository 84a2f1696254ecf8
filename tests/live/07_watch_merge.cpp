// What a merge of streams must not do, and what stands between us and etcd must not either.
#include <doctest/doctest.h>

#include "support/live.hpp"
#include "support/tcp_proxy.hpp"
#include "support/watch_support.hpp"

using namespace coordination;
using namespace support;

namespace {

/// A number that etcd gives under /metrics; -1: it gives none.
double metric(const EtcdServer& etcd, const std::string& name) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(etcd.port()));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const std::string request = "GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n";
  std::string answer;
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0 &&
      send(fd, request.data(), request.size(), MSG_NOSIGNAL) > 0) {
    char bytes[16384];
    for (ssize_t n = 0; (n = recv(fd, bytes, sizeof(bytes), 0)) > 0;) {
      answer.append(bytes, static_cast<std::size_t>(n));
    }
  }
  close(fd);
  const auto at = answer.find("\n" + name + " ");
  return at == std::string::npos ? -1 : std::strtod(answer.c_str() + at + name.size() + 2, nullptr);
}

}  // namespace

TEST_CASE("watch: neither a compaction nor a new watch ends one that has missed nothing") {
  const EtcdServer etcd;
  auto options = options_for(etcd);
  const auto meter = std::make_shared<WatchMeter>();
  options.transport = meter;
  auto c = connect(std::move(options));
  auto writer = connect(etcd);
  std::vector<Watch<WatchEvent>> watches;
  const auto key = [](std::size_t i) { return "idle" + std::to_string(i); };
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) {
      watches.push_back(c.client().watch(key(watches.size())).value());
      const int count = static_cast<int>(watches.size());
      REQUIRE(wait_until([&] { return meter->confirmed() == count; }, lenient(10s)));
    }
    std::int64_t last = 0;
    for (int i = 0; i < 300; ++i) last = writer.client().put("other", "x").value().revision;
    writer.client().compact(last).value();
  }
  for (int i = 0; i < 2; ++i) watches.push_back(c.client().watch(key(watches.size())).value());
  const int count = static_cast<int>(watches.size());
  REQUIRE(wait_until([&] { return meter->confirmed() == count; }, lenient(10s)));
  std::this_thread::sleep_for(1s);  // what is to be merged is
  for (std::size_t i = 0; i < watches.size(); ++i) writer.client().put(key(i), "1").value();
  for (std::size_t i = 0; i < watches.size(); ++i) {
    const auto event = watches[i].next(Context::with_timeout(lenient(5s)));
    REQUIRE_MESSAGE(event, key(i), ": ", why(event));
    CHECK(event->kv.key == key(i));
  }
  MESSAGE(count, " watches, ", meter->creates(), " create requests on ", meter->streams(),
          " streams, at most ", meter->most_streams_at_once(), " at once");
  CHECK(meter->most_streams_at_once() <= 7);  // three compactions
}

TEST_CASE("watch: a thousand, of which all but one are given up, cost etcd little") {
  const EtcdServer etcd;
  auto options = options_for(etcd);
  const auto meter = std::make_shared<WatchMeter>();
  options.transport = meter;
  auto c = connect(std::move(options));
  std::vector<Watch<WatchEvent>> watches;
  const int all = scaled(1000);
  for (int i = 0; i < all; ++i) {
    WatchRequest request;
    request.key = "k" + std::to_string(i);
    request.start_revision = 2;
    watches.push_back(c.client().watch(request).value());
  }
  REQUIRE(wait_until([&] { return meter->confirmed() == all; }, lenient(20s)));
  watches.erase(watches.begin() + 1, watches.end());
  const auto watchers = [&] { return metric(etcd, "etcd_debugging_mvcc_watcher_total"); };
  CHECK(wait_until([&] { return watchers() >= 1 && watchers() <= 2; }, lenient(10s)));
}

TEST_CASE("watch: a proxy that does not pass `Connection: close` on") {
  const EtcdServer etcd;
  std::atomic<int> dropped{0};
  TcpProxy proxy(etcd.port());
  proxy.rewrite([&](std::string& piece) {
    const std::string close = "Connection: close";
    for (auto at = piece.find(close); at != std::string::npos; at = piece.find(close, at)) {
      piece.replace(at, close.size(), "X-Hop-By-Hop: bye");
      ++dropped;
    }
  });
  auto options = options_for(etcd);
  options.endpoints = {proxy.endpoint()};
  const auto meter = std::make_shared<WatchMeter>();
  options.transport = meter;
  auto c = connect(std::move(options));
  std::vector<Watch<WatchEvent>> watches;
  const Stopwatch stopwatch;
  const int all = 300;
  for (int i = 0; i < all; ++i) {
    WatchRequest request;
    request.key = "a key of some length, number " + std::to_string(i);
    request.start_revision = 2;
    watches.push_back(c.client().watch(request).value());
  }
  CHECK(wait_until([&] { return meter->confirmed() == all; }, lenient(10s)));
  CHECK(dropped > 0);
  MESSAGE(all, " watches after ", stopwatch.seconds(), " s, ", meter->streams(), " streams");
  auto writer = connect(etcd);
  for (int i = 0; i < all; i += 50) {
    writer.client().put("a key of some length, number " + std::to_string(i), "1").value();
    const auto event =
        watches[static_cast<std::size_t>(i)].next(Context::with_timeout(lenient(5s)));
    CHECK_MESSAGE(event, why(event));
  }
}
