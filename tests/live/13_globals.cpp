// The global functions over the default Coordinator.
#include <doctest/doctest.h>

#include <thread>

#include "support/live.hpp"

using namespace coordination;
using namespace support;

namespace {

struct Fixture {
  std::string prefix;
  Etcdctl ctl{shared_etcd()};

  Fixture() {
    auto options = options_for(shared_etcd());
    prefix = options.key_prefix;
    coordination::close().value();
    set_default_options(options).value();
  }
  ~Fixture() {
    static_cast<void>(coordination::close());
    static_cast<void>(set_default_options(default_coordinator_options()));
  }
};

}  // namespace

TEST_CASE_FIXTURE(Fixture, "globals: locks") {
  auto lock = acquire_lock("x", 10s).value();
  CHECK(lock.held());
  CHECK(ctl.keys(prefix) == std::vector<std::string>{lock.key()});
  CHECK(try_acquire_lock("x", 10s).error().code == ErrorCode::Conflict);
  CHECK(lock.unlock());
  CHECK(try_acquire_lock("x", 10s).value().held());
}

TEST_CASE_FIXTURE(Fixture, "globals: services") {
  auto watch = watch_services("web").value();
  std::atomic<int> calls{0};
  auto subscription = watch_services("web", [&](const ServiceEvent&) { ++calls; }).value();
  const ServiceInfo service{"1", "web", "10.0.0.1", 80};
  register_service(service).value();
  const auto found = discover_services("web").value();
  REQUIRE(found.size() == 1);
  CHECK(found[0] == service);
  unregister_service("1").value();
  CHECK(discover_services("web").value().empty());
  CHECK(watch.next(Context::with_timeout(lenient(20s))).value().type == EventType::Put);
  CHECK(watch.next(Context::with_timeout(lenient(20s))).value().type == EventType::Delete);
  CHECK(wait_until([&] { return calls == 2; }, lenient(2s)));
}

TEST_CASE_FIXTURE(Fixture, "globals: configuration") {
  auto watch = watch_config("app/port").value();
  std::atomic<int> calls{0};
  auto subscription = watch_config("app/port", [&](const ConfigEvent&) { ++calls; }).value();
  set_config("app/port", 5432).value();
  CHECK(get_config("app/port").value() == 5432);
  CHECK(list_configs("app").value() == std::vector<std::string>{"app/port"});
  CHECK(ctl.get(prefix + "/config/app/port") == "5432");
  delete_config("app/port").value();
  CHECK(get_config("app/port").error().code == ErrorCode::NotFound);
  CHECK(watch.next(Context::with_timeout(lenient(20s))).value().value == 5432);
  CHECK(watch.next(Context::with_timeout(lenient(20s))).value().type == EventType::Delete);
  CHECK(wait_until([&] { return calls == 2; }, lenient(2s)));
}

TEST_CASE_FIXTURE(Fixture, "globals: one Coordinator, made at first use by whoever comes first") {
  std::vector<std::thread> threads;
  std::vector<std::shared_ptr<Coordinator>> got(8);
  for (auto& mine : got) {
    threads.emplace_back([&mine] { mine = default_coordinator().value(); });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& mine : got) CHECK(mine == got[0]);
  const auto late = set_default_options(default_coordinator_options());
  REQUIRE_FALSE(late);
  CHECK(late.error().code == ErrorCode::Conflict);
}

TEST_CASE_FIXTURE(Fixture, "globals: close, and the next use makes a new one") {
  const auto first = default_coordinator().value();
  auto lock = acquire_lock("x", 30s).value();
  CHECK(coordination::close());
  CHECK(ctl.keys(prefix).empty());
  CHECK_FALSE(lock.held());
  CHECK(coordination::close());
  set_config("k", 1).value();
  CHECK(default_coordinator().value() != first);
}

TEST_CASE_FIXTURE(Fixture, "globals: a failed connect is tried again by the next call") {
  coordination::close().value();
  CoordinatorOptions options;
  options.endpoints.clear();
  const auto refused = set_default_options(options);
  if (refused) CHECK(get_config("k").error().code == ErrorCode::Validation);
  options.endpoints = {"127.0.0.1:" + std::to_string(closed_port())};
  options.timeout = 300ms;
  set_default_options(options).value();
  CHECK_FALSE(get_config("k"));
  set_default_options(options_for(shared_etcd())).value();
  CHECK(get_config("k").error().code == ErrorCode::NotFound);
}
