// Watch: order, contents, options, ends, interruptions. What needs thousands of them is elsewhere.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

#include "support/live.hpp"
#include "support/tcp_proxy.hpp"

using namespace coordination;
using namespace support;

namespace {

constexpr auto kSoon = 30s;

struct Fixture {
  Coordinator coordinator{connect(shared_etcd())};
  Client& client{coordinator.client()};
  std::string dir{unique_prefix() + "/"};

  WatchRequest all() const {
    WatchRequest request;
    request.key = dir;
    request.range_end = prefix_range_end(dir);
    return request;
  }
};

// "PUT /dir/k=v@revision"
std::string text(const WatchEvent& event) {
  return std::string(to_string(event.type)) + " " + event.kv.key + "=" + event.kv.value;
}

std::vector<std::string> take(Watch<WatchEvent>& watch, std::size_t count) {
  std::vector<std::string> texts;
  while (texts.size() < count) {
    const auto event = watch.next(Context::with_timeout(lenient(kSoon)));
    if (!event) return texts.push_back(to_string(event.error())), texts;
    texts.push_back(text(*event));
  }
  return texts;
}

using Texts = std::vector<std::string>;

/// Measures the longest line that comes on a stream.
class LineMeter : public Transport {
 public:
  Result<HttpResponse> perform(const HttpRequest& request, const ChunkSink& sink,
                               const Context& ctx) override {
    if (request.path != "/v3/watch") return inner_->perform(request, sink, ctx);
    std::size_t length = 0;
    const auto measure = [&](std::string_view piece) {
      const auto end = piece.find('\n');
      length += end == std::string_view::npos ? piece.size() : end;
      longest_ = std::max(longest_.load(), length);
      if (end != std::string_view::npos) length = piece.size() - piece.rfind('\n') - 1;
      return sink(piece);
    };
    return inner_->perform(request, measure, ctx);
  }
  std::size_t longest() const { return longest_; }

 private:
  const std::shared_ptr<Transport> inner_{make_default_transport()};
  std::atomic<std::size_t> longest_{0};
};

}  // namespace

