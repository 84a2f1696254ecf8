// Locks under harm: a model of the queue, random interleavings, lost and late messages, a frozen
// etcd. Whatever happens, nobody holds what is not his, and nothing is left behind.
#include <doctest/doctest.h>

#include <set>
#include <thread>

#include "support/lock_support.hpp"

using namespace coordination;
using namespace support;

namespace {

constexpr milliseconds kTtl = 20s;  // of locks that are not to expire during a test

}  // namespace

TEST_CASE("lock: 200 random interleavings agree with a model of the queue [slow]") {
  const unsigned seed = test_seed();
  MESSAGE("COORDINATION_TEST_SEED=" << seed);
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  CHECK(run_queue_models(QueueModel::Rule{}, scaled(200), 10, seed) == "");
  CHECK(onlooker.wait_leases(0, 1s));  // none after close, at once
}

namespace {

// Who was inside when: each mark is made between two questions to held().
class Diary {
 public:
  void enter(std::int64_t token) { note(token, true); }
  void leave(std::int64_t token) { note(token, false); }
  /// To be called after leave(): held() was still true then.
  void was_held(std::int64_t token) {
    std::lock_guard<std::mutex> hold(mutex_);
    held_.insert(token);
  }
  /// Two who were certainly inside at the same time, or ones who came in the wrong order.
  std::string collision() const {
    std::int64_t inside = 0, last = 0;
    for (const auto& [token, entered] : marks_) {
      if (held_.count(token) == 0) continue;
      if (entered && inside != 0) return pair("both inside: ", inside, token);
      if (entered && token < last) return pair("out of order: ", last, token);
      inside = entered ? token : 0;
      last = token;
    }
    return "";
  }
  std::size_t entries() const { return held_.size(); }

 private:
  static std::string pair(const char* what, std::int64_t a, std::int64_t b) {
    return what + std::to_string(a) + " and " + std::to_string(b);
  }
  void note(std::int64_t token, bool entered) {
    std::lock_guard<std::mutex> hold(mutex_);
    marks_.emplace_back(token, entered);
  }
  std::mutex mutex_;
  std::vector<std::pair<std::int64_t, bool>> marks_;
  std::set<std::int64_t> held_;
};

// Kills keys and leases of a lock, and remembers which.
class Assassin {
 public:
  Assassin(std::string path, unsigned seed)
      : path_(std::move(path)), random_(seed), thread_([this] { work(); }) {}
  ~Assassin() { end(); }
  void end() {
    stop_ = true;
    if (thread_.joinable()) thread_.join();
  }
  /// This lock, or an earlier one with the same lease: the blow may have come after that was kept.
  bool has_hit(const Lock& lock) {
    std::lock_guard<std::mutex> hold(mutex_);
    return hit_.count(lock.fencing_token()) > 0 || hit_keys_.count(lock.key()) > 0;
  }
  std::size_t hits() {
    std::lock_guard<std::mutex> hold(mutex_);
    return hit_.size();
  }

