// Coordinator: options, endpoints, closing; and an etcd that stands still (SIGSTOP).
#include <doctest/doctest.h>

#include <cmath>
#include <future>
#include <thread>

#include "support/live.hpp"
#include "support/local_server.hpp"
#include "support/tcp_proxy.hpp"
#include "support/transports.hpp"

using namespace coordination;
using namespace support;

namespace {

/// A port at which nobody listens.
std::string dead_endpoint() { return "127.0.0.1:" + std::to_string(closed_port()); }

void check_works(const CoordinatorOptions& options) {
  auto connected = Coordinator::connect(options);
  REQUIRE_MESSAGE(connected, why(connected));
  connected->config().set("k", "v").value();
  CHECK(connected->config().get("k").value() == "v");
}

}  // namespace

TEST_CASE("connect: wrong options, before any byte is sent") {
  const LocalServer server("");
  const auto counting = std::make_shared<CountingTransport>();
  CoordinatorOptions good;
  good.endpoints = {server.endpoint()};
  good.transport = counting;
  const auto refuse = [&](const std::string& what, auto change) {
    CAPTURE(what);
    auto options = good;
    change(options);
    const auto invalid = validate(options);
    REQUIRE_FALSE(invalid);
    CHECK(invalid.error().code == ErrorCode::Validation);
    const auto connected = Coordinator::connect(options);
    REQUIRE_FALSE(connected);
    CHECK(connected.error().code == ErrorCode::Validation);
    CHECK(connected.error().outcome == Outcome::NotApplied);
  };
  using Options = CoordinatorOptions;
  CHECK(validate(good));
  CHECK(validate(default_coordinator_options()));
  refuse("no endpoints", [](Options& o) { o.endpoints.clear(); });
  for (const std::string bad :
       {"", "host:", ":2379", "host:0", "host:65536", "host:text", "ftp://host:1", "http://",
        "http://host:1/path", "ho st:1", "[::1:2379", "http://user@host:1"}) {
    refuse("endpoint '" + bad + "'", [&](Options& o) { o.endpoints = {bad}; });
    refuse("a second endpoint '" + bad + "'", [&](Options& o) { o.endpoints.push_back(bad); });
  }
  refuse("timeout 0", [](Options& o) { o.timeout = 0ms; });
  refuse("timeout -1", [](Options& o) { o.timeout = -1ms; });
  refuse("attempts -1", [](Options& o) { o.retry_config.max_attempts = -1; });
  refuse("initial delay 0", [](Options& o) { o.retry_config.initial_delay = 0ms; });
  refuse("initial delay -1", [](Options& o) { o.retry_config.initial_delay = -1ms; });
  refuse("max delay 0", [](Options& o) { o.retry_config.max_delay = 0ms; });
  refuse("multiplier 1", [](Options& o) { o.retry_config.multiplier = 1.0; });
  refuse("multiplier 0.5", [](Options& o) { o.retry_config.multiplier = 0.5; });
  refuse("multiplier NaN", [](Options& o) { o.retry_config.multiplier = std::nan(""); });
  refuse("password without user", [](Options& o) { o.password = "secret"; });
  refuse("certificate without key", [](Options& o) { o.tls.cert_file = "cert.pem"; });
  refuse("key without certificate", [](Options& o) { o.tls.key_file = "key.pem"; });
  CHECK(counting->requests() == 0);
  CHECK(server.connections() == 0);
}

TEST_CASE("connect: every spelling of an endpoint") {
  const auto& etcd = shared_etcd();
  auto options = options_for(etcd);
  SUBCASE("host:port") { options.endpoints = {etcd.endpoint()}; }
  SUBCASE("http://") { options.endpoints = {"http://" + etcd.endpoint()}; }
  SUBCASE("a name") { options.endpoints = {"localhost:" + std::to_string(etcd.port())}; }
  check_works(options);
}

TEST_CASE("connect: IPv6") {
  std::unique_ptr<EtcdServer> six;
  try {
    six = std::make_unique<EtcdServer>(EtcdOptions{"", {}, "http", "[::1]"});
  } catch (const std::exception&) {
    MESSAGE("SKIPPED: this machine has no IPv6");
    return;
  }
  auto options = options_for(*six);
  SUBCASE("[::1]:port") { options.endpoints = {six->endpoint()}; }
  SUBCASE("http://[::1]:port") { options.endpoints = {six->url()}; }
  check_works(options);
}

