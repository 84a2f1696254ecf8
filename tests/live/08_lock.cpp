// Locks on a real etcd: exclusion, order, tokens, loss, renewal, and that nothing is left behind.
#include <doctest/doctest.h>

#include <algorithm>
#include <mutex>
#include <thread>

#include "support/live.hpp"
#include "support/tcp_proxy.hpp"
#include "support/transports.hpp"

using namespace coordination;
using namespace support;

namespace {

struct Fixture {
  Coordinator coordinator{connect(shared_etcd())};
  std::string prefix;
  Coordinator other;
  DistributedLock& locks{coordinator.lock()};
  DistributedLock& others{other.lock()};
  Client& client{coordinator.client()};
  Etcdctl ctl{shared_etcd()};

  Fixture() : Fixture(options_for(shared_etcd())) {}
  explicit Fixture(CoordinatorOptions options)
      : coordinator(connect(options)), prefix(options.key_prefix), other(connect(options)) {}

  std::vector<KeyValue> queue(const std::string& key) {
    RangeRequest request;
    request.key = prefix + "/locks/" + key + "/";
    request.range_end = prefix_range_end(request.key);
    request.sort_order = SortOrder::Ascend;
    request.sort_target = SortTarget::Create;
    return client.range(request).value().kvs;
  }
  bool queue_is(const std::string& key, std::size_t length) {
    return wait_until([&] { return queue(key).size() == length; }, lenient(5s));
  }
};

std::string lease_hex(const std::string& key) { return key.substr(key.rfind('/') + 1); }

struct LostCount {
  std::shared_ptr<std::atomic<int>> calls{std::make_shared<std::atomic<int>>(0)};
  auto handler() const {
    return [calls = calls](const Error& error) {
      if (error.code == ErrorCode::Lost) ++*calls;
    };
  }
  bool told_once_within(milliseconds limit) const {
    return wait_until([this] { return *calls == 1; }, limit) &&
           never([this] { return *calls > 1; }, 300ms);
  }
};

}  // namespace

TEST_CASE_FIXTURE(Fixture, "lock: taken, seen in etcd, given back") {
  auto lock = locks.acquire("jobs/nightly", 60s).value();
  CHECK(lock.held());
  const auto entries = queue("jobs/nightly");
  REQUIRE(entries.size() == 1);
  CHECK(lock.key() == entries[0].key);
  CHECK(lock.fencing_token() == entries[0].create_revision);
  CHECK(entries[0].lease != 0);
  std::ostringstream hex;
  hex << std::hex << entries[0].lease;
  CHECK(lease_hex(lock.key()) == hex.str());
  const auto left = lock.ttl().value();
  CHECK(left > 40s);
  CHECK(left <= 60s);

  CHECK(lock.unlock());
  CHECK_FALSE(lock.held());
  CHECK(queue("jobs/nightly").empty());
  const auto again = lock.unlock();
  REQUIRE_FALSE(again);
  CHECK(again.error().code == ErrorCode::Validation);
}

TEST_CASE_FIXTURE(Fixture, "lock: exclusion between Coordinators, and within one") {
  auto lock = locks.acquire("x", 10s).value();
  for (auto* contender : {&locks, &others}) {
    const auto denied = contender->try_acquire("x", 10s);
    REQUIRE_FALSE(denied);
    CHECK(denied.error().code == ErrorCode::Conflict);
    const Stopwatch watch;
    const auto late = contender->acquire("x", 10s, Context::with_timeout(200ms));
    REQUIRE_FALSE(late);
    CHECK(late.error().code == ErrorCode::Timeout);
    CHECK(watch.elapsed() >= 190ms);
    CHECK(watch.over(lenient(300ms)) == 0);
    // On a busy machine it may have been asking for its place to the end.
    CHECK_MESSAGE(queue_is("x", 1), "who gave up has left the queue");
  }
  CHECK(lock.held());
  CHECK(others.try_acquire("another", 10s));
  lock.unlock().value();
  auto next = others.acquire("x", 10s, Context::with_timeout(lenient(20s))).value();
  CHECK(next.held());
  CHECK(next.fencing_token() > lock.fencing_token());
}

TEST_CASE_FIXTURE(Fixture, "lock: first come, first served") {
  constexpr int kWaiters = 6;
  auto lock = std::make_unique<Lock>(locks.acquire("x", 10s).value());
  std::mutex mutex;
  std::vector<int> order;
  std::vector<std::int64_t> tokens{lock->fencing_token()};
  std::vector<std::thread> threads;
  for (int i = 0; i < kWaiters; ++i) {
    threads.emplace_back([&, i] {
      auto& mine = i % 2 == 0 ? locks : others;
      auto got = mine.acquire("x", 10s, Context::with_timeout(lenient(20s)));
      if (!got) return;
      std::lock_guard<std::mutex> hold(mutex);
      order.push_back(i);
      tokens.push_back(got->fencing_token());
    });
    REQUIRE(queue_is("x", static_cast<std::size_t>(i) + 2));
  }
  lock->unlock().value();
  for (auto& thread : threads) thread.join();
  CHECK(order == std::vector<int>{0, 1, 2, 3, 4, 5});
  CHECK(std::is_sorted(tokens.begin(), tokens.end()));
  CHECK(queue_is("x", 0));
}

