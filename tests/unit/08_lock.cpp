// Section 8: locks, shared locks and semaphores, on an etcd in memory whose time the tests move.
#include <doctest/doctest.h>
#include <unistd.h>

#include <deque>
#include <future>
#include <random>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"

using namespace coordination;
using namespace support;

namespace {

constexpr const char* kTxn = "/v3/kv/txn";

struct Setup : Cluster {
  Coordinator c{connect("one")}, d{connect("two")};

  Lock acquire(const std::string& key = "a", milliseconds ttl = 9s) {
    return c.lock().acquire(key, ttl).value();
  }
  bool nothing_left() const { return etcd->keys().empty() && etcd->leases().empty(); }
};

std::string hex(std::int64_t number) {
  char text[20];
  std::snprintf(text, sizeof(text), "%llx", static_cast<unsigned long long>(number));
  return text;
}

/// Somebody who waits for a lock in a thread of his own.
class Waiter {
 public:
  using Acquire = std::function<Result<Lock>(Context)>;
  explicit Waiter(Acquire acquire)
      : thread_([this, acquire = std::move(acquire)] {
          result_ = std::make_unique<Result<Lock>>(acquire(ctx_));
          done_ = true;
        }) {}
  ~Waiter() {
    ctx_.cancel();
    thread_.join();
  }
  bool done() const { return done_; }
  bool wins() {
    return eventually([this] { return done(); }) && result_->has_value() && (*result_)->held();
  }
  Lock& lock() { return **result_; }
  const Result<Lock>& result() const { return *result_; }
  void cancel() { ctx_.cancel(); }

 private:
  Context ctx_;
  std::atomic<bool> done_{false};
  std::unique_ptr<Result<Lock>> result_;
  Joined thread_;
};

Waiter::Acquire exclusive(Coordinator& c, const std::string& key = "a", milliseconds ttl = 9s) {
  return [&c, key, ttl](Context ctx) { return c.lock().acquire(key, ttl, ctx); };
}
Waiter::Acquire shared(Coordinator& c, const std::string& key = "a") {
  return [&c, key](Context ctx) { return c.lock().acquire_shared(key, 9s, ctx); };
}
Waiter::Acquire permit(Coordinator& c, int permits, const std::string& key = "a") {
  return
      [&c, key, permits](Context ctx) { return c.lock().semaphore(key, permits).acquire(9s, ctx); };
}

bool queued(const Setup& s, std::size_t keys) {
  return eventually([&] { return s.etcd->keys().size() == keys; });
}
/// Waits until nobody has asked for anything for a while: all have looked, and are waiting.
void all_wait(const Cluster& s) {
  int seen = 0;
  do {
    seen = s.tap->count();
  } while (wait_until([&] { return s.tap->count() != seen; }, lenient(40ms)));
}

}  // namespace

TEST_CASE("lock: its key, its lease, its token") {
  Setup s;
  const auto before = s.etcd->revision();
  auto lock = s.acquire("jobs/nightly");
  REQUIRE(s.etcd->leases().size() == 1);
  CHECK(lock.key() == "/locks/jobs/nightly/" + hex(s.etcd->leases().front()));
  CHECK(s.etcd->keys() == std::vector<std::string>{lock.key()});
  CHECK(lock.fencing_token() == before + 1);
  CHECK(lock.held());
  CHECK(lock.ttl().value() == 9s);
  const auto kv = s.c.client().get(lock.key()).value();
  CHECK(kv.create_revision == lock.fencing_token());
  CHECK(kv.lease == s.etcd->leases().front());
  CHECK(kv.value.find(':' + std::to_string(getpid())) != std::string::npos);
  CHECK(lock.unlock());
  CHECK_FALSE(lock.held());
  CHECK(s.etcd->keys().empty());
}

TEST_CASE("lock: under the key prefix") {
  Setup s;
  auto options = s.options();
  options.key_prefix = "/tenants/a";
  auto c = connect_to(options);
  const auto lock = c.lock().acquire("x", 9s).value();
  CHECK(lock.key().compare(0, 19, "/tenants/a/locks/x/") == 0);
  CHECK(s.etcd->keys() == std::vector<std::string>{lock.key()});
}

TEST_CASE("lock: one holder; the other is told Conflict, and leaves nothing") {
  Setup s;
  auto lock = s.acquire();
  const auto keys = s.etcd->keys();
  check_code(s.d.lock().try_acquire("a", 9s), ErrorCode::Conflict);
  check_code(s.c.lock().try_acquire("a", 9s), ErrorCode::Conflict);
  CHECK(s.etcd->keys() == keys);
  auto other = s.d.lock().try_acquire("b", 9s);
  CHECK(other);
  CHECK(lock.unlock());
  auto again = s.d.lock().try_acquire("a", 9s);
  REQUIRE_MESSAGE(again, text_of(again));
  CHECK(again->fencing_token() > lock.fencing_token());
}

TEST_CASE("lock: keys that begin alike are different locks") {
  Setup s;
  const auto a = s.acquire("a"), ab = s.acquire("a/b"), aa = s.acquire("aa");
  CHECK(a.held());
  CHECK(ab.held());
  CHECK(aa.held());
}

TEST_CASE("lock: unlocked twice, and moved") {
  Setup s;
  auto lock = s.acquire();
  CHECK(lock.unlock());
  check_code(lock.unlock(), ErrorCode::Validation);
  check_code(lock.renew(9s), ErrorCode::Validation);
  check_code(lock.ttl(), ErrorCode::Validation);
  check_code(lock.put("k", "v"), ErrorCode::Validation);
  auto one = s.acquire("one"), two = s.acquire("two");
  const auto key = two.key();
  one = std::move(two);
  CHECK(one.key() == key);
  CHECK(one.held());
  CHECK(eventually([&] { return s.etcd->keys() == std::vector<std::string>{key}; }));
}

TEST_CASE("lock: the destructor unlocks") {
  Setup s;
  { const auto lock = s.acquire(); }
  CHECK(s.etcd->keys().empty());
  CHECK(s.d.lock().try_acquire("a", 9s));
}

TEST_CASE("lock: an uncontended lock and unlock are two requests in a loop") {
  Setup s;
  s.acquire().unlock().value();
  s.tap->reset();
  for (int i = 0; i < 50; ++i) s.acquire().unlock().value();
  for (int i = 0; i < 50; ++i) s.c.lock().try_acquire("b", 9s).value().unlock().value();
  CHECK(s.tap->count(kTxn) == 200);
  CHECK(s.tap->count_calls() == 200);
  CHECK(s.etcd->leases().size() == 1);
}

TEST_CASE("lock: who finds it free asks for no more; who met a queue joins the next one at once") {
  std::mutex mutex;
  std::vector<std::size_t> asked;  // how much each Txn that may put a key asks for
  Setup s;
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    if (request.body.find("request_put") == std::string::npos) return;
    std::lock_guard<std::mutex> hold(mutex);
    asked.push_back(nlohmann::json::parse(request.body).at("success").size());
  });
  auto lock = s.acquire();
  Waiter waiter(exclusive(s.d));
  REQUIRE(queued(s, 2));
  lock.unlock().value();
  REQUIRE(waiter.wins());
  waiter.lock().unlock().value();
  for (int i = 0; i < 2; ++i) s.d.lock().acquire("b", 9s).value().unlock().value();
  std::lock_guard<std::mutex> hold(mutex);
  CHECK(asked == std::vector<std::size_t>{1, 1, 3, 3, 1});
}

