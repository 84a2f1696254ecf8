// Elections: one leader at a time, also together with etcdctl; who is told what, and in what order.
#include <doctest/doctest.h>

#include "support/lock_support.hpp"
#include "support/tcp_proxy.hpp"

using namespace coordination;
using namespace support;

namespace {

constexpr milliseconds kTtl = 20s;

// What an observer has been told: values, "-" for nobody.
class Chronicle {
 public:
  void add(const LeaderInfo& leader) {
    std::lock_guard<std::mutex> hold(mutex_);
    in_order_ = in_order_ && leader.revision >= last_revision_;
    last_revision_ = leader.revision;
    values_.push_back(leader.exists() ? leader.value : "-");
  }
  std::vector<std::string> values() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return values_;
  }
  std::string text() const {
    std::string result;
    for (const auto& value : values()) result += (result.empty() ? "" : " ") + value;
    return result;
  }
  bool wait_last(const std::string& value) const {
    return wait_until(
        [&] {
          const auto now = values();
          return !now.empty() && now.back() == value;
        },
        lenient(5s));
  }
  bool in_order() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return in_order_;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> values_;
  std::int64_t last_revision_{0};
  bool in_order_{true};
};

struct Fixture {
  Onlooker onlooker{lease_etcd()};
  CoordinatorOptions options{options_for(lease_etcd())};
  Coordinator a{connect(options)}, b{connect(options)};
  std::string path{options.key_prefix + "/elections/e/"};
  Chronicle chronicle;

  Fixture() { REQUIRE(onlooker.wait_leases(0, 30s)); }
  Subscription observe(Coordinator& c) {
    return c.election()
        .observe("e", [this](const LeaderInfo& leader) { chronicle.add(leader); })
        .value();
  }
  // A candidate who waits, once he is in the queue.
  std::future<Result<Leadership>> stand(Coordinator& c, const std::string& value,
                                        Context ctx = {}) {
    const auto places = onlooker.count(path);
    auto future = std::async(std::launch::async, [&c, value, ctx] {
      return c.election().campaign("e", value, kTtl, ctx);
    });
    CHECK(onlooker.wait_count(path, places + 1));
    return future;
  }
};

bool waits(const std::future<Result<Leadership>>& future) {
  return future.wait_for(0s) != std::future_status::ready;
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "election: campaign, leader, proclaim, resign") {
  const auto nobody = b.election().leader("e");
  REQUIRE_FALSE(nobody);
  CHECK(nobody.error().code == ErrorCode::NotFound);
  auto first = a.election().campaign("e", "one", kTtl).value();
  CHECK(first.held());
  CHECK(onlooker.has(first.key(), first.fencing_token()));
  const auto leader = b.election().leader("e").value();
  CHECK(leader.exists());
  CHECK(leader.key == first.key());
  CHECK(leader.value == "one");
  CHECK(leader.token == first.fencing_token());
  CHECK(leader.revision >= leader.token);

  REQUIRE(first.proclaim("one, again"));
  const auto after = b.election().leader("e").value();
  CHECK(after.value == "one, again");
  CHECK(after.token == first.fencing_token());
  CHECK(onlooker.keys(path)[0].lease == lease_of_key(first.key()));  // it keeps its lease

  auto second = stand(b, "two");
  CHECK(waits(second));
  CHECK(a.election().leader("e").value().value == "one, again");
  REQUIRE(first.resign());
  auto next = second.get().value();
  CHECK(next.fencing_token() > first.fencing_token());
  CHECK(a.election().leader("e").value().value == "two");
  CHECK_FALSE(first.held());
  CHECK(first.resign().error().code == ErrorCode::Validation);
  CHECK_FALSE(first.proclaim("too late"));
  CHECK(a.election().leader("e").value().value == "two");
  REQUIRE(next.resign());
  CHECK(a.election().leader("e").error().code == ErrorCode::NotFound);
  CHECK(a.election().campaign("", "x", kTtl).error().code == ErrorCode::Validation);
  CHECK(a.election().campaign("e", "x", 0s).error().code == ErrorCode::Validation);
  CHECK(a.election().leader("a//b").error().code == ErrorCode::Validation);
}

