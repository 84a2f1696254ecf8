// Section 12: the ends of things: close() in all its ways, exit() and fork().
#include <doctest/doctest.h>

#include <future>

#include "coordination.hpp"
#include "support/ends.hpp"
#include "support/memory_cluster.hpp"

using namespace coordination;
using namespace support;

namespace {

/// A Transport that passes on what comes until it hangs.
class Hanging : public Transport {
 public:
  explicit Hanging(std::shared_ptr<Transport> inner) : inner_(std::move(inner)) {}
  Result<HttpResponse> perform(const HttpRequest& request, const ChunkSink& sink,
                               const Context& ctx) override {
    while (hangs_ && !ctx.done()) std::this_thread::sleep_for(2ms);
    if (!hangs_) return inner_->perform(request, sink, ctx);
    return Error{ErrorCode::Timeout, "it hangs", "", Outcome::MaybeApplied};
  }
  void hang(bool on) { hangs_ = on; }

 private:
  const std::shared_ptr<Transport> inner_;
  std::atomic<bool> hangs_{false};
};

struct Outage {
  const std::shared_ptr<Hanging> etcd{std::make_shared<Hanging>(std::make_shared<MemoryEtcd>())};
  Coordinator c{connect_to(options_with(etcd))};
  std::vector<Lock> take(int count) {
    std::vector<Lock> locks;
    for (int i = 0; i < count; ++i) {
      locks.push_back(c.lock().acquire("k" + std::to_string(i), 60s).value());
    }
    return locks;
  }
};

}  // namespace

TEST_CASE("ends: a second close() waits for the first") {
  Cluster cluster;
  auto c = cluster.connect(), d = cluster.connect("two");
  std::promise<void> go;
  std::promise<void> begun;
  const auto gone = go.get_future().share();
  auto watch = c.config().watch("k", [&, gone](const ConfigEvent&) {
    begun.set_value();
    gone.wait();
  });
  REQUIRE(watch);
  d.config().set("k", 1).value();
  begun.get_future().wait();
  std::atomic<int> closed{0};
  Joined first([&] {
    c.close().value();
    ++closed;
  });
  CHECK(eventually([&] { return ends::is_over(c.client().get("x")); }));
  Joined second([&] {
    c.close().value();
    ++closed;
  });
  std::this_thread::sleep_for(50ms);  // time in which it must not return
  CHECK(closed == 0);
  go.set_value();
  first.join();
  second.join();
  CHECK(closed == 2);
}

TEST_CASE("ends: close() in a handler does not wait for the close() that waits for it") {
  Cluster cluster;
  auto c = cluster.connect(), d = cluster.connect("two");
  std::atomic<bool> handled{false};
  std::promise<void> begun;
  auto watch = c.config().watch("k", [&](const ConfigEvent&) {
    begun.set_value();
    // Until the other one has begun.
    CHECK(eventually([&] { return ends::is_over(c.client().get("x")); }));
    c.close().value();
    handled = true;
  });
  REQUIRE(watch);
  d.config().set("k", 1).value();
  begun.get_future().wait();
  c.close().value();
  CHECK(eventually([&] { return handled.load(); }));
}

TEST_CASE("ends: destructors and close() have one second together when etcd hangs") {
  Outage outage;
  auto locks = outage.take(20);
  outage.etcd->hang(true);
  Stopwatch stopwatch;
  locks.clear();
  CHECK(stopwatch.over(lenient(700ms)) == 0);
  outage.c.close().value();
  CHECK(stopwatch.over(lenient(1100ms)) == 0);
}

TEST_CASE("ends: when etcd answers again, destructors wait for it again") {
  Outage outage;
  auto locks = outage.take(2);
  outage.etcd->hang(true);
  locks.clear();
  outage.etcd->hang(false);
  for (int i = 0; i < 3; ++i) {
    { const auto lock = outage.c.lock().acquire("k0", 60s).value(); }
    CHECK(outage.c.lock().try_acquire("k0", 60s));
  }
}

TEST_CASE("ends: the global close() waits for another one, too") {
  Cluster cluster;
  coordination::close().value();
  set_default_options(cluster.options()).value();
  std::promise<void> go;
  std::promise<void> begun;
  const auto gone = go.get_future().share();
  auto watch = watch_config("k", [&, gone](const ConfigEvent&) {
    begun.set_value();
    gone.wait();
  });
  REQUIRE(watch);
  set_config("k", 1).value();
  begun.get_future().wait();
  std::atomic<int> closed{0};
  const auto close_it = [&] {
    coordination::close().value();
    ++closed;
  };
  Joined first(close_it), second(close_it);
  std::this_thread::sleep_for(50ms);  // time in which neither must return
  CHECK(closed == 0);
  go.set_value();
  first.join();
  second.join();
  CHECK(closed == 2);
  set_default_options(default_coordinator_options()).value();
}

TEST_CASE("ends: exit() closes what was not closed, and the process ends with its own status") {
  for (const char* name : {"exit", "exit with the default"}) {
    for (const char* how : {"return", "exit", "exit in a handler", "beside a handler"}) {
      CAPTURE(name);
      CAPTURE(how);
      RunResult done;
      for (int i = 0; i < 3 && done.out != "keys left: 0\n"; ++i) {  // exit() gives it a second
        done = ends::run_child(name, {how, "memory"});
        CHECK(done.exit_code == 7);
      }
      CHECK(done.out == "keys left: 0\n");
    }
  }
}

TEST_CASE("ends: in a child of fork() the parent's handles are nothing, and it keeps its own") {
  const auto done = ends::run_child("fork", {std::to_string(scaled(100)), "memory"});
  CHECK(done.exit_code == 7);
  CHECK(done.out == "keys left: 0\n");
}

TEST_CASE("ends: closed in every way while it is in use, and with handles that outlive it") {
  RunResult done;
  for (int i = 0; i < 3 && done.out != "keys left: 0\n"; ++i) {  // close() has a second each time
    done = ends::run_child("close", {std::to_string(scaled(100)), "memory"});
    CHECK(done.exit_code == 7);
  }
  CHECK(done.out == "keys left: 0\n");
}