 private:
  void work() {
    while (!stop_) {
      std::this_thread::sleep_for(milliseconds(5 + random_() % 20));
      const auto keys = onlooker_.keys(path_);
      if (keys.empty()) continue;
      const auto& victim = keys[random_() % keys.size()];
      {
        std::lock_guard<std::mutex> hold(mutex_);
        hit_.insert(victim.create_revision);
        hit_keys_.insert(victim.key);
      }
      if (random_() % 2 == 0) {
        onlooker_.gateway.revoke(victim.lease);
      } else {
        onlooker_.client().remove(victim.key).value();
      }
    }
  }
  Onlooker onlooker_{lease_etcd()};
  std::string path_;
  std::mt19937 random_;
  std::mutex mutex_;
  std::set<std::int64_t> hit_;
  std::set<std::string> hit_keys_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

struct Chaos {
  std::string prefix, path;
  Diary diary;
  std::unique_ptr<Assassin> assassin;
  std::atomic<int> got{0}, refused{0}, ghosts{0}, wrong_errors{0};
};

// An attempt of a random kind: with a deadline, with a cancel from aside, or a try.
Result<Lock> attempt(Coordinator& client, std::mt19937& random) {
  const auto some = milliseconds(random() % 30);
  switch (random() % 4) {
    case 0: return client.lock().acquire("c", kTtl, Context::with_timeout(some));
    case 1: return client.lock().try_acquire("c", kTtl);
    case 2: {
      Context ctx;
      std::thread canceller([&] {
        std::this_thread::sleep_for(some);
        ctx.cancel();
      });
      auto lock = client.lock().acquire("c", kTtl, ctx);
      canceller.join();
      return lock;
    }
    default: return client.lock().acquire("c", kTtl, Context::with_timeout(lenient(20s)));
  }
}

void chaos_worker(Coordinator& client, Chaos& chaos, unsigned seed, int rounds) {
  Onlooker onlooker(lease_etcd());
  std::mt19937 random(seed);
  for (int i = 0; i < rounds; ++i) {
    auto lock = attempt(client, random);
    if (!lock) {
      const auto code = lock.error().code;
      const bool known =
          code == ErrorCode::Timeout || code == ErrorCode::Cancelled || code == ErrorCode::Conflict;
      ++(known ? chaos.refused : chaos.wrong_errors);
      if (!known) std::printf("%s\n", why(lock).c_str());
      continue;
    }
    ++chaos.got;
    const auto token = lock->fencing_token();
    chaos.diary.enter(token);
    if (!onlooker.has(lock->key(), token) && !chaos.assassin->has_hit(*lock)) ++chaos.ghosts;
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 2000));
    chaos.diary.leave(token);
    if (lock->held()) {
      // held() is told of a deleted key by a watch: only a key that still stands is proof.
      if (onlooker.has(lock->key(), token)) chaos.diary.was_held(token);
    }
    if (random() % 2 == 0) static_cast<void>(lock->unlock());
  }
}

}  // namespace

TEST_CASE("lock: many threads, random endings, keys and leases killed from outside [slow]") {
  const unsigned seed = test_seed();
  MESSAGE("COORDINATION_TEST_SEED=" << seed);
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  auto options = options_for(lease_etcd());
  Chaos chaos;
  chaos.prefix = options.key_prefix;
  chaos.path = options.key_prefix + "/locks/c/";
  chaos.assassin = std::make_unique<Assassin>(chaos.path, seed);
  std::vector<Coordinator> clients;
  for (int i = 0; i < 3; ++i) clients.push_back(connect(options));
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 6; ++i) {
    threads.emplace_back([&, i] { chaos_worker(clients[i % 3], chaos, seed + i, scaled(120)); });
  }
  for (auto& thread : threads) thread.join();
  chaos.assassin->end();
  MESSAGE("got " << chaos.got.load() << ", refused " << chaos.refused.load() << ", killed "
                 << chaos.assassin->hits() << ", certainly held " << chaos.diary.entries());
  CHECK(chaos.diary.collision() == "");
  CHECK(chaos.ghosts == 0);
  CHECK(chaos.wrong_errors == 0);
  CHECK(chaos.got > 0);
  CHECK(onlooker.wait_count(chaos.path, 0));
  // What is left are kept leases: never more than there were at the same time.
  CHECK(wait_until([&] { return onlooker.gateway.leases().size() <= 6; }, lenient(5s)));
  for (auto& client : clients) client.close().value();
  CHECK(onlooker.wait_leases(0, 1s));
}