TEST_CASE("connect: dead members are passed over, a silent one costs its share of time only") {
  auto options = options_for(shared_etcd());
  const LocalServer silent("");
  const LocalServer page(LocalServer::http("200 OK", "text/html", "<html></html>"));
  SUBCASE("dead first") {
    options.endpoints = {dead_endpoint(), dead_endpoint(), shared_etcd().endpoint()};
  }
  SUBCASE("no etcd first") { options.endpoints = {page.endpoint(), shared_etcd().endpoint()}; }
  SUBCASE("silent first") { options.endpoints = {silent.endpoint(), shared_etcd().endpoint()}; }
  SUBCASE("unknown host first") {
    options.endpoints = {"no-such-host.invalid:2379", shared_etcd().endpoint()};
  }
  const Stopwatch watch;
  check_works(options);
  CHECK(watch.over(lenient(5s)) == 0);
}

TEST_CASE("connect: nobody there") {
  CoordinatorOptions options;
  const auto dead = dead_endpoint();
  options.endpoints = {dead};
  options.timeout = 2s;
  Stopwatch watch;
  const auto refused = Coordinator::connect(options);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == ErrorCode::Connection);
  CHECK(to_string(refused.error()).find(dead) != std::string::npos);
  CHECK(watch.over(lenient(2100ms)) == 0);

  const LocalServer silent("");
  options.endpoints = {silent.endpoint()};
  watch.reset();
  const auto late = Coordinator::connect(options, Context::with_timeout(300ms));
  REQUIRE_FALSE(late);
  CHECK(late.error().code == ErrorCode::Timeout);
  CHECK(watch.over(lenient(400ms)) == 0);
}

TEST_CASE("connect: nothing is left of a Coordinator that was never made") {
  const int threads = thread_count();
  for (int i = 0; i < 20; ++i) {
    CoordinatorOptions options;
    options.endpoints = {dead_endpoint()};
    options.timeout = 500ms;
    options.retry_config.max_attempts = 1;
    CHECK_FALSE(Coordinator::connect(options));
  }
  CHECK(wait_until([&] { return thread_count() <= threads; }, lenient(2s)));
}

TEST_CASE("logs: fields, levels, and silence by default") {
  LogKeeper log;
  auto options = options_for(shared_etcd());
  options.logger = log.logger();
  TcpProxy proxy(shared_etcd().port());
  options.endpoints = {proxy.endpoint()};
  options.retry_config.max_attempts = 1;
  auto coordinator = connect(options);
  coordinator.config().set("k", "a-secret-value").value();
  proxy.refuse();
  CHECK_FALSE(coordinator.config().get("k"));
  proxy.refuse(false);
  coordinator.close().value();
  CHECK(log.contains(proxy.endpoint()));
  CHECK_FALSE(log.contains("a-secret-value"));
}

TEST_CASE("close: within a second, may be repeated, and everything answers Cancelled afterwards") {
  auto options = options_for(shared_etcd());
  const int threads = thread_count();
  auto coordinator = connect(options);
  auto lock = coordinator.lock().acquire("x", 30s).value();
  ServiceInfo service{"1", "web", "10.0.0.1", 80};
  coordinator.registry().register_service(service).value();
  auto watch = coordinator.config().watch_prefix("").value();
  auto view = coordinator.registry().view("web").value();
  auto lease = coordinator.client().grant(30s).value();
  std::atomic<int> calls{0};
  auto subscription =
      coordinator.config().watch_prefix("", [&](const ConfigEvent&) { ++calls; }).value();
  int lost = 0;
  lock.on_lost([&](const Error&) { ++lost; });
  auto reader = std::async(std::launch::async, [&] { return watch.next().error().code; });
  auto waiter = std::async(std::launch::async,
                           [&] { return coordinator.lock().acquire("x", 30s).error().code; });
  Etcdctl ctl(shared_etcd());
  REQUIRE(wait_until([&] { return ctl.keys(options.key_prefix + "/locks/").size() == 2; },
                     lenient(5s)));

  const Stopwatch closing;
  CHECK(coordinator.close());
  CHECK(closing.over(lenient(1s)) == 0);
  CHECK(reader.get() == ErrorCode::Cancelled);
  CHECK(waiter.get() == ErrorCode::Cancelled);
  CHECK(wait_until([&] { return thread_count() <= threads; }, lenient(2s)));
  CHECK_MESSAGE(ctl.keys(options.key_prefix).empty(), "all was given back");

  CHECK(coordinator.close());
  CHECK_FALSE(lock.held());
  CHECK(lock.renew(5s).error().code == ErrorCode::Cancelled);
  CHECK(lock.unlock().error().code == ErrorCode::Cancelled);
  CHECK(lease.remaining().error().code == ErrorCode::Cancelled);
  CHECK(watch.next().error().code == ErrorCode::Cancelled);
  CHECK(coordinator.config().get("k").error().code == ErrorCode::Cancelled);
  CHECK(coordinator.lock().acquire("y", 5s).error().code == ErrorCode::Cancelled);
  CHECK(coordinator.registry().register_service(service).error().code == ErrorCode::Cancelled);
  CHECK(coordinator.client().put("k", "v").error().code == ErrorCode::Cancelled);
  CHECK_FALSE(view.connected());
  CHECK_MESSAGE(lost == 0, "given back is not lost");
}

