// MemoryEtcd's own: its faults, its clock, its threads. That it answers as etcd does is shown in
// tests/conformance.
#include <doctest/doctest.h>

#include <atomic>

#include "conformance/gateway.hpp"
#include "support/wait.hpp"

using namespace std::chrono_literals;
using coordination::Context;
using coordination::ErrorCode;
using coordination::MemoryEtcd;
using coordination::Outcome;
using gateway::create_request;
using gateway::Gateway;
using gateway::Json;
using gateway::WatchCall;

namespace {

struct Fixture {
  std::shared_ptr<MemoryEtcd> etcd = MemoryEtcd::manual_clock();
  Gateway gateway{etcd, "http://one:2379"};

  bool has(const std::string& key) const {
    const auto keys = etcd->keys();
    return std::find(keys.begin(), keys.end(), key) != keys.end();
  }
};

void check_refused(const gateway::Reply& reply) {
  REQUIRE(reply.error);
  CHECK(reply.error->code == ErrorCode::Connection);
  CHECK(reply.error->outcome == Outcome::NotApplied);
}

void check_lost(const gateway::Reply& reply) {
  REQUIRE(reply.error);
  CHECK(reply.error->code == ErrorCode::Connection);
  CHECK(reply.error->outcome == Outcome::MaybeApplied);
}

std::string type_and_key(const Json& event) {
  return event.value("type", "PUT") + " " + gateway::unb64(event["kv"]["key"]);
}

/// The steady clock, ahead by what the test says; it tells nobody when it is moved.
class ShiftedClock : public coordination::Clock {
 public:
  time_point now() const override {
    return std::chrono::steady_clock::now() + milliseconds(shift_.load());
  }
  void shift(std::chrono::milliseconds by) { shift_ += by.count(); }

 private:
  using milliseconds = std::chrono::milliseconds;
  std::atomic<std::int64_t> shift_{0};
};

}  // namespace

TEST_CASE_FIXTURE(Fixture, "fail_next refuses so many requests, and nothing of them is applied") {
  etcd->fail_next(2);
  check_refused(gateway.put("a", "1"));
  check_refused(gateway.put("b", "1"));
  CHECK(gateway.put("c", "1").status == 200);
  CHECK(etcd->keys() == std::vector<std::string>{"c"});
  CHECK(etcd->revision() == 2);
  CHECK(etcd->requests() == 3);
}

TEST_CASE_FIXTURE(Fixture, "drop_replies applies so many requests and loses their answers") {
  etcd->drop_replies(1);
  check_lost(gateway.put("a", "1"));
  CHECK(gateway.put("b", "1").status == 200);
  CHECK(etcd->keys() == std::vector<std::string>{"a", "b"});
}

TEST_CASE_FIXTURE(Fixture, "fail_request fails the request with this number, streams counted") {
  etcd->fail_request(2, false);
  etcd->fail_request(4, true);
  etcd->fail_request(5, false);
  WatchCall watch(gateway, {create_request(1, "a")});
  REQUIRE(watch.wait_lines(1));
  check_refused(gateway.put("b", "2"));
  CHECK(gateway.put("c", "3").status == 200);
  check_lost(gateway.put("d", "4"));
  WatchCall refused(gateway, {create_request(1, "a")});
  REQUIRE(refused.end());
  CHECK(refused.end()->error().outcome == Outcome::NotApplied);
  CHECK(etcd->keys() == std::vector<std::string>{"c", "d"});
  CHECK(etcd->requests() == 5);
}

TEST_CASE_FIXTURE(Fixture,
                  "no_leader answers so many requests as an etcd that has lost its quorum") {
  etcd->no_leader(3);
  const auto put = gateway.put("a", "1");
  CHECK(put.status == 503);
  CHECK(put.json == Json{{"code", 14}, {"message", "etcdserver: no leader"}});
  gateway::Reply keep_alive;
  CHECK(gateway.keep_alive({7}, &keep_alive).empty());
  CHECK(keep_alive.status == 503);
  CHECK(keep_alive.json["error"] == put.json);
  WatchCall watch(gateway, {create_request(1, "a")});
  REQUIRE(watch.end());
  CHECK((*watch.end())->status == 503);
  CHECK(Json::parse((*watch.end())->body)["error"] == put.json);
  CHECK(gateway.put("b", "1").status == 200);
  CHECK(etcd->keys() == std::vector<std::string>{"b"});
}

