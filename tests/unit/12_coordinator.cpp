// Section 12: options, connecting and closing.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <future>
#include <limits>
#include <nlohmann/json.hpp>
#include <thread>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"
#include "support/no_threads.hpp"
#include "support/scripted_transport.hpp"

using namespace coordination;
using namespace support;

namespace {

constexpr const char* kRange = "/v3/kv/range";

void check_invalid(const CoordinatorOptions& options, const std::string& names) {
  const auto valid = validate(options);
  CHECK_FALSE(valid);
  if (valid) return;
  INFO(text_of(valid));
  CHECK(valid.error().code == ErrorCode::Validation);
  CHECK(valid.error().message.find(names) != std::string::npos);
  const auto connected = Coordinator::connect(options);
  REQUIRE_FALSE(connected);
  CHECK(to_string(connected.error()) == to_string(valid.error()));
}

std::string endpoint_used(const std::string& endpoint, const TlsOptions& tls = {}) {
  const auto etcd = std::make_shared<ScriptedTransport>();
  auto options = options_with(etcd);
  options.endpoints = {endpoint};
  options.tls = tls;
  const auto connected = Coordinator::connect(options);
  CHECK_MESSAGE(connected, text_of(connected));
  CHECK(etcd->count() == 1);
  return etcd->endpoints().at(0);
}

}  // namespace

TEST_CASE("options: the defaults") {
  const auto options = default_coordinator_options();
  CHECK(options.endpoints == std::vector<std::string>{"localhost:2379"});
  CHECK(options.timeout == 5s);
  CHECK(options.retry_config.max_attempts == 3);
  CHECK(options.retry_config.initial_delay == 100ms);
  CHECK(options.retry_config.max_delay == 2s);
  CHECK(options.retry_config.multiplier == 2.0);
  CHECK(options.tls.verify_server);
  CHECK(options.username.empty());
  CHECK(options.key_prefix.empty());
  CHECK(validate(options));
}

TEST_CASE("options: endpoints as they may be written") {
  CHECK(endpoint_used("localhost:2379") == "http://localhost:2379");
  CHECK(endpoint_used("http://127.0.0.1:1") == "http://127.0.0.1:1");
  CHECK(endpoint_used("https://etcd.example:65535") == "https://etcd.example:65535");
  CHECK(endpoint_used("[::1]:2379") == "http://[::1]:2379");
  CHECK(endpoint_used("https://[fe80::1%25eth0]:2379") == "https://[fe80::1%25eth0]:2379");
  CHECK(endpoint_used("etcd") == "http://etcd:2379");
  CHECK(endpoint_used("https://etcd/") == "https://etcd:2379");
  CHECK(endpoint_used("http://etcd_0.example:01/") == "http://etcd_0.example:1");
  CHECK(endpoint_used("[::1]") == "http://[::1]:2379");
  CHECK(endpoint_used("[fe80::1%eth0]/") == "http://[fe80::1%eth0]:2379");
  CHECK(endpoint_used("\xc3\xb6rtchen:1") == "http://\xc3\xb6rtchen:1");
  TlsOptions tls;
  tls.ca_pem = "text";
  CHECK(endpoint_used("etcd:2379", tls) == "https://etcd:2379");
  tls = {};
  tls.ca_file = "ca.pem";
  CHECK(endpoint_used("etcd:2379", tls) == "https://etcd:2379");
  CHECK(endpoint_used("http://etcd:2379", tls) == "http://etcd:2379");
}

