// Recipes on a real etcd: through its restarts, and by processes that are told to go or are killed.
#include <doctest/doctest.h>

#include <csignal>
#include <future>

#include "support/child.hpp"
#include "support/live.hpp"

using namespace coordination;
using namespace support;
using nlohmann::json;

namespace {

void add_one(json& n) { n = n.is_null() ? 1 : n.get<int>() + 1; }

CoordinatorOptions options_of(const Args& args) {
  CoordinatorOptions options;
  options.endpoints = {args[0]};
  options.key_prefix = args[1];
  return options;
}

/// Leads until it is told to go.
const bool kLeader = child_main("recipes-leader", [](const Args& args) {
  const auto ctx = Context::on_signals({SIGTERM});
  auto c = connect(options_of(args));
  const auto led = c.election().lead(
      "x", args[2], 5s,
      [](Leadership&, const Context& office) {
        say("leads");
        office.sleep_for(1h);
        say("leaves");
      },
      ctx);
  return led ? 0 : 1;
});

/// Counts, and has a number of its own until it is killed.
const bool kWorker = child_main("recipes-worker", [](const Args& args) {
  auto c = connect(options_of(args));
  const auto slot = c.lock().lease_slot("ids", 2, 10s).value();
  say(std::to_string(slot.number()));
  for (int i = 0; i < 25; ++i) {
    c.config().update("count", add_one, Context::with_timeout(60s)).value();
  }
  say("counted");
  Context().sleep_for(1h);
  return 0;
});

struct Fixture {
  EtcdServer server;
  CoordinatorOptions options{options_for(server)};
  Coordinator c{connect(options)};

  Process start(const std::string& name, const std::string& extra = "") const {
    return start_child(name, {server.url(), options.key_prefix, extra});
  }
};

}  // namespace

TEST_CASE_FIXTURE(Fixture,
                  "recipes: a leader that gets SIGTERM leaves at once, a killed one does not") {
  REQUIRE(kLeader);
  auto a = start("recipes-leader", "a");
  REQUIRE(a.read_line(lenient(20s)) == "leads");
  auto b = start("recipes-leader", "b");
  CHECK(c.election().leader("x").value().value == "a");
  a.signal(SIGTERM);
  CHECK(a.read_line(lenient(10s)) == "leaves");
  CHECK(a.wait(lenient(10s)) == 0);
  REQUIRE(b.read_line(lenient(20s)) == "leads");
  auto third = start("recipes-leader", "c");
  const Stopwatch watch;
  b.kill9();
  REQUIRE(third.read_line(lenient(60s)) == "leads");
  CHECK(watch.elapsed() > 1s);  // not before the lease has run out
  CHECK(third.terminate(lenient(10s)) == 0);
  CHECK(c.election().leader("x").error().code == ErrorCode::NotFound);
}

TEST_CASE_FIXTURE(Fixture, "recipes: slots and a counter of several processes") {
  REQUIRE(kWorker);
  auto a = start("recipes-worker"), b = start("recipes-worker");
  const auto one = a.read_line(lenient(20s)), other = b.read_line(lenient(20s));
  REQUIRE(one);
  REQUIRE(other);
  CHECK(*one != *other);
  CHECK(c.lock().lease_slot("ids", 2, 5s).error().code == ErrorCode::Conflict);
  CHECK(a.read_line(lenient(60s)) == "counted");
  CHECK(b.read_line(lenient(60s)) == "counted");
  CHECK(c.config().get("count").value() == 50);
  a.kill9();
  std::optional<Slot> freed;
  CHECK(wait_until(
      [&] {
        auto slot = c.lock().lease_slot("ids", 2, 5s);
        if (slot) freed.emplace(std::move(*slot));
        return freed.has_value();
      },
      lenient(30s)));
  REQUIRE(freed);
  CHECK(std::to_string(freed->number()) == *one);
}

TEST_CASE_FIXTURE(Fixture,
                  "recipes: a live value stays through a restart of etcd, and follows on") {
  c.config().set("n", 1).value();
  std::promise<int> told;  // outlives its handler
  auto live = LiveConfig<int>::follow(c.config(), "n", 0).value();
  live.on_change([&](int, int now) {
    if (now == 2) told.set_value(now);
  });
  server.kill9();
  CHECK(*live == 1);
  CHECK(wait_until([&] { return !live.view().connected(); }, lenient(20s)));
  CHECK(*live == 1);
  server.restart();
  const auto revision =
      c.config().update("n", add_one, Context::with_timeout(lenient(30s))).value();
  CHECK(told.get_future().wait_for(lenient(30s)) == std::future_status::ready);
  CHECK(*live == 2);
  CHECK(live.revision() == revision);
}