TEST_CASE("close: from a handler, and handles destroyed after their Coordinator") {
  const auto options = options_for(shared_etcd());
  auto coordinator = std::make_unique<Coordinator>(connect(options));
  auto writer = connect(options);  // its request is not ended by the closing
  std::atomic<bool> closed{false};
  auto subscription = coordinator->config().watch(
      "k", [&](const ConfigEvent&) { closed = coordinator->close().has_value(); });
  REQUIRE_MESSAGE(subscription, why(subscription));
  writer.config().set("k", 1).value();
  CHECK(wait_until([&] { return closed.load(); }, lenient(2s)));

  auto second = std::make_unique<Coordinator>(connect(shared_etcd()));
  auto lock = second->lock().acquire("x", 30s).value();
  auto watch = second->config().watch("k").value();
  auto view = second->config().view("k").value();
  const Stopwatch destroying;
  second.reset();
  CHECK(destroying.over(lenient(1s)) == 0);
}

TEST_CASE("close: a moved Coordinator") {
  auto first = connect(shared_etcd());
  auto second = std::move(first);
  second.config().set("k", 1).value();
  first = connect(shared_etcd());
  first.config().set("k", 2).value();
  CHECK(second.config().get("k").value() == 1);
}

// == an etcd that stands still ==================================================================

namespace {

struct Standstill {
  EtcdServer server;
  std::shared_ptr<CountingTransport> transport{std::make_shared<CountingTransport>()};
  CoordinatorOptions options{counted(options_for(server))};
  std::unique_ptr<Coordinator> coordinator{std::make_unique<Coordinator>(connect(options))};

  ~Standstill() { server.continue_signal(); }

  CoordinatorOptions counted(CoordinatorOptions plain) const {
    plain.transport = transport;
    return plain;
  }
  template <class Call>
  void check_timeout(const std::string& what, Call call) {
    CAPTURE(what);
    const Stopwatch watch;
    const auto error = call(Context::with_timeout(250ms));
    CHECK(error.code == ErrorCode::Timeout);
    CHECK(watch.elapsed() >= 240ms);
    CHECK(watch.over(lenient(350ms)) == 0);
  }
};

}  // namespace

