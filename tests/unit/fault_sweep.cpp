// Every recipe, with each fault at its n-th request, for all n until there is no n-th request: it
// succeeds or returns a true error, nothing is left behind, and no invariant breaks.
#include <doctest/doctest.h>

#include <cstdio>
#include <optional>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"

using namespace coordination;
using namespace support;

namespace {

enum class Fault { Refused, ReplyLost, NoLeader, TokenDead, StreamsCut };
constexpr const char* kFaultNames[] = {"refused", "reply lost", "no leader", "token dead",
                                       "streams cut"};

/// From the n-th request on, `burst` requests are spoilt.
class Sweeper : public Transport {
 public:
  Sweeper(std::shared_ptr<MemoryEtcd> etcd, Fault fault, int n, int burst)
      : etcd_(std::move(etcd)), fault_(fault), first_(n), last_(n + burst - 1) {}

  Result<HttpResponse> perform(const HttpRequest& request, const ChunkSink& sink,
                               const Context& ctx) override {
    const int number = ++count_;
    if (disarmed_ || number < first_ || number > last_) {
      return etcd_->perform(request, sink, ctx);
    }
    switch (fault_) {
      case Fault::Refused:
        return failed(Outcome::NotApplied);
      case Fault::ReplyLost:
        return lose_reply(request, ctx);
      case Fault::NoLeader:
        return HttpResponse{503, R"({"code":14, "message":"etcdserver: no leader"})"};
      case Fault::TokenDead:
        etcd_->invalidate_tokens();
        break;
      case Fault::StreamsCut:
        return cut(request, sink, ctx);
    }
    return etcd_->perform(request, sink, ctx);
  }

  void disarm() { disarmed_ = true; }
  bool reached() const { return count_ >= first_; }

 private:
  static Error failed(Outcome outcome) {
    return {ErrorCode::Connection, "the sweep says no", "", outcome, 0};
  }
  Result<HttpResponse> lose_reply(const HttpRequest& request, const Context& ctx) {
    if (request.path == "/v3/watch") return failed(Outcome::MaybeApplied);
    static_cast<void>(etcd_->perform(request, nullptr, ctx));
    return failed(Outcome::MaybeApplied);
  }
  /// A stream ends in the middle of its first line; any other request ends all open streams.
  Result<HttpResponse> cut(const HttpRequest& request, const ChunkSink& sink, const Context& ctx) {
    if (request.path != "/v3/watch") {
      etcd_->cut_streams(true);
      return etcd_->perform(request, sink, ctx);
    }
    const ChunkSink half = [&](std::string_view piece) {
      sink(piece.substr(0, piece.size() / 2));
      return false;
    };
    static_cast<void>(etcd_->perform(request, half, ctx));
    return failed(Outcome::MaybeApplied);
  }

  const std::shared_ptr<MemoryEtcd> etcd_;
  const Fault fault_;
  const int first_, last_;
  std::atomic<int> count_{0};
  std::atomic<bool> disarmed_{false};
};

/// One run: an etcd, one who is hit by the fault, and one who is not.
class World {
 public:
  const std::shared_ptr<MemoryEtcd> etcd{MemoryEtcd::manual_clock()};
  const std::shared_ptr<Sweeper> sweeper;
  std::optional<Coordinator> other, actor;

  World(Fault fault, int n, int burst) : sweeper(std::make_shared<Sweeper>(etcd, fault, n, burst)) {
    etcd->enable_auth("pw");
    other.emplace(connect_to(options(etcd, "other:1")));
  }

  /// False, after a true error, if the fault hit the connecting.
  bool connect() {
    auto connected = Coordinator::connect(options(sweeper, "actor:1"));
    if (!connected) return is_true(connected), false;
    actor.emplace(std::move(*connected));
    return true;
  }

  /// An error is one that the fault explains.
  template <class T>
  bool is_true(const Result<T>& result) {
    if (result) return true;
    const auto code = result.error().code;
    CHECK_MESSAGE((code == ErrorCode::Connection || code == ErrorCode::Unavailable ||
                   code == ErrorCode::PermissionDenied),
                  text_of(result));
    return false;
  }
  /// The state is `after` if the call succeeded, `before` if it was not applied, else one of them.
  template <class T>
  void agrees(const Result<T>& result, const std::string& key, const std::string& before,
              const std::string& after) {
    is_true(result);
    const auto now = value(key);
    if (result) {
      CHECK(now == after);
    } else if (result.error().outcome == Outcome::NotApplied) {
      CHECK(now == before);
    } else {
      CHECK((now == before || now == after));
    }
  }

