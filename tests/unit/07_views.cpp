// Section 7, the views of sections 10 and 11: live copies that are never old in silence.
#include <doctest/doctest.h>

#include <functional>
#include <future>
#include <nlohmann/json.hpp>
#include <set>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"

using namespace coordination;
using namespace support;

namespace {

using Strings = std::vector<std::string>;

struct Setup : Cluster {
  Coordinator c{connect("one")}, d{connect("two")};

  void add(const std::string& id, int port = 80) {
    d.registry().register_service({id, "web", "h", port, {}, 60s}).value();
  }
  ServiceView view() { return c.registry().view("web").value(); }
};

Strings ids(const ServiceView& view) {
  Strings result;
  for (const auto& service : view.instances()) {
    result.push_back(service.id + ":" + std::to_string(service.port));
  }
  return result;
}

bool come_to(const ServiceView& view, const Strings& expected) {
  const bool there = eventually([&] { return ids(view) == expected; });
  if (!there) CHECK(ids(view) == expected);  // says what it is instead
  return there;
}

}  // namespace

TEST_CASE("views: what is there at once, and every change") {
  Setup s;
  s.add("b");
  s.add("a");
  const auto view = s.view();
  CHECK(ids(view) == Strings{"a:80", "b:80"});
  CHECK(view.revision() == s.etcd->revision());
  s.add("c", 1);
  CHECK(come_to(view, {"a:80", "b:80", "c:1"}));
  CHECK(view.revision() == s.etcd->revision());
  s.add("c", 2);
  CHECK(come_to(view, {"a:80", "b:80", "c:2"}));
  s.d.registry().unregister("a").value();
  CHECK(come_to(view, {"b:80", "c:2"}));
  s.d.close().value();
  CHECK(come_to(view, {}));
}

TEST_CASE("views: reading one asks nobody") {
  Setup s;
  s.add("a");
  auto view = s.view();
  CHECK(eventually([&] { return view.connected(); }));
  s.tap->reset();
  for (int i = 0; i < 100; ++i) {
    CHECK(view.instances().size() == 1);
    CHECK(view.pick().value().id == "a");
  }
  CHECK(s.tap->count_calls() == 0);  // the registration's own key may be watched just then
  CHECK(s.tap->count("/v3/kv/range") == 0);
}

TEST_CASE("views: pick") {
  Setup s;
  auto view = s.view();
  const auto none = view.pick();
  REQUIRE_FALSE(none);
  CHECK(none.error().code == ErrorCode::NotFound);
  for (const char* id : {"a", "b", "c"}) s.add(id);
  CHECK(come_to(view, {"a:80", "b:80", "c:80"}));
  std::map<std::string, int> counts;
  for (int i = 0; i < 30; ++i) ++counts[view.pick().value().id];
  CHECK(counts == std::map<std::string, int>{{"a", 10}, {"b", 10}, {"c", 10}});
  std::set<std::string> seen;
  for (int i = 0; i < 200; ++i) seen.insert(view.pick(ServiceView::Pick::Random).value().id);
  CHECK(seen.size() == 3);
}

TEST_CASE("views: a record that cannot be read is left out") {
  Setup s;
  s.add("a");
  s.d.client().put("/services/web/bad", "{").value();
  const auto view = s.view();
  CHECK(ids(view) == Strings{"a:80"});
  s.d.client().put("/services/web/a", "not json any more").value();
  CHECK(come_to(view, {}));
}

TEST_CASE("views: on_change") {
  Setup s;
  auto view = s.view();
  std::atomic<std::size_t> seen{0};
  view.on_change([&] { seen = view.instances().size(); });
  s.add("a");
  CHECK(eventually([&] { return seen == 1; }));
  for (int i = 0; i < 20; ++i) s.add("x" + std::to_string(i));
  CHECK(eventually([&] { return seen == 21; }));
  std::atomic<int> others{0};
  view.on_change([&] { ++others; });
  CHECK(eventually([&] { return others > 0; }));  // of what came before it was set
  s.add("b");
  CHECK(eventually([&] { return seen == 22; }));
  CHECK(eventually([&] { return others > 1; }));
}

