// Views of services and of configuration: one consistent revision, never stale unknowingly.
#include <doctest/doctest.h>

#include <thread>

#include "support/live.hpp"
#include "support/tcp_proxy.hpp"
#include "support/watch_support.hpp"

using namespace coordination;
using namespace support;

namespace {

ServiceInfo service(const std::string& id, int port = 80) {
  ServiceInfo info;
  info.id = id;
  info.name = "web";
  info.address = "10.0.0.1";
  info.port = port;
  return info;
}

std::string ids(const std::vector<ServiceInfo>& services) {
  std::string text;
  for (const auto& info : services) text += info.id + ":" + std::to_string(info.port) + " ";
  return text;
}

std::string text_of(const ConfigView& view) {
  std::string text;
  for (const auto& key : view.keys()) text += key + "=" + view.get(key).value().dump() + " ";
  return text;
}

bool becomes(const std::function<std::string()>& now, const std::string& expected,
             milliseconds limit = 5s) {
  const bool is = wait_until([&] { return now() == expected; }, lenient(limit));
  INFO("it is \"", now(), "\", not \"", expected, "\"");
  CHECK(is);
  return is;
}

/// A record as the Go module writes it, without a lease.
void put_service(Client& client, const std::string& prefix, const ServiceInfo& info) {
  const nlohmann::json record{{"id", info.id},
                              {"name", info.name},
                              {"address", info.address},
                              {"port", info.port},
                              {"metadata", nlohmann::json::object()},
                              {"ttl", 30000000000}};
  client.put(prefix + "/services/web/" + info.id, record.dump()).value();
}

}  // namespace

TEST_CASE("service view: what is there, what comes and goes, and pick()") {
  const auto options = options_for(shared_etcd());
  auto mine = connect(options), other = connect(options);
  other.registry().register_service(service("a")).value();
  std::atomic<int> told{0};  // outlives its handler
  auto view = mine.registry().view("web").value();
  CHECK(ids(view.instances()) == "a:80 ");  // without waiting
  view.on_change([&] { ++told; });
  const auto now = [&] { return ids(view.instances()); };

  other.registry().register_service(service("c", 3)).value();
  other.registry().register_service(service("b", 2)).value();
  becomes(now, "a:80 b:2 c:3 ");
  CHECK(wait_until([&] { return told > 0; }, lenient(2s)));
  CHECK(view.connected());
  CHECK(view.age() == 0ms);

  std::map<std::string, int> picks;
  for (int i = 0; i < 9; ++i) ++picks[view.pick().value().id];
  CHECK(picks == std::map<std::string, int>{{"a", 3}, {"b", 3}, {"c", 3}});
  for (int i = 0; i < 200; ++i) ++picks[view.pick(ServiceView::Pick::Random).value().id];
  for (const auto& [id, count] : picks) CHECK(count > 20);

  other.registry().unregister("b").value();
  becomes(now, "a:80 c:3 ");
  other.registry().register_service(service("a", 81)).value();
  becomes(now, "a:81 c:3 ");
  other.close().value();  // gives back all it has registered
  becomes(now, "");
  const auto nobody = view.pick();
  REQUIRE_FALSE(nobody);
  CHECK(nobody.error().code == ErrorCode::NotFound);
}

TEST_CASE("service view: a record that cannot be read is not shown") {
  const auto options = options_for(shared_etcd());
  auto coordinator = connect(options);
  auto view = coordinator.registry().view("web").value();
  coordinator.client().put(options.key_prefix + "/services/web/bad", "no json").value();
  put_service(coordinator.client(), options.key_prefix, service("good"));
  coordinator.client().put(options.key_prefix + "/services/website/x", "{}").value();
  becomes([&] { return ids(view.instances()); }, "good:80 ");
}

TEST_CASE("config view: get, keys, entries and what belongs to it") {
  const auto options = options_for(shared_etcd());
  auto coordinator = connect(options);
  auto& config = coordinator.config();
  config.set("app/a", 1).value();
  config.set("app", "root").value();
  config.set("app2", "foreign").value();
  config.set("app-x", "foreign").value();
  auto view = config.view("app").value();
  CHECK(text_of(view) == "app=\"root\" app/a=1 ");
  CHECK_FALSE(view.get("app-x"));
  CHECK(view.get("app/none").error().code == ErrorCode::NotFound);
  const auto entry = view.get_entry("app/a").value();
  CHECK(entry.revision == config.get_entry("app/a").value().revision);

  config.set("app/b", {{"x", {1, 2}}}).value();
  config.remove("app/a").value();
  config.set("app2", "still foreign").value();
  becomes([&] { return text_of(view); }, "app=\"root\" app/b={\"x\":[1,2]} ");
  auto everything = config.view("").value();
  CHECK(everything.keys().size() == 4);
}