TEST_CASE("lock: a waiter whose lease is revoked from outside never returns what it has not") {
  Onlooker onlooker(lease_etcd());
  auto options = options_for(lease_etcd());
  auto a = connect(options), b = connect(options);
  const std::string path = options.key_prefix + "/locks/k/";
  std::mt19937 random(7);
  int requeued = 0;
  for (int round = 0; round < scaled(24); ++round) {
    auto held = a.lock().acquire("k", kTtl).value();
    auto waiting = std::async(std::launch::async, [&] { return b.lock().acquire("k", kTtl); });
    REQUIRE(onlooker.wait_count(path, 2));
    const auto before = onlooker.keys(path)[1];
    auto unlocked = std::async(std::launch::async, [&] { return held.unlock(); });
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 1500));
    REQUIRE(onlooker.gateway.revoke(lease_of_key(before.key)));
    REQUIRE(unlocked.get());
    auto got = waiting.get();
    REQUIRE(got);
    // Either it was ours before the revocation, and then held() turns false; or it is a new place.
    if (got->fencing_token() == before.create_revision) {
      CHECK(wait_until([&] { return !got->held(); }, lenient(5s)));
    } else {
      ++requeued;
      CHECK(onlooker.has(got->key(), got->fencing_token()));
      CHECK(got->held());
      REQUIRE(got->unlock());
    }
  }
  MESSAGE(requeued << " of the waiters had to queue anew");
  CHECK(requeued > 0);
}

TEST_CASE("lock: uncontended lock and unlock are two requests") {
  auto counter = std::make_shared<CountingTransport>();
  auto options = options_for(lease_etcd());
  options.transport = counter;
  auto c = connect(options);
  c.lock().acquire("k", 60s).value().unlock().value();
  // A lock that is held for longer has a watch of its own.
  const auto but_for_watches = [&] { return counter->requests_but("/v3/watch"); };
  for (const bool try_only : {false, true}) {
    counter->reset();
    for (int i = 0; i < 100; ++i) {
      auto lock = try_only ? c.lock().try_acquire("k", 60s) : c.lock().acquire("k", 60s);
      REQUIRE(lock);
      REQUIRE(lock->unlock());
    }
    CHECK(counter->requests("/v3/kv/txn") == 200);
    CHECK(but_for_watches() == 200);
  }
  counter->reset();
  for (int i = 0; i < 100; ++i) {  // the destructor does the same
    const auto lock = c.lock().acquire("k" + std::to_string(i % 3), 60s);
    REQUIRE(lock);
  }
  CHECK(but_for_watches() == 200);
}

// --- What is left behind --------------------------------------------------------------------

TEST_CASE("lock: a failed acquire leaves neither key nor lease, at once") {
  Onlooker onlooker(lease_etcd());
  auto options = options_for(lease_etcd());
  auto holder = connect(options);
  const std::string path = options.key_prefix + "/locks/k/";
  REQUIRE(onlooker.wait_leases(0, 30s));
  auto held = holder.lock().acquire("k", kTtl).value();
  auto c = connect(options);
  const auto check_clean = [&] {
    CHECK(onlooker.wait_count(path, 1, 1s));
    CHECK(onlooker.wait_leases(1, 1s));
  };
  SUBCASE("its deadline passes") {
    const Stopwatch watch;
    const auto lock = c.lock().acquire("k", kTtl, Context::with_timeout(50ms));
    REQUIRE_FALSE(lock);
    CHECK(lock.error().code == ErrorCode::Timeout);
    CHECK(lock.error().outcome == Outcome::NotApplied);
    CHECK(watch.over(lenient(150ms)) == 0);
    check_clean();
  }
  SUBCASE("it is cancelled") {
    Context ctx;
    auto lock = std::async(std::launch::async, [&] { return c.lock().acquire("k", kTtl, ctx); });
    REQUIRE(onlooker.wait_count(path, 2));
    const Stopwatch watch;
    ctx.cancel();
    const auto result = lock.get();
    CHECK(watch.over(lenient(150ms)) == 0);
    REQUIRE_FALSE(result);
    CHECK(result.error().code == ErrorCode::Cancelled);
    CHECK(result.error().outcome == Outcome::NotApplied);
    check_clean();
  }
  SUBCASE("it is cancelled before it begins") {
    Context ctx;
    ctx.cancel();
    const auto lock = c.lock().acquire("k", kTtl, ctx);
    REQUIRE_FALSE(lock);
    CHECK(lock.error().code == ErrorCode::Cancelled);
    check_clean();
  }
  SUBCASE("its Coordinator is closed") {
    auto lock = std::async(std::launch::async, [&] { return c.lock().acquire("k", kTtl); });
    REQUIRE(onlooker.wait_count(path, 2));
    c.close().value();
    const auto result = lock.get();
    REQUIRE_FALSE(result);
    CHECK(result.error().code == ErrorCode::Cancelled);
    check_clean();
  }
  SUBCASE("it was only a try; the lease is kept, and goes with close") {
    const auto lock = c.lock().try_acquire("k", kTtl);
    REQUIRE_FALSE(lock);
    CHECK(lock.error().code == ErrorCode::Conflict);
    CHECK(onlooker.count(path) == 1);
    CHECK(onlooker.gateway.leases().size() <= 2);
    c.close().value();
    check_clean();
  }
  CHECK(held.held());
  held.unlock().value();
  holder.close().value();
  CHECK(onlooker.wait_leases(0, 1s));
}

