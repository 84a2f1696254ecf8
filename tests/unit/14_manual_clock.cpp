// Section 14: an etcd in memory whose time is moved, with Coordinators on it.
#include <doctest/doctest.h>

#include <future>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"

using namespace coordination;
using namespace support;

TEST_CASE("manual clock: a healthy lock is kept, however time moves") {
  Cluster cluster;
  auto c = cluster.connect();
  const auto lock = c.lock().acquire("a", 9s).value();
  SUBCASE("ten times a third of its TTL") {
    for (int i = 0; i < 10; ++i) {
      cluster.etcd->advance(3s);
      CHECK(lock.held());
    }
  }
  SUBCASE("an hour at once") {
    cluster.etcd->advance(std::chrono::hours(1));
    CHECK(lock.held());
    CHECK(cluster.tap->count("/v3/lease/keepalive") >= 1200);
  }
  CHECK(cluster.etcd->leases().size() == 1);
}

TEST_CASE("manual clock: when advance returns, renewals are answered and handlers told") {
  Cluster cluster;
  Notes losses, deletes;
  auto c = cluster.connect("one"), d = cluster.connect("two");
  auto lost = c.lock().acquire("a", 9s).value();
  auto kept = d.lock().acquire("b", 30s).value();
  lost.on_lost(losses.on_lost());
  WatchRequest request;
  request.key = lost.key();
  request.no_put = true;
  auto watch =
      d.client().watch(request, [&](const WatchEvent& event) { deletes.add(event.kv.key); });
  REQUIRE(watch);
  cluster.cut_off("one");
  cluster.etcd->advance(8999ms);
  CHECK(losses.size() + deletes.size() == 0);
  cluster.etcd->advance(1ms);
  CHECK(losses.lines() == std::vector<std::string>{"LOST"});
  CHECK(deletes.lines() == std::vector<std::string>{lost.key()});
  cluster.etcd->advance(1001ms);
  CHECK(kept.ttl().value() > 26s);
}

TEST_CASE("manual clock: it does not wait for ever, nor for those who move it") {
  Cluster cluster;
  auto c = cluster.connect();
  auto lock = c.lock().acquire("a", 9s).value();
  std::promise<void> go;
  const auto gone = go.get_future().share();
  std::atomic<bool> moved{false};
  WatchRequest request;
  request.key = "k";
  auto watch = c.client().watch(request, [&](const WatchEvent&) {
    cluster.etcd->advance(3s);
    moved = true;
    gone.wait();
  });
  const Stopwatch stopwatch;
  c.client().put("k", "1").value();
  CHECK(eventually([&] { return moved.load(); }));
  CHECK(stopwatch.over(lenient(1500ms)) == 0);
  for (int i = 0; i < 5; ++i) cluster.etcd->advance(3s);  // beside a handler that blocks
  CHECK(stopwatch.over(lenient(15s)) == 0);
  CHECK(lock.held());
  go.set_value();
}

TEST_CASE("memory: the older half of a long history is discarded") {
  Cluster cluster;
  auto c = cluster.connect();
  Txn txn;
  for (int i = 0; i < 128; ++i) txn.then(Op::put("k" + std::to_string(i), "v"));
  for (int i = 0; i < 100000 / 128 + 1; ++i) REQUIRE(c.client().commit(txn));
  RangeRequest old;
  old.key = "k0";
  old.revision = 2;
  const auto read = c.client().range(old);
  REQUIRE_FALSE(read);
  CHECK(read.error().code == ErrorCode::Compacted);
  old.revision = cluster.etcd->revision() - 300;
  CHECK(c.client().range(old).value().kvs.size() == 1);
}