TEST_CASE("config view: always at one revision") {
  // Every transaction writes the same number to all ten keys.
  const auto options = options_for(shared_etcd());
  auto coordinator = connect(options), writer = connect(options);
  const auto write = [&](int number) {
    Txn txn;
    for (int i = 0; i < 10; ++i) {
      txn.then(Op::put(options.key_prefix + "/config/app/k" + std::to_string(i),
                       std::to_string(number)));
    }
    return writer.client().commit(txn).value().revision;
  };
  write(0);
  auto view = coordinator.config().view("app").value();
  std::atomic<bool> stopping{false};
  std::atomic<int> backwards{0}, looks{0};
  std::thread looker([&] {
    std::int64_t seen = 0;
    int number = 0;
    while (!stopping) {
      const auto revision = view.revision();
      const auto first = view.get("app/k0").value().get<int>();
      const auto last = view.get("app/k9").value().get<int>();
      // A later look can only be newer.
      if (revision < seen || first < number || last < first) ++backwards;
      seen = revision;
      number = last;
      ++looks;
    }
  });
  std::int64_t last = 0;
  for (int i = 1; i <= 300; ++i) last = write(i);
  CHECK(wait_until([&] { return view.revision() >= last; }, lenient(5s)));
  stopping = true;
  looker.join();
  CHECK(view.revision() == last);
  CHECK(view.get("app/k9").value() == 300);
  CHECK(backwards == 0);
  CHECK(looks > 10);
}

TEST_CASE("service view: instances() is one revision, while instances come and go") {
  // Pairs are written in one transaction: never one without the other.
  const auto options = options_for(shared_etcd());
  auto coordinator = connect(options), writer = connect(options);
  const auto key = [&](const char* id) { return options.key_prefix + "/services/web/" + id; };
  const std::string left = R"({"id":"left","name":"web","address":"x","port":1})";
  const std::string right = R"({"id":"right","name":"web","address":"x","port":1})";
  std::atomic<bool> stopping{false};
  std::atomic<int> halves{0}, fulls{0}, told{0};
  auto view = coordinator.registry().view("web").value();
  std::thread looker([&] {
    while (!stopping) {
      const auto size = view.instances().size();
      if (size == 1) ++halves;
      if (size == 2) ++fulls;
    }
  });
  view.on_change([&] {
    if (view.instances().size() == 1) ++halves;
    ++told;
  });
  const auto both_come = [&] {
    writer.client()
        .commit(Txn{}.then(Op::put(key("left"), left)).then(Op::put(key("right"), right)))
        .value();
  };
  const auto both_go = [&] {
    writer.client()
        .commit(Txn{}.then(Op::remove(key("left"))).then(Op::remove(key("right"))))
        .value();
  };
  for (int i = 0; i < 150; ++i) {
    both_come();
    both_go();
  }
  both_come();  // and are seen, however busy the one who looks is
  CHECK(wait_until([&] { return fulls > 0; }, lenient(20s)));
  both_go();
  CHECK(wait_until([&] { return told > 0 && view.instances().empty(); }, lenient(5s)));
  stopping = true;
  looker.join();
  CHECK(halves == 0);
}

TEST_CASE("view: wait_for() shows one's own write") {
  const auto options = options_for(shared_etcd());
  auto coordinator = connect(options);
  auto view = coordinator.config().view("app").value();
  for (int i = 0; i < 20; ++i) {
    const auto expected = i == 0 ? 0 : view.get_entry("app/k").value().revision;
    const auto revision = coordinator.config().compare_and_set("app/k", expected, i).value();
    const auto waited = view.wait_for(revision, Context::with_timeout(lenient(5s)));
    REQUIRE_MESSAGE(waited, why(waited));
    CHECK(view.get("app/k").value() == i);
  }
  const auto never = view.wait_for(1'000'000, Context::with_timeout(50ms));
  REQUIRE_FALSE(never);
  CHECK(never.error().code == ErrorCode::Timeout);
}