TEST_CASE_FIXTURE(Fixture, "without a leader a member still answers from what it knows") {
  const Json local = {{"key", gateway::b64("a")}, {"serializable", true}};
  etcd->no_leader(2);
  CHECK(gateway.range(local).status == 200);
  CHECK(gateway.with_header("Grpc-Metadata-hasleader", "true").range(local).status == 503);
  CHECK(gateway.range(local).status == 200);
}

TEST_CASE_FIXTURE(Fixture, "a fault can be for one kind of request alone") {
  etcd->fail_next(1, "/v3/kv/put");
  etcd->drop_replies(1, "/v3/kv/deleterange");
  etcd->no_leader(1, "/v3/lease/grant");
  CHECK(gateway.get("a").status == 200);
  CHECK(gateway.grant(1, 10).status == 503);
  CHECK(gateway.grant(1, 10).status == 200);
  check_refused(gateway.put("a", "1"));
  CHECK(gateway.put("a", "1").status == 200);
  check_lost(gateway.remove("a"));
  CHECK(gateway.remove("a").status == 200);
  CHECK(etcd->keys().empty());
}

TEST_CASE_FIXTURE(Fixture, "delay makes answers late, and the caller's Context ends the wait") {
  etcd->delay(30ms);
  const support::Stopwatch late;
  CHECK(gateway.put("a", "1").status == 200);
  CHECK(late.elapsed() >= 30ms);

  etcd->delay(60s);
  const support::Stopwatch deadline;
  const auto timed_out =
      gateway.post("/v3/kv/put", R"({"key":"Yg=="})", Context::with_timeout(20ms));
  REQUIRE(timed_out.error);
  CHECK(timed_out.error->code == ErrorCode::Timeout);
  CHECK(timed_out.error->outcome == Outcome::MaybeApplied);
  CHECK(deadline.over(support::lenient(1s)) == 0);
  CHECK(has("b"));

  Context ctx;
  std::thread canceller([&] {
    support::wait_until([&] { return has("c"); }, 10s);
    ctx.cancel();
  });
  const auto cancelled = gateway.post("/v3/kv/put", R"({"key":"Yw=="})", ctx);
  canceller.join();
  REQUIRE(cancelled.error);
  CHECK(cancelled.error->code == ErrorCode::Cancelled);

  auto request = gateway.request("/v3/kv/put", R"({"key":"ZA=="})");
  request.idle_timeout = 20ms;
  const auto idle = etcd->perform(request, {}, Context::with_timeout(10s));
  REQUIRE_FALSE(idle);
  CHECK(idle.error().code == ErrorCode::Connection);
  CHECK(idle.error().outcome == Outcome::MaybeApplied);
}

TEST_CASE_FIXTURE(Fixture, "a request whose Context has ended is not sent") {
  Context ctx;
  ctx.cancel();
  CHECK(gateway.post("/v3/kv/put", R"({"key":"YQ=="})", ctx).error->code == ErrorCode::Cancelled);
  const auto past = Context::with_deadline(std::chrono::steady_clock::now() - 1s);
  const auto reply = gateway.post("/v3/kv/put", R"({"key":"YQ=="})", past);
  CHECK(reply.error->code == ErrorCode::Timeout);
  CHECK(reply.error->outcome == Outcome::NotApplied);
  CHECK(etcd->requests() == 0);
  CHECK(etcd->keys().empty());
}

TEST_CASE_FIXTURE(Fixture, "cut_streams ends all streams") {
  WatchCall one(gateway, {create_request(1, "a")});
  WatchCall two(gateway, {create_request(1, "a")});
  REQUIRE(one.wait_lines(1));
  REQUIRE(two.wait_lines(1));

  SUBCASE("as a server that ends in order") {
    etcd->cut_streams();
    for (WatchCall* watch : {&one, &two}) {
      REQUIRE(watch->end());
      REQUIRE(watch->end()->has_value());
      CHECK((*watch->end())->status == 200);
      CHECK(watch->lines().rest().empty());
    }
  }
  SUBCASE("in the middle of a line") {
    etcd->cut_streams(true);
    for (WatchCall* watch : {&one, &two}) {
      REQUIRE(watch->end());
      REQUIRE_FALSE(watch->end()->has_value());
      CHECK(watch->end()->error().code == ErrorCode::Connection);
      CHECK(watch->lines().rest().find("{\"result\"") == 0);
    }
  }
  WatchCall three(gateway, {create_request(1, "a")});
  REQUIRE(three.wait_lines(1));
  gateway.put("a", "1");
  CHECK(three.events(1, 1).size() == 1);
}

