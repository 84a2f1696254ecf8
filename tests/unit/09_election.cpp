// Section 9: elections, on an etcd in memory whose time the tests move.
#include <doctest/doctest.h>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"

using namespace coordination;
using namespace support;

namespace {

struct Setup : Cluster {
  Coordinator c{connect("one")}, d{connect("two")};

  Leadership campaign(const std::string& value = "c1") {
    return c.election().campaign("e", value, 9s).value();
  }
  bool queued(std::size_t keys) const {
    return eventually([&] { return etcd->keys().size() == keys; });
  }
};

/// A candidate in a thread of its own.
class Candidate {
 public:
  Candidate(Coordinator& c, const std::string& value)
      : thread_([this, &c, value] {
          result_ =
              std::make_unique<Result<Leadership>>(c.election().campaign("e", value, 9s, ctx_));
          done_ = true;
        }) {}
  ~Candidate() {
    ctx_.cancel();
    thread_.join();
  }
  bool done() const { return done_; }
  bool leads() {
    return eventually([this] { return done(); }) && result_->has_value() && (*result_)->held();
  }
  Leadership& office() { return **result_; }
  void cancel() { ctx_.cancel(); }

 private:
  Context ctx_;
  std::atomic<bool> done_{false};
  std::unique_ptr<Result<Leadership>> result_;
  Joined thread_;
};

std::string next_value(Watch<LeaderInfo>& watch) {
  const auto info = watch.next(Context::with_timeout(lenient(2s)));
  if (!info) return text_of(info);
  return info->exists() ? info->value : "nobody";
}

}  // namespace

TEST_CASE("election: who leads, under which key, with which token") {
  Setup s;
  check_code(s.c.election().leader("e"), ErrorCode::NotFound);
  auto office = s.campaign("host-1");
  CHECK(office.held());
  CHECK(office.key().compare(0, 13, "/elections/e/") == 0);
  const auto leader = s.d.election().leader("e");
  REQUIRE_MESSAGE(leader, text_of(leader));
  CHECK(leader->exists());
  CHECK(leader->key == office.key());
  CHECK(leader->value == "host-1");
  CHECK(leader->token == office.fencing_token());
  CHECK(leader->revision == s.etcd->revision());
  CHECK(s.d.client().get(office.key()).value().create_revision == office.fencing_token());
}

TEST_CASE("election: it hands over in the order of the candidates") {
  Setup s;
  auto office = s.campaign();
  Candidate second(s.d, "d2");
  REQUIRE(s.queued(2));
  Candidate third(s.c, "c3");
  REQUIRE(s.queued(3));
  CHECK(s.c.election().leader("e").value().value == "c1");
  CHECK(office.resign());
  CHECK(second.leads());
  CHECK_FALSE(third.done());
  CHECK(s.c.election().leader("e").value().value == "d2");
  CHECK(second.office().fencing_token() > office.fencing_token());
  CHECK(second.office().resign());
  CHECK(third.leads());
  CHECK(third.office().resign());
  check_code(s.c.election().leader("e"), ErrorCode::NotFound);
}

TEST_CASE("election: a candidate who gives up leaves nothing") {
  Setup s;
  const auto office = s.campaign();
  check_code(s.d.election().campaign("e", "d", 9s, Context::with_timeout(20ms)),
             ErrorCode::Timeout);
  CHECK(s.queued(1));
  Candidate second(s.d, "d2");
  REQUIRE(s.queued(2));
  second.cancel();
  CHECK(s.queued(1));
  CHECK(s.etcd->leases().size() == 1);
  CHECK(office.held());
}

TEST_CASE("election: a candidate who comes while etcd is away waits for it") {
  Setup s;
  s.cut_off("one");
  Candidate candidate(s.c, "v");
  const int before = s.tap->count();
  CHECK(eventually([&] { return s.tap->count() >= before + 10; }));
  CHECK_FALSE(candidate.done());
  s.etcd->heal();
  CHECK(candidate.leads());
}

