// Services on a real etcd: records, events, views, and what a registration survives.
#include <doctest/doctest.h>

#include <mutex>
#include <set>
#include <thread>

#include "support/live.hpp"
#include "support/tcp_proxy.hpp"
#include "support/transports.hpp"

using namespace coordination;
using namespace support;

namespace {

constexpr auto kSoon = 30s;

ServiceInfo service(const std::string& id, const std::string& name = "web", int port = 8080) {
  ServiceInfo info;
  info.id = id;
  info.name = name;
  info.address = "10.0.0.1";
  info.port = port;
  info.metadata = {{"zone", "a"}, {"größe", "\"1\"\n"}};
  info.ttl = 20s;
  return info;
}

struct Fixture {
  CoordinatorOptions options{options_for(shared_etcd())};
  LogKeeper log;
  Coordinator coordinator{connect([this] {
    options.logger = log.logger();
    return options;
  }())};
  Coordinator other{connect(options)};
  ServiceRegistry& registry{coordinator.registry()};
  ServiceRegistry& reader{other.registry()};
  Client& client{coordinator.client()};
  Etcdctl ctl{shared_etcd()};

  std::string key(const std::string& id, const std::string& name = "web") const {
    return options.key_prefix + "/services/" + name + "/" + id;
  }
  std::vector<std::string> ids(const std::string& name = "web") {
    std::vector<std::string> result;
    for (const auto& info : reader.discover(name).value()) result.push_back(info.id);
    return result;
  }
  std::string lease_of(const std::string& id) {
    std::ostringstream hex;
    hex << std::hex << client.get(key(id)).value().lease;
    return hex.str();
  }
};

using Ids = std::vector<std::string>;

}  // namespace

TEST_CASE_FIXTURE(Fixture, "registry: a service is found with all that it said, until it is gone") {
  const auto info = service("1");
  REQUIRE(registry.register_service(info));
  const auto found = reader.discover("web").value();
  REQUIRE(found.size() == 1);
  CHECK(found[0] == info);
  CHECK(found[0].metadata.at("größe") == "\"1\"\n");
  CHECK(client.get(key("1")).value().lease != 0);
  CHECK(registry.unregister("1"));
  CHECK(reader.discover("web").value().empty());
  CHECK_FALSE(client.get(key("1")));
  const auto again = registry.unregister("1");
  REQUIRE_FALSE(again);
  CHECK(again.error().code == ErrorCode::NotFound);
}

TEST_CASE_FIXTURE(Fixture, "registry: many instances by id, and names that begin alike") {
  for (const auto* id : {"b", "a", "c"}) registry.register_service(service(id)).value();
  registry.register_service(service("x", "web2")).value();
  registry.register_service(service("y", "we")).value();
  CHECK(ids() == Ids{"a", "b", "c"});
  CHECK(ids("web2") == Ids{"x"});
  CHECK(ids("nothing").empty());
}

TEST_CASE_FIXTURE(Fixture, "registry: bad services, before anything is sent") {
  const auto counting = std::make_shared<CountingTransport>();
  auto counted_options = options;
  counted_options.transport = counting;
  auto counted = connect(counted_options);
  counting->reset();
  const auto refuse = [&](const std::string& what, auto change) {
    CAPTURE(what);
    auto info = service("1");
    change(info);
    const auto refused = counted.registry().register_service(info);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code == ErrorCode::Validation);
    CHECK(refused.error().outcome == Outcome::NotApplied);
  };
  refuse("no id", [](ServiceInfo& s) { s.id = ""; });
  refuse("no name", [](ServiceInfo& s) { s.name = ""; });
  refuse("no address", [](ServiceInfo& s) { s.address = ""; });
  refuse("slash in id", [](ServiceInfo& s) { s.id = "a/b"; });
  refuse("slash in name", [](ServiceInfo& s) { s.name = "a/b"; });
  refuse("id ..", [](ServiceInfo& s) { s.id = ".."; });
  refuse("name .", [](ServiceInfo& s) { s.name = "."; });
  refuse("port 0", [](ServiceInfo& s) { s.port = 0; });
  refuse("port -1", [](ServiceInfo& s) { s.port = -1; });
  refuse("port 65536", [](ServiceInfo& s) { s.port = 65536; });
  refuse("TTL 0", [](ServiceInfo& s) { s.ttl = 0ms; });
  refuse("TTL -1", [](ServiceInfo& s) { s.ttl = -1ms; });
  for (const std::string bad : {"", "a/b", ".."}) {
    CHECK(counted.registry().discover(bad).error().code == ErrorCode::Validation);
    CHECK(counted.registry().watch(bad).error().code == ErrorCode::Validation);
    CHECK(counted.registry().view(bad).error().code == ErrorCode::Validation);
  }
  CHECK(counting->requests() == 0);
  auto edge = service("edge");
  edge.port = 65535;
  CHECK(registry.register_service(edge));
}