TEST_CASE_FIXTURE(Fixture, "partition shuts one endpoint out, or all, until heal") {
  const Gateway other(etcd, "http://two:2379");
  WatchCall mine(gateway, {create_request(1, "a")});
  WatchCall theirs(other, {create_request(1, "a")});
  REQUIRE(mine.wait_lines(1));
  REQUIRE(theirs.wait_lines(1));

  etcd->partition("one:2379");
  REQUIRE(mine.end());
  CHECK(mine.end()->error().code == ErrorCode::Connection);
  check_refused(gateway.put("a", "1"));
  CHECK(other.put("a", "2").status == 200);
  CHECK(theirs.events(1, 1).size() == 1);

  etcd->partition();
  check_refused(other.put("b", "1"));
  REQUIRE(theirs.end());

  etcd->heal();
  CHECK(gateway.put("b", "1").status == 200);
  CHECK(other.put("b", "2").status == 200);
}

TEST_CASE_FIXTURE(Fixture, "expire_lease ends a lease now, with its keys") {
  gateway.grant(7, 60);
  gateway.put("a", "1", {{"lease", "7"}});
  gateway.put("b", "1", {{"lease", "7"}});
  WatchCall watch(gateway, {create_request(1, "a", {{"range_end", gateway::b64("c")}})});
  REQUIRE(watch.wait_lines(1));
  CHECK(etcd->leases() == std::vector<std::int64_t>{7});

  CHECK(etcd->expire_lease(7));
  const auto events = watch.events(1, 2);
  REQUIRE(events.size() == 2);
  CHECK(type_and_key(events[0]) == "DELETE a");
  CHECK(type_and_key(events[1]) == "DELETE b");
  CHECK(events[0]["kv"]["mod_revision"] == events[1]["kv"]["mod_revision"]);
  CHECK(etcd->leases().empty());
  CHECK(etcd->keys().empty());
  CHECK_FALSE(etcd->expire_lease(7));
  CHECK(gateway.keep_alive({7})[0]["result"].count("TTL") == 0);
}

TEST_CASE_FIXTURE(Fixture, "time stands still until advance moves it") {
  gateway.grant(1, 10);
  gateway.grant(2, 5);
  gateway.put("ten", "", {{"lease", "1"}});
  gateway.put("five", "", {{"lease", "2"}});
  WatchCall watch(gateway, {create_request(1, "", {{"range_end", gateway::b64({"\0", 1})}})});
  REQUIRE(watch.wait_lines(1));

  etcd->advance(4999ms);
  CHECK(etcd->leases() == std::vector<std::int64_t>{1, 2});
  CHECK(gateway.time_to_live(1).json["TTL"] == "5");
  etcd->advance(1ms);
  CHECK(etcd->leases() == std::vector<std::int64_t>{1});
  CHECK(etcd->keys() == std::vector<std::string>{"ten"});
  CHECK(gateway.keep_alive({1, 2}).size() == 2);
  etcd->advance(9999ms);
  CHECK(etcd->leases() == std::vector<std::int64_t>{1});
  etcd->advance(1h);
  CHECK(etcd->leases().empty());

  const auto events = watch.events(1, 2);
  REQUIRE(events.size() == 2);
  CHECK(type_and_key(events[0]) == "DELETE five");
  CHECK(type_and_key(events[1]) == "DELETE ten");
}

TEST_CASE("a clock of the user's is obeyed, and wakes watchers by itself") {
  const auto clock = std::make_shared<coordination::ManualClock>();
  const auto etcd = std::make_shared<MemoryEtcd>(clock);
  CHECK(etcd->clock() == clock);
  const Gateway gateway(etcd, "http://one:2379");
  gateway.grant(1, 10);
  gateway.put("a", "", {{"lease", "1"}});
  WatchCall watch(gateway, {create_request(1, "a")});
  REQUIRE(watch.wait_lines(1));
  clock->advance(10s);
  CHECK(watch.events(1, 1).size() == 1);
}