TEST_CASE("election: proclaim") {
  Setup s;
  auto office = s.campaign("one");
  const auto token = office.fencing_token();
  CHECK(office.proclaim("two"));
  const auto leader = s.d.election().leader("e").value();
  CHECK(leader.value == "two");
  CHECK(leader.token == token);
  CHECK(s.d.client().get(office.key()).value().lease == s.etcd->leases().front());
  CHECK(s.c.client().commit(Txn{}.when(office.guard()).then(Op::put("k", "v"))).value().succeeded);
  s.d.client().remove(office.key()).value();
  check_code(office.proclaim("three"), ErrorCode::Lost);
  CHECK_FALSE(office.held());
  CHECK_FALSE(
      s.c.client().commit(Txn{}.when(office.guard()).then(Op::put("k", "w"))).value().succeeded);
  check_code(s.d.election().leader("e"), ErrorCode::NotFound);
}

TEST_CASE("election: what was proclaimed twice and arrives late does not undo a later word") {
  HttpRequest late;
  Setup s;
  auto office = s.campaign("first");
  const auto hook = s.tap->lose_if([&](const HttpRequest& request) {  // the first that writes
    if (!late.body.empty() || request.body.find("request_put") == std::string::npos) return false;
    late = request;
    return true;
  });
  CHECK(office.proclaim("second"));
  CHECK(office.proclaim("third"));
  REQUIRE_FALSE(late.body.empty());
  REQUIRE(s.etcd->perform(late, nullptr, {}));
  CHECK(s.d.election().leader("e").value().value == "third");
}

TEST_CASE("election: lost, and told once") {
  Setup s;
  Notes notes;
  auto office = s.campaign();
  office.on_lost(notes.on_lost());
  Candidate second(s.d, "d2");
  REQUIRE(s.queued(2));
  s.cut_off("one");
  s.etcd->advance(4s);
  CHECK(eventually([&] { return s.tap->finished("/v3/lease/keepalive") > 0; }));
  s.etcd->advance(5s);
  CHECK_FALSE(office.held());
  CHECK(second.leads());
  CHECK(eventually([&] { return notes.size() == 1; }));
  check_code(office.proclaim("x"), ErrorCode::Lost);
  check_code(office.resign(), ErrorCode::Lost);
  check_code(office.resign(), ErrorCode::Validation);
  CHECK(notes.lines() == std::vector<std::string>{"LOST"});
}

TEST_CASE("election: resigned by the destructor, and by assignment") {
  Setup s;
  { const auto office = s.campaign(); }
  CHECK(s.etcd->keys().empty());
  auto one = s.c.election().campaign("e", "1", 9s).value();
  auto two = s.c.election().campaign("f", "2", 9s).value();
  const auto key = two.key();
  one = std::move(two);
  CHECK(one.key() == key);
  CHECK(eventually([&] { return s.etcd->keys() == std::vector<std::string>{key}; }));
}

TEST_CASE("election: observed: every leader and value, in order, also nobody") {
  Setup s;
  auto office = s.campaign("c1");
  auto watch = s.d.election().observe("e").value();
  CHECK(next_value(watch) == "c1");
  office.proclaim("c1 again").value();
  CHECK(next_value(watch) == "c1 again");
  Candidate second(s.d, "d2");
  REQUIRE(s.queued(2));  // a candidate is no leader yet
  office.resign().value();
  CHECK(next_value(watch) == "d2");
  REQUIRE(second.leads());
  second.office().resign().value();
  CHECK(next_value(watch) == "nobody");
  const auto third = s.campaign("c3");
  CHECK(next_value(watch) == "c3");
  const auto none = watch.next(Context::with_timeout(10ms));
  check_code(none, ErrorCode::Timeout);
}

TEST_CASE("election: observed while nobody leads it begins with nobody") {
  Setup s;
  auto below = s.c.election().campaign("e/below", "another's", 9s).value();
  auto watch = s.d.election().observe("e").value();
  const auto first = watch.next(Context::with_timeout(lenient(2s)));
  REQUIRE_MESSAGE(first, text_of(first));
  CHECK_FALSE(first->exists());
  CHECK(first->revision == below.fencing_token());
  const auto office = s.campaign("one");
  CHECK(next_value(watch) == "one");
  auto late = s.d.election().observe("e").value();
  CHECK(next_value(late) == "one");
  CHECK_FALSE(late.next(Context::with_timeout(20ms)));
}

