// Section 6: leases, on an etcd in memory whose time the tests move.
#include <doctest/doctest.h>

#include <algorithm>
#include <future>
#include <sstream>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"

using namespace coordination;
using namespace support;

namespace {

constexpr const char* kKeepAlive = "/v3/lease/keepalive";

struct Setup : Cluster {
  Coordinator c{connect()};
  Client& client{c.client()};

  Lease grant(milliseconds ttl = 9s) { return client.grant(ttl).value(); }

  /// A third of the TTL passes, and what has to be renewed is.
  void third_of(const Lease& lease) {
    const int before = tap->finished(kKeepAlive);
    etcd->advance(lease.ttl() / 3 + 1ms);
    CHECK(eventually([&] { return tap->finished(kKeepAlive) > before; }));
  }
  void put_with(const Lease& lease, const std::string& key) {
    PutRequest put;
    put.key = key;
    put.lease = lease.id();
    client.put(put).value();
  }
};

}  // namespace

TEST_CASE("lease: granted, in etcd, and gone with its handle") {
  Setup s;
  {
    const auto lease = s.grant();
    CHECK(lease.id() > 0);
    CHECK(lease.ttl() == 9s);
    CHECK(lease.held());
    CHECK(s.etcd->leases() == std::vector<std::int64_t>{lease.id()});
    s.put_with(lease, "a");
    CHECK(s.etcd->keys() == std::vector<std::string>{"a"});
  }
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
  CHECK(s.etcd->keys().empty());
}

TEST_CASE("lease: whole seconds, and etcd's minimum") {
  Setup s;
  CHECK(s.grant(1ms).ttl() == 2s);
  CHECK(s.grant(2001ms).ttl() == 3s);
  auto lease = s.grant(10s);
  CHECK(lease.ttl() == 10s);
  CHECK(lease.remaining().value() == 10s);
}

TEST_CASE("lease: held() asks nobody") {
  Setup s;
  const auto lease = s.grant();
  s.tap->reset();
  for (int i = 0; i < 100; ++i) CHECK(lease.held());
  CHECK(s.tap->count() == 0);
}

TEST_CASE("lease: it renews itself for as long as it is wanted") {
  Setup s;
  const auto lease = s.grant();
  s.put_with(lease, "a");
  for (int i = 0; i < 12; ++i) {  // four TTLs
    s.third_of(lease);
    CHECK(lease.held());
  }
  CHECK(s.etcd->leases().size() == 1);
  CHECK(s.etcd->keys().size() == 1);
  CHECK(s.tap->count(kKeepAlive) <= 14);
}

TEST_CASE("lease: many are renewed in one request, by no more threads") {
  Setup s;
  std::vector<Lease> leases;
  for (int i = 0; i < 200; ++i) leases.push_back(s.grant());
  s.tap->reset();
  s.etcd->advance(5s);
  for (auto& lease : leases) CHECK(lease.remaining().value() == 7s);
  CHECK(s.tap->count(kKeepAlive) <= 2);
  CHECK(thread_count() <= 20);
}

TEST_CASE("lease: lost because etcd says so") {
  Setup s;
  Notes notes;
  auto lease = s.grant();
  lease.on_lost(notes.on_lost());
  CHECK(s.etcd->expire_lease(lease.id()));
  CHECK(lease.held());  // nobody has told us yet
  s.third_of(lease);
  CHECK(eventually([&] { return notes.size() == 1; }));
  CHECK(notes.lines() == std::vector<std::string>{"LOST"});
  CHECK_FALSE(lease.held());
  const auto renewed = lease.keep_alive_once();
  REQUIRE_FALSE(renewed);
  CHECK(renewed.error().code == ErrorCode::Lost);
  const auto left = lease.remaining();
  REQUIRE_FALSE(left);
  CHECK(left.error().code == ErrorCode::Lost);
  const int before = s.tap->count(kKeepAlive);
  s.etcd->advance(9s);
  s.etcd->advance(9s);
  CHECK(s.tap->count(kKeepAlive) == before);
  CHECK(notes.size() == 1);
}