TEST_CASE("in real time, a sleeping watcher sees a lease run out without any other request") {
  const auto clock = std::make_shared<ShiftedClock>();
  const auto etcd = std::make_shared<MemoryEtcd>(clock);
  const Gateway gateway(etcd, "http://one:2379");
  gateway.grant(1, 2);
  gateway.put("a", "", {{"lease", "1"}});
  clock->shift(1960ms);
  WatchCall watch(gateway, {create_request(1, "a"), create_request(2, "b")});
  REQUIRE(watch.wait_lines(2));
  const auto events = watch.events(1, 1);
  REQUIRE(events.size() == 1);
  CHECK(type_and_key(events[0]) == "DELETE a");
}

TEST_CASE_FIXTURE(Fixture, "users, tokens and their death") {
  etcd->enable_auth("secret");
  etcd->add_user("bob", "pw", "b/");
  const auto login = [&](const char* name, const char* password) {
    return gateway.call("/v3/auth/authenticate", {{"name", name}, {"password", password}});
  };
  CHECK(gateway.put("a", "1").message() == "etcdserver: user name is empty");
  CHECK(login("bob", "wrong").status == 400);
  const Gateway root = gateway.with_token(login("root", "secret").json["token"]);
  const Gateway bob = gateway.with_token(login("bob", "pw").json["token"]);
  CHECK(root.put("a", "1").status == 200);
  CHECK(bob.put("b/x", "1").status == 200);
  CHECK(bob.put("b", "1").status == 403);
  CHECK(bob.get("a").code() == 7);

  etcd->invalidate_tokens();
  CHECK(root.put("a", "2").status == 401);
  CHECK(bob.put("b/x", "2").code() == 16);
  const Gateway again = gateway.with_token(login("bob", "pw").json["token"]);
  CHECK(again.put("b/x", "3").status == 200);
}

TEST_CASE_FIXTURE(Fixture, "compact discards the history before the present revision") {
  for (int i = 0; i < 5; ++i) gateway.put("a", std::to_string(i));
  etcd->compact();
  CHECK(gateway.range({{"key", "YQ=="}, {"revision", "5"}}).code() == 11);
  CHECK(gateway.range({{"key", "YQ=="}, {"revision", "6"}}).status == 200);
  WatchCall watch(gateway, {create_request(1, "a", {{"start_revision", "2"}})});
  REQUIRE(watch.wait_lines(2));
  CHECK(gateway::number(watch.results()[1], "compact_revision") == 6);
  etcd->compact();
  CHECK(etcd->revision() == 6);
}

TEST_CASE_FIXTURE(Fixture, "restart_empty ends the streams, and nothing is left") {
  etcd->enable_auth("secret");
  etcd->restart_empty();
  gateway.grant(1, 10);
  gateway.put("a", "1", {{"lease", "1"}});
  WatchCall watch(gateway, {create_request(1, "a")});
  REQUIRE(watch.wait_lines(1));

  etcd->restart_empty();
  REQUIRE(watch.end());
  CHECK(watch.end()->error().code == ErrorCode::Connection);
  CHECK(etcd->keys().empty());
  CHECK(etcd->leases().empty());
  CHECK(etcd->revision() == 1);
  WatchCall again(gateway, {create_request(1, "a", {{"start_revision", "1"}})});
  gateway.put("a", "2");
  const auto events = again.events(1, 1);
  REQUIRE(events.size() == 1);
  CHECK(gateway::number(events[0]["kv"], "mod_revision") == 2);
}

TEST_CASE_FIXTURE(Fixture, "a sink may send requests, and one that is slow holds up nobody") {
  std::mutex mutex;
  std::condition_variable changed;
  int pieces = 0;
  bool released = false;
  std::thread watcher([&] {
    const auto sink = [&](std::string_view) {
      gateway.put("from the sink", "1");
      std::unique_lock<std::mutex> lock(mutex);
      ++pieces;
      changed.notify_all();
      changed.wait(lock, [&] { return released; });
      return pieces < 2;
    };
    const auto request = gateway.request("/v3/watch", create_request(1, "a").dump());
    const auto end = etcd->perform(request, sink, Context::with_timeout(20s));
    CHECK(end.has_value());
  });
  {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return pieces == 1; });
  }
  for (int i = 0; i < 100; ++i) CHECK(gateway.put("a", std::to_string(i)).status == 200);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    released = true;
    changed.notify_all();
  }
  watcher.join();  // the sink's second answer ended the request
  CHECK(pieces == 2);
  CHECK(has("from the sink"));
}

