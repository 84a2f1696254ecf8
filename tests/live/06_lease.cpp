// Lease: granted, renewed in batches, lost, revoked, detached.
#include <doctest/doctest.h>

#include <algorithm>
#include <iomanip>
#include <thread>

#include "support/live.hpp"
#include "support/tcp_proxy.hpp"
#include "support/transports.hpp"

using namespace coordination;
using namespace support;

namespace {

// As etcdctl prints it.
std::string hex(std::int64_t id) {
  std::ostringstream text;
  text << std::hex << std::setw(16) << std::setfill('0') << id;
  return text.str();
}

struct Fixture {
  Coordinator coordinator{connect(shared_etcd())};
  Client& client{coordinator.client()};
  Etcdctl ctl{shared_etcd()};
  std::string key{unique_prefix()};

  void put(const Lease& lease) {
    PutRequest request{key, "v"};
    request.lease = lease.id();
    client.put(request).value();
  }
  bool listed(std::int64_t id) const {
    const auto all = ctl.leases();
    return std::find(all.begin(), all.end(), hex(id)) != all.end();
  }
};

// Counts what on_lost tells.
struct LostCount {
  std::shared_ptr<std::atomic<int>> calls{std::make_shared<std::atomic<int>>(0)};
  std::shared_ptr<std::atomic<int>> wrong{std::make_shared<std::atomic<int>>(0)};
  auto handler() const {
    return [calls = calls, wrong = wrong](const Error& error) {
      if (error.code != ErrorCode::Lost) ++*wrong;
      ++*calls;
    };
  }
};

}  // namespace

TEST_CASE_FIXTURE(Fixture, "lease: granted, told, used, revoked") {
  auto lease = client.grant(60s).value();
  CHECK(lease.ttl() == 60s);
  CHECK(lease.held());
  CHECK(listed(lease.id()));
  put(lease);
  CHECK(client.get(key).value().lease == lease.id());
  const auto left = lease.remaining().value();
  CHECK(left > 40s);
  CHECK(left <= 60s);
  CHECK(lease.keep_alive_once());

  LostCount lost;
  lease.on_lost(lost.handler());
  CHECK(lease.revoke());
  CHECK_FALSE(lease.held());
  CHECK_FALSE(client.get(key));
  CHECK_FALSE(listed(lease.id()));
  CHECK_MESSAGE(lease.revoke(), "a lease that is gone already is a success");
  CHECK_MESSAGE(never([&] { return *lost.calls > 0; }, 200ms), "revoked is not lost");
}

TEST_CASE_FIXTURE(Fixture, "lease: etcd's minimum and whole seconds") {
  CHECK(client.grant(1ms).value().ttl() == 2s);
  CHECK(client.grant(2500ms).value().ttl() == 3s);
  for (const milliseconds bad : {0ms, -1000ms}) {
    const auto refused = client.grant(bad);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code == ErrorCode::Validation);
  }
}

TEST_CASE_FIXTURE(Fixture, "lease: the destructor revokes, detach does not") {
  std::int64_t revoked = 0;
  {
    const auto lease = client.grant(30s).value();
    revoked = lease.id();
    put(lease);
  }
  CHECK(wait_until([&] { return !listed(revoked); }, lenient(2s)));
  CHECK_FALSE(client.get(key));
  std::int64_t detached = 0;
  {
    auto lease = client.grant(6s).value();
    put(lease);
    detached = lease.detach();
  }
  CHECK(listed(detached));
  CHECK(client.get(key));
  CHECK_MESSAGE(wait_until([&] { return !client.get(key); }, lenient(10s)),
                "nobody renews it any more");
}

TEST_CASE_FIXTURE(Fixture, "lease: it renews itself over three TTLs [slow]") {
  const auto lease = client.grant(4s).value();
  put(lease);
  CHECK(never([&] { return !lease.held() || !client.get(key); }, 12500ms));
}