TEST_CASE("election: of two of the same age all name the same as leader") {
  Setup s;
  auto watch = s.d.election().observe("e").value();
  CHECK(next_value(watch) == "nobody");
  s.c.client()
      .commit(
          Txn().then(Op::put("/elections/e/b", "second")).then(Op::put("/elections/e/a", "first")))
      .value();
  CHECK(next_value(watch) == "first");
  CHECK(s.d.election().leader("e").value().value == "first");
  auto late = s.d.election().observe("e").value();
  CHECK(next_value(late) == "first");
  CHECK_FALSE(watch.next(Context::with_timeout(20ms)));
}

TEST_CASE("election: proclaim returns the revision of the new word") {
  Setup s;
  auto office = s.campaign("one");
  const auto revision = office.proclaim("two").value();
  CHECK(revision == s.etcd->revision());
  CHECK(s.d.client().get(office.key()).value().mod_revision == revision);
  const Result<void> as_before = office.proclaim("three");
  CHECK(as_before);
  bool dropped = false;
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    bool puts = request.body.find("request_put") != std::string::npos;
    if (puts && !std::exchange(dropped, true)) s.etcd->drop_replies(1);
  });
  const auto once = office.proclaim("four").value();  // though its answer was lost
  s.tap->before(nullptr);
  CHECK(dropped);
  CHECK(s.d.client().get(office.key()).value().mod_revision == once);
  CHECK(s.d.client().get(office.key()).value().version == 4);
}

TEST_CASE("election: observed by a handler, through cut streams") {
  Setup s;
  Notes notes;
  auto office = s.campaign("0");
  const auto subscription = s.d.election().observe(
      "e", [&](const LeaderInfo& info) { notes.add(info.exists() ? info.value : "nobody"); });
  REQUIRE_MESSAGE(subscription, text_of(subscription));
  std::vector<std::string> expected{"0"};
  for (int i = 1; i < 10; ++i) {
    if (i % 3 == 0) s.etcd->cut_streams(i % 2 == 0);
    office.proclaim(std::to_string(i)).value();
    expected.push_back(std::to_string(i));
  }
  CHECK(eventually([&] { return notes.size() == expected.size(); }));
  CHECK(notes.lines() == expected);
}

TEST_CASE("election: in one queue with candidates of another kind") {
  Setup s;
  PutRequest put;
  put.key = "/elections/e/694d5765fc71500b";
  put.value = "etcdctl";
  auto lease = s.d.client().grant(60s).value();
  put.lease = lease.id();
  s.d.client().put(put).value();
  CHECK(s.c.election().leader("e").value().value == "etcdctl");
  Candidate candidate(s.c, "c");
  REQUIRE(s.queued(2));
  CHECK_FALSE(candidate.done());
  lease.revoke().value();
  CHECK(candidate.leads());
}

TEST_CASE("election: a leader writes under the guard of the office") {
  Setup s;
  auto office = s.campaign();
  CHECK(office.put("k", "1"));
  CHECK(office.remove("k").value().deleted == 1);
  CHECK(office.commit(Txn{}.then(Op::put("k", "2"))).value().succeeded);
  CHECK(s.d.client().get("k").value().value == "2");
  s.d.client().remove(office.key()).value();
  check_code(office.put("k", "3"), ErrorCode::Lost);
  CHECK(s.d.client().get("k").value().value == "2");
}

TEST_CASE("election: a candidate of an election below is no leader of this one") {
  Setup s;
  auto below = s.c.election().campaign("e/b", "below", 9s).value();
  check_code(s.d.election().leader("e"), ErrorCode::NotFound);
}

TEST_CASE("election: candidates of an election below are not told by observe") {
  Setup s;
  auto below = s.c.election().campaign("e/b", "below", 9s).value();
  auto watch = s.d.election().observe("e").value();
  auto office = s.campaign("one");
  std::string value = next_value(watch);
  CHECK(value == "nobody");
  value = next_value(watch);
  CHECK(value == "one");
}
