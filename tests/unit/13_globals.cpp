// Section 13: the functions over the default Coordinator.
#include <doctest/doctest.h>

#include <future>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"

using namespace coordination;
using namespace support;

namespace {

/// The default Coordinator on an etcd in memory, and none afterwards.
struct Setup : Cluster {
  Setup() {
    coordination::close().value();
    set_default_options(options()).value();
  }
  ~Setup() {
    static_cast<void>(coordination::close());
    static_cast<void>(set_default_options(default_coordinator_options()));
  }
};

}  // namespace

TEST_CASE("globals: made at first use, one for all") {
  Setup s;
  CHECK(s.tap->count() == 0);
  std::vector<std::shared_ptr<Coordinator>> seen(8);
  {
    std::vector<Joined> threads;
    for (auto& slot : seen) {
      threads.emplace_back([&slot] { slot = default_coordinator().value(); });
    }
  }
  for (const auto& coordinator : seen) CHECK(coordinator == seen.front());
  CHECK(s.tap->count() == 1);
}

TEST_CASE("globals: options can be set while there is none in use") {
  Setup s;
  CHECK(set_default_options(s.options()));
  default_coordinator().value();
  check_code(set_default_options(s.options()), ErrorCode::Conflict);
  CHECK(coordination::close());
  CHECK(set_default_options(s.options()));
  auto bad = s.options();
  bad.timeout = 0ms;
  check_code(set_default_options(bad), ErrorCode::Validation);
}

TEST_CASE(
    "globals: closed, what was handed out answers Cancelled, and the next use makes another") {
  Setup s;
  const auto old = default_coordinator().value();
  auto lock = acquire_lock("a", 9s).value();
  CHECK(coordination::close());
  CHECK(coordination::close());
  CHECK_FALSE(lock.held());
  check_code(old->config().get("k"), ErrorCode::Cancelled);
  check_code(lock.unlock(), ErrorCode::Cancelled);
  CHECK(set_config("k", 1));
  CHECK(default_coordinator().value() != old);
}

TEST_CASE("globals: a connect that failed is tried again") {
  Setup s;
  s.cut_off("one");
  check_code(default_coordinator(), ErrorCode::Connection);
  check_code(get_config("k"), ErrorCode::Connection);
  s.etcd->heal();
  check_code(get_config("k"), ErrorCode::NotFound);
}

TEST_CASE("globals: the first use, too, ends with its Context, and at close()") {
  static_cast<void>(coordination::close());
  const auto mute = std::make_shared<ScriptedTransport>();
  mute->always("/v3/kv/range", silence());
  set_default_options(options_with(mute)).value();
  std::vector<Joined> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([] {
      const Stopwatch stopwatch;
      check_code(acquire_lock("a", 9s, Context::with_timeout(50ms)), ErrorCode::Timeout);
      CHECK(stopwatch.over(lenient(250ms)) == 0);
    });
  }
  threads.clear();
  const int before = mute->count();  // each of them may have had a turn
  std::atomic<bool> ended{false};
  Joined patient([&] {
    check_code(get_config("k"), ErrorCode::Cancelled);
    ended = true;
  });
  CHECK(eventually([&] { return mute->count() > before; }));
  const Stopwatch stopwatch;
  CHECK(coordination::close());
  CHECK(set_default_options(default_coordinator_options()));  // there is none in use any more
  CHECK(eventually([&] { return ended.load(); }));
  CHECK(stopwatch.over(lenient(250ms)) == 0);
}

TEST_CASE("globals: what was connected when close() came is closed") {
  Setup s;
  std::future<void> closing;
  const auto etcd = std::make_shared<ScriptedTransport>();
  const auto hook = etcd->next("/v3/kv/range", [&](const auto&, const auto&, const Context& ctx) {
    closing = std::async(std::launch::async, [] { CHECK(coordination::close()); });
    CHECK(eventually([&] { return ctx.cancelled(); }));  // it has said so
    return HttpResponse{200, reply(1)};
  });
  set_default_options(options_with(etcd)).value();
  check_code(default_coordinator(), ErrorCode::Cancelled);
  closing.get();
}