  std::string value(const std::string& key) {
    const auto kv = other->client().get(key);
    if (!kv) CHECK_MESSAGE(kv.error().code == ErrorCode::NotFound, text_of(kv));
    return kv ? kv->value : "none";
  }
  bool has(const std::string& key) const {
    const auto keys = etcd->keys();
    return std::find(keys.begin(), keys.end(), key) != keys.end();
  }

  /// Nothing of the actor's is left.
  void end() {
    sweeper->disarm();
    if (actor) actor->close().value();
    other->close().value();
    CHECK(etcd->leases().empty());
    for (const auto& key : etcd->keys()) {
      CHECK_MESSAGE(key.compare(0, 6, "/locks") != 0, key);
      CHECK_MESSAGE(key.compare(0, 4, "/ser") != 0, key);
      CHECK_MESSAGE(key.compare(0, 4, "/ele") != 0, key);
      CHECK_MESSAGE(key.compare(0, 4, "/sem") != 0, key);
    }
  }

 private:
  CoordinatorOptions options(const std::shared_ptr<Transport>& transport,
                             const std::string& endpoint) const {
    auto options = options_with(transport);
    options.endpoints = {endpoint};
    options.clock = etcd->clock();
    options.username = "root";
    options.password = "pw";
    return options;
  }
};

using Scenario = std::function<void(World&)>;

/// Runs the scenario with each fault at each request; returns at how many points there was one.
int sweep(const char* name, const Scenario& scenario) {
  int points = 0;
  for (int kind = 0; kind < 5; ++kind) {
    for (const int burst : {1, 3}) {
      if (burst > 1 && static_cast<Fault>(kind) == Fault::TokenDead)
        continue;  // none lives so short
      for (int n = 1;; ++n) {
        INFO(std::string(name) << ": " << std::string(kFaultNames[kind]) << " at request " << n
                               << ", " << burst << " times");
        World world(static_cast<Fault>(kind), n, burst);
        if (world.connect()) scenario(world);
        const bool reached = world.sweeper->reached();
        world.end();
        if (!reached) break;
        ++points;
      }
    }
  }
  std::printf("fault sweep: %-12s %4d injection points\n", name, points);
  return points;
}

// What a lock must be, however it was acquired.

void check_held(World& world, Lock& lock) {
  CHECK(lock.held());
  CHECK(world.has(lock.key()));
}

/// False if it may still be there: then the next one may find it so.
bool unlock(World& world, Lock& lock) {
  const auto unlocked = lock.unlock();
  CHECK_FALSE(lock.held());
  world.is_true(unlocked);
  if (unlocked) CHECK_FALSE(world.has(lock.key()));
  return unlocked.has_value();
}

void exclusive(World& world) {
  auto& locks = world.actor->lock();
  auto lock = locks.acquire("a", 9s);
  if (!world.is_true(lock)) return;
  check_held(world, *lock);
  CHECK_FALSE(world.other->lock().try_acquire("a", 9s));
  const auto renewed = lock->renew(9s);
  world.is_true(renewed);
  const auto token = lock->fencing_token();
  const auto moved = lock->renew(20s);
  world.is_true(moved);
  check_held(world, *lock);
  CHECK(world.other->client().get(lock->key()).value().create_revision == token);
  world.agrees(lock->put("k", "1"), "k", "none", "1");
  unlock(world, *lock);
}

void try_exclusive(World& world) {
  for (int i = 0; i < 2; ++i) {
    auto lock = world.actor->lock().try_acquire("a", 9s);
    if (!world.is_true(lock)) return;
    check_held(world, *lock);
    if (!unlock(world, *lock)) return;
  }
}

void shared(World& world) {
  const auto beside = world.other->lock().acquire_shared("a", 9s).value();
  auto lock = world.actor->lock().acquire_shared("a", 9s);
  if (world.is_true(lock)) {
    check_held(world, *lock);
    unlock(world, *lock);
  }
  auto tried = world.actor->lock().try_acquire_shared("a", 9s);
  if (world.is_true(tried)) check_held(world, *tried);
  CHECK(beside.held());
}

void semaphore(World& world) {
  const auto beside = world.other->lock().semaphore("a", 2).acquire(9s).value();
  auto permits = world.actor->lock().semaphore("a", 2);
  auto one = permits.acquire(9s);
  if (world.is_true(one)) {
    check_held(world, *one);
    CHECK_FALSE(world.other->lock().semaphore("a", 2).try_acquire(9s));
    if (!unlock(world, *one)) return;
  }
  auto two = permits.try_acquire(9s);
  if (world.is_true(two)) check_held(world, *two);
}

/// The lock is held by somebody else at first, who gives it back when he is waited for.
void contended(World& world) {
  auto first = world.other->lock().acquire("a", 60s).value();
  Result<Lock> second = Error{};
  std::atomic<bool> done{false};
  {
    Joined waiter([&] {
      second = world.actor->lock().acquire("a", 60s, Context::with_timeout(5s));
      done = true;
    });
    CHECK(eventually([&] { return done || world.etcd->keys().size() >= 2; }));
    std::this_thread::sleep_for(1ms);
    if (!done) CHECK(first.held());
    first.unlock().value();
  }
  if (!world.is_true(second)) return;
  check_held(world, *second);
  CHECK(second->fencing_token() > first.fencing_token());
  CHECK_FALSE(world.other->lock().try_acquire("a", 9s));
  unlock(world, *second);
}

void election(World& world) {
  auto& elections = world.actor->election();
  auto office = elections.campaign("e", "one", 9s);
  if (!world.is_true(office)) return;
  CHECK(office->held());
  world.agrees(office->proclaim("two"), office->key(), "one", "two");
  const auto leader = elections.leader("e");
  if (world.is_true(leader)) CHECK(leader->key == office->key());
  const auto resigned = office->resign();
  world.is_true(resigned);
  CHECK_FALSE(office->held());
  if (resigned) CHECK_FALSE(world.has(office->key()));
}

void registry(World& world) {
  auto& services = world.actor->registry();
  const ServiceInfo service{"w1", "web", "h", 80, {}, 9s};
  const auto registered = services.register_service(service);
  world.is_true(registered);
  if (registered) CHECK(world.has("/services/web/w1"));
  auto moved = service;
  moved.port = 81;
  const auto again = services.register_service(moved);
  world.is_true(again);
  const auto found = services.discover("web");
  if (world.is_true(found) && again) {
    REQUIRE(found->size() == 1);
    CHECK(found->front() == moved);
  }
  if (!registered && !again) {
    CHECK(services.unregister("w1").error().code == ErrorCode::NotFound);
    return;
  }
  const auto ended = services.unregister("w1");
  world.is_true(ended);
  if (ended) CHECK_FALSE(world.has("/services/web/w1"));
}

void config(World& world) {
  auto& values = world.actor->config();
  world.agrees(values.set("k", "one"), "/config/k", "none", "one");
  world.other->config().set("k", "two").value();
  const auto entry = values.get_entry("k");
  if (world.is_true(entry)) CHECK(entry->value == "two");
  const auto revision = world.other->config().get_entry("k").value().revision;
  world.agrees(values.compare_and_set("k", revision, "three"), "/config/k", "two", "three");
  const auto list = values.list("");
  if (world.is_true(list)) CHECK(*list == std::vector<std::string>{"k"});
  world.other->config().set("k", "four").value();
  world.agrees(values.remove("k"), "/config/k", "four", "none");
}

void watches(World& world) {
  auto watch = world.actor->config().watch("k");
  auto view = world.actor->config().view("");
  world.is_true(view);
  if (!world.is_true(watch)) return;
  for (int i = 1; i <= 4; ++i) {
    world.other->config().set("k", i).value();
    const auto event = watch->next(Context::with_timeout(lenient(3s)));
    REQUIRE_MESSAGE(event, text_of(event));
    CHECK(event->value == i);
  }
  CHECK_FALSE(watch->next(Context::with_timeout(0ms)));
  if (!view) return;
  CHECK(eventually([&] {
    const auto seen = view->get("k");
    return seen && *seen == 4;
  }));
}

}  // namespace

TEST_CASE("fault sweep: locks") {
  CHECK(sweep("lock", exclusive) > 60);
  CHECK(sweep("try lock", try_exclusive) > 40);
  CHECK(sweep("contended", contended) > 40);
}

TEST_CASE("fault sweep: shared locks and semaphores") {
  CHECK(sweep("shared", shared) > 40);
  CHECK(sweep("semaphore", semaphore) > 40);
}

TEST_CASE("fault sweep: election") { CHECK(sweep("election", election) > 50); }

TEST_CASE("fault sweep: registry") { CHECK(sweep("registry", registry) > 50); }

TEST_CASE("fault sweep: config") { CHECK(sweep("config", config) > 60); }

TEST_CASE("fault sweep: watches and views") { CHECK(sweep("watches", watches) > 40); }