TEST_CASE("views: a handler may destroy its view, and none runs after the destructor") {
  Setup s;
  auto view = std::make_unique<ServiceView>(s.view());
  std::atomic<bool> destroyed{false};
  view->on_change([&] {
    view.reset();
    destroyed = true;
  });
  s.add("a");
  CHECK(eventually([&] { return destroyed.load(); }));
  auto calls = std::make_shared<std::atomic<int>>(0);
  auto watcher = s.view();  // tells when the change has come
  {
    auto other = s.view();
    other.on_change([calls] { ++*calls; });
  }
  s.add("b");
  CHECK(come_to(watcher, {"a:80", "b:80"}));
  CHECK(*calls == 0);
}

TEST_CASE("views: cut off, it says so; healed, it has caught up") {
  Setup s;
  s.add("a");
  s.add("b");
  const auto view = s.view();
  CHECK(eventually([&] { return view.connected(); }));
  CHECK(view.age() == 0ms);
  s.cut_off("one");
  CHECK(eventually([&] { return !view.connected(); }));
  s.etcd->advance(1s);
  CHECK(view.age() == 1s);
  s.d.registry().unregister("a").value();
  s.add("c");
  CHECK(ids(view) == Strings{"a:80", "b:80"});
  s.etcd->heal();
  CHECK(come_to(view, {"b:80", "c:80"}));
  CHECK(eventually([&] { return view.connected(); }));
  CHECK(view.age() == 0ms);
}

TEST_CASE("views: resynchronised by difference after a compaction, or an etcd that is empty") {
  Setup s;
  s.add("a");
  s.add("b");
  const auto view = s.view();
  CHECK(eventually([&] { return view.connected(); }));
  s.cut_off("one");
  s.d.registry().unregister("a").value();
  s.add("b", 81);
  s.add("c");
  s.etcd->compact();
  s.etcd->heal();
  CHECK(come_to(view, {"b:81", "c:80"}));
  s.d.close().value();
  CHECK(come_to(view, {}));
  s.etcd->restart_empty();
  auto e = s.connect("three");
  e.registry().register_service({"z", "web", "h", 9, {}, 60s}).value();
  CHECK(come_to(view, {"z:9"}));
}

TEST_CASE("views: a quiet one notices, too, that etcd has come back empty") {
  Setup s;
  s.d.config().set("a/old", 1).value();
  auto quiet = s.c.config().view("a").value();
  WatchRequest request;
  request.key = "/config/a/old";
  auto raw = s.c.client().watch(request).value();
  std::atomic<int> heard{0};
  const auto busy = s.c.config().watch("busy", [&](const ConfigEvent&) { ++heard; }).value();
  for (int i = 0; i < 50; ++i) s.d.config().set("busy", i).value();
  CHECK(eventually([&] { return heard == 50; }));
  s.etcd->restart_empty();
  auto e = s.connect("three");
  for (int i = 0; i < 5; ++i) e.config().set("b", i).value();  // more than the quiet ones have seen
  CHECK(eventually([&] { return quiet.keys().empty(); }));
  const auto end = raw.next(Context::with_timeout(lenient(2s)));
  REQUIRE_FALSE(end);
  CHECK(end.error().code == ErrorCode::Compacted);
  e.config().set("a/new", 2).value();
  CHECK(eventually([&] { return quiet.keys() == Strings{"a/new"}; }));
}