TEST_CASE_FIXTURE(Fixture, "lock: the next waiter has it at once") {
  auto lock = locks.acquire("x", 10s).value();
  std::atomic<bool> has{false};
  std::thread waiter([&] {
    auto got = others.acquire("x", 10s, Context::with_timeout(lenient(20s)));
    has = got.has_value();
  });
  REQUIRE(queue_is("x", 2));
  std::this_thread::sleep_for(200ms);
  CHECK_FALSE(has);
  const Stopwatch watch;
  lock.unlock().value();
  waiter.join();
  CHECK(has);
  CHECK(watch.over(lenient(100ms)) == 0);
}

TEST_CASE_FIXTURE(Fixture, "lock: the destructor and a move give it back") {
  {
    const auto lock = locks.acquire("x", 10s).value();
    CHECK(queue("x").size() == 1);
  }
  CHECK(queue_is("x", 0));
  auto first = locks.acquire("x", 10s).value();
  auto second = std::move(first);
  CHECK(second.held());
  CHECK(queue("x").size() == 1);
  second = locks.acquire("y", 10s).value();
  CHECK(queue_is("x", 0));
  CHECK(queue("y").size() == 1);
}

TEST_CASE_FIXTURE(Fixture, "lock: a call that fails leaves neither key nor lease behind") {
  auto lock = locks.acquire("x", 30s).value();
  other.close().value();
  auto leases_before = ctl.leases();
  std::sort(leases_before.begin(), leases_before.end());
  {
    auto third = connect([&] {
      auto options = options_for(shared_etcd());
      options.key_prefix = prefix;
      return options;
    }());
    CHECK_FALSE(third.lock().acquire("x", 7s, Context::with_timeout(100ms)));
    const Context ctx;
    std::thread canceller([&] {
      queue_is("x", 2);
      ctx.cancel();
    });
    const auto cancelled = third.lock().acquire("x", 7s, ctx);
    canceller.join();
    REQUIRE_FALSE(cancelled);
    CHECK(cancelled.error().code == ErrorCode::Cancelled);
    CHECK_FALSE(third.lock().try_acquire("x", 7s));
    CHECK(queue_is("x", 1));
  }
  const auto none_is_new = [&] {  // older ones may have run out
    auto leases = ctl.leases();
    std::sort(leases.begin(), leases.end());
    return std::includes(leases_before.begin(), leases_before.end(), leases.begin(), leases.end());
  };
  CHECK(wait_until(none_is_new, lenient(1s)));
}

TEST_CASE_FIXTURE(Fixture, "lock: bad keys and TTLs, before anything is sent") {
  const auto counting = std::make_shared<CountingTransport>();
  auto options = options_for(shared_etcd());
  options.transport = counting;
  auto counted = connect(options);
  counting->reset();
  for (const std::string bad : {"", "/", "/x", "x/", "a//b", "..", "a/../b", ".", "a/./b"}) {
    CAPTURE(bad);
    const auto lock = counted.lock().acquire(bad, 5s);
    REQUIRE_FALSE(lock);
    CHECK(lock.error().code == ErrorCode::Validation);
    const auto tried = counted.lock().try_acquire(bad, 5s);
    REQUIRE_FALSE(tried);
    CHECK(tried.error().code == ErrorCode::Validation);
  }
  for (const milliseconds bad : {0ms, -1ms}) {
    const auto lock = counted.lock().acquire("x", bad);
    REQUIRE_FALSE(lock);
    CHECK(lock.error().code == ErrorCode::Validation);
  }
  CHECK(counting->requests() == 0);
}

TEST_CASE_FIXTURE(Fixture, "lock: it renews itself, over three TTLs [slow]") {
  CHECK(locks.acquire("short", 1s).value().ttl().value() <= 2s);
  auto lock = locks.acquire("x", 4s).value();
  LostCount lost;
  lock.on_lost(lost.handler());
  CHECK(never([&] { return !lock.held() || queue("x").empty(); }, 12500ms));
  CHECK(*lost.calls == 0);
  CHECK(lock.unlock());
}