TEST_CASE("lock: a kept lease is not used once it is old or gone") {
  Setup s;
  s.acquire().unlock().value();
  s.etcd->expire_lease(s.etcd->leases().front());
  auto lock = s.acquire();
  CHECK(lock.held());
  CHECK(s.etcd->leases().size() == 1);
  CHECK(s.c.client().get(lock.key()).value().lease == s.etcd->leases().front());
  lock.unlock().value();
  s.etcd->expire_lease(s.etcd->leases().front());
  auto tried = s.c.lock().try_acquire("a", 9s);
  REQUIRE_MESSAGE(tried, text_of(tried));
  CHECK(tried->held());
}

TEST_CASE("lock: a lease that nobody takes again is given back") {
  Setup s;
  s.acquire("a", 6s).unlock().value();
  CHECK(s.etcd->leases().size() == 1);
  for (int i = 0; i < 10; ++i) {
    const int before = s.tap->finished("/v3/lease/keepalive");
    s.etcd->advance(2500ms);
    wait_until([&] { return s.tap->finished("/v3/lease/keepalive") > before; }, 20ms);
  }
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
}

TEST_CASE("lock: first come, first served") {
  Setup s;
  auto lock = std::make_unique<Lock>(s.acquire());
  std::deque<Waiter> waiters;
  for (std::size_t i = 0; i < 6; ++i) {
    waiters.emplace_back(exclusive(i % 2 == 0 ? s.d : s.c));
    REQUIRE(queued(s, i + 2));
  }
  CHECK(lock->unlock());
  std::int64_t token = lock->fencing_token();
  for (std::size_t i = 0; i < waiters.size(); ++i) {
    REQUIRE(waiters[i].wins());
    CHECK(waiters[i].lock().fencing_token() > token);
    token = waiters[i].lock().fencing_token();
    for (std::size_t k = i + 1; k < waiters.size(); ++k) CHECK_FALSE(waiters[k].done());
    CHECK(waiters[i].lock().unlock());
  }
  CHECK(s.etcd->keys().empty());
}

TEST_CASE("lock: an unlock wakes the next in the queue and nobody else") {
  std::atomic<int> waiting{0};
  Setup s;
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    // The holder's own watch names its start.
    const bool from_now = request.body.find("start_revision") == std::string::npos;
    if (request.path == "/v3/watch" && from_now) ++waiting;
  });
  auto lock = std::make_unique<Lock>(s.acquire());
  std::vector<std::unique_ptr<Waiter>> waiters;
  for (std::size_t i = 0; i < 10; ++i) {
    waiters.push_back(std::make_unique<Waiter>(exclusive(i % 2 == 0 ? s.c : s.d)));
    CHECK(eventually([&] { return s.etcd->keys().size() == i + 2; }));
  }
  CHECK(eventually([&] { return waiting == 10; }));
  all_wait(s);
  s.tap->reset();
  lock.reset();
  CHECK(waiters[0]->wins());
  CHECK(s.tap->count(kTxn) == 2);  // the unlock, and a look of the next
  CHECK(s.tap->count_calls() == 2);
}

namespace {

/// Of each watch stream one watch is as late with its events as etcd's timer makes it: for a test,
/// they never come.
struct Late : Transport {
  Late(std::shared_ptr<Transport> next, const std::string& watch)
      : inner(std::move(next)), id("\"watch_id\":\"" + watch + "\"") {}

  Result<HttpResponse> perform(const HttpRequest& request, const ChunkSink& sink,
                               const Context& ctx) override {
    const auto in_time = [&](std::string_view piece) {
      std::istringstream lines{std::string(piece)};
      for (std::string line; std::getline(lines, line);) {
        const bool late = line.find(id) != line.npos && line.find("\"events\"") != line.npos;
        if (!late && !sink(line + "\n")) return false;
      }
      return true;
    };
    return inner->perform(request, request.path == "/v3/watch" ? ChunkSink(in_time) : sink, ctx);
  }

  const std::shared_ptr<Transport> inner;
  const std::string id;
};

}  // namespace

TEST_CASE("lock: a watch that etcd serves late delays no hand-over") {
  Cluster cluster;
  for (const std::string watch : {"1", "2"}) {
    CAPTURE(watch);
    auto holder = cluster.connect("one");
    auto options = cluster.options("two");
    options.transport = std::make_shared<Late>(cluster.tap, watch);
    auto late = connect_to(options);
    auto lock = holder.lock().acquire("a", 9s).value();
    Waiter waiter(exclusive(late));
    REQUIRE(eventually([&] { return cluster.etcd->keys().size() == 2; }));
    all_wait(cluster);
    lock.unlock().value();
    REQUIRE(waiter.wins());
    waiter.lock().unlock().value();
  }
}

TEST_CASE("lock: who gives up waiting leaves nothing, and lets the others pass") {
  Setup s;
  auto lock = s.acquire();
  const Stopwatch watch;
  check_code(s.d.lock().acquire("a", 9s, Context::with_timeout(30ms)), ErrorCode::Timeout);
  CHECK(watch.over(lenient(130ms)) == 0);
  CHECK(queued(s, 1));
  Waiter first(exclusive(s.d));
  REQUIRE(queued(s, 2));
  Waiter second(exclusive(s.d));
  REQUIRE(queued(s, 3));
  Stopwatch since_cancel;
  first.cancel();
  CHECK(eventually([&] { return first.done(); }));
  CHECK(since_cancel.over(lenient(100ms)) == 0);
  check_code(first.result(), ErrorCode::Cancelled);
  CHECK(queued(s, 2));
  CHECK_FALSE(second.done());
  lock.unlock().value();
  CHECK(second.wins());
  second.lock().unlock().value();
  const Context over;
  over.cancel();
  s.tap->reset();
  check_code(s.c.lock().acquire("a", 9s, over), ErrorCode::Cancelled);
  check_code(s.c.lock().try_acquire("a", 9s, Context::with_timeout(0ms)), ErrorCode::Timeout);
  CHECK(s.tap->count() == 0);
}

TEST_CASE("lock: the next one has it when the holder's lease runs out") {
  Setup s;
  Notes notes;
  auto lock = s.acquire();
  lock.on_lost(notes.on_lost());
  Waiter waiter(exclusive(s.d));
  REQUIRE(queued(s, 2));
  s.cut_off("one");
  s.etcd->advance(4s);  // the waiter renews his lease
  CHECK(eventually([&] { return s.tap->finished("/v3/lease/keepalive") > 0; }));
  s.etcd->advance(4s);
  CHECK(lock.held());
  CHECK_FALSE(waiter.done());
  s.etcd->advance(1s);
  CHECK_FALSE(lock.held());
  CHECK(waiter.wins());
  CHECK(eventually([&] { return notes.size() == 1; }));
  CHECK(notes.lines() == std::vector<std::string>{"LOST"});
  check_code(lock.unlock(), ErrorCode::Lost);
}