TEST_CASE("views: a watch that begins in the new history misses nothing, and is told of no loss") {
  std::atomic<bool> cut{false};
  Setup s;
  auto old = s.c.config().view("a").value();
  CHECK(eventually([&] { return old.connected(); }));
  for (int i = 0; i < 50; ++i) s.d.config().set("a/k", i).value();
  CHECK(eventually([&] { return old.revision() == s.etcd->revision(); }));
  cut = true;
  const auto hook = s.tap->lose_if(
      [&](const HttpRequest& request) { return cut && request.path == "/v3/watch"; });
  s.etcd->restart_empty();
  auto e = s.connect("three");
  e.config().set("a/new", 1).value();
  WatchRequest request;
  request.key = "/config/a/new";
  auto young = s.c.client().watch(request).value();
  cut = false;
  CHECK(eventually([&] { return old.keys() == Strings{"a/new"}; }));
  e.config().set("a/new", 2).value();
  const auto event = young.next(Context::with_timeout(lenient(3s)));
  REQUIRE_MESSAGE(event, text_of(event));
  CHECK(event->kv.value == "2");
}

TEST_CASE("views: a new history that has overtaken the old one is known") {
  Setup s;
  auto& config = s.d.config();
  config.set("a/ghost", 1).value();
  config.set("a/same", 2).value();
  auto view = s.c.config().view("a").value();
  std::atomic<int> heard{0};
  const auto busy = s.c.config().watch("a/same", [&](const ConfigEvent&) { ++heard; }).value();
  CHECK(eventually([&] { return view.connected(); }));
  config.set("a/same", 3).value();
  CHECK(eventually([&] { return heard == 1; }));
  s.cut_off("one");
  s.etcd->restart_empty();
  auto e = s.connect("three");
  for (int i = 0; i < 50; ++i) e.config().set("a/same", i).value();
  e.config().set("a/new", 4).value();
  s.etcd->heal();
  CHECK(eventually([&] { return view.keys() == Strings{"a/new", "a/same"}; }));
  CHECK(view.get("a/same").value() == 49);
}

TEST_CASE("views: a reading that takes longer than options.timeout is possible again") {
  std::atomic<bool> slow{false};
  Cluster cluster;
  auto options = cluster.options();
  options.timeout = 200ms;
  auto c = connect_to(options);
  auto d = cluster.connect("two");
  d.config().set("k", 1).value();
  auto view = c.config().view("").value();
  CHECK(eventually([&] { return view.connected(); }));
  const auto hook = cluster.tap->before([&](const HttpRequest& request) {
    const bool all = request.body.find("range_end") != std::string::npos;
    if (slow && request.path == "/v3/kv/range" && all) std::this_thread::sleep_for(1200ms);
  });
  slow = true;
  cluster.cut_off("one");
  d.config().set("k", 2).value();
  d.config().set("k", 3).value();
  cluster.etcd->compact();
  cluster.etcd->heal();
  CHECK(wait_until([&] { return view.get("k").value() == 3; }, lenient(8s)));
  cluster.tap->before(nullptr);
}

TEST_CASE("views: to read again there is more time from try to try") {
  std::atomic<bool> fails{false};
  std::atomic<int> longest{0};
  Setup s;
  s.add("a");
  const auto view = s.view();
  CHECK(eventually([&] { return view.connected(); }));
  const auto hook = s.tap->lose_if([&](const HttpRequest& request) {
    const bool all = request.body.find("range_end") != std::string::npos;
    if (!fails || request.endpoint != "http://one:1" || request.path != "/v3/kv/range" || !all) {
      return false;
    }
    const int limit = std::stoi(header(request, "Grpc-Timeout"));  // in ms
    longest = (std::max)(longest.load(), limit);
    return true;
  });
  s.cut_off("one");
  s.add("b");
  s.add("b", 81);
  s.etcd->compact();
  fails = true;
  s.etcd->heal();
  CHECK(eventually([&] { return longest > 5000; }));
  fails = false;
  CHECK(come_to(view, {"a:80", "b:81"}));
}