TEST_CASE_FIXTURE(Fixture, "registry: a corrupt record is skipped and logged, never fatal") {
  registry.register_service(service("good")).value();
  const std::vector<std::string> corrupt{"",
                                         "no json",
                                         "[1]",
                                         "{\"id\":7}",
                                         "{\"id\":\"x\",\"name\":\"web\",\"port\":\"text\"}",
                                         std::string(100'000, '['),
                                         "\xff\xfe"};
  auto watch = reader.watch("web").value();
  for (std::size_t i = 0; i < corrupt.size(); ++i) {
    client.put(key("bad" + std::to_string(i)), corrupt[i]).value();
  }
  CHECK(ids() == Ids{"good"});
  CHECK(wait_until([&] { return log.contains("bad1"); }, lenient(2s)));
  registry.register_service(service("later")).value();
  const auto event = watch.next(Context::with_timeout(lenient(kSoon))).value();
  CHECK(event.type == EventType::Put);
  CHECK(event.service.id == "later");
  const auto view = reader.view("web").value();
  CHECK(view.instances().size() == 2);
}

TEST_CASE_FIXTURE(Fixture, "registry: events in order; a Delete carries the last record") {
  auto watch = reader.watch("web").value();
  auto info = service("1");
  registry.register_service(info).value();
  registry.register_service(service("2", "other")).value();
  info.port = 9090;
  registry.register_service(info).value();
  registry.unregister("1").value();

  const auto first = watch.next(Context::with_timeout(lenient(kSoon))).value();
  CHECK(first.type == EventType::Put);
  CHECK(first.service == service("1"));
  CHECK(first.revision > 0);
  const auto age = std::chrono::system_clock::now() - first.timestamp;
  CHECK(age >= 0s);
  CHECK(age < lenient(5s));
  const auto second = watch.next(Context::with_timeout(lenient(kSoon))).value();
  CHECK(second.type == EventType::Put);
  CHECK(second.service == info);
  CHECK(second.revision > first.revision);
  const auto third = watch.next(Context::with_timeout(lenient(kSoon))).value();
  CHECK(third.type == EventType::Delete);
  CHECK(third.service == info);
  CHECK(third.revision > second.revision);
  CHECK(watch.next(Context::with_timeout(100ms)).error().code == ErrorCode::Timeout);
}

TEST_CASE_FIXTURE(Fixture, "registry: events called back, and the state at the beginning") {
  registry.register_service(service("1")).value();
  registry.register_service(service("2")).value();
  std::mutex mutex;
  Ids seen;
  const auto note = [&](const ServiceEvent& event) {
    std::lock_guard<std::mutex> hold(mutex);
    seen.push_back(std::string(to_string(event.type)) + " " + event.service.id);
  };
  WatchOptions existing;
  existing.include_existing = true;
  auto subscription = reader.watch("web", note, existing).value();
  const auto seen_now = [&] {
    std::lock_guard<std::mutex> hold(mutex);
    return seen;
  };
  CHECK(wait_until([&] { return seen_now().size() == 2; }, lenient(5s)));
  registry.register_service(service("3")).value();
  registry.unregister("1").value();
  CHECK(wait_until([&] { return seen_now().size() == 4; }, lenient(5s)));
  CHECK(seen_now() == Ids{"PUT 1", "PUT 2", "PUT 3", "DELETE 1"});
  subscription.cancel();
  registry.unregister("2").value();
  CHECK(never([&] { return seen_now().size() > 4; }, 200ms));

  auto pulled = reader.watch("web", existing).value();
  CHECK(pulled.next(Context::with_timeout(lenient(kSoon))).value().service.id == "3");
}

TEST_CASE_FIXTURE(Fixture, "registry: it renews itself, whatever becomes of the Context [slow]") {
  auto info = service("1");
  info.ttl = 4s;
  const auto ctx = Context::with_timeout(lenient(20s));
  registry.register_service(info, ctx).value();
  ctx.cancel();
  CHECK(never([&] { return ids() != Ids{"1"}; }, 12500ms));
}

TEST_CASE_FIXTURE(Fixture, "registry: close takes all registrations back at once") {
  registry.register_service(service("1")).value();
  registry.register_service(service("2", "db")).value();
  coordinator.close().value();
  CHECK(ids().empty());
  CHECK(ids("db").empty());
}

TEST_CASE_FIXTURE(Fixture, "registry: unregister takes back only what this Coordinator has made") {
  registry.register_service(service("1")).value();
  reader.register_service(service("2")).value();
  CHECK(registry.unregister("2").error().code == ErrorCode::NotFound);
  CHECK(ids() == Ids{"1", "2"});
  registry.register_service(service("1", "db")).value();
  CHECK(registry.unregister("1"));
  CHECK(ids() == Ids{"2"});
  CHECK_MESSAGE(ids("db").empty(), "every registration with this id");
}

TEST_CASE_FIXTURE(Fixture, "registry: the same id again replaces the record without a gap") {
  auto info = service("1");
  registry.register_service(info).value();
  auto watch = reader.watch("web").value();
  for (int port = 1; port <= 5; ++port) {
    info.port = port;
    info.ttl = port % 2 == 0 ? 20s : 30s;  // another lease, too
    registry.register_service(info).value();
  }
  for (int port = 1; port <= 5; ++port) {
    const auto event = watch.next(Context::with_timeout(lenient(kSoon))).value();
    CHECK(event.type == EventType::Put);
    CHECK(event.service.port == port);
  }
  CHECK(watch.next(Context::with_timeout(300ms)).error().code == ErrorCode::Timeout);
  CHECK(reader.discover("web").value().at(0) == info);
}

TEST_CASE_FIXTURE(Fixture, "registry: a rolling restart under one id, a hundred times") {
  for (int round = 0; round < scaled(100); ++round) {
    auto going = connect(options);
    REQUIRE(going.registry().register_service(service("1", "web", 1)));
    std::thread coming([&] { CHECK(registry.register_service(service("1", "web", 2))); });
    static_cast<void>(going.registry().update("1", {{"state", "draining"}}));
    static_cast<void>(going.registry().unregister("1"));
    coming.join();
    going.close().value();
    CHECK(reader.discover("web").value() == std::vector<ServiceInfo>{service("1", "web", 2)});
  }
}

TEST_CASE_FIXTURE(Fixture, "registry: a record that vanished comes back by itself [slow]") {
  struct Told {
    std::mutex mutex;
    std::vector<RegistrationEvent> events;
  };
  const auto told = std::make_shared<Told>();
  auto info = service("1");
  info.ttl = 6s;
  RegisterOptions handling;
  handling.on_event = [told](RegistrationEvent event, const ServiceInfo&) {
    std::lock_guard<std::mutex> hold(told->mutex);
    told->events.push_back(event);
  };
  const auto told_at_least = [&](RegistrationEvent event, int times) {
    std::lock_guard<std::mutex> hold(told->mutex);
    return std::count(told->events.begin(), told->events.end(), event) >= times;
  };
  registry.register_service(info, handling).value();

  SUBCASE("its lease was revoked") { REQUIRE(ctl.run({"lease", "revoke", lease_of("1")}).ok()); }
  SUBCASE("its key was deleted") { REQUIRE(ctl.run({"del", key("1")}).ok()); }
  CHECK(wait_until([&] { return ids() == Ids{"1"}; }, lenient(5s)));
  CHECK(wait_until([&] { return told_at_least(RegistrationEvent::Registered, 1); }, lenient(2s)));
  CHECK(wait_until([&] { return told_at_least(RegistrationEvent::Lost, 1); }, lenient(2s)));
  CHECK(reader.discover("web").value().at(0) == info);
  CHECK(never([&] { return ids() != Ids{"1"}; }, 6500ms));
}

TEST_CASE_FIXTURE(Fixture, "registry: a record that vanished stays away if it was told to") {
  auto info = service("1");
  info.ttl = 2s;
  const auto lost = std::make_shared<std::atomic<int>>(0);  // the Coordinator outlives this block
  RegisterOptions handling;
  handling.heal = HealPolicy::NotifyOnly;
  handling.on_event = [lost](RegistrationEvent event, const ServiceInfo& about) {
    if (event == RegistrationEvent::Lost && about.id == "1") ++*lost;
  };
  registry.register_service(info, handling).value();
  REQUIRE(ctl.run({"lease", "revoke", lease_of("1")}).ok());
  CHECK(wait_until([&] { return *lost == 1; }, lenient(4s)));
  CHECK(never([&] { return !ids().empty(); }, 1500ms));
  registry.unregister("1").has_value();  // either answer is right
}

TEST_CASE("registry: registrations come back when etcd has lost its data") {
  EtcdServer server;
  auto options = options_for(server);
  options.retry_config.max_delay = 300ms;
  auto coordinator = connect(options);
  auto info = service("1");
  info.ttl = 3s;
  coordinator.registry().register_service(info).value();
  server.wipe_and_restart();
  const auto back = [&] {
    const auto found = coordinator.registry().discover("web");
    return found && found->size() == 1 && found->at(0) == info;
  };
  CHECK(wait_until(back, lenient(10s)));
}

TEST_CASE_FIXTURE(Fixture, "view: a snapshot that follows every change") {
  registry.register_service(service("1")).value();
  std::atomic<int> changes{0};  // outlives its handler
  auto view = reader.view("web").value();
  REQUIRE(view.instances().size() == 1);
  CHECK(view.instances()[0] == service("1"));
  CHECK(view.revision() > 0);
  CHECK(wait_until([&] { return view.connected(); }, lenient(2s)));
  view.on_change([&] { ++changes; });

  registry.register_service(service("2")).value();
  CHECK(wait_until([&] { return view.instances().size() == 2; }, lenient(2s)));
  auto changed = service("1");
  changed.port = 1;
  registry.register_service(changed).value();
  CHECK(wait_until([&] { return view.instances()[0] == changed; }, lenient(2s)));
  registry.unregister("1").value();
  CHECK(wait_until([&] { return view.instances().size() == 1; }, lenient(2s)));
  CHECK(view.instances()[0].id == "2");
  CHECK(wait_until([&] { return changes >= 1; }, lenient(2s)));
  CHECK(changes <= 3);
  registry.unregister("2").value();
  CHECK(wait_until([&] { return view.instances().empty(); }, lenient(2s)));
  CHECK(view.pick().error().code == ErrorCode::NotFound);
}

TEST_CASE_FIXTURE(Fixture, "view: pick in turn and at random, without a request") {
  const auto counting = std::make_shared<CountingTransport>();
  auto counted_options = options;
  counted_options.transport = counting;
  auto counted = connect(counted_options);
  for (const auto* id : {"a", "b", "c"}) registry.register_service(service(id)).value();
  auto view = counted.registry().view("web").value();
  REQUIRE(wait_until([&] { return view.connected(); }, lenient(2s)));
  const int before = counting->requests();
  std::map<std::string, int> picked;
  for (int i = 0; i < 30; ++i) ++picked[view.pick().value().id];
  CHECK(picked == std::map<std::string, int>{{"a", 10}, {"b", 10}, {"c", 10}});
  std::set<std::string> random;
  for (int i = 0; i < 200; ++i) random.insert(view.pick(ServiceView::Pick::Random).value().id);
  CHECK(random == std::set<std::string>{"a", "b", "c"});
  CHECK(counting->requests() == before);
}

TEST_CASE_FIXTURE(Fixture, "view: it says when it may be old, and catches up") {
  TcpProxy proxy(shared_etcd().port());
  auto proxied_options = options;
  proxied_options.endpoints = {proxy.endpoint()};
  proxied_options.retry_config.max_delay = 200ms;
  auto proxied = connect(proxied_options);
  registry.register_service(service("1")).value();
  auto view = proxied.registry().view("web").value();
  REQUIRE(wait_until([&] { return view.connected(); }, lenient(2s)));
  CHECK(view.age() == 0ms);
  proxy.refuse();
  CHECK(wait_until([&] { return !view.connected(); }, lenient(2s)));
  registry.register_service(service("2")).value();
  registry.unregister("1").value();
  std::this_thread::sleep_for(200ms);
  CHECK(view.age() >= 100ms);
  CHECK_MESSAGE(view.instances().at(0).id == "1", "the last that was heard");
  proxy.refuse(false);
  CHECK(wait_until([&] { return view.connected() && view.instances().at(0).id == "2"; },
                   lenient(5s)));
  CHECK(view.instances().size() == 1);
}