TEST_CASE("lock: one who waits for longer than his TTL keeps his place") {
  Setup s;
  auto lock = s.acquire();
  Waiter waiter(exclusive(s.d));
  REQUIRE(queued(s, 2));
  for (int i = 0; i < 8; ++i) {
    const int before = s.tap->finished("/v3/lease/keepalive");
    s.etcd->advance(3100ms);
    CHECK(eventually([&] { return s.tap->finished("/v3/lease/keepalive") >= before + 2; }));
  }
  CHECK(lock.held());
  CHECK(s.etcd->keys().size() == 2);
  lock.unlock().value();
  CHECK(waiter.wins());
}

TEST_CASE("lock: one whose lease dies while he waits queues again") {
  Setup s;
  auto lock = s.acquire();
  const auto holder = s.etcd->leases().front();
  Waiter waiter(exclusive(s.d));
  REQUIRE(queued(s, 2));
  for (const auto lease : s.etcd->leases()) {
    if (lease != holder) s.etcd->expire_lease(lease);
  }
  CHECK(queued(s, 2));
  CHECK_FALSE(waiter.done());
  lock.unlock().value();
  CHECK(waiter.wins());
  CHECK(s.d.client().get(waiter.lock().key()));
}

TEST_CASE("lock: who waits outlasts an outage that takes his lease, and queues again") {
  Setup s;
  auto lock = s.acquire("a", 60s);
  Waiter waiter(exclusive(s.d));
  REQUIRE(queued(s, 2));
  s.cut_off("two");
  s.etcd->advance(10s);
  REQUIRE(queued(s, 1));
  const int before = s.tap->count();
  CHECK(eventually([&] { return s.tap->count() >= before + 10; }));  // it asks for a new lease
  CHECK_FALSE(waiter.done());
  s.etcd->heal();
  CHECK(queued(s, 2));
  lock.unlock().value();
  CHECK(waiter.wins());
}

TEST_CASE("lock: who comes while etcd is away waits for it") {
  Setup s;
  s.cut_off("one");
  Waiter waiter(exclusive(s.c));
  const int before = s.tap->count();
  CHECK(eventually([&] { return s.tap->count() >= before + 10; }));
  CHECK_FALSE(waiter.done());
  const auto late = s.c.lock().acquire("b", 9s, Context::with_timeout(500ms));
  check_code(late, ErrorCode::Timeout);
  CHECK(late.error().message.find("/locks/b was not acquired within ") == 0);
  CHECK(late.error().cause.find("CONNECTION_ERROR") != std::string::npos);
  CHECK(late.error().outcome == Outcome::NotApplied);
  s.etcd->heal();
  CHECK(waiter.wins());
}

TEST_CASE("lock: who does not get it is told who has it, and how long was waited") {
  Setup s;
  const auto lock = s.acquire();
  Waiter second(exclusive(s.d));
  REQUIRE(queued(s, 2));
  const auto third = s.d.lock().acquire("a", 9s, Context::with_timeout(60ms));
  check_code(third, ErrorCode::Timeout);
  int waited = 0;
  const char* form = "/locks/a was not acquired within %d ms";
  REQUIRE_MESSAGE(std::sscanf(third.error().message.c_str(), form, &waited) == 1, text_of(third));
  CHECK(waited >= 60);
  CHECK(third.error().cause.find(lock.key()) == 0);
  CHECK(third.error().cause.find(" holds it") != std::string::npos);
  const auto tried = s.d.lock().try_acquire("a", 9s);
  check_code(tried, ErrorCode::Conflict);
  CHECK(tried.error().message == "/locks/a is taken");
  CHECK(tried.error().cause.find(lock.key()) == 0);
  const Context over;
  over.cancel();
  const auto ended = s.d.lock().acquire("a", 9s, over);
  check_code(ended, ErrorCode::Cancelled);
  CHECK(ended.error().cause.find("it had ended before") != std::string::npos);
}

TEST_CASE("lock: in one queue with contenders of another kind") {
  Setup s;
  // As `etcdctl lock /locks/a` does it.
  PutRequest put;
  put.key = "/locks/a/694d5765fc71500b";
  auto lease = s.d.client().grant(60s).value();
  put.lease = lease.id();
  s.d.client().put(put).value();
  check_code(s.c.lock().try_acquire("a", 9s), ErrorCode::Conflict);
  Waiter waiter(exclusive(s.c));
  REQUIRE(queued(s, 2));
  CHECK_FALSE(waiter.done());
  lease.revoke().value();
  CHECK(waiter.wins());
}

TEST_CASE("lock: lost when somebody deletes its key") {
  Setup s;
  Notes notes;
  auto lock = s.acquire();
  lock.on_lost(notes.on_lost());
  lock.on_lost(notes.on_lost());
  CHECK(eventually([&] { return s.tap->count("/v3/watch") > 0; }));
  s.d.client().remove(lock.key()).value();
  CHECK(eventually([&] { return !lock.held(); }));
  CHECK(eventually([&] { return notes.size() == 2; }));
  check_code(lock.unlock(), ErrorCode::Lost);
  check_code(lock.unlock(), ErrorCode::Validation);
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
  CHECK(notes.size() == 2);
}

TEST_CASE("lock: lost before it is watched: unlock says so, and deletes nobody else's") {
  Setup s;
  auto lock = s.acquire();
  s.d.client().remove(lock.key()).value();
  auto other = s.d.lock().try_acquire("a", 9s);
  REQUIRE_MESSAGE(other, text_of(other));
  check_code(lock.unlock(), ErrorCode::Lost);
  CHECK(s.etcd->keys() == std::vector<std::string>{other->key()});
  CHECK(other->held());
  CHECK(other->unlock());
}

TEST_CASE("lock: a key that somebody deletes and makes again is not ours") {
  Setup s;
  auto lock = s.acquire();
  s.d.client().remove(lock.key()).value();
  s.d.client().put(lock.key(), "imposter").value();
  check_code(lock.put("k", "v"), ErrorCode::Lost);
  check_code(lock.unlock(), ErrorCode::Lost);
  CHECK(s.etcd->keys() == std::vector<std::string>{lock.key()});
}

TEST_CASE("lock: its guard keeps writes of a former holder out") {
  Setup s;
  auto lock = s.acquire();
  CHECK(lock.put("k", "1"));
  CHECK(s.c.client().commit(Txn{}.when(lock.guard()).then(Op::put("k", "2"))).value().succeeded);
  const auto done =
      lock.commit(Txn{}.when(Compare::exists("k")).then(Op::get("k")).then(Op::put("n", "3")));
  REQUIRE_MESSAGE(done, text_of(done));
  CHECK(done->succeeded);
  CHECK(done->range(0).kvs.at(0).value == "2");
  CHECK(done->revision == s.etcd->revision());
  const auto other = lock.commit(Txn{}.when(Compare::missing("k")).otherwise(Op::get("n")));
  REQUIRE_MESSAGE(other, text_of(other));
  CHECK_FALSE(other->succeeded);
  CHECK(other->range(0).kvs.size() == 1);
  const auto removed = lock.remove("n");
  REQUIRE_MESSAGE(removed, text_of(removed));
  CHECK(removed->deleted == 1);
  CHECK(lock.remove("n").value().deleted == 0);

  s.etcd->expire_lease(s.etcd->leases().front());
  CHECK(lock.held());  // nobody has told us yet
  CHECK_FALSE(
      s.c.client().commit(Txn{}.when(lock.guard()).then(Op::put("k", "9"))).value().succeeded);
  const auto revision = s.etcd->revision();
  SUBCASE("put") { check_code(lock.put("k", "9"), ErrorCode::Lost); }
  SUBCASE("remove") { check_code(lock.remove("k"), ErrorCode::Lost); }
  SUBCASE("commit") { check_code(lock.commit(Txn{}.then(Op::put("k", "9"))), ErrorCode::Lost); }
  CHECK(s.etcd->revision() == revision);
  CHECK_FALSE(lock.held());
}