TEST_CASE("lease: in the log it is in hex, as in keys and as etcdctl shows it") {
  Cluster cluster;
  Notes log;
  auto options = cluster.options();
  options.logger = log.logger();
  auto c = connect_to(options);
  const auto lease = c.client().grant(9s).value();
  std::ostringstream hex;
  hex << std::hex << lease.id();
  CHECK(cluster.etcd->expire_lease(lease.id()));
  cluster.etcd->advance(4s);
  CHECK(eventually([&] { return log.contain("a lease is lost lease=" + hex.str() + " why="); }));
}

TEST_CASE("lease: lost by the clock, when etcd cannot be reached") {
  Setup s;
  Notes notes;
  auto lease = s.grant();
  lease.on_lost(notes.on_lost());
  s.put_with(lease, "a");
  s.cut_off("one");
  s.etcd->advance(8999ms);
  CHECK(lease.held());
  s.etcd->advance(1ms);
  CHECK_FALSE(lease.held());
  CHECK(eventually([&] { return notes.size() == 1; }));
  s.etcd->heal();
  s.etcd->advance(9s);
  CHECK_FALSE(lease.held());
  CHECK(notes.size() == 1);
  CHECK(s.etcd->keys().empty());
}

TEST_CASE("lease: its time counts from when the renewal was sent, not from its answer") {
  Setup s;
  const auto hook = s.tap->after([&](const HttpRequest& request) {
    if (request.path == "/v3/lease/grant" || request.path == kKeepAlive) s.etcd->advance(2s);
  });
  SUBCASE("nor from that of the grant") {
    auto lease = s.grant(30s);
    s.tap->after(nullptr);
    s.cut_off("one");
    s.etcd->advance(27999ms);
    CHECK(lease.held());
    s.etcd->advance(1ms);
    CHECK_FALSE(lease.held());
    return;
  }
  auto lease = s.grant(30s);       // so long that it is not renewed in between
  CHECK(lease.keep_alive_once());  // sent at 2 s, and answered at 4 s
  s.tap->after(nullptr);
  s.cut_off("one");
  s.etcd->advance(27999ms);
  CHECK(lease.held());
  s.etcd->advance(1ms);
  CHECK_FALSE(lease.held());
}

TEST_CASE("lease: an answer that is late cannot bring a lost lease back") {
  Setup s;
  auto lease = s.grant();
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    if (request.path == kKeepAlive) s.etcd->advance(9s);
  });
  CHECK_FALSE(lease.keep_alive_once());
  CHECK_FALSE(lease.held());
  s.tap->before(nullptr);
  CHECK_FALSE(lease.keep_alive_once());
  CHECK_FALSE(lease.held());
}

TEST_CASE("lease: the loss is told once to every handler, also to those that come late") {
  Setup s;
  Notes notes;
  auto lease = s.grant();
  s.cut_off("one");
  s.etcd->advance(10s);
  CHECK_FALSE(lease.held());
  lease.on_lost(notes.on_lost());
  CHECK(eventually([&] { return notes.size() == 1; }));
  lease.on_lost(notes.on_lost());
  CHECK(eventually([&] { return notes.size() == 2; }));
  s.etcd->advance(10s);
  CHECK(notes.size() == 2);
}

TEST_CASE("lease: nothing is told after revoke, detach or destruction") {
  Setup s;
  Notes notes;
  {
    auto revoked = s.grant(), detached = s.grant(), destroyed = s.grant();
    for (auto* lease : {&revoked, &detached, &destroyed}) lease->on_lost(notes.on_lost());
    CHECK(revoked.revoke());
    detached.detach();
    { const Lease gone = std::move(destroyed); }
    CHECK_FALSE(revoked.held());
    CHECK_FALSE(detached.held());
    s.etcd->advance(30s);
    CHECK(eventually([&] { return s.etcd->leases().empty(); }));
  }
  s.c.close().value();
  CHECK(notes.size() == 0);
}