TEST_CASE_FIXTURE(Fixture, "lock: renew with the same TTL, and with another") {
  auto lock = locks.acquire("x", 10s).value();
  const auto key = lock.key();
  const auto token = lock.fencing_token();
  CHECK(lock.renew(10s));
  CHECK(lock.key() == key);

  std::atomic<bool> overtaken{false};
  const Context waiting;
  std::thread waiter([&] {
    if (others.acquire("x", 10s, waiting)) overtaken = true;
  });
  REQUIRE(queue_is("x", 2));
  const auto renewed = lock.renew(30s);
  REQUIRE_MESSAGE(renewed, why(renewed));
  CHECK(lock.held());
  CHECK(lock.fencing_token() == token);
  CHECK(lock.ttl().value() > 25s);
  const auto entry = client.get(lock.key()).value();
  CHECK(entry.create_revision == token);
  CHECK_MESSAGE(queue("x").at(0).key == lock.key(), "it has kept its place");
  CHECK(client.commit(Txn{}.when(lock.guard())).value().succeeded);
  CHECK(never([&] { return overtaken.load(); }, 300ms));
  waiting.cancel();
  waiter.join();
  CHECK_FALSE(overtaken);
  for (const milliseconds bad : {0ms, -1ms}) {
    const auto refused = lock.renew(bad);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code == ErrorCode::Validation);
  }
  CHECK(lock.unlock());
  CHECK(queue_is("x", 0));
  CHECK_FALSE(lock.renew(10s));
}

TEST_CASE_FIXTURE(Fixture, "lock: a renewal with another TTL holds from then on") {
  auto lock = locks.acquire("x", 30s).value();
  lock.renew(6s).value();
  CHECK(lock.ttl().value() <= 6s);
  CHECK(never([&] { return !lock.held() || queue("x").empty(); }, 7s));
  CHECK(lock.unlock());
}

TEST_CASE_FIXTURE(Fixture, "lock: lost when its key is deleted") {
  auto lock = locks.acquire("x", 3s).value();
  LostCount lost;
  lock.on_lost(lost.handler());
  REQUIRE(ctl.run({"del", lock.key()}).ok());
  CHECK(lost.told_once_within(lenient(3s)));
  CHECK_FALSE(lock.held());
  const auto unlocked = lock.unlock();
  REQUIRE_FALSE(unlocked);
  CHECK(unlocked.error().code == ErrorCode::Lost);
}

TEST_CASE_FIXTURE(Fixture, "lock: lost when its lease is revoked; the next waiter has it") {
  auto lock = locks.acquire("x", 3s).value();
  const auto token = lock.fencing_token();
  LostCount lost;
  lock.on_lost(lost.handler());
  std::atomic<std::int64_t> next{0};
  std::thread waiter([&] {
    auto got = others.acquire("x", 3s, Context::with_timeout(lenient(10s)));
    if (got) next = got->fencing_token();
  });
  REQUIRE(queue_is("x", 2));
  REQUIRE(ctl.run({"lease", "revoke", lease_hex(lock.key())}).ok());
  waiter.join();
  CHECK(next > token);
  CHECK(lost.told_once_within(lenient(3s)));
  CHECK_FALSE(lock.held());
  CHECK_FALSE(client.commit(Txn{}.when(lock.guard())).value().succeeded);
  for (const auto& code :
       {lock.renew(3s).error().code, lock.ttl().error().code, lock.unlock().error().code}) {
    CHECK(code == ErrorCode::Lost);
  }
}

TEST_CASE_FIXTURE(Fixture, "lock: a handler that comes after the loss is told; none after unlock") {
  auto lost_lock = locks.acquire("x", 2s).value();
  REQUIRE(ctl.run({"lease", "revoke", lease_hex(lost_lock.key())}).ok());
  REQUIRE(wait_until([&] { return !lost_lock.held(); }, lenient(3s)));
  LostCount late;
  lost_lock.on_lost(late.handler());
  CHECK(late.told_once_within(lenient(1s)));

  auto lock = locks.acquire("y", 2s).value();
  LostCount none;
  lock.on_lost(none.handler());
  lock.unlock().value();
  CHECK(never([&] { return *none.calls > 0; }, 2500ms));
}

TEST_CASE_FIXTURE(Fixture, "lock: writes that take place only while it is ours") {
  auto lock = locks.acquire("x", 10s).value();
  const std::string key = prefix + "/data";
  CHECK(lock.put(key, "1"));
  CHECK(client.get(key).value().value == "1");
  const auto committed = lock.commit(Txn{}.then(Op::put(key, "2")).then(Op::get(key)));
  REQUIRE_MESSAGE(committed, why(committed));
  CHECK(committed->succeeded);
  REQUIRE(committed->responses.size() == 2);
  CHECK(committed->range(1).kvs.at(0).value == "2");
  const auto otherwise = lock.commit(
      Txn{}.when(Compare::missing(key)).then(Op::put(key, "3")).otherwise(Op::put(key, "4")));
  REQUIRE_MESSAGE(otherwise, why(otherwise));
  CHECK_FALSE(otherwise->succeeded);
  CHECK(client.get(key).value().value == "4");
  CHECK(lock.remove(key).value().deleted == 1);

  client.put(key, "kept").value();
  REQUIRE(ctl.run({"del", lock.key()}).ok());
  for (const auto& code : {lock.put(key, "late").error().code, lock.remove(key).error().code,
                           lock.commit(Txn{}.then(Op::put(key, "late"))).error().code}) {
    CHECK(code == ErrorCode::Lost);
  }
  CHECK(client.get(key).value().value == "kept");
}