TEST_CASE("options: endpoints as they may not") {
  const auto etcd = std::make_shared<ScriptedTransport>();
  for (const char* endpoint : {"",
                               "/",
                               "host:",
                               ":2379",
                               ":",
                               "host:0",
                               "host:65536",
                               "host:99999999999",
                               "host:abc",
                               "host:-1",
                               "host:+1",
                               "host: 1",
                               "ftp://host:1",
                               "http://",
                               "https://",
                               "http://:1",
                               "host:2379//",
                               "https://host//",
                               "http://https://x:1",
                               "https://http://x:1",
                               "unix:///x:1",
                               "[x]:1",
                               "[1:2]3]:1",
                               "[::1]2379",
                               "[::1%]:1",
                               "x?a:1",
                               "x#:1",
                               "x\\y:1",
                               "x,y:1",
                               "x;rm:1",
                               "a\"b:1",
                               "host:2379/path",
                               "http://host/path:1",
                               "::1:2379",
                               "[]:1",
                               "ho st:1",
                               "joe@host:1",
                               "joe:pw@host:1",
                               "host:1:2",
                               "http://http://a:1",
                               "[::1:2379",
                               "::1]:2379",
                               "host\n:1",
                               "ho\xc2\x9bst:1",
                               "host:1\r\n"}) {
    INFO(std::string(endpoint));
    auto options = options_with(etcd);
    options.endpoints = {"fine:2379", endpoint};
    check_invalid(options, "endpoint");
  }
  auto options = options_with(etcd);
  options.endpoints = {"a:1,b:2"};
  check_invalid(options, "the endpoint \"a:1,b:2\" is not one, but several");
  options.endpoints = {"a\n\x1b[31m:1"};
  check_invalid(options, "the endpoint \"a\\x0a\\x1b[31m:1\" is not ");
  options.endpoints.clear();
  check_invalid(options, "endpoints");
  CHECK(etcd->count() == 0);
}

TEST_CASE("options: everything else that may be wrong") {
  const auto etcd = std::make_shared<ScriptedTransport>();
  using Change = std::function<void(CoordinatorOptions&)>;
  const std::pair<const char*, Change> cases[] = {
      {"timeout", [](auto& o) { o.timeout = 0ms; }},
      {"timeout", [](auto& o) { o.timeout = -1ms; }},
      {"multiplier", [](auto& o) { o.retry_config.multiplier = 1.0; }},
      {"multiplier", [](auto& o) { o.retry_config.multiplier = -2; }},
      {"multiplier",
       [](auto& o) { o.retry_config.multiplier = std::numeric_limits<double>::quiet_NaN(); }},
      {"delay", [](auto& o) { o.retry_config.initial_delay = 0ms; }},
      {"delay", [](auto& o) { o.retry_config.max_delay = -1ms; }},
      {"max_attempts", [](auto& o) { o.retry_config.max_attempts = -1; }},
      {"password", [](auto& o) { o.password = "secret"; }},
      {"tls", [](auto& o) { o.tls.cert_file = "cert.pem"; }},
      {"tls", [](auto& o) { o.tls.key_file = "key.pem"; }},
      {"tls", [](auto& o) { o.tls.cert_pem = "text"; }},
      {"limits", [](auto& o) { o.limits.head = 0; }},
      {"limits", [](auto& o) { o.limits.body = 0; }},
      {"key_prefix", [](auto& o) { o.key_prefix = "app"; }},
      {"key_prefix", [](auto& o) { o.key_prefix = "/"; }},
      {"key_prefix", [](auto& o) { o.key_prefix = "/app/"; }},
      {"key_prefix", [](auto& o) { o.key_prefix = "/a//b"; }},
      {"key_prefix", [](auto& o) { o.key_prefix = "/a/../b"; }}};
  for (const auto& entry : cases) {
    const auto& names = entry.first;  // INFO's lambda cannot take a structured binding
    const auto& change = entry.second;
    INFO(std::string(names));
    auto options = options_with(etcd);
    change(options);
    check_invalid(options, names);
    CHECK(validate(options).error().message.find("secret") == std::string::npos);
  }
  CHECK(etcd->count() == 0);
  auto good = options_with(etcd);
  good.key_prefix = "/tenants/a";
  good.username = "joe";
  good.retry_config.multiplier = 1.01;
  good.retry_config.max_attempts = 0;
  CHECK(validate(good));
}

TEST_CASE("connect: it tries every endpoint until one answers") {
  const auto etcd = std::make_shared<ScriptedTransport>();
  auto options = options_with(etcd);
  options.endpoints = {"one:2379", "two:2379", "three:2379"};
  etcd->endpoint("http://one:2379", refused());
  etcd->endpoint("http://two:2379", answer(404, "404 page not found\n"));
  const auto connected = Coordinator::connect(options);
  REQUIRE_MESSAGE(connected, text_of(connected));
  CHECK(etcd->endpoints() ==
        std::vector<std::string>{"http://one:2379", "http://two:2379", "http://three:2379"});
}