TEST_CASE("lease: a handler may destroy its lease") {
  Setup s;
  auto lease = std::make_unique<Lease>(s.grant());
  std::atomic<bool> destroyed{false};
  lease->on_lost([&](const Error&) {
    lease.reset();
    destroyed = true;
  });
  s.etcd->expire_lease(lease->id());
  s.etcd->advance(4s);
  CHECK(eventually([&] { return destroyed.load(); }));
}

TEST_CASE("lease: a handler that throws is logged, and harms no other") {
  Setup s;
  Notes log, notes;
  auto options = s.options("two");
  options.logger = log.logger();
  auto c = connect_to(options);
  auto one = c.client().grant(9s).value(), two = c.client().grant(9s).value();
  one.on_lost([](const Error&) { throw std::runtime_error("oh no"); });
  two.on_lost(notes.on_lost());
  s.cut_off("two");
  s.etcd->advance(9s);
  CHECK(eventually([&] { return notes.size() == 1 && log.contain("oh no"); }));
}

TEST_CASE("lease: keep_alive_once renews now") {
  Setup s;
  auto lease = s.grant(10s);
  s.etcd->advance(2000ms);  // before the first renewal, jitter included
  CHECK(lease.remaining().value() == 8s);
  CHECK(lease.keep_alive_once());
  CHECK(lease.remaining().value() == 10s);
  s.cut_off("one");
  const auto failed = lease.keep_alive_once();
  REQUIRE_FALSE(failed);
  CHECK(failed.error().code == ErrorCode::Connection);
  CHECK(lease.held());
}

TEST_CASE("lease: revoke takes its keys, and may be repeated") {
  Setup s;
  auto lease = s.grant();
  s.put_with(lease, "a");
  CHECK(lease.revoke());
  CHECK(s.etcd->leases().empty());
  CHECK(s.etcd->keys().empty());
  CHECK(lease.revoke());
  CHECK_FALSE(lease.held());
}

TEST_CASE("lease: a revoke that failed is done later") {
  Setup s;
  auto lease = s.grant();
  s.cut_off("one");
  const auto failed = lease.revoke();
  REQUIRE_FALSE(failed);
  CHECK(failed.error().code == ErrorCode::Connection);
  CHECK_FALSE(lease.held());
  CHECK(s.etcd->leases().size() == 1);
  s.etcd->heal();
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
}

TEST_CASE("lease: detached, it lives until its TTL is over") {
  Setup s;
  {
    auto lease = s.grant();
    const auto id = lease.id();
    CHECK(lease.detach() == id);
  }
  s.etcd->advance(8s);
  CHECK(s.etcd->leases().size() == 1);
  s.etcd->advance(1s);
  CHECK(s.etcd->leases().empty());
  CHECK(s.tap->count(kKeepAlive) == 0);
}

TEST_CASE("lease: a handle that is assigned to gives up its lease") {
  Setup s;
  auto one = s.grant(), two = s.grant();
  const auto id = two.id();
  one = std::move(two);
  CHECK(one.id() == id);
  CHECK(eventually([&] { return s.etcd->leases() == std::vector<std::int64_t>{id}; }));
  CHECK(one.held());
}

TEST_CASE("lease: a grant that failed leaves nothing behind") {
  Setup s;
  s.etcd->drop_replies(3, "/v3/lease/grant");
  const auto lease = s.client.grant(9s);
  REQUIRE_FALSE(lease);
  CHECK(lease.error().outcome == Outcome::MaybeApplied);
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
}

TEST_CASE("lease: a grant whose answer was lost once is one lease") {
  Setup s;
  s.etcd->drop_replies(1);
  const auto lease = s.client.grant(9s);
  REQUIRE_MESSAGE(lease, text_of(lease));
  CHECK(s.etcd->leases() == std::vector<std::int64_t>{lease->id()});
  CHECK(lease->held());
}