TEST_CASE("views: what has changed before a compaction is told in order, and then what has gone") {
  Setup s;
  auto& config = s.d.config();
  for (const char* key : {"w/a", "w/b", "w/c", "w/d"}) config.set(key, 1).value();
  Notes notes;
  const auto watch = s.c.config().watch_prefix(
      "w", [&](const ConfigEvent& event) { notes.add(to_string(event.type) + (" " + event.key)); });
  const auto view = s.c.config().view("w").value();
  CHECK(eventually([&] { return view.connected(); }));
  s.cut_off("one");
  config.set("w/d", 2).value();
  config.remove("w/a").value();
  config.set("w/c", 2).value();
  config.set("w/b", 2).value();
  s.etcd->compact();
  s.etcd->heal();
  CHECK(eventually([&] { return notes.size() == 4; }));
  CHECK(notes.lines() == Strings{"PUT w/d", "PUT w/c", "PUT w/b", "DELETE w/a"});
}

TEST_CASE("handlers: nobody is told of the end that close() makes") {
  Setup s;
  Notes notes;
  auto view = s.view();
  view.on_end([&](const Error& error) { notes.add(to_string(error.code)); });
  auto watch = s.c.client().watch({"k"}, [](const WatchEvent&) {}).value();
  watch.on_end([&](const Error& error) { notes.add(to_string(error.code)); });
  s.c.close().value();
  CHECK(notes.size() == 0);
}

TEST_CASE("handlers: a watch that has ended says so, once, after its events") {
  Setup s;
  Notes notes;
  auto watch = s.c.client()
                   .watch({"a"}, [&](const WatchEvent& event) { notes.add(event.kv.value); })
                   .value();
  SUBCASE("to a handler that is there") {
    watch.on_end([&](const Error& error) { notes.add(to_string(error.code)); });
  }
  bool late = false;
  SUBCASE("to one that comes late") { late = true; }
  s.d.client().put("a", "1").value();
  CHECK(eventually([&] { return notes.size() == 1; }));
  s.cut_off("one");
  s.d.client().put("a", "2").value();
  s.d.client().put("a", "3").value();
  s.etcd->compact();
  s.etcd->heal();
  if (late) {
    std::this_thread::sleep_for(1s);  // it has ended then, or else it comes in time
    watch.on_end([&](const Error& error) { notes.add(to_string(error.code)); });
  }
  CHECK(eventually([&] { return notes.size() == 2; }));
  CHECK(notes.lines() == Strings{"1", "COMPACTED"});
  watch.on_end([&](const Error&) { notes.add("again"); });  // each handler is told once
  CHECK(eventually([&] { return notes.size() == 3; }));
  watch.cancel();
  CHECK(notes.lines() == Strings{"1", "COMPACTED", "again"});
}

TEST_CASE("views: one that has ended says so, once, to every handler") {
  Setup s;
  Notes notes;
  s.d.config().set("k", 1).value();
  auto view = s.c.config().view("k").value();
  view.on_end([&](const Error& error) { notes.add(to_string(error.code)); });
  s.etcd->enable_auth("secret");
  s.etcd->cut_streams();
  CHECK(eventually([&] { return notes.size() == 1; }));
  view.on_end([&](const Error&) { notes.add("late"); });
  CHECK(eventually([&] { return notes.size() == 2; }));
  CHECK(notes.lines() == Strings{"PERMISSION_DENIED", "late"});
}

TEST_CASE("watches: one that breaks hurries the renewals") {
  Setup s;
  std::atomic<int> lost{0};
  auto lease = s.c.client().grant(60s).value();
  lease.on_lost([&](const Error&) { ++lost; });
  auto watch = s.c.client().watch("k").value();
  s.d.client().put("k", "1").value();
  REQUIRE(watch.next(Context::with_timeout(lenient(3s))));
  s.etcd->restart_empty();
  CHECK(eventually([&] { return lost == 1; }));
}

