// Leases under harm: frozen and stuck members, restarts, lost answers, revocation from outside;
// and many of them at once.
#include <doctest/doctest.h>

#include "support/lock_support.hpp"
#include "support/tcp_proxy.hpp"

using namespace coordination;
using namespace support;

TEST_CASE("lease: the client chooses its id, so that a repeated grant is one lease") {
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  auto fault = std::make_shared<FaultTransport>();
  auto options = options_for(lease_etcd());
  options.transport = fault;
  options.retry_config.initial_delay = 5ms;
  auto c = connect(options);
  for (const int lost : {0, 1, 2}) {
    CAPTURE(lost);
    fault->lose_answers("/v3/lease/grant", lost);
    auto lease = c.client().grant(20s);
    REQUIRE_MESSAGE(lease, why(lease));
    CHECK(onlooker.gateway.leases() == std::vector<std::int64_t>{lease->id()});
    CHECK(lease->held());
    CHECK(lease->ttl() == 20s);
    CHECK(lease->remaining().value() > 15s);
    REQUIRE(lease->revoke());
    CHECK(onlooker.wait_leases(0, 1s));
  }
  // An outcome that cannot be known: it says so, and what there may be is taken back.
  fault->lose_answers("/v3/lease/grant", 100);
  const auto unknown = c.client().grant(20s);
  REQUIRE_FALSE(unknown);
  CHECK(unknown.error().outcome == Outcome::MaybeApplied);
  CHECK(onlooker.wait_leases(0, 3s));
}

TEST_CASE("lease: ttl, remaining, keep_alive_once") {
  auto c = connect(lease_etcd());
  auto minimum = c.client().grant(1ms).value();
  CHECK(minimum.ttl() >= 1s);
  CHECK(minimum.ttl() <= 5s);
  CHECK(minimum.ttl() >= minimum.remaining().value());
  auto odd = c.client().grant(6500ms).value();
  CHECK(odd.ttl() == 7s);  // rounded up
  auto lease = c.client().grant(30s).value();
  CHECK(wait_until([&] { return lease.remaining().value() < 29s; }, lenient(5s)));
  // etcd counts whole seconds: one may pass before it is asked.
  const auto is_whole = [&] { return lease.keep_alive_once() && lease.remaining().value() >= 29s; };
  CHECK(wait_until(is_whole, lenient(20s)));
  CHECK(c.client().grant(0s).error().code == ErrorCode::Validation);
  CHECK(c.client().grant(-1s).error().code == ErrorCode::Validation);
}

TEST_CASE("lease: revoke takes the keys with it and tells nobody of a loss") {
  Onlooker onlooker(lease_etcd());
  auto options = options_for(lease_etcd());
  auto c = connect(options);
  const auto key = options.key_prefix + "/k";
  auto lease = c.client().grant(20s).value();
  LossCount loss;
  lease.on_lost(loss.handler());
  PutRequest put{key, "1"};
  put.lease = lease.id();
  REQUIRE(c.client().put(put));
  REQUIRE(lease.revoke());
  CHECK_FALSE(lease.held());
  CHECK(onlooker.count(key) == 0);
  CHECK_FALSE(onlooker.gateway.has_lease(lease.id()));
  CHECK(lease.revoke());  // it is gone: that is what was wanted
  CHECK(lease.keep_alive_once().error().code == ErrorCode::Lost);
  CHECK(lease.remaining().error().code == ErrorCode::Lost);
  // A destructor does the same, in the background.
  std::int64_t id = 0;
  {
    const auto scoped = c.client().grant(20s).value();
    id = scoped.id();
    CHECK(onlooker.gateway.has_lease(id));
  }
  CHECK(wait_until([&] { return !onlooker.gateway.has_lease(id); }, lenient(2s)));
  c.close().value();
  CHECK(loss.told() == 0);
}

TEST_CASE("lease: detached, it lives on until its TTL") {
  Onlooker onlooker(lease_etcd());
  auto options = options_for(lease_etcd());
  auto c = connect(options);
  auto lease = c.client().grant(6s).value();
  PutRequest put{options.key_prefix + "/k", "1"};
  put.lease = lease.id();
  REQUIRE(c.client().put(put));
  const auto id = lease.detach();
  CHECK(id == put.lease);
  { const auto dying = std::move(lease); }
  c.close().value();
  CHECK(onlooker.gateway.has_lease(id));
  CHECK(onlooker.count(put.key) == 1);
  CHECK(wait_until([&] { return !onlooker.gateway.has_lease(id); }, lenient(12s)));
  CHECK(onlooker.count(put.key) == 0);
}