TEST_CASE("lease: renewals go on through lost answers, no leader and dead tokens") {
  Setup s;
  s.etcd->enable_auth("pw");
  auto options = s.options("two");
  options.username = "root";
  options.password = "pw";
  auto c = connect_to(options);
  Notes notes;
  auto lease = c.client().grant(9s).value();
  lease.on_lost(notes.on_lost());
  const auto survives = [&](const std::function<void()>& fault) {
    fault();
    s.etcd->advance(lease.ttl() / 3 + 1ms);
    CHECK(eventually([&] {
      s.etcd->advance(20ms);  // the next attempt is made by etcd's clock, too
      const auto left = lease.remaining();
      return left && *left >= 8s;
    }));
    CHECK(lease.held());
  };
  survives([&] { s.etcd->drop_replies(1); });
  survives([&] { s.etcd->fail_next(1); });
  survives([&] { s.etcd->no_leader(1); });
  survives([&] { s.etcd->invalidate_tokens(); });
  CHECK(notes.size() == 0);
}

TEST_CASE("lease: a renewal gets itself the token that it needs, with nobody else's help") {
  Setup s;
  s.etcd->enable_auth("pw");
  auto options = s.options("two");
  options.username = "root";
  options.password = "pw";
  auto c = connect_to(options);
  const auto lease = c.client().grant(9s).value();
  s.etcd->invalidate_tokens();
  s.etcd->advance(lease.ttl() / 3 + 1ms);
  CHECK(eventually([&] { return s.tap->finished(kKeepAlive) == 2; }));
  for (int i = 0; i < 3; ++i) s.third_of(lease);
  CHECK(lease.held());
  CHECK(s.tap->finished("/v3/auth/authenticate") == 2);
}

TEST_CASE("lease: of two, the one whose time is over first is lost first") {
  const auto etcd = std::make_shared<MemoryEtcd>();
  auto c = connect_to(options_with(etcd));
  const auto later = c.client().grant(60s).value();
  auto sooner = c.client().grant(2s).value();
  std::atomic<int> lost{0};
  sooner.on_lost([&](const Error&) { ++lost; });
  etcd->partition();
  CHECK(wait_until([&] { return lost == 1; }, lenient(10s)));
  CHECK(later.held());
}

TEST_CASE("lease: a grant that took long is renewed before it is too late") {
  Setup s;
  for (const milliseconds took : {4s, 7s}) {
    const auto hook = s.tap->before([&](const HttpRequest& request) {
      if (request.path == "/v3/lease/grant") s.etcd->advance(took);
    });
    const int before = s.tap->finished(kKeepAlive);
    const auto lease = s.grant(9s);
    const bool renewed = s.tap->finished(kKeepAlive) > before;
    s.tap->before(nullptr);
    if (took > 4500ms) CHECK(renewed);  // before it was handed out
    CHECK(lease.held());
    s.etcd->advance(6s);
    CHECK(lease.held());
  }
}

TEST_CASE("lease: where no new connection can be had, they are renewed one by one on an old one") {
  Setup s;
  std::vector<Lease> leases;
  for (int i = 0; i < 5; ++i) leases.push_back(s.grant());
  s.tap->lose_if([](const HttpRequest& request) {
    return request.path == kKeepAlive && header(request, "Connection") == "close";
  });
  for (int i = 0; i < 6; ++i) {
    s.third_of(leases.front());
    for (auto& lease : leases) {
      CHECK(eventually([&] { return lease.remaining().value() >= 8s; }));
      CHECK(lease.held());
    }
  }
}

TEST_CASE("lease: handlers that block all callback threads delay no renewal") {
  Setup s;
  std::promise<void> go;
  const auto gone = go.get_future().share();
  std::atomic<int> blocked{0};
  const auto block = [&](const Error&) {
    ++blocked;
    gone.wait();
  };
  std::vector<Lease> lost;
  for (int i = 0; i < 4; ++i) {
    lost.push_back(s.grant());
    lost.back().on_lost(block);
  }
  const auto lease = s.grant();
  for (auto& each : lost) s.etcd->expire_lease(each.id());
  s.third_of(lease);
  CHECK(eventually([&] { return blocked == 2; }));  // there are two threads for handlers
  for (int i = 0; i < 9; ++i) {
    s.third_of(lease);
    CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));
    CHECK(lease.held());
  }
  go.set_value();
  CHECK(eventually([&] { return blocked == 4; }));
}

