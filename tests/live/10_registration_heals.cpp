// Registrations that are harmed: they come back, or stay away and say so; and they are replaced
// without a moment of absence.
#include <doctest/doctest.h>

#include "support/lock_support.hpp"

using namespace coordination;
using namespace support;

namespace {

constexpr milliseconds kTtl = 10s;
constexpr milliseconds kBackWithin = 3s;

ServiceInfo service(const std::string& id, milliseconds ttl = kTtl, int port = 8080) {
  return ServiceInfo{id, "web", "10.0.0.1", port, {{"zone", "a"}}, ttl};
}

// What a registration was told, in order: R registered, L lost, X replaced.
class Told {
 public:
  RegisterOptions options(HealPolicy heal = HealPolicy::Restore) const {
    RegisterOptions options;
    options.heal = heal;
    options.on_event = [state = state_](RegistrationEvent event, const ServiceInfo&) {
      const char letter = event == RegistrationEvent::Registered ? 'R'
                          : event == RegistrationEvent::Lost     ? 'L'
                                                                 : 'X';
      std::lock_guard<std::mutex> hold(state->mutex);
      state->letters += letter;
    };
    return options;
  }
  std::string text() const {
    std::lock_guard<std::mutex> hold(state_->mutex);
    return state_->letters;
  }
  bool wait(const std::string& expected, milliseconds limit = kBackWithin) const {
    return wait_until([&] { return text() == expected; }, lenient(limit));
  }

 private:
  struct State {
    std::mutex mutex;
    std::string letters;
  };
  std::shared_ptr<State> state_{std::make_shared<State>()};
};

struct Fixture {
  explicit Fixture(EtcdServer& server = lease_etcd())
      : onlooker(server), options(options_for(server)), c(connect(options)) {
    REQUIRE(onlooker.wait_leases(0, 30s));
  }
  Fixture(const Fixture&) = delete;
  Fixture& operator=(const Fixture&) = delete;
  ~Fixture() {
    static_cast<void>(c.close());
    CHECK(onlooker.wait_leases(0, 2s));
  }

  std::string path(const std::string& id = "") const {
    return options.key_prefix + "/services/web/" + id;
  }
  // The registered records, or none if etcd does not answer.
  std::vector<ServiceInfo> found() {
    return c.registry().discover("web").value_or(std::vector<ServiceInfo>{});
  }
  bool wait_found(const ServiceInfo& info, milliseconds limit = kBackWithin) {
    return wait_until([&] { return found() == std::vector<ServiceInfo>{info}; }, lenient(limit));
  }
  std::int64_t lease_of(const std::string& id) { return onlooker.keys(path(id)).at(0).lease; }

  Onlooker onlooker;
  CoordinatorOptions options;
  Coordinator c;
};

}  // namespace

TEST_CASE_FIXTURE(Fixture, "registration: it comes back within 3 s, as often as it is harmed") {
  const Told told;
  const auto info = service("1");
  REQUIRE(c.registry().register_service(info, told.options()));
  std::function<void()> harm;
  SUBCASE("its key is deleted") {
    harm = [&] { onlooker.client().remove(path("1")).value(); };
  }
  SUBCASE("its lease is revoked") {
    harm = [&] { REQUIRE(onlooker.gateway.revoke(lease_of("1"))); };
  }
  SUBCASE("all keys are deleted") {
    harm = [&] {
      RemoveRequest all{options.key_prefix};
      all.range_end = prefix_range_end(all.key);
      onlooker.client().remove(all).value();
    };
  }
  std::string expected = "R";
  for (int i = 0; i < 4; ++i) {
    const Stopwatch watch;
    harm();  // the first and third time before the key has its watch, else after that
    expected += "LR";
    CHECK(told.wait(expected));
    CHECK(wait_found(info));
    CHECK(watch.over(lenient(kBackWithin)) == 0);
    if (i % 2 == 0) std::this_thread::sleep_for(400ms);
  }
  CHECK(onlooker.wait_leases(1));  // those it had before are given up
  CHECK(onlooker.gateway.has_lease(lease_of("1")));
  CHECK(told.text() == expected);
  REQUIRE(c.registry().unregister("1"));
  CHECK(onlooker.count(path()) == 0);
  CHECK(told.text() == expected);
}