TEST_CASE("lock: close while many acquire leaves no lease") {
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  for (int round = 0; round < scaled(20); ++round) {
    auto options = options_for(lease_etcd());
    auto c = connect(options);
    std::atomic<bool> stop{false};
    std::atomic<int> got{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&, i] {
        while (!stop) {  // a TTL of its own for each round: no lease is used twice
          const auto ttl = 20s + std::chrono::seconds(got % 5);
          const auto lock = c.lock().acquire("k" + std::to_string(i % 2), ttl);
          if (lock) ++got;
          if (!lock) return;
        }
      });
    }
    wait_until([&] { return got > 5 + round; }, lenient(5s));
    c.close().value();
    stop = true;
    for (auto& thread : threads) thread.join();
    const bool clean = onlooker.wait_leases(0, 2s);
    CHECK_MESSAGE(clean, "round " << round << ": " << onlooker.gateway.leases().size() << " left");
    for (const auto lease : onlooker.gateway.leases()) onlooker.gateway.revoke(lease);
    CHECK(onlooker.count(options.key_prefix) == 0);
    if (!clean) break;
  }
}

TEST_CASE("lock: an etcd that answers late finds nobody waiting [slow]") {
  EtcdServer etcd;
  Onlooker onlooker(etcd);
  auto options = options_for(etcd);
  auto c = connect(options);
  const std::string path = options.key_prefix + "/locks/";
  // One kept lease, so that some of the attempts stop at the txn and others at the grant.
  c.lock().acquire("warm", kTtl).value().unlock().value();
  auto held = onlooker.coordinator.lock();
  etcd.stop_signal();
  const Stopwatch watch;
  std::vector<std::future<Result<Lock>>> attempts;
  for (int i = 0; i < 6; ++i) {
    attempts.push_back(std::async(std::launch::async, [&, i] {
      const auto ctx = Context::with_timeout(lenient(300ms));
      const auto key = "k" + std::to_string(i % 3);
      return i % 2 == 0 ? c.lock().acquire(key, kTtl, ctx) : c.lock().try_acquire(key, kTtl, ctx);
    }));
  }
  for (auto& attempt : attempts) {
    const auto lock = attempt.get();
    REQUIRE_FALSE(lock);
    CHECK(lock.error().code == ErrorCode::Timeout);
    CHECK(lock.error().outcome == Outcome::NotApplied);
  }
  CHECK(watch.over(lenient(500ms)) == 0);
  SUBCASE("for a moment") {}
  SUBCASE("for longer than a revocation is tried") { std::this_thread::sleep_for(3500ms); }
  etcd.continue_signal();
  CHECK(onlooker.wait_count(path, 0, 4s));
  CHECK(onlooker.wait_leases(0, 6s));
  // And it stays so: what was sent then has arrived by the time a new request is answered.
  c.lock().acquire("k0", kTtl).value().unlock().value();
  CHECK(onlooker.count(path) == 0);
  c.close().value();
  CHECK(onlooker.wait_leases(0, 1s));
}