TEST_CASE("lease: one that may not be revoked keeps back no other") {
  Cluster cluster;
  cluster.etcd->enable_auth("root-password");
  cluster.etcd->add_user("app", "app-password", "/app");
  auto root_options = cluster.options("two");
  root_options.username = "root";
  root_options.password = "root-password";
  auto root = connect_to(root_options);
  auto options = cluster.options();
  options.username = "app";
  options.password = "app-password";
  auto app = connect_to(options);
  std::vector<Lease> leases;
  for (int i = 0; i < 6; ++i) leases.push_back(app.client().grant(60s).value());
  const auto by_id = [](const Lease& a, const Lease& b) { return a.id() < b.id(); };
  const auto first = std::min_element(leases.begin(), leases.end(), by_id)->id();
  PutRequest foreign;
  foreign.key = "/other";
  foreign.lease = first;
  root.client().put(foreign).value();
  leases.clear();
  CHECK(eventually([&] { return cluster.etcd->leases() == std::vector<std::int64_t>{first}; }));
}

TEST_CASE("lease: close revokes what it has while a grant has no answer") {
  std::promise<void> go;
  std::atomic<bool> waits{false};
  Setup s;
  const auto lease = s.grant();
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    if (request.path != "/v3/lease/grant") return;
    waits = true;
    go.get_future().wait();
  });
  Joined granting([&] { CHECK_FALSE(s.client.grant(9s)); });
  CHECK(eventually([&] { return waits.load(); }));
  const Stopwatch closing;
  CHECK(s.c.close());
  CHECK(closing.over(lenient(1s)) == 0);
  CHECK(s.etcd->leases().empty());
  go.set_value();
}

TEST_CASE("lease: close waits for a grant that is under way, and revokes what it brings") {
  Setup s;
  const auto lease = s.grant();
  std::atomic<bool> waits{false}, closed{false};
  const auto hook = s.tap->after([&](const HttpRequest& request) {
    if (request.path != "/v3/lease/grant") return;
    waits = true;
    CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));  // the other one is revoked
    CHECK(never([&] { return closed.load(); }, 100ms));
  });
  Joined granting([&] { check_code(s.client.grant(9s), ErrorCode::Cancelled); });
  CHECK(eventually([&] { return waits.load(); }));
  const Stopwatch closing;
  CHECK(s.c.close());
  closed = true;
  if (closing.elapsed() >= 1s) s.etcd->advance(10s);  // it waits for no longer: the TTL is left
  CHECK(s.etcd->leases().empty());
}

TEST_CASE("lease: nothing is told after revoke, also where the handler was due") {
  Setup s;
  Notes notes;
  std::promise<void> go;
  const auto gone = go.get_future().share();
  std::atomic<int> blocked{0};
  std::vector<Lease> busy;
  for (int i = 0; i < 2; ++i) {
    busy.push_back(s.grant());
    busy.back().on_lost([&](const Error&) {
      ++blocked;
      gone.wait();
    });
    s.etcd->expire_lease(busy.back().id());
    s.etcd->advance(3001ms);
    CHECK(eventually([&] { return blocked == i + 1; }));
  }
  auto lease = s.grant();
  lease.on_lost(notes.on_lost());
  s.etcd->expire_lease(lease.id());
  s.etcd->advance(3001ms);
  CHECK(eventually([&] { return !lease.held(); }));
  CHECK(lease.revoke());
  lease.on_lost(notes.on_lost());
  go.set_value();
  busy.clear();
  CHECK(notes.size() == 0);
}

TEST_CASE("lease: a TTL that no clock can count") {
  Setup s;
  for (const milliseconds ttl : {milliseconds::max(), milliseconds(0), milliseconds::min()}) {
    const auto lease = s.client.grant(ttl);
    REQUIRE_FALSE(lease);
    CHECK(lease.error().code == ErrorCode::Validation);
  }
}