TEST_CASE("lock: the loss is told once to every handler, also to late ones; never after unlock") {
  Setup s;
  Notes notes;
  auto lost = s.acquire("a"), unlocked = s.acquire("b");
  unlocked.on_lost(notes.on_lost());
  unlocked.unlock().value();
  s.cut_off("one");
  s.etcd->advance(9s);
  CHECK_FALSE(lost.held());
  lost.on_lost(notes.on_lost());
  CHECK(eventually([&] { return notes.size() == 1; }));
  lost.on_lost(notes.on_lost());
  CHECK(eventually([&] { return notes.size() == 2; }));
  s.c.close().value();
  CHECK(notes.size() == 2);
}

TEST_CASE("lock: a handler may unlock and destroy its lock") {
  Setup s;
  auto lock = std::make_unique<Lock>(s.acquire());
  std::atomic<bool> done{false};
  lock->on_lost([&](const Error&) {
    CHECK_FALSE(lock->held());
    check_code(lock->unlock(), ErrorCode::Lost);
    lock.reset();
    done = true;
  });
  s.cut_off("one");
  s.etcd->advance(9s);
  CHECK(eventually([&] { return done.load(); }));
}

TEST_CASE("lock: after the loss its lease is revoked, so that nobody is kept out") {
  Setup s;
  auto lock = s.acquire();
  s.cut_off("one");
  s.etcd->advance(8s);
  s.etcd->heal();
  CHECK(lock.renew(9s));
  CHECK(lock.held());
  s.d.client().remove(lock.key()).value();
  check_code(lock.put("a", "b"), ErrorCode::Lost);
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
}

TEST_CASE("lock: renew with the same TTL renews now") {
  Setup s;
  auto lock = s.acquire("a", 10s);
  s.etcd->advance(2s);  // too early for a renewal of its own
  CHECK(lock.ttl().value() == 8s);
  const auto leases = s.etcd->leases();
  CHECK(lock.renew(10s));
  CHECK(lock.ttl().value() == 10s);
  CHECK(s.etcd->leases() == leases);
}

TEST_CASE("lock: renew with another TTL keeps the key, the place and the token") {
  Setup s;
  auto lock = s.acquire("a", 10s);
  Waiter waiter(exclusive(s.d));
  REQUIRE(queued(s, 2));
  const auto key = lock.key();
  const auto token = lock.fencing_token();
  const auto before = s.c.client().get(key).value();
  CHECK(lock.renew(30s));
  CHECK(lock.key() == key);
  CHECK(lock.fencing_token() == token);
  CHECK(lock.ttl().value() == 30s);
  const auto kv = s.c.client().get(key).value();
  CHECK(kv.create_revision == token);
  CHECK(kv.lease != before.lease);
  CHECK(eventually([&] { return s.etcd->leases().size() == 2; }));  // ours and the waiter's
  CHECK(lock.held());
  CHECK(lock.put("k", "v"));
  CHECK_FALSE(waiter.done());
  for (int i = 0; i < 3; ++i) {  // and from then on it renews itself with the new TTL
    const int renewals = s.tap->finished("/v3/lease/keepalive");
    s.etcd->advance(10s + 1ms);
    CHECK(eventually([&] { return s.tap->finished("/v3/lease/keepalive") > renewals; }));
  }
  CHECK(lock.held());
  CHECK(lock.unlock());
}

TEST_CASE("lock: renew of what is lost") {
  Setup s;
  auto same = s.acquire("a"), other = s.acquire("b");
  for (const auto lease : s.etcd->leases()) s.etcd->expire_lease(lease);
  check_code(same.renew(9s), ErrorCode::Lost);
  check_code(other.renew(20s), ErrorCode::Lost);
  check_code(same.ttl(), ErrorCode::Lost);
  CHECK_FALSE(same.held());
  CHECK_FALSE(other.held());
  check_code(same.renew(0ms), ErrorCode::Validation);
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
}

TEST_CASE("lock: renewals of which nobody knows what they have done") {
  Setup s;
  auto lock = s.acquire("a", 9s);
  const auto token = lock.fencing_token();
  s.etcd->drop_replies(3, kTxn);
  auto renewed = lock.renew(20s);  // the key has moved to this one
  REQUIRE_FALSE(renewed);
  CHECK(renewed.error().outcome == Outcome::MaybeApplied);
  s.tap->lose(3, kTxn);
  renewed = lock.renew(30s);  // and never to this one
  REQUIRE_FALSE(renewed);
  CHECK(renewed.error().outcome == Outcome::MaybeApplied);
  s.etcd->fail_next(99, kTxn);
  renewed = lock.renew(40s, Context::with_timeout(200ms));
  s.etcd->fail_next(0, kTxn);
  REQUIRE_FALSE(renewed);
  CHECK(renewed.error().outcome == Outcome::NotApplied);
  CHECK(eventually([&] { return s.etcd->leases().size() == 3; }));  // the last was given up
  for (int i = 0; i < 4; ++i) {
    const int before = s.tap->finished("/v3/lease/keepalive");
    s.etcd->advance(3001ms);
    CHECK(eventually([&] { return s.tap->finished("/v3/lease/keepalive") > before; }));
    CHECK(lock.held());
    CHECK(s.etcd->keys() == std::vector<std::string>{lock.key()});
  }
  CHECK(lock.renew(9s));  // known again
  CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));
  CHECK(lock.held());
  CHECK(lock.ttl().value() == 9s);
  CHECK(s.c.client().get(lock.key()).value().lease == s.etcd->leases().front());
  CHECK(lock.fencing_token() == token);
  s.etcd->drop_replies(3, kTxn);
  CHECK_FALSE(lock.renew(20s));  // nobody knows again
  SUBCASE("settled with the TTL that it had") {
    CHECK(lock.renew(9s));
    CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));
    CHECK(lock.held());
    CHECK(lock.unlock());
  }
  SUBCASE("unlocked") { CHECK(lock.unlock()); }
  CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));  // that it keeps for the next
  CHECK(s.etcd->keys().empty());
}