TEST_CASE("watch: include_existing begins with what is there, the oldest first, without a gap") {
  const auto options = options_for(shared_etcd());
  auto coordinator = connect(options), writer = connect(options);
  for (const char* key : {"app/c", "app/a", "app/b"}) writer.config().set(key, key).value();
  writer.config().set("app/c", "again").value();
  std::atomic<bool> stopping{false};
  std::thread writing([&] {
    for (int i = 0; !stopping; ++i) writer.config().set("app/n", i).value();
  });
  WatchOptions existing;
  existing.include_existing = true;
  for (int round = 0; round < 5; ++round) {
    auto watch = coordinator.config().watch_prefix("app", existing).value();
    std::vector<Change> first;
    int n = -1;
    for (int i = 0; i < 60; ++i) {
      const auto event = watch.next(Context::with_timeout(lenient(5s)));
      REQUIRE_MESSAGE(event, why(event));
      CHECK(event->type == EventType::Put);
      if (event->key == "app/n") {
        const int value = event->value.get<int>();
        CHECK((n < 0 || value == n + 1));  // no gap and no repetition
        n = value;
      } else {
        first.push_back({true, event->key, event->value.dump(), 0});
      }
    }
    const std::vector<Change> expected{{true, "app/c", "\"again\"", 0},
                                       {true, "app/a", "\"app/a\"", 0},
                                       {true, "app/b", "\"app/b\"", 0}};
    CHECK(first_difference(first, expected) == "none");
  }
  stopping = true;
  writing.join();
}

TEST_CASE("watch: registry events, with the last record of what is gone") {
  const auto options = options_for(shared_etcd());
  auto coordinator = connect(options);
  auto info = service("a", 8080);
  info.metadata["zone"] = "eu";
  coordinator.registry().register_service(info).value();
  WatchOptions existing;
  existing.include_existing = true;
  auto watch = coordinator.registry().watch("web", existing).value();
  auto event = watch.next(Context::with_timeout(lenient(5s))).value();
  CHECK(event.type == EventType::Put);
  CHECK(event.service == info);
  info.metadata["zone"] = "us";
  coordinator.registry().register_service(info).value();
  event = watch.next(Context::with_timeout(lenient(5s))).value();
  CHECK(event.type == EventType::Put);
  CHECK(event.service == info);
  const auto revision = event.revision;
  coordinator.registry().unregister("a").value();
  event = watch.next(Context::with_timeout(lenient(5s))).value();
  CHECK(event.type == EventType::Delete);
  CHECK(event.service == info);
  CHECK(event.revision > revision);
}

TEST_CASE("view: on_change may destroy the view; after the destructor it is not called") {
  const auto options = options_for(shared_etcd());
  auto coordinator = connect(options), writer = connect(options);
  std::optional<ConfigView> view{coordinator.config().view("app").value()};
  std::atomic<int> calls{0};
  std::atomic<bool> destroyed{false};
  view->on_change([&] {
    ++calls;
    view.reset();
    destroyed = true;
  });
  for (int i = 0; i < 20; ++i) writer.config().set("app/k", i).value();
  CHECK(wait_until([&] { return destroyed.load(); }, lenient(5s)));
  CHECK(calls == 1);

  for (int round = 0; round < 10; ++round) {
    std::atomic<bool> alive{true};
    std::atomic<int> late{0};
    view.emplace(coordinator.config().view("app").value());
    view->on_change([&] {
      if (!alive) ++late;
    });
    writer.config().set("app/k", -round).value();
    view.reset();
    alive = false;
    writer.config().set("app/k", round).value();
    CHECK(late == 0);
  }
}

TEST_CASE("view: told when etcd is away, and right again afterwards") {
  EtcdServer etcd;
  TcpProxy proxy(etcd.port());
  auto options = options_for(etcd);
  options.endpoints = {proxy.endpoint()};
  auto coordinator = connect(options);
  auto direct_options = options;
  direct_options.endpoints = {etcd.endpoint()};
  auto writer = connect(direct_options);
  writer.config().set("app/a", 1).value();
  put_service(writer.client(), options.key_prefix, service("a"));
  auto view = coordinator.config().view("app").value();
  auto services = coordinator.registry().view("web").value();
  REQUIRE(wait_until([&] { return view.connected() && services.connected(); }, lenient(5s)));

  proxy.refuse();
  CHECK(wait_until([&] { return !view.connected() && !services.connected(); }, lenient(1s)));
  std::this_thread::sleep_for(300ms);
  CHECK(view.age() >= 250ms);
  CHECK(view.age() <= lenient(5s));
  CHECK(services.age() >= 250ms);
  writer.config().set("app/a", 2).value();
  put_service(writer.client(), options.key_prefix, service("b"));
  CHECK(text_of(view) == "app/a=1 ");  // it shows what it had
  proxy.refuse(false);
  becomes([&] { return text_of(view); }, "app/a=2 ");
  becomes([&] { return ids(services.instances()); }, "a:80 b:80 ");
  CHECK(wait_until([&] { return view.connected() && services.connected(); }, lenient(5s)));
  CHECK(view.age() == 0ms);
}