TEST_CASE("views: wait_for is told also where the difference is nothing") {
  Setup s;
  s.add("a");
  const auto view = s.view();
  CHECK(eventually([&] { return view.connected(); }));
  s.cut_off("one");
  s.add("b");
  s.d.registry().unregister("b").value();
  const auto revision = s.etcd->revision();
  s.etcd->compact();
  Result<void> told = Error{};
  Joined waiting([&] { told = view.wait_for(revision, Context::with_timeout(lenient(3s))); });
  s.etcd->heal();
  waiting.join();
  CHECK_MESSAGE(told, text_of(told));
  CHECK(view.revision() >= revision);
  CHECK(ids(view) == Strings{"a:80"});
}

TEST_CASE("handlers: two that cancel each other's watch do not wait for ever") {
  Setup s;
  std::atomic<int> met{0}, done{0};
  Subscription a, b;
  const auto handler = [&](Subscription& other) {
    return [&](const ConfigEvent&) {
      ++met;
      CHECK(eventually([&] { return met == 2; }));
      other.cancel();
      ++done;
    };
  };
  a = s.c.config().watch("k", handler(b)).value();
  b = s.c.config().watch("k", handler(a)).value();
  s.d.config().set("k", 1).value();
  CHECK(eventually([&] { return done == 2; }));
}

TEST_CASE("handlers: one closes the coordinator while another waits for that one") {
  Setup s;
  std::atomic<int> met{0}, done{0};
  Subscription a, b;
  const auto handler = [&](std::function<void()> act) {
    return [&, act](const ConfigEvent&) {
      ++met;
      CHECK(eventually([&] { return met == 2; }));
      act();
      ++done;
    };
  };
  a = s.c.config().watch("k", handler([&] { CHECK(s.c.close()); })).value();
  b = s.c.config().watch("k", handler([&] { a.cancel(); })).value();
  s.d.config().set("k", 1).value();
  CHECK(eventually([&] { return done == 2; }));
}

TEST_CASE("views: through cuts in the middle of lines nothing is lost") {
  Setup s;
  const auto view = s.view();
  Strings expected;
  for (int i = 0; i < 30; ++i) {
    if (i % 3 == 0) s.etcd->cut_streams(true);
    s.add(std::to_string(100 + i));
    expected.push_back(std::to_string(100 + i) + ":80");
  }
  CHECK(come_to(view, expected));
}

TEST_CASE("views: of a configuration") {
  Setup s;
  auto& config = s.d.config();
  config.set("app", 1).value();
  config.set("app/a", "text").value();
  config.set("app2", 3).value();
  auto view = s.c.config().view("app").value();
  CHECK(view.keys() == Strings{"app", "app/a"});
  CHECK(view.get("app").value() == 1);
  CHECK(view.get("app/a").value() == "text");
  CHECK_FALSE(view.get("app2"));
  CHECK(view.get("app/none").error().code == ErrorCode::NotFound);
  std::atomic<int> calls{0};
  view.on_change([&] { ++calls; });
  config.set("app/a", {{"x", 1}}).value();
  const auto revision = s.etcd->revision();
  CHECK(eventually([&] { return calls > 0; }));
  const auto entry = view.get_entry("app/a").value();
  CHECK(entry.key == "app/a");
  CHECK(entry.value == nlohmann::json{{"x", 1}});
  CHECK(entry.revision == revision);
  CHECK(view.revision() >= revision);
  CHECK(config.compare_and_set("app/a", entry.revision, 5));
  config.remove("app").value();
  CHECK(eventually([&] { return view.keys() == Strings{"app/a"}; }));
  CHECK(view.get("app/a").value() == 5);
  const auto all = s.c.config().view("").value();
  CHECK(all.keys() == Strings{"app/a", "app2"});
}