TEST_CASE("registration: all come back within 3 s of a restart of etcd without its data") {
  EtcdServer etcd;
  auto options = options_for(etcd);
  auto c = connect(options);
  std::vector<Told> told(50);
  for (std::size_t i = 0; i < told.size(); ++i) {
    const auto info = service(std::to_string(100 + i));
    REQUIRE(c.registry().register_service(info, told[i].options()));
  }
  // The second time there is more history than before.
  for (int round = 1; round <= 2; ++round) {
    etcd.wipe_and_restart();
    const Stopwatch watch;
    const auto all_back = [&] {
      const auto found = c.registry().discover("web");
      return found && found->size() == told.size();
    };
    CHECK(wait_until(all_back, lenient(kBackWithin)));
    MESSAGE("all 50 were back after " << watch.elapsed().count() << " ms");
    const std::string expected = round == 1 ? "RLR" : "RLRLR";
    for (const auto& one : told) CHECK(one.wait(expected));
  }
  CHECK(c.registry().unregister("100"));
  CHECK(c.registry().discover("web").value().size() == told.size() - 1);
  Onlooker onlooker(etcd);
  CHECK(onlooker.wait_leases(told.size() - 1));
}

TEST_CASE(
    "registration: it comes back after an etcd that was away for longer than its TTL [slow]") {
  EtcdServer etcd;
  Fixture fixture(etcd);
  const Told told;
  const auto info = service("1", 4s);
  REQUIRE(fixture.c.registry().register_service(info, told.options()));
  SUBCASE("frozen") {
    etcd.stop_signal();
    CHECK(told.wait("RL", 6s));
    std::this_thread::sleep_for(1s);
    etcd.continue_signal();
  }
  SUBCASE("killed") {
    etcd.kill9();
    CHECK(told.wait("RL", 6s));
    std::this_thread::sleep_for(1s);
    etcd.restart();
  }
  CHECK(told.wait("RLR"));
  CHECK(fixture.wait_found(info));
  CHECK(fixture.onlooker.wait_leases(1, 6s));
  // The old lease runs out, and takes nothing with it.
  std::this_thread::sleep_for(4500ms);
  CHECK(fixture.found() == std::vector<ServiceInfo>{info});
  CHECK(told.text() == "RLR");
}

TEST_CASE_FIXTURE(Fixture, "registration: NotifyOnly tells, and stays away") {
  const Told told;
  REQUIRE(c.registry().register_service(service("1"), told.options(HealPolicy::NotifyOnly)));
  SUBCASE("its key is deleted") { onlooker.client().remove(path("1")).value(); }
  SUBCASE("its lease is revoked") { REQUIRE(onlooker.gateway.revoke(lease_of("1"))); }
  CHECK(told.wait("RL"));
  std::this_thread::sleep_for(700ms);  // by then one that heals would be back
  CHECK(onlooker.count(path()) == 0);
  CHECK(told.text() == "RL");
  // Until it is wanted again.
  const auto again = service("1", kTtl, 9090);
  REQUIRE(c.registry().register_service(again, told.options(HealPolicy::NotifyOnly)));
  CHECK(wait_found(again));
  CHECK(told.wait("RLR"));
  CHECK(c.registry().unregister("1"));
}

// --- Replacing ------------------------------------------------------------------------------

namespace {

// Asks all the time, and counts what must not be.
class HardPoll {
 public:
  HardPoll(Fixture& fixture, std::size_t instances)
      : c_(connect(fixture.options)), thread_([this, instances] {
          while (!stop_) {
            const auto found = c_.registry().discover("web");
            ++(found && found->size() == instances ? good_ : bad_);
          }
        }) {}
  ~HardPoll() { end(); }
  void end() {
    stop_ = true;
    if (thread_.joinable()) thread_.join();
  }
  int good() const { return good_; }
  int bad() const { return bad_; }

 private:
  Coordinator c_;
  std::atomic<bool> stop_{false};
  std::atomic<int> good_{0}, bad_{0};
  std::thread thread_;
};

}  // namespace