TEST_CASE("lock: lost on its way to another lease, it keeps nobody out") {
  std::atomic<bool> cut{false};
  Setup s;
  auto lock = s.acquire("a", 9s);
  const auto hook = s.tap->after([&](const HttpRequest& request) {
    if (request.path != kTxn || cut.exchange(true)) return;
    s.cut_off("one");
    s.etcd->advance(9s);
    CHECK(eventually([&] { return !lock.held(); }));
  });
  s.etcd->drop_replies(1, kTxn);
  CHECK_FALSE(lock.renew(60s));
  s.tap->after(nullptr);
  CHECK(s.etcd->keys().size() == 1);
  s.etcd->heal();
  CHECK(eventually([&] { return s.nothing_left(); }));
  auto next = s.d.lock().try_acquire("a", 9s);
  REQUIRE_MESSAGE(next, text_of(next));
  CHECK(next->fencing_token() > lock.fencing_token());
}

TEST_CASE("lock: unlock does not wait for a handler; the destructor does") {
  Setup s;
  std::promise<void> go;
  std::atomic<bool> runs{false}, done{false};
  std::optional<Joined> later;
  {
    auto lock = s.acquire();
    lock.on_lost([&](const Error&) {
      runs = true;
      go.get_future().wait();
      done = true;
    });
    s.etcd->expire_lease(s.etcd->leases().front());
    s.etcd->advance(3001ms);
    CHECK(eventually([&] { return runs.load(); }));
    check_code(lock.unlock(), ErrorCode::Lost);
    CHECK_FALSE(done);
    later.emplace([&] {
      std::this_thread::sleep_for(50ms);  // time in which the destructor must not return
      go.set_value();
    });
  }
  CHECK(done);
}

TEST_CASE("lock: with_lock") {
  Setup s;
  int calls = 0;
  CHECK(s.c.lock().with_lock("a", 9s, [&](Lock& lock) {
    ++calls;
    CHECK(lock.held());
    check_code(s.d.lock().try_acquire("a", 9s), ErrorCode::Conflict);
  }));
  CHECK(calls == 1);
  CHECK(s.etcd->keys().empty());
  check_code(s.c.lock().with_lock("a", 9s,
                                  [&](Lock& lock) {
                                    ++calls;
                                    s.d.client().remove(lock.key()).value();
                                  }),
             ErrorCode::Lost);
  CHECK(calls == 2);
  const auto held = s.acquire();
  check_code(s.d.lock().with_lock(
                 "a", 9s, [&](Lock&) { ++calls; }, Context::with_timeout(10ms)),
             ErrorCode::Timeout);
  CHECK(calls == 2);
}

TEST_CASE("lock: with_lock returns what its function returns") {
  Setup s;
  const auto number = s.c.lock().with_lock("a", 9s, [](Lock&) { return 7; });
  CHECK(number.value() == 7);
  auto pointer = s.c.lock().with_lock("a", 9s, [](Lock&) { return std::make_unique<int>(8); });
  CHECK(**pointer == 8);
  const auto kept = s.c.lock().with_lock("a", 9s, [](Lock& lock) { return lock.renew(9s); });
  CHECK(kept);
  const auto error = s.c.lock().with_lock("a", 9s, [&](Lock& lock) -> Result<int> {
    s.d.client().remove(lock.key()).value();
    return Error{ErrorCode::NotFound, "its own", "", {}, 0};
  });
  check_code(error, ErrorCode::NotFound);
  CHECK(error.error().message == "its own");
  const auto lost = s.c.lock().with_lock("a", 9s, [&](Lock& lock) {
    s.d.client().remove(lock.key()).value();
    return 9;
  });
  check_code(lost, ErrorCode::Lost);
}

TEST_CASE("lock: with_lock whose release must go on in the background has succeeded") {
  Setup s;
  const auto done = s.c.lock().with_lock("a", 9s, [&](Lock&) {
    s.cut_off("one");
    return 7;
  });
  REQUIRE_MESSAGE(done, text_of(done));
  CHECK(*done == 7);
  s.etcd->heal();
  CHECK(queued(s, 0));
}

// Who holds it.

TEST_CASE("lock: who holds it can be asked") {
  Setup s;
  check_code(s.d.lock().holder("a"), ErrorCode::NotFound);
  auto options = s.options("three");
  options.holder = "the third";
  auto e = connect_to(options);
  const auto lock = e.lock().acquire("a", 9s).value();
  const auto nested = s.acquire("a/b");
  Waiter waiter(exclusive(s.c));
  REQUIRE(queued(s, 3));
  const auto holder = s.d.lock().holder("a").value();
  CHECK(holder.key == lock.key());
  CHECK(holder.value == "the third");
  CHECK(holder.token == lock.fencing_token());
  CHECK(holder.revision == s.etcd->revision());
  check_code(s.d.lock().holder("a//b"), ErrorCode::Validation);
  options.holder = "shared by all";  // would be taken for a shared holder's
  check_code(Coordinator::connect(options), ErrorCode::Validation);
}

TEST_CASE("lock: who waits for himself is told so") {
  Setup s;
  const auto lock = s.acquire();
  const auto own = s.c.lock().try_acquire("a", 9s);
  check_code(own, ErrorCode::Conflict);
  CHECK(own.error().cause == lock.key() + " holds it, by this Coordinator");
  const auto others = s.d.lock().try_acquire("a", 9s);
  check_code(others, ErrorCode::Conflict);
  CHECK(others.error().cause == lock.key() + " holds it");
}

TEST_CASE("lock: an unlock whose answer was lost says so: the key may have gone before") {
  Setup s;
  auto lock = s.acquire();
  SUBCASE("it was ours") {}
  SUBCASE("somebody else had deleted it") { s.d.client().remove(lock.key()).value(); }
  s.etcd->drop_replies(1, kTxn);
  const auto unlocked = lock.unlock();
  check_code(unlocked, ErrorCode::Connection);
  CHECK(unlocked.error().outcome == Outcome::MaybeApplied);
  CHECK(s.etcd->keys().empty());
  auto other = s.acquire("b");
  s.cut_off("one");
  check_code(other.unlock(Context::with_timeout(500ms)), ErrorCode::Connection);
  CHECK_FALSE(other.held());
  s.etcd->heal();
  CHECK(eventually([&] { return s.etcd->keys().empty(); }));
}

TEST_CASE("lock: destroyed while etcd cannot be reached: bounded, and gone later") {
  Setup s;
  const Stopwatch watch;
  {
    const auto lock = s.acquire();
    s.cut_off("one");
  }
  CHECK(watch.over(lenient(600ms)) == 0);
  s.etcd->heal();
  CHECK(eventually([&] { return s.nothing_left(); }));
}

TEST_CASE("lock: close gives everything back and ends the waiting") {
  Setup s;
  Notes notes;
  auto lock = s.acquire();
  lock.on_lost(notes.on_lost());
  auto of_d = s.d.lock().acquire("b", 9s).value();
  Waiter waiter(exclusive(s.c, "b"));
  REQUIRE(queued(s, 3));
  const Stopwatch watch;
  s.c.close().value();
  CHECK(watch.over(lenient(1s)) == 0);
  CHECK(eventually([&] { return waiter.done(); }));
  check_code(waiter.result(), ErrorCode::Cancelled);
  CHECK(s.etcd->keys() == std::vector<std::string>{of_d.key()});
  CHECK_FALSE(lock.held());
  check_code(lock.renew(9s), ErrorCode::Cancelled);
  check_code(lock.ttl(), ErrorCode::Cancelled);
  check_code(lock.put("a", "b"), ErrorCode::Cancelled);
  check_code(lock.unlock(), ErrorCode::Cancelled);
  CHECK(notes.size() == 0);
}