TEST_CASE("connect: if none answers, the error says why") {
  const auto etcd = std::make_shared<ScriptedTransport>();
  auto options = options_with(etcd);
  options.endpoints = {"one:2379", "two:2379"};
  options.timeout = lenient(200ms);
  const auto code_of = [&](const Answer& always) {
    etcd->always(kRange, always);
    const Stopwatch watch;
    const auto connected = Coordinator::connect(options);
    CHECK(watch.over(lenient(400ms)) == 0);
    REQUIRE_FALSE(connected);
    return std::string(to_string(connected.error().code));
  };
  CHECK(code_of(refused()) == "CONNECTION_ERROR");
  CHECK(code_of(answer(404, "404 page not found\n")) == "SERVICE_UNAVAILABLE");
  CHECK(code_of(etcd_error(503, 14, "etcdserver: no leader")) == "SERVICE_UNAVAILABLE");
  CHECK(code_of(answer(200, "<html></html>")) == "INTERNAL_ERROR");
  CHECK(code_of(silence()) == "TIMEOUT_ERROR");
}

TEST_CASE("connect: that nobody verifies the server is said once, and loudly") {
  std::vector<std::string> warnings;
  auto options = options_with(std::make_shared<ScriptedTransport>());
  options.logger = [&](LogLevel level, std::string_view message, const LogFields&) {
    if (level >= LogLevel::Warn) warnings.emplace_back(message);
  };
  CHECK(Coordinator::connect(options));  // the log is complete when it has been closed
  CHECK(warnings.empty());
  options.tls.verify_server = false;
  auto connected = Coordinator::connect(options);
  REQUIRE(connected);
  CHECK(connected.value().client().get("a").error().code == ErrorCode::NotFound);
  connected.value().close().value();
  REQUIRE(warnings.size() == 1);
  CHECK(warnings[0].find("tls.verify_server is false") == 0);
}

TEST_CASE("connect: its Context ends it") {
  const auto etcd = std::make_shared<ScriptedTransport>();
  etcd->always(kRange, silence());
  const Stopwatch watch;
  const auto late = Coordinator::connect(options_with(etcd), Context::with_timeout(30ms));
  REQUIRE_FALSE(late);
  CHECK(late.error().code == ErrorCode::Timeout);
  CHECK(watch.over(lenient(130ms)) == 0);
  const Context ctx;
  ctx.cancel();
  etcd->clear();
  const auto cancelled = Coordinator::connect(options_with(etcd), ctx);
  REQUIRE_FALSE(cancelled);
  CHECK(cancelled.error().code == ErrorCode::Cancelled);
  CHECK(etcd->count() == 0);
}

TEST_CASE("connect: a user who may not read the first key is connected all the same") {
  const auto etcd = std::make_shared<ScriptedTransport>();
  etcd->always(kRange, etcd_error(403, 7, "etcdserver: permission denied"));
  CHECK(Coordinator::connect(options_with(etcd)));
}

TEST_CASE("connect: a logger that throws does no harm") {
  const auto etcd = std::make_shared<ScriptedTransport>();
  auto options = options_with(etcd);
  int lines = 0;
  options.logger = [&](LogLevel, std::string_view, const LogFields&) {
    ++lines;
    throw std::runtime_error("disk full");
  };
  CHECK(Coordinator::connect(options));
  CHECK(lines > 0);
}