TEST_CASE_FIXTURE(Fixture, "a stream ends with its Context, its deadline, or for want of bytes") {
  WatchCall cancelled(gateway, {create_request(1, "a")});
  REQUIRE(cancelled.wait_lines(1));
  cancelled.cancel();
  REQUIRE(cancelled.end());
  CHECK(cancelled.end()->error().code == ErrorCode::Cancelled);

  const auto request = gateway.request("/v3/watch", create_request(1, "a").dump());
  const auto timed_out = etcd->perform(request, {}, Context::with_timeout(20ms));
  CHECK(timed_out.error().code == ErrorCode::Timeout);

  WatchCall idle(gateway, {create_request(1, "a")}, 20ms);
  REQUIRE(idle.end());
  CHECK(idle.end()->error().code == ErrorCode::Connection);
}

TEST_CASE("a MemoryEtcd that goes away ends its streams") {
  auto etcd = std::make_unique<MemoryEtcd>();
  const auto request =
      Gateway(nullptr, "http://one").request("/v3/watch", create_request(1, "a").dump());
  std::atomic<bool> opened{false};
  std::atomic<bool> lost{false};
  std::thread watcher([&, raw = etcd.get()] {
    const auto sink = [&](std::string_view) { return opened = true; };
    const auto end = raw->perform(request, sink, Context::with_timeout(20s));
    lost = !end && end.error().code == ErrorCode::Connection;
  });
  REQUIRE(support::wait_until([&] { return opened.load(); }, 10s));
  etcd.reset();
  watcher.join();
  CHECK(lost);
}

TEST_CASE_FIXTURE(Fixture, "whose answer it is") {
  const Fixture other;
  CHECK(etcd->cluster_id() != 0);
  CHECK(etcd->cluster_id() != other.etcd->cluster_id());

  WatchCall watch(gateway, {create_request(1, "a")});
  REQUIRE(watch.wait_lines(1));
  gateway.grant(7, 5);
  std::size_t puts = 0;
  const auto ids = [&] {
    gateway.put("a", "1");
    ++puts;
    REQUIRE(watch.events(1, puts).size() == puts);
    Json lines = gateway.keep_alive({7});
    lines.push_back({{"result", watch.results().back()}});
    lines.push_back({{"result", gateway.get("a").json}});
    std::set<std::string> seen;
    for (const Json& line : lines) {
      seen.insert(line["result"]["header"]["cluster_id"].get<std::string>());
    }
    return seen;
  };
  CHECK(ids() == std::set<std::string>{std::to_string(etcd->cluster_id())});
  etcd->set_cluster_id(18446744073709551615u);
  CHECK(ids() == std::set<std::string>{"18446744073709551615"});
  CHECK(etcd->cluster_id() == 18446744073709551615u);

  etcd->restart_empty();
  CHECK(etcd->cluster_id() == 18446744073709551615u);
}

TEST_CASE_FIXTURE(Fixture, "many threads at once") {
  const int rounds = support::scaled(400);
  std::atomic<int> done{0};
  WatchCall all(gateway, {create_request(1, "k", {{"range_end", gateway::b64("l")}})});
  REQUIRE(all.wait_lines(1));
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const std::string key = "k" + std::to_string(t);
      for (int i = 0; i < rounds; ++i) {
        if (gateway.put(key, std::to_string(i)).status == 200) ++done;
        if (i % 16 == 0) {
          WatchCall one(gateway, {create_request(1, key)});
          one.wait_lines(1);
          gateway.grant(1000 * (t + 1) + i, 5);
        }
        if (i % 32 == 0) etcd->advance(100ms);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(done == 4 * rounds);
  const auto events = all.events(1, static_cast<std::size_t>(4 * rounds));
  REQUIRE(events.size() == static_cast<std::size_t>(4 * rounds));
  for (std::size_t i = 0; i < events.size(); ++i) {  // each revision once, in order
    CHECK(gateway::number(events[i]["kv"], "mod_revision") == static_cast<std::int64_t>(i) + 2);
  }
}