TEST_CASE("view: a frozen etcd is noticed, and its return, too [slow]") {
  EtcdServer etcd;
  const auto options = options_for(etcd);
  auto coordinator = connect(options);
  coordinator.config().set("app/a", 1).value();
  auto view = coordinator.config().view("app").value();
  REQUIRE(wait_until([&] { return view.connected(); }, lenient(5s)));
  const Stopwatch watch;
  etcd.stop_signal();
  CHECK(wait_until([&] { return !view.connected(); }, lenient(12s)));
  MESSAGE("noticed after ", watch.seconds(), " s");
  CHECK(view.age() >= 4s);
  std::this_thread::sleep_for(3s);  // the stream is given up
  const auto age = view.age();
  CHECK(age >= watch.elapsed() - 2s);
  CHECK(age <= watch.elapsed() + 1s);
  etcd.continue_signal();
  CHECK(wait_until([&] { return view.connected(); }, lenient(8s)));
  CHECK(view.age() == 0ms);
  coordinator.config().set("app/a", 2).value();
  becomes([&] { return text_of(view); }, "app/a=2 ");
}

TEST_CASE("view: etcd is wiped and begins again at revision 1") {
  EtcdServer etcd;
  const auto options = options_for(etcd);
  auto coordinator = connect(options);
  auto& config = coordinator.config();
  for (int i = 0; i < 20; ++i) config.set("app/a", i).value();
  config.set("app/gone", true).value();
  put_service(coordinator.client(), options.key_prefix, service("old"));
  auto view = config.view("app").value();
  auto services = coordinator.registry().view("web").value();
  Changes changes;
  auto follow =
      config.watch_prefix("app", [&](const ConfigEvent& e) { changes.add(change_of(e)); }).value();
  CHECK(ids(services.instances()) == "old:80 ");
  const auto before = services.revision();

  etcd.wipe_and_restart();
  becomes([&] { return text_of(view); }, "");
  becomes([&] { return ids(services.instances()); }, "");
  CHECK(changes.reaches(2, 5s));
  CHECK(applied(changes.all()).empty());
  for (const auto& change : changes.all()) CHECK_FALSE(change.put);

  config.set("app/a", "new").value();
  becomes([&] { return text_of(view); }, "app/a=\"new\" ");
  CHECK(changes.reaches(3, 5s));
  CHECK(changes.all().back().value == "\"new\"");
  CHECK(view.revision() < before);

  // At the very revision that it had before, other instances stand there.
  std::int64_t revision = 0;
  while (revision < before - 1) revision = coordinator.client().put("/x", "").value().revision;
  put_service(coordinator.client(), options.key_prefix, service("new"));
  CHECK(wait_until([&] { return services.revision() == before; }, lenient(5s)));
  CHECK(ids(services.instances()) == "new:80 ");
}

TEST_CASE("view: a thousand of them on one coordinator") {
  const auto options = options_for(shared_etcd());
  auto meter = std::make_shared<WatchMeter>();
  auto metered = options;
  metered.transport = meter;
  auto coordinator = connect(metered);
  const int count = scaled(1000);
  std::vector<ConfigView> views;
  for (int i = 0; i < count; ++i) {
    views.push_back(coordinator.config().view("v" + std::to_string(i)).value());
  }
  for (int i = 0; i < count; ++i) coordinator.config().set("v" + std::to_string(i), i).value();
  const auto right = [&] {
    int sum = 0;
    for (int i = 0; i < count; ++i) {
      const auto value = views[static_cast<std::size_t>(i)].get("v" + std::to_string(i));
      if (value && *value == i) ++sum;
    }
    return sum;
  };
  CHECK(wait_until([&] { return right() == count; }, lenient(5s)));
  CHECK(meter->most_streams_at_once() <= 5);
}