TEST_CASE_FIXTURE(Fixture, "lock: with_lock") {
  bool inside = false;
  const auto done = locks.with_lock("x", 10s, [&](Lock& lock) {
    inside = lock.held();
    CHECK_FALSE(others.try_acquire("x", 10s));
  });
  CHECK_MESSAGE(done, why(done));
  CHECK(inside);
  CHECK(queue("x").empty());
  const auto lost = locks.with_lock("x", 10s, [&](Lock& lock) {
    REQUIRE(ctl.run({"del", lock.key()}).ok());
  });
  REQUIRE_FALSE(lost);
  CHECK(lost.error().code == ErrorCode::Lost);
}

TEST_CASE("lock: alone, lock and unlock cost two round trips in a loop") {
  const auto counting = std::make_shared<CountingTransport>();
  auto options = options_for(shared_etcd());
  options.transport = counting;
  auto coordinator = connect(options);
  coordinator.lock().acquire("x", 30s).value().unlock().value();
  counting->reset();
  constexpr int kRounds = 50;
  for (int i = 0; i < kRounds; ++i) {
    coordinator.lock().acquire("x", 30s).value().unlock().value();
  }
  const int all = counting->requests();  // first: what comes meanwhile is beside
  const int beside = counting->requests("/v3/lease/keepalive") + counting->requests("/v3/watch");
  CHECK(all - beside <= 2 * kRounds);
  coordinator.close().value();
  Etcdctl ctl(shared_etcd());
  CHECK(ctl.keys(options.key_prefix).empty());
}

TEST_CASE("lock: a hundred waiters use up neither threads nor connections, and delay nobody") {
  auto options = options_for(shared_etcd());
  auto coordinator = connect(options);
  auto holder = connect(options);
  const int waiters = scaled(100);
  std::vector<Lock> held;
  for (int i = 0; i < waiters; ++i) {
    held.push_back(holder.lock().acquire("k" + std::to_string(i), 30s).value());
  }
  const int threads_before = thread_count();
  const Context ctx;
  std::atomic<int> ended{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < waiters; ++i) {
    threads.emplace_back([&, i] {
      const auto got = coordinator.lock().acquire("k" + std::to_string(i), 30s, ctx);
      if (!got && got.error().code == ErrorCode::Cancelled) ++ended;
    });
  }
  Etcdctl ctl(shared_etcd());
  CHECK(wait_until(
      [&] { return static_cast<int>(ctl.keys(options.key_prefix).size()) == 2 * waiters; },
      lenient(10s)));
  CHECK(thread_count() <= threads_before + waiters + 20);
  const Stopwatch watch;
  coordinator.config().set("k", 1).value();
  CHECK(coordinator.config().get("k").value() == 1);
  CHECK(coordinator.lock().acquire("free", 5s));
  CHECK(watch.over(lenient(500ms)) == 0);
  const Stopwatch cancelling;
  ctx.cancel();
  for (auto& thread : threads) thread.join();
  CHECK(ended == waiters);
  CHECK(cancelling.over(lenient(2s)) == 0);
}

TEST_CASE("lock: a waiter and a holder survive a cut connection and a killed etcd") {
  EtcdServer server;
  TcpProxy proxy(server.port());
  auto options = options_for(server);
  options.endpoints = {proxy.endpoint()};
  auto holder = connect(options);
  auto waiting = connect(options);
  auto lock = holder.lock().acquire("x", 15s).value();
  std::atomic<bool> has{false};
  Result<Lock> got = Error{};
  std::thread waiter([&] {
    got = waiting.lock().acquire("x", 5s, Context::with_timeout(lenient(20s)));
    has = true;
  });
  const auto both_queued = [&] {
    return Etcdctl(server).keys(options.key_prefix + "/locks/").size() == 2;
  };
  CHECK(wait_until(both_queued, lenient(5s)));
  proxy.cut();
  server.restart();
  std::this_thread::sleep_for(1s);
  CHECK_FALSE(has);
  CHECK(lock.held());
  const auto unlocked = lock.unlock(Context::with_timeout(lenient(5s)));
  CHECK_MESSAGE(unlocked, why(unlocked));
  waiter.join();
  REQUIRE_MESSAGE(got, why(got));
  CHECK(got->held());
  CHECK(got->fencing_token() > lock.fencing_token());
}