TEST_CASE("log: a logger that blocks keeps nothing waiting but the log") {
  const Cluster cluster;
  Notes log, notes;
  std::promise<void> released;
  const auto open = released.get_future().share();
  auto options = cluster.options("two");
  options.logger = [&, write = log.logger()](LogLevel level, std::string_view message,
                                             const LogFields& fields) {
    open.wait();
    write(level, message, fields);
  };
  auto c = connect_to(options);
  auto kept = c.client().grant(9s).value(), lost = c.client().grant(9s).value();
  lost.on_lost(notes.on_lost());
  cluster.etcd->expire_lease(lost.id());
  for (int i = 0; i < 5; ++i) {
    const int before = cluster.tap->finished("/v3/lease/keepalive");
    cluster.etcd->advance(3001ms);
    CHECK(eventually([&] { return cluster.tap->finished("/v3/lease/keepalive") > before; }));
  }
  CHECK(kept.held());
  CHECK(eventually([&] { return notes.size() == 1; }));
  CHECK(log.size() == 0);
  SUBCASE("and all is written when it goes on") {
    released.set_value();
    CHECK(c.close());
    REQUIRE(eventually([&] { return log.size() > 0; }));
    CHECK(log.lines().front().find("INFO connected") == 0);
  }
  SUBCASE("and close() does not wait for it") {
    const Stopwatch watch;
    CHECK(c.close());
    CHECK(watch.over(lenient(1500ms)) == 0);
    released.set_value();
    CHECK(eventually([&] { return log.size() == 1; }));  // the one that it was about to write
  }
}

TEST_CASE("clock: one that throws is one that goes on as before, and it is said once") {
  struct Faulty : Clock {
    std::atomic<bool> throws{false};
    time_point now() const override {
      if (throws) throw std::runtime_error("no battery");
      return std::chrono::steady_clock::now() + 1h;
    }
  };
  const Cluster cluster;
  const auto clock = std::make_shared<Faulty>();
  Notes log;
  auto options = cluster.options();
  options.clock = clock;
  options.logger = log.logger();
  auto c = connect_to(options);
  auto lease = c.client().grant(5s).value();
  clock->throws = true;
  const int before = cluster.tap->finished("/v3/lease/keepalive");
  CHECK(lease.held());
  CHECK(wait_until([&] { return cluster.tap->finished("/v3/lease/keepalive") > before + 1; },
                   lenient(20s)));
  CHECK(lease.held());
  c.close().value();
  const auto lines = log.lines();
  const auto said = [](const std::string& line) {
    return line == "ERROR the Clock throws what=no battery";
  };
  CHECK(std::count_if(lines.begin(), lines.end(), said) == 1);
}

TEST_CASE("threads: where there are none to be had, it is said, and all is done later" *
          doctest::skip(sanitized())) {
  const Cluster cluster;
  Notes log, notes;
  auto options = cluster.options();
  options.logger = log.logger();
  {
    const NoThreads none;
    const auto refused = Coordinator::connect(options);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code == ErrorCode::Unavailable);
    CHECK(refused.error().cause == "the system has no thread to give");
  }
  auto c = connect_to(options);
  auto lease = c.client().grant(9s).value();
  lease.on_lost(notes.on_lost());
  {
    const NoThreads none;
    cluster.etcd->expire_lease(lease.id());
    std::thread clock;  // cannot be made
    CHECK_THROWS(clock = std::thread([] {}));
    cluster.etcd->advance(9s);
    CHECK(notes.size() == 0);
  }
  CHECK(wait_until([&] { return notes.size() == 1; }, 10s));
  c.close().value();
  const auto lines = log.lines();
  const auto said = [](const std::string& line) {
    return line == "ERROR the system has no thread to give; it is asked again";
  };
  CHECK(std::count_if(lines.begin(), lines.end(), said) >= 1);
}

TEST_CASE("close: it may be repeated, and every service answers Cancelled from then on") {
  const auto etcd = std::make_shared<ScriptedTransport>();
  auto c = connect_to(options_with(etcd));
  CHECK(c.close());
  CHECK(c.close());
  etcd->clear();
  const auto cancelled = [](const auto& result) {
    CHECK_FALSE(result);
    if (!result) CHECK_MESSAGE(result.error().code == ErrorCode::Cancelled, text_of(result));
  };
  cancelled(c.client().get("a"));
  cancelled(c.client().put("a", "b"));
  cancelled(c.client().grant(10s));
  cancelled(c.client().watch("a"));
  cancelled(c.client().status());
  cancelled(c.lock().acquire("a", 10s));
  cancelled(c.lock().try_acquire("a", 10s));
  cancelled(c.lock().acquire_shared("a", 10s));
  cancelled(c.lock().semaphore("a", 1).acquire(10s));
  cancelled(c.election().campaign("a", "b", 10s));
  cancelled(c.election().leader("a"));
  cancelled(c.election().observe("a"));
  cancelled(c.registry().register_service({"id", "name", "host", 80}));
  cancelled(c.registry().unregister("id"));
  cancelled(c.registry().discover("name"));
  cancelled(c.registry().watch("name"));
  cancelled(c.registry().view("name"));
  cancelled(c.config().get("a"));
  cancelled(c.config().set("a", 1));
  cancelled(c.config().compare_and_set("a", 0, 1));
  cancelled(c.config().remove("a"));
  cancelled(c.config().list(""));
  cancelled(c.config().watch("a"));
  cancelled(c.config().watch_prefix("a"));
  cancelled(c.config().view("a"));
  CHECK(etcd->count() == 0);
}

