// Processes that are killed while they hold something.
#include <doctest/doctest.h>

#include <thread>

#include "support/live.hpp"

using namespace coordination;
using namespace support;

namespace {

constexpr auto kTtl = 5s;

// Arguments: url, key prefix. Holds a lock and a registration until it is killed.
int hold(const Args& args) {
  CoordinatorOptions options;
  options.endpoints = {args.at(0)};
  options.key_prefix = args.at(1);
  auto coordinator = connect(options);
  auto lock = coordinator.lock().acquire("x", kTtl).value();
  ServiceInfo service{"dying", "web", "10.0.0.1", 80};
  service.ttl = kTtl;
  coordinator.registry().register_service(service).value();
  say(std::to_string(lock.fencing_token()));
  std::this_thread::sleep_for(300s);
  return 0;
}
const bool hold_registered = child_main("hold", hold);

struct Fixture {
  CoordinatorOptions options{options_for(shared_etcd())};
  Coordinator coordinator{connect(options)};
  Process child{start_child("hold", {shared_etcd().url(), options.key_prefix})};
  std::int64_t token{std::stoll(child.read_line(lenient(20s)).value())};

  bool registered() { return coordinator.registry().discover("web").value().size() == 1; }
};

}  // namespace

TEST_CASE_FIXTURE(Fixture,
                  "crash: who waits for a killed holder has the lock within TTL + 2 s [slow]") {
  std::this_thread::sleep_for(6s);  // longer than the TTL: it renews itself
  REQUIRE(registered());
  CHECK_FALSE(coordinator.lock().try_acquire("x", 10s));
  Result<Lock> lock = Error{};
  std::thread waiter(
      [&] { lock = coordinator.lock().acquire("x", 10s, Context::with_timeout(lenient(20s))); });
  const Etcdctl ctl(shared_etcd());
  const auto queue = options.key_prefix + "/locks/x/";
  const bool queued = wait_until([&] { return ctl.keys(queue).size() == 2; }, lenient(5s));
  child.kill9();
  const Stopwatch watch;
  waiter.join();
  CHECK(queued);
  REQUIRE_MESSAGE(lock, why(lock));
  MESSAGE("the lock passed on after ", watch.seconds(), " s; TTL 5 s");
  CHECK(watch.over(kTtl + 2s) == 0);
  CHECK(watch.elapsed() >= 1s);
  CHECK(lock->fencing_token() > token);
}

TEST_CASE_FIXTURE(Fixture, "crash: a killed service is gone within TTL + 2 s") {
  REQUIRE(registered());
  auto watch = coordinator.registry().watch("web").value();
  auto view = coordinator.registry().view("web").value();
  CHECK(view.instances().size() == 1);
  child.kill9();
  const Stopwatch dead;
  CHECK(wait_until([&] { return !registered(); }, lenient(kTtl + 2s)));
  MESSAGE("the service was gone after ", dead.seconds(), " s; TTL 5 s");
  const auto event = watch.next(Context::with_timeout(lenient(5s))).value();
  CHECK(event.type == EventType::Delete);
  CHECK(event.service.id == "dying");
  CHECK(wait_until([&] { return view.instances().empty(); }, lenient(2s)));
}

TEST_CASE_FIXTURE(Fixture, "crash: a holder that was stopped and goes on knows that it has lost") {
  child.stop_signal();
  const auto lock = coordinator.lock().acquire("x", 10s, Context::with_timeout(lenient(20s)));
  REQUIRE_MESSAGE(lock, why(lock));
  CHECK(lock->fencing_token() > token);
  child.continue_signal();
  // The registration of the stopped process comes back by itself; its lock does not.
  CHECK(wait_until([&] { return registered(); }, lenient(5s)));
  CHECK(never([&] { return !lock->held(); }, 1s));
  RangeRequest queue{options.key_prefix + "/locks/x/"};
  queue.range_end = prefix_range_end(queue.key);
  CHECK(coordinator.client().range(queue).value().kvs.size() == 1);
}