TEST_CASE_FIXTURE(Fixture, "election: a campaign that fails leaves neither key nor lease") {
  auto first = a.election().campaign("e", "one", kTtl).value();
  const auto timeout = b.election().campaign("e", "two", kTtl, Context::with_timeout(50ms));
  REQUIRE_FALSE(timeout);
  CHECK(timeout.error().code == ErrorCode::Timeout);
  CHECK(timeout.error().outcome == Outcome::NotApplied);
  CHECK(onlooker.wait_count(path, 1, 1s));
  Context ctx;
  auto second = stand(b, "two", ctx);
  ctx.cancel();
  const auto cancelled = second.get();
  REQUIRE_FALSE(cancelled);
  CHECK(cancelled.error().code == ErrorCode::Cancelled);
  CHECK(onlooker.wait_count(path, 1, 1s));
  CHECK(onlooker.wait_leases(1, 1s));
  a.close().value();
  CHECK(onlooker.wait_leases(0, 1s));
}

TEST_CASE_FIXTURE(Fixture, "election: the office is lost; proclaim and resign say so") {
  auto first = a.election().campaign("e", "one", kTtl).value();
  LossCount loss;
  first.on_lost(loss.handler());
  auto second = stand(b, "two");
  SUBCASE("the key was deleted") { onlooker.client().remove(first.key()).value(); }
  SUBCASE("the lease was revoked") { REQUIRE(onlooker.gateway.revoke(lease_of_key(first.key()))); }
  auto next = second.get().value();
  Txn guarded;
  guarded.when(first.guard()).then(Op::put(options.key_prefix + "/x", "stale"));
  CHECK_FALSE(a.client().commit(guarded).value().succeeded);
  const auto proclaimed = first.proclaim("stale");  // held() need not know of it yet
  REQUIRE_FALSE(proclaimed);
  CHECK(proclaimed.error().code == ErrorCode::Lost);
  CHECK_FALSE(first.held());
  CHECK(loss.wait(1));
  CHECK(first.resign().error().code == ErrorCode::Lost);
  CHECK(b.election().leader("e").value().value == "two");
  CHECK(next.held());
  a.close().value();
  CHECK(loss.told() == 1);
}

TEST_CASE_FIXTURE(Fixture, "election: a candidate whose lease dies while it waits does not lead") {
  auto first = a.election().campaign("e", "one", kTtl).value();
  auto second = stand(b, "two");
  const auto before = onlooker.keys(path)[1];
  REQUIRE(onlooker.gateway.revoke(before.lease));
  // It stands anew, behind the leader.
  CHECK(wait_until(
      [&] {
        const auto keys = onlooker.keys(path);
        return keys.size() == 2 && keys[1].create_revision > before.create_revision;
      },
      lenient(3s)));
  CHECK(waits(second));
  REQUIRE(first.resign());
  auto next = second.get().value();
  CHECK(next.fencing_token() > before.create_revision);
  CHECK(onlooker.has(next.key(), next.fencing_token()));
}

// --- Observing ------------------------------------------------------------------------------

TEST_CASE_FIXTURE(Fixture, "observe: each leader once, in order, and the absence between") {
  auto observer = observe(b);
  std::string expected = "-";  // nobody at first
  for (int i = 0; i < 5; ++i) {
    const auto name = "L" + std::to_string(i);
    auto leader = a.election().campaign("e", name, kTtl).value();
    REQUIRE(leader.proclaim(name + "'"));
    REQUIRE(leader.proclaim(name + "'"));  // nothing new: not told
    REQUIRE(leader.resign());
    expected += " " + name + " " + name + "' -";
  }
  CHECK(chronicle.wait_last("-"));
  CHECK(wait_until([&] { return chronicle.text() == expected; }, lenient(2s)));
  CHECK(chronicle.text() == expected);
  CHECK(chronicle.in_order());
}

TEST_CASE_FIXTURE(Fixture, "observe: candidates who never led are not told") {
  auto leader = a.election().campaign("e", "A", kTtl).value();
  auto second = stand(b, "B");
  Context gives_up;
  auto third = stand(b, "C", gives_up);
  // B and C are there, the last change is A's: the leader is the oldest, not the last to write.
  REQUIRE(leader.proclaim("A'"));
  auto observer = observe(b);
  CHECK(chronicle.wait_last("A'"));
  gives_up.cancel();
  CHECK_FALSE(third.get());
  REQUIRE(leader.resign());
  auto b_leads = second.get().value();
  CHECK(chronicle.wait_last("B"));
  CHECK(chronicle.text() == "A' B");
}