// Shared locks.

TEST_CASE("shared: many together, none beside an exclusive one") {
  Setup s;
  std::vector<Lock> readers;
  for (int i = 0; i < 3; ++i) {
    readers.push_back(s.c.lock().acquire_shared("a", 9s).value());
    readers.push_back(s.d.lock().try_acquire_shared("a", 9s).value());
  }
  for (const auto& reader : readers) CHECK(reader.held());
  check_code(s.d.lock().try_acquire("a", 9s), ErrorCode::Conflict);
  Waiter writer(exclusive(s.d));
  REQUIRE(queued(s, 7));
  for (auto& reader : readers) {
    CHECK_FALSE(writer.done());
    CHECK(reader.unlock());
  }
  CHECK(writer.wins());
  check_code(s.c.lock().try_acquire_shared("a", 9s), ErrorCode::Conflict);
}

TEST_CASE("shared: a writer who waits is not overtaken, and those behind him come together") {
  Setup s;
  auto first = s.c.lock().acquire_shared("a", 9s).value();
  Waiter writer(exclusive(s.d));
  REQUIRE(queued(s, 2));
  check_code(s.c.lock().try_acquire_shared("a", 9s), ErrorCode::Conflict);
  CHECK(queued(s, 2));
  Waiter one(shared(s.c)), two(shared(s.d));
  REQUIRE(queued(s, 4));
  first.unlock().value();
  REQUIRE(writer.wins());
  CHECK_FALSE(one.done());
  CHECK_FALSE(two.done());
  writer.lock().unlock().value();
  CHECK(one.wins());
  CHECK(two.wins());
}

// Semaphores.

TEST_CASE("semaphore: so many permits, first come, first served") {
  Setup s;
  auto semaphore = s.c.lock().semaphore("a", 2);
  auto one = semaphore.acquire(9s).value(), two = semaphore.try_acquire(9s).value();
  CHECK(one.key().compare(0, 14, "/semaphores/a/") == 0);
  check_code(s.d.lock().semaphore("a", 2).try_acquire(9s), ErrorCode::Conflict);
  CHECK(queued(s, 2));
  Waiter third(permit(s.d, 2));
  REQUIRE(queued(s, 3));
  Waiter fourth(permit(s.c, 2));
  REQUIRE(queued(s, 4));
  CHECK_FALSE(third.done());
  two.unlock().value();
  CHECK(third.wins());
  CHECK_FALSE(fourth.done());
  one.unlock().value();
  CHECK(fourth.wins());
  CHECK(third.lock().held());
  const auto lock = s.acquire("a");  // another thing of the same name
  CHECK(lock.held());
}

TEST_CASE("semaphore: a waiter further back is not let in by one who gives up") {
  Setup s;
  auto semaphore = s.c.lock().semaphore("a", 1);
  auto one = semaphore.acquire(9s).value();
  Waiter second(permit(s.d, 1));
  REQUIRE(queued(s, 2));
  Waiter third(permit(s.d, 1));
  REQUIRE(queued(s, 3));
  second.cancel();
  CHECK(queued(s, 2));
  CHECK_FALSE(third.done());
  one.unlock().value();
  CHECK(third.wins());
}

TEST_CASE("semaphore: a lost permit goes to the next") {
  Setup s;
  auto one = s.c.lock().semaphore("a", 1).acquire(9s).value();
  Waiter second(permit(s.d, 1));
  REQUIRE(queued(s, 2));
  s.etcd->expire_lease(s.c.client().get(one.key()).value().lease);
  CHECK(second.wins());
  check_code(one.unlock(), ErrorCode::Lost);
}

TEST_CASE("semaphore: users who disagree on the permits are told both numbers") {
  Setup s;
  const auto one = s.c.lock().semaphore("a", 3).acquire(9s).value();
  for (const bool only_try : {true, false}) {
    auto semaphore = s.d.lock().semaphore("a", 2);
    const auto other = only_try ? semaphore.try_acquire(9s) : semaphore.acquire(9s);
    check_code(other, ErrorCode::Conflict);
    CHECK(other.error().message == "/semaphores/a has 2 permits here");
    CHECK(other.error().cause == one.key() + " says 3");
    CHECK(queued(s, 1));
  }
  CHECK(s.d.lock().semaphore("a", 3).acquire(9s));
  s.d.client().put("/semaphores/b/1234", "somebody else's").value();  // a permit is a permit
  const auto beside = s.d.lock().semaphore("b", 2).try_acquire(9s);
  REQUIRE_MESSAGE(beside, text_of(beside));
  check_code(s.c.lock().semaphore("b", 2).try_acquire(9s), ErrorCode::Conflict);
}

TEST_CASE("semaphore: a release wakes those who can be next, and nobody else") {
  Setup s;
  auto semaphore = s.c.lock().semaphore("a", 2);
  auto one = semaphore.acquire(9s).value();
  const auto two = semaphore.acquire(9s).value();
  std::vector<std::unique_ptr<Waiter>> waiters;
  for (std::size_t i = 0; i < 10; ++i) {
    waiters.push_back(std::make_unique<Waiter>(permit(s.d, 2)));
    CHECK(eventually([&] { return s.etcd->keys().size() == i + 3; }));
  }
  all_wait(s);
  s.tap->reset();
  one.unlock().value();
  CHECK(waiters[0]->wins());
  CHECK(s.tap->count(kTxn) == 2);  // the unlock, and a look of the next
  waiters[9]->cancel();            // the last: nobody else's business
  CHECK(eventually([&] { return waiters[9]->done(); }));
  std::this_thread::sleep_for(lenient(40ms));
  CHECK(s.tap->count(kTxn) == 2);
}

TEST_CASE("shared: who comes does not read those who are there") {
  std::atomic<int> read{0};
  Setup s;
  for (int i = 0; i < 100; ++i) {
    s.c.client().put("/locks/a/" + hex(0x1000 + i), "shared " + std::string(1000, 'x')).value();
  }
  const auto reader = s.d.lock().acquire_shared("a", 9s);
  REQUIRE_MESSAGE(reader, text_of(reader));
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    if (request.path == kTxn && request.body.find("\"limit\"") == std::string::npos) ++read;
  });
  Waiter writer(exclusive(s.c));
  REQUIRE(queued(s, 102));
  Waiter behind(shared(s.d));
  REQUIRE(queued(s, 103));
  CHECK_FALSE(behind.done());
  CHECK(read == 0);  // the writer is among the few that are asked for
  for (int i = 0; i < 20; ++i) {
    s.c.client().put("/locks/a/" + hex(0x2000 + i), "shared").value();
  }
  check_code(s.d.lock().try_acquire_shared("a", 9s), ErrorCode::Conflict);  // now it is not
}

// All together.