TEST_CASE("globals: options cannot be set while the Coordinator is being connected") {
  Setup s;
  std::promise<void> go;
  const auto hook =
      s.tap->before([gone = go.get_future().share()](const HttpRequest&) { gone.wait(); });
  Joined first([] { CHECK(default_coordinator()); });
  CHECK(eventually([&] { return s.tap->count() > 0; }));
  check_code(set_default_options(s.options()), ErrorCode::Conflict);
  go.set_value();
  first.join();
  s.tap->before(nullptr);
}

TEST_CASE("globals: locks") {
  Setup s;
  auto lock = acquire_lock("a", 9s);
  REQUIRE_MESSAGE(lock, text_of(lock));
  CHECK(s.etcd->keys() == std::vector<std::string>{lock->key()});
  check_code(try_acquire_lock("a", 9s), ErrorCode::Conflict);
  check_code(acquire_lock("a", 9s, Context::with_timeout(10ms)), ErrorCode::Timeout);
  CHECK(lock->unlock());
  CHECK(try_acquire_lock("a", 9s));
}

TEST_CASE("globals: services") {
  Setup s;
  Notes notes;
  auto watch = watch_services("web").value();
  const auto subscription = watch_services("web", [&](const ServiceEvent& event) {
    notes.add(to_string(event.type) + (" " + event.service.id));
  });
  REQUIRE_MESSAGE(subscription, text_of(subscription));
  const ServiceInfo service{"w1", "web", "h", 80};
  CHECK(register_service(service));
  const auto found = discover_services("web").value();
  REQUIRE(found.size() == 1);
  CHECK(found[0] == service);
  CHECK(unregister_service("w1"));
  check_code(unregister_service("w1"), ErrorCode::NotFound);
  CHECK(watch.next(Context::with_timeout(2s)).value().type == EventType::Put);
  CHECK(watch.next(Context::with_timeout(2s)).value().type == EventType::Delete);
  CHECK(eventually([&] { return notes.size() == 2; }));
  CHECK(notes.lines() == std::vector<std::string>{"PUT w1", "DELETE w1"});
}

TEST_CASE("globals: configuration") {
  Setup s;
  Notes notes;
  auto watch = watch_config("app/k").value();
  const auto subscription =
      watch_config("app/k", [&](const ConfigEvent& event) { notes.add(event.value.dump()); });
  REQUIRE_MESSAGE(subscription, text_of(subscription));
  CHECK(set_config("app/k", {{"a", 1}}));
  CHECK(get_config("app/k").value() == nlohmann::json{{"a", 1}});
  CHECK(list_configs("app").value() == std::vector<std::string>{"app/k"});
  CHECK(delete_config("app/k"));
  check_code(delete_config("app/k"), ErrorCode::NotFound);
  CHECK(watch.next(Context::with_timeout(2s)).value().value == nlohmann::json{{"a", 1}});
  CHECK(watch.next(Context::with_timeout(2s)).value().type == EventType::Delete);
  CHECK(eventually([&] { return notes.size() == 2; }));
  CHECK(notes.lines() == std::vector<std::string>{R"({"a":1})", "null"});
}

TEST_CASE("globals: connecting and the call share one time limit") {
  const auto etcd = std::make_shared<ScriptedTransport>();
  etcd->next("/v3/kv/range", after(lenient(300ms), ok(reply(1))));
  etcd->always("/v3/kv/range", silence());
  auto options = options_with(etcd);
  options.timeout = lenient(400ms);
  Setup s;
  set_default_options(options).value();
  const Stopwatch watch;
  check_code(get_config("a"), ErrorCode::Timeout);
  CHECK(watch.over(lenient(600ms)) == 0);
  CHECK(etcd->count("/v3/kv/range") >= 2);
  CHECK(etcd->count("/v3/kv/range") <= 3);  // the member that is late is looked at
}