TEST_CASE("lease: close revokes them all") {
  Setup s;
  std::vector<Lease> leases;
  for (int i = 0; i < 100; ++i) leases.push_back(s.grant());
  CHECK(s.etcd->leases().size() == 100);
  s.c.close().value();
  CHECK(s.etcd->leases().empty());
  int held = 0;
  for (auto& lease : leases) held += lease.held();
  CHECK(held == 0);
  for (const auto& again : {leases.front().keep_alive_once(), leases.back().keep_alive_once()}) {
    REQUIRE_FALSE(again);
    CHECK_MESSAGE(again.error().code == ErrorCode::Cancelled, text_of(again));
  }
}

TEST_CASE("lease: a renewal that is answered late counts from when it was sent") {
  // Each answer takes 2.5 s of a TTL of 6 s: an attempt stays open, and the next begins beside it.
  const auto etcd = std::make_shared<MemoryEtcd>();
  struct Slow : Transport {
    std::shared_ptr<MemoryEtcd> etcd;
    std::atomic<int> begun{0}, open{0}, most{0};
    Result<HttpResponse> perform(const HttpRequest& request, const ChunkSink& sink,
                                 const Context& ctx) override {
      if (request.path != kKeepAlive) return etcd->perform(request, sink, ctx);
      ++begun;
      const int now = ++open;
      if (now > most) most = now;
      const auto end = std::chrono::steady_clock::now() + 2500ms;
      while (!ctx.done() && std::chrono::steady_clock::now() < end) {
        std::this_thread::sleep_for(5ms);
      }
      --open;
      if (!ctx.done()) return etcd->perform(request, sink, ctx);
      return Error{ErrorCode::Timeout, "cut", "", Outcome::MaybeApplied, 0};
    }
  };
  auto slow = std::make_shared<Slow>();
  slow->etcd = etcd;
  CoordinatorOptions options;
  options.endpoints = {"a:1"};
  options.transport = slow;
  auto c = Coordinator::connect(options).value();
  Notes notes;
  auto lease = c.client().grant(6s).value();
  lease.on_lost(notes.on_lost());
  const Stopwatch watch;
  CHECK(wait_until([&] { return slow->begun >= 6 || !lease.held(); }, lenient(30s)));
  CHECK(watch.elapsed() > 8s);
  CHECK(lease.held());
  CHECK(notes.size() == 0);
  CHECK(slow->most >= 2);
  CHECK(slow->most <= 3);
}

TEST_CASE("lease: its time counts from when an automatic renewal was sent") {
  Setup s;
  std::atomic<bool> once{false};
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    if (request.path == kKeepAlive && !once.exchange(true)) s.etcd->advance(2s);
  });
  auto lease = s.grant();
  s.etcd->advance(3s);  // and two more while the renewal is on its way
  CHECK(eventually([&] { return s.tap->finished(kKeepAlive) > 0; }));
  s.cut_off("one");
  SUBCASE("held until then") {
    s.etcd->advance(6999ms);
    CHECK(lease.held());
    s.etcd->advance(1ms);
    CHECK_FALSE(lease.held());
  }
  SUBCASE("once lost it is revoked when etcd can be reached again") {
    s.etcd->advance(7s);
    CHECK_FALSE(lease.held());
    CHECK(s.etcd->leases().size() == 1);
    s.etcd->heal();
    CHECK(eventually([&] { return s.etcd->leases().empty(); }));
  }
}

TEST_CASE("lease: one whose grant may be under way is revoked until it cannot come any more") {
  Setup s;
  HttpRequest late;
  const auto hook = s.tap->lose_if([&](const HttpRequest& request) {
    if (request.path != "/v3/lease/grant") return false;
    late = request;
    return true;
  });
  CHECK_FALSE(s.client.grant(9s));
  CHECK(eventually([&] { return s.tap->finished("/v3/lease/revoke") > 0; }));
  REQUIRE(s.etcd->perform(late, nullptr, {}));  // it comes after all
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
}

TEST_CASE("lease: keep_alive_once beside the automatic renewals") {
  Setup s;
  auto lease = s.grant();
  std::atomic<bool> over{false};
  {
    Joined renewing([&] {
      while (!over) CHECK(lease.keep_alive_once());
    });
    s.etcd->advance(60s);
    over = true;
  }
  CHECK(lease.held());
  CHECK(s.etcd->leases().size() == 1);
}