TEST_CASE_FIXTURE(Fixture, "observe: what goes in one revision is gone at once") {
  auto observer = observe(b);
  const auto remove_all = [&] {
    RemoveRequest everybody{path};
    everybody.range_end = prefix_range_end(path);
    return onlooker.client().remove(everybody).value().deleted;
  };
  std::string expected = "-";
  for (int i = 0; i < 6; ++i) {
    // The order of the names is not that of the ages: in every second round the leader goes first.
    const bool leader_first = i % 2 == 0;
    onlooker.client().put(path + (leader_first ? "1" : "3"), "old").value();
    onlooker.client().put(path + "2", "young").value();
    CHECK(chronicle.wait_last("old"));
    CHECK(remove_all() == 2);
    CHECK(chronicle.wait_last("-"));
    expected += " old -";
  }
  CHECK(chronicle.text() == expected);
  CHECK(chronicle.in_order());
}

TEST_CASE_FIXTURE(Fixture, "observe: as a watch, with a second observer from the middle") {
  auto leader = a.election().campaign("e", "A", kTtl).value();
  auto watch = b.election().observe("e").value();
  const auto now = watch.next(Context::with_timeout(lenient(5s))).value();
  CHECK(now.value == "A");
  CHECK(now.token == leader.fencing_token());
  CHECK(now.key == leader.key());
  const auto nothing = watch.next(Context::with_timeout(30ms));
  REQUIRE_FALSE(nothing);
  CHECK(nothing.error().code == ErrorCode::Timeout);
  REQUIRE(leader.resign());
  const auto absence = watch.next(Context::with_timeout(lenient(5s))).value();
  CHECK_FALSE(absence.exists());
  CHECK(absence.revision > now.revision);
  b.close().value();
  CHECK(watch.next().error().code == ErrorCode::Cancelled);
}

TEST_CASE(
    "observe: after a compaction of the time that it missed, it tells the difference [slow]") {
  TcpProxy proxy(lease_etcd().port());
  Onlooker onlooker(lease_etcd());
  auto options = options_for(lease_etcd());
  auto a = connect(options);
  auto far_options = options;
  far_options.endpoints = {proxy.endpoint()};
  auto far = connect(far_options);
  Chronicle chronicle;
  auto observer =
      far.election().observe("e", [&](const LeaderInfo& info) { chronicle.add(info); }).value();
  auto first = a.election().campaign("e", "A", kTtl).value();
  REQUIRE(chronicle.wait_last("A"));
  SUBCASE("there is another leader, and others behind him") {
    proxy.refuse();
    REQUIRE(first.resign());
    auto second = a.election().campaign("e", "B", kTtl).value();
    auto third =
        std::async(std::launch::async, [&] { return a.election().campaign("e", "C", kTtl); });
    REQUIRE(onlooker.wait_count(options.key_prefix + "/elections/e/", 2));
    REQUIRE(second.proclaim("B'"));
    const auto revision = onlooker.client().put(options.key_prefix + "/x", "1").value().revision;
    REQUIRE(onlooker.client().compact(revision));
    proxy.refuse(false);
    CHECK(chronicle.wait_last("B'"));
    REQUIRE(second.resign());
    auto c_leads = third.get().value();
    CHECK(chronicle.wait_last("C"));
    // Between A and B' there may be told that nobody led, which is true; never C.
    const auto text = chronicle.text();
    CHECK_MESSAGE((text == "- A B' C" || text == "- A - B' C"), text);
  }
  SUBCASE("nobody led when it was cut off") {
    REQUIRE(first.resign());
    REQUIRE(chronicle.wait_last("-"));
    proxy.refuse();
    auto second = a.election().campaign("e", "B", kTtl).value();
    auto third =
        std::async(std::launch::async, [&] { return a.election().campaign("e", "C", kTtl); });
    REQUIRE(onlooker.wait_count(options.key_prefix + "/elections/e/", 2));
    REQUIRE(second.proclaim("B'"));  // changed later than C's, but older
    const auto revision = onlooker.client().put(options.key_prefix + "/x", "1").value().revision;
    REQUIRE(onlooker.client().compact(revision));
    proxy.refuse(false);
    CHECK(chronicle.wait_last("B'"));
    REQUIRE(second.resign());
    CHECK(third.get());
    CHECK(chronicle.text().substr(0, 8) == "- A - B'");
  }
  SUBCASE("nobody leads") {
    proxy.refuse();
    REQUIRE(first.resign());
    const auto revision = onlooker.client().put(options.key_prefix + "/x", "1").value().revision;
    REQUIRE(onlooker.client().compact(revision));
    proxy.refuse(false);
    CHECK(chronicle.wait_last("-"));
    CHECK(chronicle.text() == "- A -");
  }
}