namespace {

/// Spoils about every tenth request, and cuts the streams now and then.
Tap::Action trouble(Cluster& cluster) {
  auto random = std::make_shared<std::mt19937>(1);
  auto mutex = std::make_shared<std::mutex>();
  return [&cluster, random, mutex](const HttpRequest&) {
    std::lock_guard<std::mutex> hold(*mutex);
    const auto kind = (*random)() % 40;
    if (kind == 0) cluster.etcd->fail_next(1);
    if (kind == 1 || kind == 2) cluster.etcd->drop_replies(1);
    if (kind == 3) cluster.etcd->no_leader(1);
    if (kind == 4) cluster.etcd->cut_streams((*random)() % 2 == 0);
  };
}

struct Tally {
  std::atomic<int> inside{0}, wrong{0}, rounds{0}, failed{0};
  std::atomic<std::int64_t> last_token{0};

  void lock_once(Coordinator& c) {
    auto lock = c.lock().acquire("a", 60s);
    if (!lock) {
      const auto code = lock.error().code;
      if (code != ErrorCode::Connection && code != ErrorCode::Unavailable) ++wrong;
      ++failed;
      return;
    }
    if (++inside != 1) ++wrong;
    if (lock->fencing_token() <= last_token.exchange(lock->fencing_token())) ++wrong;
    --inside;
    static_cast<void>(lock->unlock());
    ++rounds;
  }
};

}  // namespace

TEST_CASE("lock: never two holders, and no standstill, whatever goes wrong") {
  constexpr int kThreads = 4;
  const int each = scaled(100);
  Cluster cluster;
  std::vector<Coordinator> coordinators;
  for (int t = 0; t < kThreads; ++t) {
    coordinators.push_back(cluster.connect("c" + std::to_string(t)));
  }
  cluster.tap->before(trouble(cluster));
  Tally tally;
  {
    std::vector<Joined> workers;
    for (auto& c : coordinators) {
      workers.emplace_back([&] {
        for (int i = 0; i < each; ++i) tally.lock_once(c);
      });
    }
  }
  CHECK(tally.wrong == 0);
  CHECK(tally.rounds + tally.failed == kThreads * each);
  CHECK(tally.rounds >= kThreads * each * 9 / 10);
  cluster.tap->before(nullptr);
  cluster.etcd->fail_next(0);
  cluster.etcd->drop_replies(0);
  cluster.etcd->no_leader(0);
  const Stopwatch closing;
  for (auto& c : coordinators) c.close().value();
  if (closing.elapsed() >= 1s) cluster.etcd->advance(10min);  // one second is what close() takes
  CHECK(cluster.etcd->keys().empty());
  CHECK(cluster.etcd->leases().empty());
}

TEST_CASE(
    "lock: what it writes is one flat Txn with the guard, of as many operations as any other") {
  Setup s;
  auto lock = s.acquire();
  std::vector<std::string> bodies;
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    if (request.path == kTxn) bodies.push_back(request.body);
  });
  Txn many;
  for (int i = 0; i < 128; ++i) many.then(Op::put("k" + std::to_string(i), "v"));
  CHECK(lock.put("k", "1"));
  CHECK(lock.remove("k"));
  CHECK(lock.commit(many));
  s.tap->before(nullptr);
  REQUIRE(bodies.size() == 3);
  for (const auto& body : bodies) CHECK(body.find("request_txn") == std::string::npos);
  check_code(lock.commit(many.then(Op::get("k"))), ErrorCode::Validation);
}

TEST_CASE("lock: handlers that block do not delay the news of a loss") {
  Setup s;
  std::promise<void> go;
  const auto gone = go.get_future().share();
  std::atomic<int> blocked{0};
  const auto block = [&blocked, gone](const WatchEvent&) {
    ++blocked;
    gone.wait();
  };
  std::vector<Subscription> watches;
  WatchRequest request;
  for (const char* key : {"x", "y"}) {
    request.key = key;
    watches.push_back(s.c.client().watch(request, block).value());
    s.d.client().put(key, "1").value();
  }
  CHECK(eventually([&] { return blocked == 2; }));
  auto lock = s.acquire();
  Notes notes;
  lock.on_lost(notes.on_lost());
  auto lease = s.c.client().grant(9s).value();
  lease.on_lost(notes.on_lost());
  s.d.client().remove(lock.key()).value();
  s.etcd->expire_lease(lease.id());
  check_code(lease.keep_alive_once(), ErrorCode::Lost);
  CHECK(eventually([&] { return notes.size() == 2; }));
  go.set_value();
}

TEST_CASE("shared: a lock that is renewed with another TTL stays a shared one") {
  Setup s;
  auto reader = s.c.lock().acquire_shared("a", 9s).value();
  reader.renew(20s).value();
  CHECK(s.d.lock().try_acquire_shared("a", 9s));
}

TEST_CASE("lock: a kept lease that is about to expire is not taken for a new one") {
  Setup s;
  s.acquire().unlock().value();
  s.tap->lose_if([](const HttpRequest& request) { return request.path == "/v3/lease/keepalive"; });
  s.etcd->advance(7s);
  const auto lock = s.acquire();
  s.etcd->advance(3s);
  CHECK(lock.held());
}

TEST_CASE("lock: a compaction does not end the watch of its own key") {
  Setup s;
  Notes notes;
  auto options = s.options("three");
  options.retry_config.max_attempts = 1;
  auto c = connect_to(options);
  auto lock = c.lock().acquire("a", 9s).value();
  lock.on_lost(notes.on_lost());
  CHECK(eventually([&] { return s.tap->count("/v3/watch") > 0; }));
  s.cut_off("three");
  s.d.client().remove(lock.key()).value();
  s.d.config().set("x", 1).value();
  s.etcd->compact();
  SUBCASE("etcd can be asked") {}
  SUBCASE("etcd cannot be asked at first") { s.etcd->fail_next(1, kTxn); }
  s.etcd->heal();
  CHECK(eventually([&] { return !lock.held(); }));
  CHECK(eventually([&] { return notes.size() == 1; }));
}

TEST_CASE("lock: keys of a queue below do not hide those of this one") {
  Setup s;
  const auto holder = s.acquire("a"), below = s.acquire("a/b");
  check_code(s.d.lock().acquire("a", 9s, Context::with_timeout(300ms)), ErrorCode::Timeout);
  const auto deeper = s.acquire("b/c");
  CHECK(s.d.lock().try_acquire("b", 9s));
}

TEST_CASE("lock: acquire does not return one that is lost already") {
  Setup s;
  std::atomic<bool> once{false};
  const auto hook = s.tap->after([&](const HttpRequest& request) {
    if (request.path == kTxn && !once.exchange(true)) s.etcd->advance(9s);
  });
  const auto lock = s.acquire();
  CHECK(lock.held());
}