TEST_CASE("watch: a long history comes in lines of bounded length, and is whole") {
  const EtcdServer etcd;
  auto options = options_for(etcd);
  const auto meter = std::make_shared<LineMeter>();
  options.transport = meter;
  auto c = connect(options);
  std::vector<std::int64_t> written;
  for (char i = 0; i < 24; ++i) {
    const std::string value(1'000'000, static_cast<char>('a' + i));
    written.push_back(c.client().put("k", value).value().revision);
  }
  // In one transaction, and yet in more than one line.
  Txn txn;
  for (int i = 0; i < 4; ++i) {
    txn.then(Op::put("k" + std::to_string(i), std::string(350'000, 'x')));
  }
  const auto last = c.client().commit(txn).value().revision;
  WatchRequest request;
  request.key = "k";
  request.range_end = "l";
  request.start_revision = written.front();
  request.prev_kv = true;
  request.queue_size = 4;
  auto watch = c.client().watch(request).value();
  for (std::size_t i = 0; i < written.size(); ++i) {
    const auto event = watch.next(Context::with_timeout(lenient(kSoon))).value();
    CHECK(event.revision == written[i]);
    CHECK(event.kv.value == std::string(1'000'000, static_cast<char>('a' + i)));
  }
  for (int i = 0; i < 4; ++i) {
    const auto event = watch.next(Context::with_timeout(lenient(kSoon))).value();
    CHECK(event.revision == last);
    CHECK(event.kv.key == "k" + std::to_string(i));
    CHECK(event.kv.value.size() == 350'000);
  }
  MESSAGE("the longest line: ", meter->longest() / 1024, " KiB of ",
          (2 * 24 * 1000 + 4 * 350) * 4 / 3, " in all");
  CHECK(meter->longest() < 4u << 20);
}

TEST_CASE_FIXTURE(Fixture, "watch: every change in order, with its contents and revision") {
  auto watch = client.watch(all()).value();
  const auto put = client.put(dir + "a", "1").value();
  client.put(dir + "b", "2").value();
  client.put("/elsewhere" + dir, "x").value();
  client.put(dir + "a", "3").value();
  const auto removed = client.remove(dir + "b").value();

  const auto first = watch.next(Context::with_timeout(lenient(kSoon))).value();
  CHECK(first.type == EventType::Put);
  CHECK(first.kv.key == dir + "a");
  CHECK(first.kv.value == "1");
  CHECK(first.revision == put.revision);
  CHECK(first.kv.mod_revision == put.revision);
  CHECK(first.kv.version == 1);
  CHECK_FALSE(first.prev_kv.has_value());
  CHECK(take(watch, 2) == Texts{"PUT " + dir + "b=2", "PUT " + dir + "a=3"});
  const auto last = watch.next(Context::with_timeout(lenient(kSoon))).value();
  CHECK(last.type == EventType::Delete);
  CHECK(last.kv.key == dir + "b");
  CHECK(last.revision == removed.revision);
  const auto none = watch.next(Context::with_timeout(100ms));
  REQUIRE_FALSE(none);
  CHECK(none.error().code == ErrorCode::Timeout);
  client.put(dir + "c", "after the timeout").value();
  CHECK(take(watch, 1) == Texts{"PUT " + dir + "c=after the timeout"});
}

TEST_CASE_FIXTURE(Fixture, "watch: one key, and not those that begin like it") {
  auto watch = client.watch(dir + "k").value();
  client.put(dir + "k2", "x").value();
  client.put(dir + "k", "1").value();
  CHECK(take(watch, 1) == Texts{"PUT " + dir + "k=1"});
}

TEST_CASE_FIXTURE(Fixture, "watch: it has begun when watch() returns") {
  for (int i = 0; i < scaled(50); ++i) {
    const auto key = dir + std::to_string(i);
    auto watch = client.watch(key).value();
    client.put(key, "1").value();
    CHECK(take(watch, 1) == Texts{"PUT " + key + "=1"});
  }
}

TEST_CASE_FIXTURE(Fixture, "watch: from a revision of the past, with previous values, filtered") {
  const auto start = client.put(dir + "a", "1").value().revision;
  client.put(dir + "a", "2").value();
  client.remove(dir + "a").value();
  auto request = all();
  request.start_revision = start;
  SUBCASE("all") {
    auto watch = client.watch(request).value();
    CHECK(take(watch, 3) ==
          Texts{"PUT " + dir + "a=1", "PUT " + dir + "a=2", "DELETE " + dir + "a="});
  }
  SUBCASE("with previous values") {
    request.prev_kv = true;
    auto watch = client.watch(request).value();
    CHECK_FALSE(watch.next(Context::with_timeout(lenient(kSoon))).value().prev_kv.has_value());
    CHECK(watch.next(Context::with_timeout(lenient(kSoon))).value().prev_kv.value().value == "1");
    CHECK(watch.next(Context::with_timeout(lenient(kSoon))).value().prev_kv.value().value == "2");
  }
  SUBCASE("no puts") {
    request.no_put = true;
    auto watch = client.watch(request).value();
    CHECK(take(watch, 1) == Texts{"DELETE " + dir + "a="});
  }
  SUBCASE("no deletes") {
    request.no_delete = true;
    auto watch = client.watch(request).value();
    client.put(dir + "b", "1").value();
    CHECK(take(watch, 3) ==
          Texts{"PUT " + dir + "a=1", "PUT " + dir + "a=2", "PUT " + dir + "b=1"});
  }
  SUBCASE("from the future") {
    const auto now = client.put(dir + "a", "3").value().revision;
    request.start_revision = now + 2;
    auto watch = client.watch(request).value();
    client.put(dir + "a", "too early").value();
    client.put(dir + "a", "4").value();
    const auto event = watch.next(Context::with_timeout(lenient(kSoon))).value();
    CHECK(event.revision >= now + 2);
    CHECK(event.kv.value == "4");
  }
}

TEST_CASE_FIXTURE(Fixture, "watch: many events of one transaction, and bytes") {
  auto watch = client.watch(all()).value();
  Txn txn;
  for (char c = 'a'; c < 'a' + 20; ++c) txn.then(Op::put(dir + c, std::string(1, c) + '\0'));
  const auto done = client.commit(txn).value();
  std::string order;
  for (int i = 0; i < 20; ++i) {
    const auto event = watch.next(Context::with_timeout(lenient(kSoon))).value();
    CHECK(event.revision == done.revision);
    CHECK(event.kv.value == event.kv.key.substr(dir.size()) + '\0');
    order += event.kv.value[0];
  }
  CHECK(order == "abcdefghijklmnopqrst");
}

TEST_CASE_FIXTURE(
    Fixture,
    "watch: a compacted start is told, with the revision from which on nothing is missing") {
  const auto start = client.put(dir + "a", "1").value().revision;
  const auto kept = client.put(dir + "a", "2").value().revision;
  client.compact(kept).value();
  auto request = all();
  request.start_revision = start;
  auto watch = client.watch(request);
  const auto event = watch ? watch->next(Context::with_timeout(lenient(kSoon)))
                           : Result<WatchEvent>(watch.error());
  REQUIRE_FALSE(event);
  CHECK(event.error().code == ErrorCode::Compacted);
  // Not the compacted revision itself: some etcds have dropped deletes from it.
  CHECK(event.error().revision == kept + 1);
  client.put(dir + "a", "3").value();
  request.start_revision = event.error().revision;
  auto again = client.watch(request).value();
  CHECK(take(again, 1) == Texts{"PUT " + dir + "a=3"});
}

TEST_CASE_FIXTURE(Fixture, "watch: cancel wakes the reader and ends the loop") {
  auto watch = client.watch(all()).value();
  client.put(dir + "a", "1").value();
  client.put(dir + "b", "2").value();
  Texts seen;
  std::atomic<int> count{0};
  std::thread canceller([&] {
    wait_until([&] { return count == 2; }, lenient(10s));
    watch.cancel();
  });
  for (const auto& event : watch) {
    seen.push_back(text(event));
    ++count;
  }
  canceller.join();
  CHECK(seen == Texts{"PUT " + dir + "a=1", "PUT " + dir + "b=2"});
  const auto ended = watch.next();
  REQUIRE_FALSE(ended);
  CHECK(ended.error().code == ErrorCode::Cancelled);
}

TEST_CASE_FIXTURE(Fixture, "watch: a cancelled Context ends the waiting, not the watch") {
  auto watch = client.watch(all()).value();
  const Context ctx;
  std::thread canceller([&] {
    std::this_thread::sleep_for(50ms);
    ctx.cancel();
  });
  const auto waited = watch.next(ctx);
  canceller.join();
  REQUIRE_FALSE(waited);
  CHECK(waited.error().code == ErrorCode::Cancelled);
  client.put(dir + "a", "1").value();
  CHECK(take(watch, 1) == Texts{"PUT " + dir + "a=1"});
}

TEST_CASE_FIXTURE(Fixture, "watch: a handler is called in order, one call at a time") {
  constexpr int kEvents = 300;
  std::mutex mutex;
  std::vector<std::int64_t> revisions;
  std::atomic<int> inside{0}, overlaps{0};
  auto subscription = client.watch(all(), [&](const WatchEvent& event) {
    if (++inside > 1) ++overlaps;
    {
      std::lock_guard<std::mutex> hold(mutex);
      revisions.push_back(event.revision);
    }
    --inside;
  });
  REQUIRE_MESSAGE(subscription, why(subscription));
  std::vector<std::int64_t> expected;
  for (int i = 0; i < kEvents; ++i) expected.push_back(client.put(dir, "v").value().revision);
  const auto seen = [&] {
    std::lock_guard<std::mutex> hold(mutex);
    return revisions;
  };
  CHECK(wait_until([&] { return seen().size() >= kEvents; }, lenient(5s)));
  subscription->cancel();
  client.put(dir, "after the end").value();
  std::this_thread::sleep_for(50ms);
  CHECK(seen() == expected);
  CHECK(overlaps == 0);
}

TEST_CASE_FIXTURE(Fixture, "watch: a handler may end its own watch, call etcd, and throw") {
  LogKeeper log;
  auto options = options_for(shared_etcd());
  options.logger = log.logger();
  auto other = connect(options);
  SUBCASE("end its own watch") {
    std::atomic<int> calls{0};
    auto subscription = std::make_shared<Subscription>();
    std::atomic<bool> ready{false}, ended{false};
    *subscription = other.client()
                        .watch(all(),
                               [&](const WatchEvent&) {
                                 wait_until([&] { return ready.load(); }, 5s);
                                 ++calls;
                                 subscription.reset();
                                 ended = true;
                               })
                        .value();
    ready = true;
    for (int i = 0; i < 5; ++i) client.put(dir, "v").value();
    CHECK(wait_until([&] { return calls == 1; }, lenient(5s)));
    CHECK(never([&] { return calls > 1; }, 200ms));
    CHECK(wait_until([&] { return ended.load(); }, lenient(5s)));
  }
  SUBCASE("call etcd and start a watch") {
    std::atomic<bool> done{false};
    std::mutex mutex;
    std::vector<Watch<WatchEvent>> watches;
    WatchRequest only_a;
    only_a.key = dir + "a";
    auto subscription = other.client()
                            .watch(only_a,
                                   [&](const WatchEvent&) {
                                     auto inner = other.client().watch(dir + "b").value();
                                     other.client().put(dir + "b", "from the handler").value();
                                     std::lock_guard<std::mutex> hold(mutex);
                                     watches.push_back(std::move(inner));
                                     done = true;
                                   })
                            .value();
    client.put(dir + "a", "1").value();
    REQUIRE(wait_until([&] { return done.load(); }, lenient(5s)));
    std::lock_guard<std::mutex> hold(mutex);
    CHECK(take(watches.at(0), 1) == Texts{"PUT " + dir + "b=from the handler"});
  }
  SUBCASE("throw") {
    std::atomic<int> calls{0};
    auto subscription = other.client()
                            .watch(all(),
                                   [&](const WatchEvent&) {
                                     ++calls;
                                     throw std::runtime_error("from the test");
                                   })
                            .value();
    client.put(dir, "1").value();
    client.put(dir, "2").value();
    CHECK(wait_until([&] { return calls == 2; }, lenient(5s)));
    CHECK(wait_until([&] { return log.contains("from the test"); }, lenient(1s)));
  }
}

TEST_CASE_FIXTURE(Fixture, "watch: cancel() waits for a handler that is running") {
  std::atomic<bool> inside{false}, left{false};
  auto subscription = client
                          .watch(all(),
                                 [&](const WatchEvent&) {
                                   inside = true;
                                   std::this_thread::sleep_for(200ms);
                                   left = true;
                                 })
                          .value();
  client.put(dir, "1").value();
  REQUIRE(wait_until([&] { return inside.load(); }, lenient(5s)));
  subscription.cancel();
  CHECK(left);
}

TEST_CASE("watch: nothing is lost or repeated when the stream is cut") {
  TcpProxy proxy(shared_etcd().port());
  auto options = options_for(shared_etcd());
  options.endpoints = {proxy.endpoint()};
  auto watcher = connect(options);
  auto writer = connect(shared_etcd());
  const std::string key = unique_prefix();
  auto watch = watcher.client().watch(key).value();
  Texts expected;
  for (int i = 0; i < 200; ++i) {
    const auto put = writer.client().put(key, std::to_string(i));
    REQUIRE_MESSAGE(put, why(put));
    expected.push_back("PUT " + key + "=" + std::to_string(i));
    if (i % 20 == 7) proxy.cut();
    if (i % 20 == 17) proxy.cut_after(static_cast<std::size_t>(i));  // within some line
  }
  CHECK(take(watch, expected.size()) == expected);
}

TEST_CASE("watch: it goes on when etcd was killed and comes back") {
  EtcdServer server;
  auto coordinator = connect(server);
  const std::string key = unique_prefix();
  auto watch = coordinator.client().watch(key).value();
  for (int round = 0; round < 2; ++round) {
    const std::string value = std::to_string(round);
    REQUIRE(Etcdctl(server).put(key, "before " + value));
    server.kill9();
    server.restart();
    REQUIRE(Etcdctl(server).put(key, "after " + value));
    CHECK(take(watch, 2) ==
          Texts{"PUT " + key + "=before " + value, "PUT " + key + "=after " + value});
  }
}

TEST_CASE_FIXTURE(Fixture, "watch: a handle that outlives its Coordinator") {
  auto other = std::make_unique<Coordinator>(connect(shared_etcd()));
  auto watch = other->client().watch(all()).value();
  std::atomic<bool> woken_by_error{false};
  std::thread reader([&] { woken_by_error = !watch.next(); });
  std::this_thread::sleep_for(50ms);
  const Stopwatch closing;
  other.reset();
  reader.join();
  CHECK(woken_by_error);
  CHECK(closing.over(lenient(1s)) == 0);
  const auto ended = watch.next();
  REQUIRE_FALSE(ended);
  CHECK(ended.error().code == ErrorCode::Cancelled);
}