TEST_CASE_FIXTURE(Standstill, "SIGSTOP: every call ends at its deadline with Timeout [slow]") {
  auto& c = *coordinator;
  auto lock = c.lock().acquire("x", 600s).value();
  auto lease = c.client().grant(600s).value();
  auto other_lease = c.client().grant(600s).value();
  auto watch = c.config().watch("k").value();
  c.config().set("k", 1).value();
  CHECK(watch.next(Context::with_timeout(lenient(20s))));
  ServiceInfo service{"1", "web", "10.0.0.1", 80};
  service.ttl = 600s;
  c.registry().register_service(service).value();
  auto office = c.election().campaign("e", "me", 600s).value();
  auto second = c.election().campaign("f", "me", 600s).value();
  auto view = c.config().view("").value();
  const auto handler = [](const auto&) {};
  server.stop_signal();

  check_timeout("range", [&](Context ctx) { return c.client().range({"k"}, ctx).error(); });
  check_timeout("raw watch", [&](Context ctx) { return c.client().watch("k", ctx).error(); });
  check_timeout("revoke", [&](Context ctx) { return other_lease.revoke(ctx).error(); });
  check_timeout("guarded put", [&](Context ctx) { return lock.put("k", "v", ctx).error(); });
  check_timeout("guarded remove", [&](Context ctx) { return lock.remove("k", ctx).error(); });
  check_timeout("guarded commit", [&](Context ctx) {
    return lock.commit(Txn{}.then(Op::put("k", "v")), ctx).error();
  });
  check_timeout("shared",
                [&](Context ctx) { return c.lock().acquire_shared("y", 5s, ctx).error(); });
  check_timeout("permit",
                [&](Context ctx) { return c.lock().semaphore("y", 2).acquire(5s, ctx).error(); });
  check_timeout("with_lock", [&](Context ctx) {
    const auto nothing = [](Lock&) {};
    return c.lock().with_lock("y", 5s, nothing, ctx).error();
  });
  check_timeout("campaign",
                [&](Context ctx) { return c.election().campaign("e", "me", 5s, ctx).error(); });
  check_timeout("leader", [&](Context ctx) { return c.election().leader("e", ctx).error(); });
  check_timeout("observe", [&](Context ctx) { return c.election().observe("e", ctx).error(); });
  check_timeout("proclaim", [&](Context ctx) { return office.proclaim("you", ctx).error(); });
  check_timeout("resign", [&](Context ctx) { return second.resign(ctx).error(); });
  check_timeout("get_entry", [&](Context ctx) { return c.config().get_entry("k", ctx).error(); });
  check_timeout("get_as", [&](Context ctx) { return c.config().get_as<int>("k", ctx).error(); });
  check_timeout("compare_and_set",
                [&](Context ctx) { return c.config().compare_and_set("k", 1, 2, ctx).error(); });
  check_timeout("config remove", [&](Context ctx) { return c.config().remove("k", ctx).error(); });
  check_timeout("watch_prefix",
                [&](Context ctx) { return c.config().watch_prefix("", ctx).error(); });
  check_timeout("watch, called back",
                [&](Context ctx) { return c.config().watch("k", handler, ctx).error(); });
  check_timeout("service watch",
                [&](Context ctx) { return c.registry().watch("web", ctx).error(); });
  check_timeout("update", [&](Context ctx) { return c.registry().update("1", {}, ctx).error(); });
  check_timeout("config view", [&](Context ctx) { return c.config().view("", ctx).error(); });
  check_timeout("wait_for",
                [&](Context ctx) { return view.wait_for(view.revision() + 1000, ctx).error(); });
  check_timeout("get", [&](Context ctx) { return c.client().get("k", ctx).error(); });
  check_timeout("put", [&](Context ctx) { return c.client().put("k", "v", ctx).error(); });
  check_timeout("remove", [&](Context ctx) { return c.client().remove("k", ctx).error(); });
  check_timeout("commit", [&](Context ctx) {
    return c.client().commit(Txn{}.then(Op::put("k", "v")), ctx).error();
  });
  check_timeout("compact", [&](Context ctx) { return c.client().compact(1, ctx).error(); });
  check_timeout("status", [&](Context ctx) { return c.client().status(ctx).error(); });
  check_timeout("grant", [&](Context ctx) { return c.client().grant(5s, ctx).error(); });
  check_timeout("remaining", [&](Context ctx) { return lease.remaining(ctx).error(); });
  check_timeout("keep_alive", [&](Context ctx) { return lease.keep_alive_once(ctx).error(); });
  check_timeout("watch", [&](Context ctx) { return c.config().watch("j", ctx).error(); });
  check_timeout("next", [&](Context ctx) { return watch.next(ctx).error(); });
  check_timeout("acquire", [&](Context ctx) { return c.lock().acquire("y", 5s, ctx).error(); });
  check_timeout("try_acquire",
                [&](Context ctx) { return c.lock().try_acquire("y", 5s, ctx).error(); });
  check_timeout("renew", [&](Context ctx) { return lock.renew(60s, ctx).error(); });
  check_timeout("renew, other TTL", [&](Context ctx) { return lock.renew(30s, ctx).error(); });
  check_timeout("ttl", [&](Context ctx) { return lock.ttl(ctx).error(); });
  check_timeout("config get", [&](Context ctx) { return c.config().get("k", ctx).error(); });
  check_timeout("config set", [&](Context ctx) { return c.config().set("k", 2, ctx).error(); });
  check_timeout("list", [&](Context ctx) { return c.config().list("", ctx).error(); });
  check_timeout("discover", [&](Context ctx) { return c.registry().discover("web", ctx).error(); });
  check_timeout("register", [&](Context ctx) {
    return c.registry().register_service({"2", "web", "10.0.0.1", 80}, ctx).error();
  });
  check_timeout("unregister",
                [&](Context ctx) { return c.registry().unregister("1", ctx).error(); });
  check_timeout("view", [&](Context ctx) { return c.registry().view("web", ctx).error(); });
  check_timeout("connect", [&](Context ctx) { return Coordinator::connect(options, ctx).error(); });
  check_timeout("unlock", [&](Context ctx) { return lock.unlock(ctx).error(); });

  const Stopwatch closing;
  static_cast<void>(c.close());
  CHECK(closing.over(lenient(1s)) == 0);
}