TEST_CASE("lock: on_lost is not called after unlock, also where it was due") {
  Setup s;
  std::promise<void> go;
  const auto gone = go.get_future().share();
  std::atomic<int> blocked{0};
  std::vector<Lease> busy;
  for (int i = 0; i < 2; ++i) {  // all threads that could call it
    busy.push_back(s.c.client().grant(9s).value());
    busy.back().on_lost([&blocked, gone](const Error&) {
      ++blocked;
      gone.wait();
    });
    s.etcd->expire_lease(busy.back().id());
    check_code(busy.back().keep_alive_once(), ErrorCode::Lost);
    CHECK(eventually([&] { return blocked == i + 1; }));
  }
  Notes notes;
  auto lock = s.acquire();
  lock.on_lost(notes.on_lost());
  s.d.client().remove(lock.key()).value();
  CHECK(eventually([&] { return !lock.held(); }));
  check_code(lock.unlock(), ErrorCode::Lost);
  std::atomic<bool> next{false};
  auto later = s.c.client().grant(9s).value();
  later.on_lost([&](const Error&) { next = true; });
  s.etcd->expire_lease(later.id());
  check_code(later.keep_alive_once(), ErrorCode::Lost);
  go.set_value();
  CHECK(eventually([&] { return next.load(); }));  // what was due before it has had its turn
  s.c.close().value();
  CHECK(notes.size() == 0);
}

TEST_CASE("lock: held() may be asked while it is renewed with other TTLs") {
  Setup s;
  auto lock = s.acquire();
  std::atomic<bool> over{false};
  std::atomic<int> asked{0};
  {
    Joined asking([&] {
      while (!over) {
        CHECK(lock.held());
        ++asked;
      }
    });
    CHECK(eventually([&] { return asked > 0; }));
    for (int i = 0; i < 20; ++i) CHECK(lock.renew(i % 2 == 0 ? 20s : 9s));
    over = true;
  }
}

TEST_CASE("lock: a place in the queue that somebody takes away and makes again is not ours") {
  Setup s;
  auto holder = s.acquire();
  Waiter waiter(exclusive(s.d));
  REQUIRE(queued(s, 2));
  const auto keys = s.etcd->keys();
  const auto& place = keys[0] == holder.key() ? keys[1] : keys[0];
  s.tap->lose_if([](const HttpRequest& request) { return request.path == "/v3/watch"; });
  s.etcd->cut_streams();
  s.c.client().remove(place).value();
  s.c.client().put(place, "somebody else").value();
  holder.unlock().value();
  s.tap->lose_if(nullptr);
  REQUIRE(queued(s, 2));  // he stands behind it
  CHECK_FALSE(waiter.done());
  s.c.client().remove(place).value();
  REQUIRE(waiter.wins());
  CHECK(waiter.lock().put("k", "v"));
}

TEST_CASE("lock: a place that was asked for twice, and comes late, keeps nobody out") {
  HttpRequest late;
  Setup s;
  const auto hook = s.tap->lose_if([&](const HttpRequest& request) {
    if (!late.body.empty() || request.path != kTxn) return false;
    late = request;
    return true;
  });
  SUBCASE("acquire") { s.acquire().unlock().value(); }
  SUBCASE("try_acquire") { s.c.lock().try_acquire("a", 9s).value().unlock().value(); }
  REQUIRE_FALSE(late.body.empty());
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
  static_cast<void>(s.etcd->perform(late, nullptr, {}));
  CHECK(s.etcd->keys().empty());
}

TEST_CASE("lock: given back after a waiter has looked and before he watches, it is his at once") {
  Setup s;
  auto holder = s.acquire();
  std::atomic<bool> once{false};
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    bool waits = request.path == "/v3/watch" && request.endpoint == "http://two:1";
    if (waits && !once.exchange(true)) holder.unlock().value();
  });
  Waiter waiter(exclusive(s.d));
  CHECK(waiter.wins());
  CHECK(once);
}

TEST_CASE("lock: of the leases that are given back only so many are kept") {
  Setup s;
  std::vector<Lock> locks;
  for (int i = 0; i < 80; ++i) locks.push_back(s.acquire("a" + std::to_string(i)));
  locks.clear();
  CHECK(eventually([&] { return s.etcd->leases().size() <= 64; }));
}

namespace {

/// The steady clock, ahead by what the test says; it tells nobody when it is moved.
class AheadClock : public Clock {
 public:
  time_point now() const override { return std::chrono::steady_clock::now() + ahead_.load(); }
  void move(milliseconds by) { ahead_ = by; }

 private:
  std::atomic<milliseconds> ahead_{milliseconds(0)};
};

/// An etcd of which `change` says what becomes of a piece of a watch stream.
class BadStreams : public Transport {
 public:
  using Change = std::function<std::string(const HttpRequest&, std::string_view piece)>;
  BadStreams(std::shared_ptr<Transport> etcd, Change change)
      : etcd_(std::move(etcd)), change_(std::move(change)) {}
  Result<HttpResponse> perform(const HttpRequest& request, const ChunkSink& sink,
                               const Context& ctx) override {
    if (request.path != "/v3/watch") return etcd_->perform(request, sink, ctx);
    return etcd_->perform(
        request, [&](std::string_view piece) { return sink(change_(request, piece)); }, ctx);
  }

 private:
  const std::shared_ptr<Transport> etcd_;
  const Change change_;
};

}  // namespace

TEST_CASE("lock: held() is false as soon as one of its leases may have run out") {
  const Cluster cluster;
  const auto clock = std::make_shared<AheadClock>();
  auto options = cluster.options();
  options.clock = clock;
  auto c = connect_to(options);
  auto lock = c.lock().acquire("a", 9s).value();
  cluster.etcd->drop_replies(3, kTxn);
  REQUIRE_FALSE(lock.renew(60s));  // nobody knows on which of the two it hangs
  CHECK(lock.held());
  clock->move(9s);
  CHECK_FALSE(lock.held());
}

TEST_CASE("lock: who waits leaves a member whose streams are refused") {
  const Cluster cluster;
  auto d = cluster.connect("two");
  std::atomic<int> at_two{0};
  auto options = cluster.options();
  options.endpoints = {"one:1", "two:1"};
  options.transport = std::make_shared<BadStreams>(cluster.tap, [&](const HttpRequest& request,
                                                                    std::string_view piece) {
    if (request.endpoint == "http://two:1") return ++at_two, std::string(piece);
    return std::string("{\"error\":{\"grpc_code\":14,\"message\":\"etcdserver: no leader\"}}\n");
  });
  auto c = connect_to(options);
  auto lock = d.lock().acquire("a", 9s).value();
  Waiter waiter(exclusive(c));
  CHECK(eventually([&] { return at_two > 0; }));
  CHECK(lock.unlock());
  CHECK(waiter.wins());
}

TEST_CASE("lock: who waits looks again now and then, should its stream be frozen [slow]") {
  const Cluster cluster;
  auto d = cluster.connect("two");
  std::atomic<bool> frozen{false};
  auto options = cluster.options();
  options.transport =
      std::make_shared<BadStreams>(cluster.tap, [&](const auto&, std::string_view piece) {
        return frozen ? std::string() : std::string(piece);
      });
  auto c = connect_to(options);
  auto lock = d.lock().acquire("a", 60s).value();
  const int before = cluster.tap->count("/v3/watch");
  Waiter waiter(exclusive(c, "a", 60s));
  CHECK(eventually([&] { return cluster.tap->count("/v3/watch") > before; }));
  std::this_thread::sleep_for(200ms);  // its look
  frozen = true;
  CHECK(lock.unlock());
  CHECK(wait_until([&] { return waiter.done(); }, lenient(40s)));
  CHECK(waiter.wins());
}
