// The contract of handlers, and the ends of watches: in time, and nothing runs afterwards.
#include <doctest/doctest.h>

#include <thread>

#include "support/live.hpp"
#include "support/watch_support.hpp"

using namespace coordination;
using namespace support;

namespace {

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

/// Puts to one key as fast as it can.
class Hammer {
 public:
  explicit Hammer(const std::string& key)
      : coordinator_(connect(shared_etcd())), thread_([this, key] {
          for (int i = 0; !stopping_; ++i) {
            static_cast<void>(coordinator_.client().put(key, std::to_string(i)));
          }
        }) {}
  ~Hammer() {
    stopping_ = true;
    thread_.join();
  }

 private:
  Coordinator coordinator_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

/// By how many milliseconds the action takes longer than a second.
template <class Action>
long over_a_second(Action action) {
  const Stopwatch watch;
  action();
  return watch.over(lenient(1s));
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "handlers: one at a time, in order, each event once") {
  std::atomic<int> inside{0}, overlaps{0};
  Changes seen;
  auto subscription = client
                          .watch(all(),
                                 [&](const WatchEvent& event) {
                                   if (++inside > 1) ++overlaps;
                                   seen.add(change_of(event));
                                   std::this_thread::sleep_for(1ms);
                                   --inside;
                                 })
                          .value();
  std::vector<Change> truth;
  for (int i = 0; i < 100; ++i) {
    const auto value = std::to_string(i);
    truth.push_back({true, dir + "k", value, client.put(dir + "k", value).value().revision});
  }
  CHECK(seen.reaches(100, 5s));
  CHECK(overlaps == 0);
  CHECK(first_difference(seen.all(), truth) == "none");
}

TEST_CASE_FIXTURE(Fixture, "handlers: what they throw is logged, and the next event comes") {
  LogKeeper log;
  auto options = options_for(shared_etcd());
  options.logger = log.logger();
  auto logging = connect(options);
  Journal<std::string> seen;
  auto subscription = logging.client()
                          .watch(all(),
                                 [&](const WatchEvent& event) {
                                   seen.add(event.kv.value);
                                   if (event.kv.value == "1")
                                     throw std::runtime_error("thrown one");
                                   if (event.kv.value == "2") throw 2;
                                 })
                          .value();
  for (const char* value : {"1", "2", "3"}) client.put(dir + "k", value).value();
  CHECK(seen.reaches(3, 5s));
  CHECK(seen.all() == std::vector<std::string>{"1", "2", "3"});
  CHECK(wait_until([&] { return log.contains("thrown one"); }, lenient(2s)));
  CHECK(wait_until([&] { return log.contains("ERROR"); }, lenient(2s)));
}

TEST_CASE_FIXTURE(Fixture, "handlers: may cancel and destroy their own watch") {
  const Hammer hammer(dir + "k");
  for (int round = 0; round < 20; ++round) {
    std::optional<Subscription> subscription;
    std::atomic<bool> made{false};
    std::atomic<int> calls{0};
    std::atomic<long> took{-1};
    const auto end_it = [&] {
      if (round % 2 == 0) {
        subscription->cancel();
      } else {
        subscription.reset();
      }
    };
    const auto handler = [&](const WatchEvent&) {
      wait_until([&] { return made.load(); }, lenient(5s));
      ++calls;
      took = over_a_second(end_it);
    };
    subscription = client.watch(all(), handler).value();
    made = true;
    REQUIRE(wait_until([&] { return took >= 0; }, lenient(5s)));
    CHECK(took == 0);
    std::this_thread::sleep_for(5ms);
    CHECK(calls == 1);
  }
}

TEST_CASE_FIXTURE(Fixture, "handlers: may make calls and watches, and close the coordinator") {
  std::atomic<bool> made{false}, closed{false};
  Journal<std::string> seen;
  std::optional<Subscription> inner;
  auto outer =
      client
          .watch(all(),
                 [&](const WatchEvent& event) {
                   if (event.kv.value == "close") {
                     coordinator.close().value();
                     closed = true;
                   }
                   if (event.kv.value != "first") return;
                   seen.add(client.get(event.kv.key).value().value);
                   WatchRequest request;
                   request.key = dir + "inner";
                   inner = client.watch(request, [&](const WatchEvent& e) { seen.add(e.kv.value); })
                               .value();
                   made = true;
                 })
          .value();
  client.put(dir + "k", "first").value();
  REQUIRE(wait_until([&] { return made.load(); }, lenient(5s)));
  client.put(dir + "inner", "second").value();
  CHECK(seen.reaches(2, 5s));
  CHECK(seen.all() == std::vector<std::string>{"first", "second"});
  auto other = connect(shared_etcd());
  other.client().put(dir + "k", "close").value();
  CHECK(wait_until([&] { return closed.load(); }, lenient(3s)));
}

TEST_CASE_FIXTURE(Fixture, "watch: destroyed during delivery, at once, and nothing runs after it") {
  const Hammer hammer(dir + "k");
  std::atomic<int> late{0};
  long longest = 0;
  for (int round = 0; round < 40; ++round) {
    std::atomic<bool> alive{true};
    std::atomic<int> calls{0};
    std::optional<Subscription> subscription{client
                                                 .watch(all(),
                                                        [&](const WatchEvent&) {
                                                          if (!alive) ++late;
                                                          ++calls;
                                                        })
                                                 .value()};
    auto watch = std::make_unique<Watch<WatchEvent>>(client.watch(all()).value());
    REQUIRE(watch->next(Context::with_timeout(lenient(5s))));
    REQUIRE(wait_until([&] { return calls > 0; }, lenient(5s)));
    longest = std::max(longest, over_a_second([&] {
                         subscription.reset();
                         alive = false;
                         watch.reset();
                       }));
  }
  CHECK(late == 0);
  CHECK(longest == 0);
}

TEST_CASE_FIXTURE(Fixture, "watch: cancel() waits for a handler that is running") {
  std::atomic<bool> inside{false}, done{false};
  auto subscription = client
                          .watch(all(),
                                 [&](const WatchEvent&) {
                                   inside = true;
                                   std::this_thread::sleep_for(200ms);
                                   done = true;
                                 })
                          .value();
  client.put(dir + "k", "v").value();
  REQUIRE(wait_until([&] { return inside.load(); }, lenient(5s)));
  subscription.cancel();
  CHECK(done);
}

TEST_CASE_FIXTURE(Fixture, "watch: cancel() wakes a reader, a Context ends only the call") {
  auto watch = client.watch(all()).value();
  const auto timed_out = watch.next(Context::with_timeout(50ms));
  REQUIRE_FALSE(timed_out);
  CHECK(timed_out.error().code == ErrorCode::Timeout);
  const Context ctx;
  ctx.cancel();
  CHECK(watch.next(ctx).error().code == ErrorCode::Cancelled);
  client.put(dir + "k", "v").value();
  const auto event = watch.next(Context::with_timeout(lenient(5s)));
  REQUIRE_MESSAGE(event, why(event));
  CHECK(event->kv.value == "v");

  std::atomic<bool> woken{false};
  std::thread reader([&] {
    for (auto& unexpected : watch) static_cast<void>(unexpected);
    woken = true;
  });
  std::this_thread::sleep_for(50ms);
  CHECK_FALSE(woken);
  watch.cancel();
  CHECK(wait_until([&] { return woken.load(); }, lenient(1s)));
  reader.join();
  CHECK(watch.next().error().code == ErrorCode::Cancelled);
}

namespace {

/// Closes a coordinator with 1,000 open watches, of which some have events and one a reader.
void close_with_many(const EtcdServer& etcd, const std::function<void()>& before_close) {
  auto coordinator = connect(etcd);
  auto& client = coordinator.client();
  const auto dir = unique_prefix() + "/";
  std::atomic<bool> closed{false};
  std::atomic<int> events{0}, late{0};
  std::vector<Subscription> subscriptions;
  std::vector<Watch<WatchEvent>> watches;
  for (int i = 0; i < 1000; ++i) {
    WatchRequest request;
    request.key = dir + std::to_string(i % 10);
    if (i % 2 == 0) {
      watches.push_back(client.watch(request).value());
      continue;
    }
    subscriptions.push_back(client
                                .watch(request,
                                       [&](const WatchEvent&) {
                                         ++events;
                                         if (closed) ++late;
                                       })
                                .value());
  }
  auto view = coordinator.config().view("").value();
  std::atomic<int> code{-1};
  std::thread reader([&] {
    for (;;) {
      const auto event = watches[0].next();
      if (event) continue;
      code = static_cast<int>(event.error().code);
      return;
    }
  });
  for (int i = 0; i < 10; ++i) client.put(dir + std::to_string(i), "v").value();
  REQUIRE(wait_until([&] { return events > 0; }, lenient(5s)));
  before_close();
  const auto took = over_a_second([&] { coordinator.close().value(); });
  closed = true;
  CHECK(took == 0);
  CHECK(wait_until([&] { return code >= 0; }, lenient(1s)));
  reader.join();
  CHECK(code == static_cast<int>(ErrorCode::Cancelled));
  CHECK_FALSE(view.connected());
  CHECK(client.watch(dir).error().code == ErrorCode::Cancelled);
  CHECK(late == 0);
  const auto freed = over_a_second([&] {
    subscriptions.clear();
    watches.clear();
  });
  CHECK(freed == 0);
}

}  // namespace

TEST_CASE("watch: close() with a thousand watches open") {
  close_with_many(shared_etcd(), [] {});
}

TEST_CASE("watch: close() with a thousand watches open, while etcd is frozen") {
  EtcdServer etcd;
  close_with_many(etcd, [&] { etcd.stop_signal(); });
  etcd.continue_signal();
}

TEST_CASE("watch: close() with a thousand watches open, while etcd is gone") {
  EtcdServer etcd;
  close_with_many(etcd, [&] { etcd.kill9(); });
}

TEST_CASE("watch: a thousand are cancelled one by one within a second") {
  auto coordinator = connect(shared_etcd());
  const auto dir = unique_prefix() + "/";
  std::vector<Watch<WatchEvent>> watches;
  for (int i = 0; i < 1000; ++i) {
    watches.push_back(coordinator.client().watch(dir + std::to_string(i)).value());
  }
  CHECK(over_a_second([&] { watches.clear(); }) == 0);
}

TEST_CASE_FIXTURE(Fixture, "watch: starts and ends in many threads at once") {
  const Hammer hammer(dir + "k");
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < scaled(60); ++i) {
        if ((i + t) % 2 == 0) {
          auto watch = client.watch(all());
          if (!watch || !watch->next(Context::with_timeout(lenient(5s)))) ++failures;
        } else {
          std::atomic<int> calls{0};
          auto subscription = client.watch(all(), [&](const WatchEvent&) { ++calls; });
          if (!wait_until([&] { return calls > 0; }, lenient(5s))) ++failures;
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(failures == 0);
}