TEST_CASE_FIXTURE(Standstill,
                  "SIGSTOP: a lock is not held any more before its TTL is over [slow]") {
  std::atomic<int> lost{0};  // these outlive their handler
  std::atomic<bool> right_code{false};
  auto lock = std::make_unique<Lock>(coordinator->lock().acquire("x", 3s).value());
  auto idle = coordinator->lock().acquire("idle", 60s).value();
  lock->on_lost([&](const Error& error) {
    right_code = error.code == ErrorCode::Lost;
    ++lost;
  });
  const auto renewals = transport->requests("/v3/lease/keepalive");
  CHECK(wait_until([&] { return transport->requests("/v3/lease/keepalive") > renewals; },
                   lenient(2s)));
  CHECK(lock->held());
  server.stop_signal();
  const Stopwatch stopped;
  CHECK(wait_until([&] { return !lock->held(); }, lenient(5s)));
  CHECK(stopped.over(3s + lenient(20ms)) == 0);
  CHECK(wait_until([&] { return lost == 1; }, lenient(500ms)));
  CHECK(right_code);

  Stopwatch destroying;
  lock.reset();
  CHECK(destroying.over(lenient(1s)) == 0);
  destroying.reset();
  { const auto given_up = std::move(idle); }
  CHECK(destroying.over(lenient(1s)) == 0);

  server.continue_signal();
  CHECK(never([&] { return lost > 1; }, 1500ms));
  const auto again = coordinator->lock().acquire("x", 3s, Context::with_timeout(lenient(8s)));
  CHECK_MESSAGE(again, why(again));
}

TEST_CASE_FIXTURE(Standstill, "SIGSTOP: all destructors return within a second") {
  auto& c = *coordinator;
  auto lock = std::make_unique<Lock>(c.lock().acquire("x", 60s).value());
  auto lease = std::make_unique<Lease>(c.client().grant(60s).value());
  auto watch = std::make_unique<Watch<ConfigEvent>>(c.config().watch("k").value());
  auto view = std::make_unique<ServiceView>(c.registry().view("web").value());
  auto subscription = std::make_unique<Subscription>(
      c.config().watch_prefix("", [](const ConfigEvent&) {}).value());
  c.registry().register_service({"1", "web", "10.0.0.1", 80}).value();
  server.stop_signal();
  const auto quick = [](auto& handle, const std::string& what) {
    CAPTURE(what);
    const Stopwatch watch_destroying;
    handle.reset();
    CHECK(watch_destroying.over(lenient(1s)) == 0);
  };
  quick(lock, "lock");
  quick(lease, "lease");
  quick(watch, "watch");
  quick(view, "view");
  quick(subscription, "subscription");
  quick(coordinator, "coordinator");
}

TEST_CASE("SIGSTOP: another member takes over [slow]") {
  EtcdServer server;
  TcpProxy first(server.port()), second(server.port());
  auto options = options_for(server);
  options.endpoints = {first.endpoint(), second.endpoint()};
  auto coordinator = connect(options);
  std::atomic<int> lost{0};  // outlives its handler
  auto lock = coordinator.lock().acquire("x", 8s).value();
  lock.on_lost([&](const Error&) { ++lost; });
  first.pause();
  const auto got = coordinator.client().get("none", Context::with_timeout(10s));
  CHECK(got.error().code == ErrorCode::NotFound);
  CHECK(never([&] { return !lock.held(); }, 10s));
  CHECK(lost == 0);
}