TEST_CASE("lock: a short lock whose etcd froze when it was asked for leaves nothing [slow]") {
  EtcdServer etcd;
  Onlooker onlooker(etcd);
  auto options = options_for(etcd);
  auto c = connect(options);
  etcd.stop_signal();
  REQUIRE_FALSE(c.lock().acquire("k", 2s, Context::with_timeout(lenient(300ms))));
  std::this_thread::sleep_for(4500ms);  // longer than the lease would have lived
  etcd.continue_signal();
  CHECK(onlooker.wait_leases(0, 1500ms));  // sooner than by its TTL
  CHECK(onlooker.wait_count(options.key_prefix, 0, 1s));
}

// --- Lost and late messages -----------------------------------------------------------------

namespace {

// Does `work` with the answers to requests n .. n + lost - 1 dropped, for n = 1, 2, ... until it
// is done with fewer requests than n.
void for_each_request(NthTransport& transport, int lost, const std::function<void(int)>& work) {
  for (int n = 1; n < 30; ++n) {
    const int before = transport.faults();
    transport.arm(n, lost);
    work(n);
    transport.disarm();
    if (transport.faults() == before) {
      CHECK(n > 1);
      return;
    }
  }
  FAIL("it never ends");
}

}  // namespace

TEST_CASE("lock: whichever answer is lost, acquire, renew and unlock tell the truth") {
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  auto transport = std::make_shared<NthTransport>();
  auto options = options_for(lease_etcd());
  options.transport = transport;
  options.retry_config.initial_delay = 5ms;
  const std::string path = options.key_prefix + "/locks/k/";
  int lost = 1;
  SUBCASE("one answer") { lost = 1; }
  SUBCASE("two answers in a row") { lost = 2; }
  SUBCASE("more than are tried") { lost = 4; }
  int successes = 0, failures = 0;
  for_each_request(*transport, lost, [&](int n) {
    CAPTURE(n);
    transport->disarm();
    auto c = connect(options);
    transport->arm(n, lost);
    auto lock = c.lock().acquire("k", kTtl, Context::with_timeout(lenient(10s)));
    ++(lock ? successes : failures);
    if (lock) {
      CHECK(onlooker.has(lock->key(), lock->fencing_token()));
      CHECK(lock->held());
      const auto renewed = lock->renew(kTtl);
      if (lost <= 2) CHECK_MESSAGE(renewed, why(renewed));
      const auto moved = lock->renew(30s);
      if (lost <= 2) CHECK_MESSAGE(moved, why(moved));
      CHECK(lock->held());
      CHECK(onlooker.has(lock->key(), lock->fencing_token()));
      const auto left = lock->ttl();
      if (moved && left) CHECK(*left > 20s);
      const auto unlocked = lock->unlock();
      if (unlocked) CHECK(onlooker.count(path) == 0);
      const bool sure = unlocked || unlocked.error().outcome == Outcome::MaybeApplied;
      if (lost <= 2) CHECK_MESSAGE(sure, why(unlocked));
      if (!unlocked) CHECK(unlocked.error().code != ErrorCode::Lost);
    } else {
      CHECK(lock.error().outcome == Outcome::NotApplied);
      if (lost <= 2) FAIL_CHECK(why(lock));
    }
    transport->disarm();
    CHECK(onlooker.wait_count(path, 0, 3s));
    c.close().value();
    CHECK(onlooker.wait_leases(0, 1s));
  });
  MESSAGE(successes << " acquired, " << failures << " failed");
}