TEST_CASE("lease: revoked from outside, it is lost by the next renewal, and told once") {
  Onlooker onlooker(lease_etcd());
  auto c = connect(lease_etcd());
  auto lease = c.client().grant(3s).value();
  auto late = c.client().grant(3s).value();
  LossCount loss, late_loss;
  lease.on_lost(loss.handler());
  REQUIRE(onlooker.gateway.revoke(lease.id()));
  REQUIRE(onlooker.gateway.revoke(late.id()));
  const Stopwatch watch;
  CHECK(loss.wait(1, 3s));
  CHECK(watch.over(lenient(1500ms)) == 0);  // a third of the TTL, and something
  CHECK_FALSE(lease.held());
  CHECK(lease.keep_alive_once().error().code == ErrorCode::Lost);
  CHECK(wait_until([&] { return !late.held(); }, lenient(2s)));
  late.on_lost(late_loss.handler());  // it came before the handler
  CHECK(late_loss.wait(1));
  // What asks etcd hears it at once.
  auto third = c.client().grant(60s).value();
  LossCount third_loss;
  third.on_lost(third_loss.handler());
  REQUIRE(onlooker.gateway.revoke(third.id()));
  CHECK(third.keep_alive_once().error().code == ErrorCode::Lost);
  CHECK_FALSE(third.held());
  CHECK(third_loss.wait(1));
  c.close().value();
  CHECK(loss.told() == 1);
  CHECK(late_loss.told() == 1);
  CHECK(third_loss.told() == 1);
}

TEST_CASE("lease: a handler may destroy its own lease, and throw") {
  Onlooker onlooker(lease_etcd());
  auto c = connect(lease_etcd());
  auto lease = std::make_shared<std::optional<Lease>>(c.client().grant(2s).value());
  const auto id = (*lease)->id();
  LossCount count;
  (*lease)->on_lost([lease, count](const Error& error) {
    lease->reset();
    count.handler()(error);
    throw std::runtime_error("thrown by the test");
  });
  REQUIRE(onlooker.gateway.revoke(id));
  CHECK(count.wait(1));
  // The thread that ran it runs others.
  auto second = c.client().grant(2s).value();
  LossCount loss;
  second.on_lost(loss.handler());
  REQUIRE(onlooker.gateway.revoke(second.id()));
  CHECK(loss.wait(1));
}

TEST_CASE("lease: with a frozen etcd it ends TTL after the last renewal, told at once [slow]") {
  EtcdServer etcd;
  Onlooker onlooker(etcd);
  auto c = connect(etcd);
  constexpr milliseconds kTtl = 3s;
  const Stopwatch granted;
  auto lease = c.client().grant(kTtl).value();
  std::atomic<int> told{0};
  lease.on_lost([&](const Error&) { ++told; });
  etcd.stop_signal();
  const Stopwatch frozen;
  CHECK(lease.held());
  REQUIRE(wait_until([&] { return !lease.held(); }, 2 * kTtl));
  // The last renewal was sent before etcd froze.
  CHECK(frozen.over(kTtl + 20ms) == 0);
  CHECK(granted.elapsed() >= kTtl);
  REQUIRE(wait_until([&] { return told > 0; }, lenient(500ms)));
  etcd.continue_signal();
  // It may live on in etcd, which counts anew after a pause: it is taken away.
  CHECK(onlooker.wait_leases(0, 2s));
  CHECK_FALSE(lease.held());
  c.close().value();
  CHECK(told == 1);
}

TEST_CASE("lease: a member that is stuck does not eat the TTL [slow]") {
  TcpProxy proxy(lease_etcd().port());
  auto options = options_for(lease_etcd());
  options.endpoints = {proxy.endpoint(), lease_etcd().endpoint()};
  auto c = connect(options);
  std::vector<Lease> leases;
  LossCount loss;
  for (int i = 0; i < 3; ++i) {
    leases.push_back(c.client().grant(5s).value());
    leases.back().on_lost(loss.handler());
  }
  CHECK(proxy.accepted() > 0);
  proxy.pause();  // it takes connections and requests, and answers nothing
  const Stopwatch watch;
  while (watch.elapsed() < 11s) {
    for (const auto& lease : leases) REQUIRE(lease.held());
    std::this_thread::sleep_for(5ms);
  }
  CHECK(loss.told() == 0);
}