TEST_CASE_FIXTURE(Fixture, "registration: replaced without a moment of absence") {
  const Told told;
  REQUIRE(c.registry().register_service(service("1"), told.options()));
  auto watch = c.registry().watch("web").value();
  HardPoll poll(*this, 1);
  const int rounds = scaled(60);
  std::string expected = "R";
  for (int i = 1; i <= rounds; ++i) {
    // Every second time with another TTL, that is with another lease.
    auto next = service("1", std::chrono::seconds(10 + i / 2 % 3), 8080 + i);
    next.metadata["round"] = std::to_string(i);
    REQUIRE(c.registry().register_service(next, told.options()));
    expected += 'R';
    const auto event = watch.next(Context::with_timeout(lenient(5s)));
    REQUIRE(event);
    CHECK(event->type == EventType::Put);
    CHECK(event->service == next);
  }
  CHECK(told.wait(expected));
  // Events of the old leases and of the replaced keys have had their time.
  CHECK(onlooker.wait_leases(1));
  std::this_thread::sleep_for(400ms);
  poll.end();
  CHECK(poll.good() > rounds);
  CHECK(poll.bad() == 0);
  CHECK(told.text() == expected);
  CHECK_FALSE(watch.next(Context::with_timeout(10ms)));
  // The last one heals as the first.
  onlooker.client().remove(path("1")).value();
  CHECK(told.wait(expected + "LR"));
  CHECK(found().at(0).port == 8080 + rounds);
}

TEST_CASE_FIXTURE(Fixture, "registration: replaced by several threads at once") {
  const Told told;
  REQUIRE(c.registry().register_service(service("1"), told.options()));
  HardPoll poll(*this, 1);
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  const int rounds = scaled(20);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < rounds; ++i) {
        const auto info = service("1", std::chrono::seconds(10 + (i + t) % 3), 1000 * t + i + 1);
        if (!c.registry().register_service(info, told.options())) ++failures;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(failures.load() == 0);
  CHECK(onlooker.wait_leases(1));
  std::this_thread::sleep_for(400ms);
  poll.end();
  CHECK(poll.bad() == 0);
  CHECK(told.text() == std::string(static_cast<std::size_t>(4 * rounds + 1), 'R'));
  CHECK(c.registry().unregister("1"));
  CHECK(onlooker.count(path()) == 0);
}

TEST_CASE_FIXTURE(Fixture, "registration: one that was registered elsewhere gives way") {
  const Told told;
  REQUIRE(c.registry().register_service(service("1"), told.options()));
  auto other = connect(options);
  const Told others;
  const auto theirs = service("1", kTtl, 9999);
  REQUIRE(other.registry().register_service(theirs, others.options()));
  CHECK(told.wait("RX"));
  CHECK(onlooker.wait_leases(1));
  CHECK(found() == std::vector<ServiceInfo>{theirs});
  SUBCASE("its end does not touch the other's record") {
    CHECK(c.registry().unregister("1"));
    CHECK(found() == std::vector<ServiceInfo>{theirs});
  }
  SUBCASE("nor does its close") {
    c.close().value();
    CHECK(onlooker.count(path()) == 1);
  }
  SUBCASE("it can take its turn again") {
    const auto again = service("1", kTtl, 7777);
    REQUIRE(c.registry().register_service(again, told.options()));
    CHECK(others.wait("RX"));
    CHECK(found() == std::vector<ServiceInfo>{again});
    CHECK(told.wait("RXR"));
  }
  SUBCASE("where the record is removed the first who looks puts it back, and there is no fight") {
    onlooker.client().remove(path("1")).value();
    CHECK(wait_until([&] { return told.text() == "RXR" || others.text() == "RLR"; }, lenient(5s)));
    const bool back = told.text() == "RXR";
    CHECK(onlooker.wait_leases(1));
    CHECK(found() == std::vector<ServiceInfo>{back ? service("1") : theirs});
    const auto gave_way = [&] { return others.text() == "RLX" || others.text() == "RX"; };
    if (back) CHECK(wait_until(gave_way, lenient(5s)));  // both changes may come as one
    if (!back) CHECK(told.text() == "RX");
  }
  other.close().value();
}

TEST_CASE_FIXTURE(Fixture, "registration: registered again while its lease is just gone") {
  const Told told;
  for (int i = 0; i < 10; ++i) {
    REQUIRE(c.registry().register_service(service("1", kTtl, 100 + i), told.options()));
    if (i % 2 == 0) {
      REQUIRE(onlooker.gateway.revoke(lease_of("1")));
    } else {
      onlooker.client().remove(path("1")).value();
    }
    const auto next = service("1", kTtl, 200 + i);
    const auto again = c.registry().register_service(next, told.options());
    CHECK_MESSAGE(again, why(again));
    CHECK(wait_found(next, 1s));
  }
  std::this_thread::sleep_for(400ms);
  CHECK(found() == std::vector<ServiceInfo>{service("1", kTtl, 209)});
  CHECK(onlooker.wait_leases(1));
}