TEST_CASE("lock: whichever answer is lost, try_acquire tells the truth") {
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  auto transport = std::make_shared<NthTransport>();
  auto options = options_for(lease_etcd());
  options.transport = transport;
  options.retry_config.initial_delay = 5ms;
  const std::string path = options.key_prefix + "/locks/k/";
  bool held_by_other = false;
  SUBCASE("free") { held_by_other = false; }
  SUBCASE("held by somebody else") { held_by_other = true; }
  auto other_options = options;
  other_options.transport = nullptr;
  auto other = connect(other_options);
  std::optional<Lock> others;
  if (held_by_other) others = other.lock().acquire("k", kTtl).value();
  const std::size_t base = held_by_other ? 1 : 0;
  for_each_request(*transport, 1, [&](int n) {
    CAPTURE(n);
    transport->disarm();
    auto c = connect(options);
    transport->arm(n, 1);
    auto lock = c.lock().try_acquire("k", kTtl);
    CHECK(lock.has_value() == !held_by_other);
    if (!lock) CHECK(lock.error().code == ErrorCode::Conflict);
    if (lock) {
      const auto unlocked = lock->unlock();
      const bool maybe = !unlocked && unlocked.error().outcome == Outcome::MaybeApplied;
      CHECK_MESSAGE((unlocked || maybe), why(unlocked));
    }
    transport->disarm();
    CHECK(onlooker.wait_count(path, base, 3s));
    c.close().value();
    CHECK(onlooker.wait_leases(base, 1s));
  });
}

TEST_CASE("lock: a request that arrives after its repetition leaves no ghost in the queue") {
  Onlooker onlooker(lease_etcd());
  auto late = std::make_shared<LateTransport>();
  auto options = options_for(lease_etcd());
  options.transport = late;
  options.retry_config.initial_delay = 1ms;
  auto c = connect(options);
  const std::string path = options.key_prefix + "/locks/k/";
  c.lock().acquire("warm", kTtl).value().unlock().value();  // a lease is kept from now on
  late->keep_back("/v3/kv/txn");
  SUBCASE("of acquire") {
    c.lock().acquire("k", kTtl).value().unlock().value();
    REQUIRE(late->kept() == 1);
    late->deliver();
  }
  SUBCASE("of try_acquire, which was refused") {
    auto other_options = options;
    other_options.transport = nullptr;
    auto other = connect(other_options);
    auto held = other.lock().acquire("k", kTtl).value();
    REQUIRE_FALSE(c.lock().try_acquire("k", kTtl));
    REQUIRE(late->kept() == 1);
    held.unlock().value();
    late->deliver();
  }
  SUBCASE("of try_acquire, which was successful") {
    c.lock().try_acquire("k", kTtl).value().unlock().value();
    REQUIRE(late->kept() == 1);
    late->deliver();
  }
  CHECK(onlooker.wait_count(path, 0, 2s));
  // The lock is free for everybody.
  auto second = connect(options);
  auto lock = second.lock().acquire("k", kTtl, Context::with_timeout(lenient(2s)));
  CHECK_MESSAGE(lock, why(lock));
}

// --- Leases that are kept -------------------------------------------------------------------

TEST_CASE("lock: kept leases that have died delay nobody") {
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  auto c = connect(lease_etcd());
  {
    std::vector<Lock> locks;
    for (int i = 0; i < 20; ++i) {
      locks.push_back(c.lock().acquire("k" + std::to_string(i), kTtl).value());
    }
  }
  // Some are given up meanwhile: these cannot be revoked.
  for (const auto lease : onlooker.gateway.leases()) onlooker.gateway.revoke(lease);
  const Stopwatch watch;
  auto lock = c.lock().acquire("k", kTtl);
  REQUIRE(lock);
  CHECK(onlooker.has(lock->key(), lock->fencing_token()));
  CHECK(watch.over(lenient(500ms)) == 0);
  REQUIRE(lock->unlock());
  // The same for a try: a dead lease is no conflict and no loss.
  for (const auto lease : onlooker.gateway.leases()) onlooker.gateway.revoke(lease);
  const auto tried = c.lock().try_acquire("k", kTtl);
  CHECK_MESSAGE(tried, why(tried));
}

// --- Renewing -------------------------------------------------------------------------------