TEST_CASE("lease: it survives a restart of etcd [slow]") {
  EtcdServer etcd;
  Onlooker onlooker(etcd);
  auto options = options_for(etcd);
  auto c = connect(options);
  auto lease = c.client().grant(12s).value();
  LossCount loss;
  lease.on_lost(loss.handler());
  for (int i = 0; i < 3; ++i) {
    etcd.restart();
    REQUIRE(wait_until([&] { return lease.keep_alive_once().has_value(); }, lenient(4s)));
    CHECK(lease.held());
    CHECK(lease.remaining().value() > 8s);
  }
  etcd.wipe_and_restart();
  CHECK(loss.wait(1, 6s));
  CHECK_FALSE(lease.held());
  c.close().value();
  CHECK(loss.told() == 1);
}

TEST_CASE("lease: handles outlive their Coordinator, and do nothing") {
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  auto c = connect(lease_etcd());
  auto lease = c.client().grant(20s).value();
  auto other = c.client().grant(20s).value();
  LossCount loss;
  lease.on_lost(loss.handler());
  c.close().value();
  CHECK(onlooker.wait_leases(0, 1s));
  CHECK_FALSE(lease.held());
  CHECK(lease.remaining().error().code == ErrorCode::Cancelled);
  CHECK_FALSE(lease.keep_alive_once());
  CHECK(c.client().grant(20s).error().code == ErrorCode::Cancelled);
  other.detach();
  CHECK(loss.told() == 0);
}

// --- Many -----------------------------------------------------------------------------------

namespace {

// All locks and registrations of the case below, and the number of losses they were told.
struct Crowd {
  std::vector<Lock> locks;
  std::shared_ptr<std::atomic<int>> losses{std::make_shared<std::atomic<int>>(0)};

  void lock(Coordinator& c, int n, milliseconds ttl) {
    for (int i = 0; i < n; ++i) {
      locks.push_back(c.lock().acquire("k" + std::to_string(i), ttl).value());
      locks.back().on_lost([losses = losses](const Error&) { ++*losses; });
    }
  }
  void enlist(Coordinator& c, int n, milliseconds ttl) {
    RegisterOptions options;
    options.on_event = [losses = losses](RegistrationEvent event, const ServiceInfo&) {
      if (event != RegistrationEvent::Registered) ++*losses;
    };
    for (int i = 0; i < n; ++i) {
      ServiceInfo service{"id" + std::to_string(i), "crowd", "127.0.0.1", 1000, {}, ttl};
      c.registry().register_service(service, options).value();
    }
  }
  int held() const {
    return static_cast<int>(
        std::count_if(locks.begin(), locks.end(), [](const Lock& lock) { return lock.held(); }));
  }
};

}  // namespace

TEST_CASE("lease: 2,000 locks and 2,000 registrations of one Coordinator, past their TTL [slow]") {
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  const int n = scaled(2000);
  constexpr milliseconds kTtl = 20s;
  auto counter = std::make_shared<CountingTransport>();
  auto options = options_for(lease_etcd());
  options.transport = counter;
  const int threads_before = thread_count();
  auto c = connect(options);
  Stopwatch watch;
  Crowd crowd;
  auto locking = std::async(std::launch::async, [&] { crowd.lock(c, n, kTtl); });
  crowd.enlist(c, n, kTtl);
  locking.get();
  const auto filling = watch.seconds();
  // The keys' watches gather on a few streams in the first second; threads that are not needed any
  // more leave after five.
  std::this_thread::sleep_for(1s);
  counter->reset();
  watch.reset();
  int most_threads = 0;
  while (watch.elapsed() < kTtl * 3 / 2) {
    const int threads = thread_count() - threads_before;
    if (watch.elapsed() > 6s) most_threads = std::max(most_threads, threads);
    REQUIRE(crowd.held() == n);
    std::this_thread::sleep_for(250ms);
  }
  const double per_second = counter->requests() / watch.seconds();
  CHECK(crowd.losses->load() == 0);
  CHECK(onlooker.gateway.leases().size() == static_cast<std::size_t>(2 * n));
  CHECK(onlooker.count(options.key_prefix) == static_cast<std::size_t>(2 * n));
  CHECK(most_threads <= 20);
  CHECK(per_second <= 20);
  MESSAGE(n << " locks and " << n << " registrations, made in " << filling << " s: " << per_second
            << " requests/s (" << counter->requests("/v3/lease/keepalive") / watch.seconds()
            << " renewals), " << most_threads << " threads, " << rss_kb() / 1024
            << " MiB resident");
  watch.reset();
  c.close().value();
  MESSAGE("closed in " << watch.seconds() << " s, " << onlooker.gateway.leases().size()
                       << " leases left to their TTL");
  CHECK(watch.over(lenient(1200ms)) == 0);
  crowd.locks.clear();
  CHECK(onlooker.wait_leases(0, 2 * kTtl));
}