// --- etcdctl --------------------------------------------------------------------------------

TEST_CASE_FIXTURE(Fixture, "election: etcdctl elect and campaign exclude each other") {
  const Etcdctl ctl(lease_etcd());
  const auto name = options.key_prefix + "/elections/e";
  auto observer = observe(b);
  SUBCASE("etcdctl waits for us") {
    auto ours = a.election().campaign("e", "ours", kTtl).value();
    auto theirs = ctl.start({"elect", name, "theirs"});
    REQUIRE(onlooker.wait_count(path, 2));
    CHECK(b.election().leader("e").value().value == "ours");
    CHECK_FALSE(theirs.read_line(100ms));
    REQUIRE(ours.resign());
    const auto key = theirs.read_line(lenient(5s));
    REQUIRE(key);
    CHECK(key->compare(0, path.size(), path) == 0);
    CHECK(theirs.read_line(lenient(5s)) == "theirs");
    CHECK(chronicle.wait_last("theirs"));
    theirs.terminate();
    CHECK(chronicle.wait_last("-"));
    CHECK(chronicle.text() == "- ours theirs -");
  }
  SUBCASE("we wait for etcdctl") {
    auto theirs = ctl.start({"elect", name, "theirs"});
    REQUIRE(theirs.read_line(lenient(5s)));
    auto ours = stand(a, "ours");
    CHECK(waits(ours));
    const auto leader = b.election().leader("e").value();
    CHECK(leader.value == "theirs");
    theirs.terminate();  // it resigns
    auto won = ours.get().value();
    CHECK(won.fencing_token() > leader.token);
    CHECK(chronicle.wait_last("ours"));
    REQUIRE(won.resign());
    CHECK(chronicle.wait_last("-"));
    CHECK(chronicle.text() == "- theirs ours -");
  }
  SUBCASE("we wait for etcdctl, which is killed: its lease runs out") {
    const Stopwatch watch;
    const auto lease = onlooker.gateway.grant(5);
    PutRequest put{path + "1234", "theirs"};  // what it would have left behind
    put.lease = lease;
    onlooker.client().put(put).value();
    auto won = a.election().campaign("e", "ours", kTtl).value();
    CHECK(watch.elapsed() > 4s);
    CHECK(chronicle.wait_last("ours"));
    CHECK(chronicle.text() == "- theirs ours");
  }
  SUBCASE("etcdctl observes us") {
    auto listener = ctl.start({"elect", "-l", name});
    auto ours = a.election().campaign("e", "ours", kTtl).value();
    const auto line = listener.read_until("ours", lenient(5s));
    CHECK(line);
    REQUIRE(ours.proclaim("news"));
    CHECK(listener.read_until("news", lenient(5s)));
  }
  a.close().value();
  // etcdctl leaves its lease to run out.
  for (const auto lease : onlooker.gateway.leases()) onlooker.gateway.revoke(lease);
}

// --- Lost answers ---------------------------------------------------------------------------

TEST_CASE("election: whichever answer is lost, campaign, proclaim and resign tell the truth") {
  Onlooker onlooker(lease_etcd());
  REQUIRE(onlooker.wait_leases(0, 30s));
  auto transport = std::make_shared<NthTransport>();
  auto options = options_for(lease_etcd());
  options.transport = transport;
  options.retry_config.initial_delay = 5ms;
  const std::string path = options.key_prefix + "/elections/e/";
  for (int n = 1; n < 20; ++n) {
    CAPTURE(n);
    transport->disarm();
    auto c = connect(options);
    const int before = transport->faults();
    transport->arm(n);
    {
      auto office = c.election().campaign("e", "one", kTtl, Context::with_timeout(lenient(9s)));
      REQUIRE_MESSAGE(office, why(office));
      CHECK(onlooker.has(office->key(), office->fencing_token()));
      const auto proclaimed = office->proclaim("two");
      CHECK_MESSAGE(proclaimed, why(proclaimed));
      CHECK(c.election().leader("e").value().value == "two");
      const auto resigned = office->resign();
      // Where the answer was lost it is gone, but nobody can tell whether by this call.
      const bool maybe = !resigned && resigned.error().outcome == Outcome::MaybeApplied;
      CHECK_MESSAGE((resigned || maybe), why(resigned));
    }
    const bool over = transport->faults() == before;
    transport->disarm();
    CHECK(onlooker.count(path) == 0);
    c.close().value();
    CHECK(onlooker.wait_leases(0, 3s));
    if (over) break;
  }
}