TEST_CASE("lease: a renewal that failed is tried again before its next turn") {
  Setup s;
  const auto lease = s.grant();
  s.tap->lose(1, kKeepAlive);
  s.etcd->advance(3001ms);
  CHECK(eventually([&] { return s.tap->count(kKeepAlive) == 1; }));
  s.etcd->advance(1s);
  CHECK(eventually([&] { return s.tap->finished(kKeepAlive) == 1; }));
}

namespace {

/// Grants every lease for a second, and renews it at endpoints as `renew` says.
struct Granting {
  using Renew = std::function<Answer(const std::string& endpoint, std::int64_t id)>;
  explicit Granting(Renew renew) {
    options.endpoints = {"one:1", "two:1"};
    options.clock = clock;
    etcd->always("/v3/kv/range", ok(line_of(7, 0)));
    etcd->always("/v3/lease/revoke", ok(line_of(7, 0)));
    etcd->always("/v3/lease/grant", [](const auto& request, const auto& sink, const auto& ctx) {
      return ok(line_of(7, id_of(request)))(request, sink, ctx);
    });
    etcd->always(kKeepAlive, Answer([=](const auto& request, const auto& sink, const auto& ctx) {
                   return renew(request.endpoint, id_of(request))(request, sink, ctx);
                 }));
  }
  static std::int64_t id_of(const HttpRequest& request) {
    const auto first = request.body.substr(0, request.body.find('\n'));
    const auto id = nlohmann::json::parse(first).at("ID");
    return id.is_string() ? std::stoll(id.get<std::string>()) : id.get<std::int64_t>();
  }
  static std::string line_of(int cluster, std::int64_t lease) {
    nlohmann::json line;
    line["header"] = {{"cluster_id", std::to_string(cluster)}, {"revision", "1"}};
    if (lease != 0) line["ID"] = std::to_string(lease);
    if (lease != 0) line["TTL"] = "1";
    return line.dump();
  }
  static Answer renewal(int cluster, std::int64_t lease) {
    return ok("{\"result\":" + line_of(cluster, lease) + "}\n");
  }

  const std::shared_ptr<ScriptedTransport> etcd{std::make_shared<ScriptedTransport>()};
  const std::shared_ptr<ManualClock> clock{std::make_shared<ManualClock>()};
  CoordinatorOptions options{options_with(etcd)};
};

}  // namespace

TEST_CASE("lease: what another cluster renews is not renewed") {
  const Granting granting([](const auto&, std::int64_t id) { return Granting::renewal(8, id); });
  auto c = connect_to(granting.options);
  const auto lease = c.client().grant(1s).value();
  granting.clock->advance(400ms);
  CHECK(eventually([&] { return granting.etcd->count(kKeepAlive) > 0; }));
  CHECK(lease.held());
  granting.clock->advance(600ms);
  CHECK_FALSE(lease.held());
}

TEST_CASE("lease: the renewal of another lease is none of this one") {
  const Granting granting(
      [](const auto&, std::int64_t id) { return Granting::renewal(7, id + 1); });
  auto c = connect_to(granting.options);
  auto lease = c.client().grant(1s).value();
  const auto renewed = lease.keep_alive_once();
  REQUIRE_FALSE(renewed);
  CHECK(renewed.error().code == ErrorCode::Internal);
  CHECK(lease.held());
  granting.clock->advance(1s);
  CHECK_FALSE(lease.held());
}

TEST_CASE("lease: a member that serves all but renewals is left for another one") {
  Notes asked;
  Granting granting([&](const auto& endpoint, std::int64_t id) {
    asked.add(endpoint);
    return asked.lines().front() == endpoint ? silence() : Granting::renewal(7, id);
  });
  auto c = connect_to(granting.options);
  const auto lease = c.client().grant(1s).value();
  granting.clock->advance(400ms);
  REQUIRE(eventually([&] { return asked.size() >= 2; }));
  CHECK(asked.lines()[1] != asked.lines()[0]);
}