// --- The end --------------------------------------------------------------------------------

TEST_CASE("registration: unregister is two requests, and needs no scan") {
  auto counter = std::make_shared<CountingTransport>();
  auto options = options_for(lease_etcd());
  options.transport = counter;
  auto c = connect(options);
  for (int i = 0; i < 20; ++i) {
    REQUIRE(c.registry().register_service(service(std::to_string(i), 60s)));
  }
  counter->reset();
  for (int i = 0; i < 10; ++i) REQUIRE(c.registry().unregister(std::to_string(i)));
  CHECK(counter->requests("/v3/kv/range") == 0);
  CHECK(counter->requests("/v3/kv/txn") + counter->requests("/v3/lease/revoke") <= 20);
  CHECK(c.registry().discover("web").value().size() == 10);
  CHECK(c.registry().unregister("0").error().code == ErrorCode::NotFound);
}

TEST_CASE_FIXTURE(Fixture, "registration: unregistered while it heals, it stays away") {
  std::mt19937 random(11);
  for (int i = 0; i < scaled(20); ++i) {
    REQUIRE(c.registry().register_service(service("1", i % 2 == 0 ? 10s : 20s)));
    if (i % 4 == 0) std::this_thread::sleep_for(350ms);  // its key has a watch by then
    if (i % 2 == 0) {
      onlooker.client().remove(path("1")).value();
    } else {
      onlooker.gateway.revoke(lease_of("1"));
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
    REQUIRE(c.registry().unregister("1"));
    CHECK(onlooker.wait_count(path(), 0, 1s));
    CHECK(onlooker.wait_leases(0, 1s));
  }
  std::this_thread::sleep_for(500ms);
  CHECK(onlooker.count(path()) == 0);
  CHECK(onlooker.wait_leases(0, 1s));
}

TEST_CASE_FIXTURE(Fixture, "registration: its handler may unregister it, or register another") {
  std::atomic<int> calls{0};
  RegisterOptions handling;
  handling.on_event = [&](RegistrationEvent event, const ServiceInfo& info) {
    if (event != RegistrationEvent::Lost) return;
    if (c.registry().register_service(service("2")) && c.registry().unregister(info.id)) ++calls;
  };
  REQUIRE(c.registry().register_service(service("1"), handling));
  REQUIRE(onlooker.gateway.revoke(lease_of("1")));
  CHECK(wait_until([&] { return calls == 1; }, lenient(kBackWithin)));
  CHECK(wait_found(service("2")));
  std::this_thread::sleep_for(400ms);
  CHECK(wait_found(service("2"), 1s));
  CHECK(calls.load() == 1);
}

// --- Lost answers ---------------------------------------------------------------------------

TEST_CASE("registration: a replacement with an unknown outcome costs nobody his record [slow]") {
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  auto fault = std::make_shared<FaultTransport>();
  auto options = options_for(lease_etcd());
  options.transport = fault;
  options.retry_config.initial_delay = 5ms;
  auto c = connect(options);
  const std::string path = options.key_prefix + "/services/web/1";
  const Told told;
  REQUIRE(c.registry().register_service(service("1", 4s, 1), told.options()));
  milliseconds ttl{};
  SUBCASE("with the same lease") { ttl = 4s; }
  SUBCASE("with another lease") { ttl = 5s; }
  fault->lose_answers("/v3/kv/txn", 100);
  const auto unknown = c.registry().register_service(service("1", ttl, 2), told.options());
  fault->lose_answers("/v3/kv/txn", 0);
  REQUIRE_FALSE(unknown);
  CHECK(unknown.error().outcome == Outcome::MaybeApplied);
  // For two TTLs one of the two is there.
  const Stopwatch watch;
  while (watch.elapsed() < 9s) {
    REQUIRE(onlooker.count(path) == 1);
    std::this_thread::sleep_for(20ms);
  }
  // And it heals, and can be replaced.
  onlooker.client().remove(path).value();
  CHECK(onlooker.wait_count(path, 1, kBackWithin));
  REQUIRE(c.registry().register_service(service("1", 4s, 3), told.options()));
  CHECK(c.registry().discover("web").value().at(0).port == 3);
  CHECK(told.text().find('X') == std::string::npos);  // it never gave way to itself
  CHECK(onlooker.wait_leases(1));
  c.close().value();
  CHECK(onlooker.wait_leases(0, 1s));
}