TEST_CASE("close: within a second, whatever the transport does") {
  const auto within_a_second = [](const Answer& hang,
                                  const std::function<void(std::unique_ptr<Coordinator>&)>& end) {
    const auto etcd = std::make_shared<ScriptedTransport>();
    etcd->always("/v3/lease/grant",
                 [](const HttpRequest& request, const auto&, const auto&) -> Result<HttpResponse> {
                   const auto id = nlohmann::json::parse(request.body)["ID"].get<std::string>();
                   return HttpResponse{200, reply(1, "\"ID\":\"" + id + "\",\"TTL\":\"10\"")};
                 });
    auto c = std::make_unique<Coordinator>(connect_to(options_with(etcd)));
    auto lease = c->client().grant(10s);
    REQUIRE_MESSAGE(lease, text_of(lease));
    auto watch = c->client().watch("a");
    REQUIRE_MESSAGE(watch, text_of(watch));
    for (const char* path : {"/v3/lease/revoke", "/v3/lease/keepalive", "/v3/watch", kRange}) {
      etcd->always(path, hang);
    }
    const Stopwatch stopwatch;
    end(c);
    CHECK(stopwatch.over(lenient(1s)) == 0);
    CHECK_FALSE(lease->held());
    const auto event = watch->next();
    REQUIRE_FALSE(event);
    CHECK(event.error().code == ErrorCode::Cancelled);
  };
  SUBCASE("close, and requests that have no answer") {
    within_a_second(silence(), [](auto& c) { CHECK(c->close()); });
  }
  SUBCASE("the destructor, and a transport that does not look at deadlines") {
    within_a_second(deaf_to_deadlines(), [](auto& c) { c.reset(); });
  }
}

TEST_CASE("coordinator: it can be moved, and what it replaces is closed") {
  const auto one = std::make_shared<ScriptedTransport>();
  const auto two = std::make_shared<ScriptedTransport>();
  auto first = connect_to(options_with(one));
  auto second = connect_to(options_with(two));
  auto old_client = first.client();
  one->clear();
  two->clear();
  first = std::move(second);
  CHECK(first.client().range({"a"}));
  CHECK(two->count() == 1);
  const auto closed = old_client.range({"a"});
  REQUIRE_FALSE(closed);
  CHECK(closed.error().code == ErrorCode::Cancelled);
  CHECK(one->count() == 0);
  Coordinator third(std::move(first));
  CHECK(third.client().range({"a"}));
  CHECK(third.close());
}

TEST_CASE("connect: the login and the first read share one time limit") {
  const auto etcd = std::make_shared<ScriptedTransport>();
  etcd->always("/v3/auth/authenticate", after(lenient(300ms), ok(reply(0, R"("token":"t")"))));
  etcd->always(kRange, silence());
  auto options = options_with(etcd);
  options.username = "u";
  options.password = "p";
  options.timeout = lenient(400ms);
  const Stopwatch watch;
  const auto connected = Coordinator::connect(options);
  CHECK_FALSE(connected);
  CHECK(watch.over(lenient(600ms)) == 0);
  CHECK(etcd->count(kRange) >= 1);
  CHECK(etcd->count(kRange) <= 2);  // the member that is late is looked at
}