TEST_CASE_FIXTURE(Fixture, "lease: lost when somebody else revokes it, told once") {
  auto lease = client.grant(2s).value();
  LostCount lost;
  lease.on_lost(lost.handler());
  REQUIRE(ctl.run({"lease", "revoke", hex(lease.id())}).ok());
  CHECK(wait_until([&] { return *lost.calls > 0; }, lenient(2s)));
  CHECK_FALSE(lease.held());
  const auto renewed = lease.keep_alive_once();
  REQUIRE_FALSE(renewed);
  CHECK(renewed.error().code == ErrorCode::Lost);
  CHECK(never([&] { return *lost.calls > 1; }, 1500ms));
  CHECK(*lost.wrong == 0);
}

TEST_CASE_FIXTURE(Fixture, "lease: a handler that comes after the loss is told, too") {
  auto lease = client.grant(2s).value();
  REQUIRE(ctl.run({"lease", "revoke", hex(lease.id())}).ok());
  REQUIRE(wait_until([&] { return !lease.held(); }, lenient(2s)));
  LostCount late;
  lease.on_lost(late.handler());
  CHECK(wait_until([&] { return *late.calls == 1; }, lenient(1s)));
  CHECK(never([&] { return *late.calls > 1; }, 200ms));
}

TEST_CASE_FIXTURE(Fixture, "lease: keep_alive_once notices by itself") {
  auto lease = client.grant(60s).value();
  REQUIRE(ctl.run({"lease", "revoke", hex(lease.id())}).ok());
  const auto renewed = lease.keep_alive_once();
  REQUIRE_FALSE(renewed);
  CHECK(renewed.error().code == ErrorCode::Lost);
  CHECK_FALSE(lease.held());
}

TEST_CASE("lease: not held any more before the TTL is over, when etcd cannot be reached") {
  TcpProxy proxy(shared_etcd().port());
  auto options = options_for(shared_etcd());
  options.endpoints = {proxy.endpoint()};
  auto coordinator = connect(options);
  auto lease = coordinator.client().grant(3s).value();
  LostCount lost;
  lease.on_lost(lost.handler());
  proxy.pause();
  const Stopwatch paused;
  CHECK(wait_until([&] { return !lease.held(); }, lenient(4s)));
  // The last renewal was sent before the pause. (20 ms: the question is asked now and then.)
  CHECK(paused.over(3s + lenient(20ms)) == 0);
  CHECK(paused.elapsed() >= 1s);
  CHECK(wait_until([&] { return *lost.calls == 1; }, lenient(500ms)));
  proxy.resume();
  CHECK(never([&] { return *lost.calls > 1 || lease.held(); }, 1500ms));
}

TEST_CASE("lease: a short loss of the connection costs nothing") {
  TcpProxy proxy(shared_etcd().port());
  auto options = options_for(shared_etcd());
  options.endpoints = {proxy.endpoint()};
  auto coordinator = connect(options);
  auto lease = coordinator.client().grant(10s).value();
  LostCount lost;
  lease.on_lost(lost.handler());
  for (int i = 0; i < 3; ++i) {
    proxy.refuse();
    std::this_thread::sleep_for(1500ms);
    proxy.refuse(false);
    CHECK(never([&] { return !lease.held(); }, 1s));
  }
  CHECK(*lost.calls == 0);
}

TEST_CASE("lease: five hundred are renewed in few requests, by few threads") {
  const auto counting = std::make_shared<CountingTransport>();
  auto options = options_for(shared_etcd());
  options.transport = counting;
  auto coordinator = connect(options);
  const int many = scaled(500);
  std::vector<Lease> leases;
  for (int i = 0; i < many; ++i) leases.push_back(coordinator.client().grant(20s).value());
  counting->reset();
  const auto all_held = [&] {
    return std::all_of(leases.begin(), leases.end(), [](const Lease& l) { return l.held(); });
  };
  CHECK(never([&] { return !all_held(); }, 25s));
  const int posts = counting->requests("/v3/lease/keepalive");
  MESSAGE(posts, " requests renewed ", many, " leases for 25 s");
  CHECK(posts >= 3);  // every seven seconds
  CHECK(posts <= 100);
  CHECK(thread_count() <= 16 + (sanitized() ? 1 : 0));
}