TEST_CASE("lock: renew with another TTL keeps key, token and place") {
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  auto options = options_for(lease_etcd());
  auto a = connect(options), b = connect(options);
  const std::string path = options.key_prefix + "/locks/k/";
  auto lock = a.lock().acquire("k", 20s).value();
  LossCount loss;
  lock.on_lost(loss.handler());
  const auto key = lock.key();
  const auto token = lock.fencing_token();
  const auto old_lease = onlooker.keys(path)[0].lease;
  auto waiting = std::async(std::launch::async, [&] { return b.lock().acquire("k", kTtl); });
  REQUIRE(onlooker.wait_count(path, 2));

  REQUIRE(lock.renew(60s));
  CHECK(lock.key() == key);
  CHECK(lock.fencing_token() == token);
  CHECK(lock.held());
  CHECK(lock.ttl().value() > 50s);
  const auto keys = onlooker.keys(path);
  REQUIRE(keys.size() == 2);
  CHECK(keys[0].key == key);
  CHECK(keys[0].create_revision == token);
  CHECK(keys[0].lease != old_lease);
  CHECK(waiting.wait_for(0s) == std::future_status::timeout);
  CHECK(wait_until([&] { return !onlooker.gateway.has_lease(old_lease); }, lenient(3s)));
  CHECK(onlooker.has(key, token));

  REQUIRE(lock.put(options.key_prefix + "/x", "1"));  // the guard still holds
  REQUIRE(lock.renew(8s));                            // and back to a short one
  CHECK(lock.ttl().value() <= 8s);
  CHECK(loss.told() == 0);
  // The new lease is the one that counts: without it the lock is lost.
  REQUIRE(onlooker.gateway.revoke(onlooker.keys(path)[0].lease));
  CHECK(loss.wait(1));
  CHECK_FALSE(lock.held());
  REQUIRE(waiting.get());
  CHECK(lock.renew(2s).error().code == ErrorCode::Lost);
  CHECK(lock.unlock().error().code == ErrorCode::Lost);
  CHECK(loss.told() == 1);
}

TEST_CASE("lock: renewed from several threads at once it stays held") {
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  auto c = connect(lease_etcd());
  auto lock = c.lock().acquire("k", 30s).value();
  LossCount loss;
  lock.on_lost(loss.handler());
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < scaled(25); ++i) {
        if (!lock.renew(std::chrono::seconds(20 + (t * 7 + i) % 11))) ++failures;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(failures == 0);
  CHECK(onlooker.wait_leases(1));  // the others have been given up
  CHECK(lock.held());
  CHECK(onlooker.has(lock.key(), lock.fencing_token()));
  CHECK(lock.ttl());
  CHECK(loss.told() == 0);
  CHECK(lock.unlock());
}

TEST_CASE("lock: a lock and one below its name do not disturb each other") {
  Onlooker onlooker(lease_etcd());
  auto options = options_for(lease_etcd());
  auto a = connect(options), b = connect(options);
  auto child = a.lock().acquire("jobs/nightly", kTtl).value();
  auto parent = b.lock().acquire("jobs", kTtl, Context::with_timeout(lenient(2s)));
  CHECK_MESSAGE(parent, why(parent));
  if (parent) CHECK(parent->unlock());
  const auto tried = b.lock().try_acquire("jobs", kTtl);
  CHECK_MESSAGE(tried, why(tried));
}

TEST_CASE("lock: close right after many unlocks leaves no lease") {
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  auto c = connect(lease_etcd());
  std::vector<Lock> locks;
  for (int i = 0; i < 300; ++i) {
    locks.push_back(c.lock().acquire("k" + std::to_string(i), kTtl).value());
  }
  for (auto& lock : locks) lock.unlock().value();
  const Stopwatch watch;
  c.close().value();
  CHECK(watch.over(lenient(1s)) == 0);
  CHECK(onlooker.wait_leases(0, 1s));
  for (const auto lease : onlooker.gateway.leases()) onlooker.gateway.revoke(lease);
}