TEST_CASE("grant: the grant and the renewal that a slow one needs share one time limit") {
  const auto etcd = std::make_shared<ScriptedTransport>();
  auto options = options_with(etcd);
  const milliseconds ttl = lenient(2s);
  options.timeout = lenient(1400ms);
  options.retry_config.max_attempts = 1;
  auto c = connect_to(options);
  const auto granted = R"("ID":"1","TTL":")" + std::to_string(ttl / 1s) + '"';
  etcd->always("/v3/lease/grant", after(lenient(1100ms), ok(reply(5, granted))));
  etcd->always("/v3/lease/keepalive", silence());
  const Stopwatch watch;
  CHECK_FALSE(c.client().grant(ttl));
  CHECK(watch.over(lenient(1900ms)) == 0);
  CHECK(etcd->count("/v3/lease/keepalive") == 1);
}

namespace {

/// `handle` is empty when this returns, and what was in it has ended.
template <class Handle>
void move_out_of(Handle& handle) {
  const Handle taken(std::move(handle));
}

template <class T>
void check_empty(const Result<T>& result) {
  CHECK_FALSE(result);
  if (!result) CHECK_MESSAGE(result.error().code == ErrorCode::Cancelled, text_of(result));
}

}  // namespace

TEST_CASE("coordinator: handles that were moved from answer") {
  Cluster cluster;
  auto c = cluster.connect();
  SUBCASE("a lock") {
    auto lock = c.lock().acquire("a", 9s).value();
    move_out_of(lock);
    CHECK_FALSE(lock.held());
    CHECK(lock.key().empty());
    CHECK(lock.fencing_token() == 0);
    lock.on_lost([](const Error&) { FAIL("of nothing"); });
    check_empty(lock.unlock());
    check_empty(lock.unlock());
    check_empty(lock.renew(9s));
    check_empty(lock.ttl());
    check_empty(lock.put("k", "v"));
    check_empty(lock.commit(Txn().then(Op::put("k", "v"))));
    const auto guarded = c.client().commit(Txn().when(lock.guard()).then(Op::put("k", "v")));
    CHECK_FALSE((guarded && guarded->succeeded));
    CHECK(cluster.etcd->keys().empty());
    lock = c.lock().acquire("a", 9s).value();
    CHECK(lock.held());
  }
  SUBCASE("an office") {
    auto office = c.election().campaign("a", "v", 9s).value();
    move_out_of(office);
    CHECK_FALSE(office.held());
    check_empty(office.proclaim("w"));
    check_empty(office.resign());
  }
  SUBCASE("a lease") {
    auto lease = c.client().grant(9s).value();
    move_out_of(lease);
    CHECK_FALSE(lease.held());
    CHECK(lease.id() == 0);
    CHECK(lease.ttl() == 0ms);
    CHECK(lease.detach() == 0);
    lease.on_lost([](const Error&) { FAIL("of nothing"); });
    check_empty(lease.remaining());
    check_empty(lease.keep_alive_once());
    check_empty(lease.revoke());
  }
  SUBCASE("watches") {
    auto watch = c.config().watch("k").value();
    move_out_of(watch);
    check_empty(watch.next());
    watch.cancel();
    auto subscription = c.config().watch("k", [](const ConfigEvent&) {}).value();
    move_out_of(subscription);
    subscription.cancel();
  }
  SUBCASE("views") {
    auto services = c.registry().view("web").value();
    move_out_of(services);
    CHECK(services.instances().empty());
    CHECK_FALSE(services.connected());
    check_empty(services.pick());
    check_empty(services.wait_for(1));
    services.on_change([] { FAIL("of nothing"); });
    auto config = c.config().view("app").value();
    move_out_of(config);
    CHECK(config.keys().empty());
    check_empty(config.get("app/a"));
    check_empty(config.get_entry("app/a"));
    check_empty(config.wait_for(1));
  }
  SUBCASE("a Coordinator, and what was taken from it") {
    auto& lock = c.lock();
    auto semaphore = c.lock().semaphore("s", 1);
    move_out_of(c);
    CHECK(c.close());
    check_empty(lock.acquire("a", 9s));
    check_empty(semaphore.acquire(9s));
    check_empty(c.registry().discover("web"));
    check_empty(c.registry().register_service({"i", "web", "host", 1}));
    check_empty(c.config().get("k"));
    check_empty(c.config().watch("k"));
    check_empty(c.election().leader("e"));
    check_empty(c.client().get("k"));
    check_empty(c.client().grant(9s));
  }
}