TEST_CASE("views: many readers while it changes") {
  Setup s;
  auto view = s.view();
  std::atomic<bool> stop{false};
  std::atomic<int> torn{0};
  {
    std::vector<Joined> readers;
    for (int t = 0; t < 3; ++t) {
      readers.emplace_back([&] {
        std::int64_t last = 0;
        while (!stop) {
          const auto revision = view.revision();
          if (revision < last) ++torn;
          last = revision;
          // b is always registered after a, and goes before it.
          bool a = false, b = false;
          for (const auto& service : view.instances()) (service.id == "a" ? a : b) = true;
          if (b && !a) ++torn;
          static_cast<void>(view.pick());
        }
      });
    }
    for (int i = 0; i < scaled(100); ++i) {
      s.add("a");
      s.add("b");
      s.d.registry().unregister("b").value();
      s.d.registry().unregister("a").value();
    }
    stop = true;
  }
  CHECK(torn == 0);
  CHECK(come_to(view, {}));
}

TEST_CASE("views: after close they are not connected, and do no harm") {
  Setup s;
  s.add("a");
  auto services = s.view();
  auto config = s.c.config().view("").value();
  s.c.close().value();
  CHECK_FALSE(services.connected());
  CHECK_FALSE(config.connected());
  CHECK(services.instances().size() == 1);
  CHECK(config.keys().empty());
  auto moved = std::move(services);
  moved = s.d.registry().view("web").value();
  CHECK(moved.instances().size() == 1);
}

TEST_CASE("views: one that is destroyed ends its watch") {
  Setup s;
  {
    const auto view = s.view();
    CHECK(eventually([&] { return view.connected(); }));
  }
  CHECK(eventually([&] { return s.tap->finished("/v3/watch") == s.tap->count("/v3/watch"); }));
}

TEST_CASE("views: wait_for ends with its Context") {
  Setup s;
  const auto view = s.view();
  std::promise<void> over;
  Joined closer([&] {  // or it would never end
    if (over.get_future().wait_for(lenient(2s)) == std::future_status::timeout) s.c.close().value();
  });
  const auto waited = view.wait_for(1000000, Context::with_timeout(20ms));
  over.set_value();
  REQUIRE_FALSE(waited);
  CHECK(waited.error().code == ErrorCode::Timeout);
}

TEST_CASE("views: on_change is told once for all that comes while it runs, and told again") {
  Setup s;
  auto view = std::make_unique<ConfigView>(s.c.config().view("a").value());
  std::promise<void> go;
  const auto gone = go.get_future().share();
  std::atomic<int> calls{0};
  view->on_change([&calls, gone] {
    ++calls;
    gone.wait();
  });
  const auto set = [&](int value) {
    s.d.config().set("a/k", value).value();
    CHECK(eventually([&] { return view->get("a/k").value_or(nullptr) == value; }));
  };
  set(-1);
  CHECK(eventually([&] { return calls == 1; }));
  for (int i = 0; i < 20; ++i) set(i);
  CHECK(calls == 1);
  go.set_value();
  CHECK(eventually([&] { return calls >= 2; }));
  set(20);
  CHECK(eventually([&] { return calls >= 3; }));
  view.reset();
  CHECK(calls <= 4);  // what is shown may not have been told yet when it goes on
}

TEST_CASE("views: every handler is told, one that comes late of what has changed before") {
  Setup s;
  auto view = s.view();
  std::atomic<int> first{0}, second{0};
  view.on_change([&] { ++first; });
  s.add("a");
  CHECK(eventually([&] { return first == 1; }));
  view.on_change([&] { ++second; });
  CHECK(eventually([&] { return second == 1; }));
  s.add("b");
  CHECK(eventually([&] { return first == 2 && second == 2; }));
}

TEST_CASE("views: their age may be asked by any thread") {
  Setup s;
  const auto view = s.view();
  std::atomic<bool> over{false};
  {
    std::vector<Joined> threads;
    for (int t = 0; t < 2; ++t) {
      threads.emplace_back([&] {
        while (!over) CHECK(view.age() >= 0ms);
      });
    }
    for (int i = 0; i < 20; ++i) s.etcd->cut_streams();
    over = true;
  }
}
