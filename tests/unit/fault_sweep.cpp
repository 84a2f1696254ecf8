// Every recipe, with each fault at its n-th request, for all n until there is no n-th request: it
// succeeds or returns a true error, nothing is left behind, and no invariant breaks.
#include <doctest/doctest.h>

#include <cstdio>
#include <functional>
#include <optional>
#include <thread>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"

using namespace coordination;
using namespace support;

namespace {

enum class Fault {
  Refused,
  ReplyLost,
  NoLeader,
  TokenDead,
  Delayed,
  StreamsCut,    // in the middle of a line
  StreamsEnded,  // well
  Partitioned,   // until the scenario is over
  Compacted,
  LeasesExpired,  // all that the actor has
  Emptied         // etcd comes back without its data
};
constexpr const char* kFaultNames[] = {
    "refused",       "reply lost",  "no leader", "token dead",     "delayed", "streams cut",
    "streams ended", "partitioned", "compacted", "leases expired", "emptied"};
constexpr int kFaults = 11;

/// Whether several in a row are worse than one.
bool bursts(Fault fault) {
  return fault == Fault::Refused || fault == Fault::ReplyLost || fault == Fault::NoLeader ||
         fault == Fault::StreamsCut;
}

/// From the n-th request on, `burst` requests are spoilt.
class Sweeper : public Transport {
 public:
  Sweeper(std::shared_ptr<MemoryEtcd> etcd, Fault fault, int n, int burst)
      : etcd_(std::move(etcd)), fault_(fault), first_(n), last_(n + burst - 1) {}

  Result<HttpResponse> perform(const HttpRequest& request, const ChunkSink& sink,
                               const Context& ctx) override {
    const int number = ++count_;
    note_lease(request);
    // Who is cut off tries until its time is over.
    if (fault_ == Fault::Partitioned && number == last_ + 4) etcd_->heal();
    if (disarmed_ || number < first_ || number > last_) {
      return etcd_->perform(request, sink, ctx);
    }
    switch (fault_) {
      case Fault::Refused: return failed(Outcome::NotApplied);
      case Fault::ReplyLost: return lose_reply(request, ctx);
      case Fault::NoLeader:
        return HttpResponse{503, R"({"code":14, "message":"etcdserver: no leader"})"};
      case Fault::TokenDead: etcd_->invalidate_tokens(); break;
      case Fault::Delayed: std::this_thread::sleep_for(3ms); break;
      case Fault::StreamsCut: return cut(request, sink, ctx);
      case Fault::StreamsEnded: etcd_->cut_streams(); break;
      case Fault::Partitioned: cut_off(); break;
      case Fault::Compacted: etcd_->compact(); break;
      case Fault::LeasesExpired: expire_leases(); break;
      case Fault::Emptied:
        etcd_->restart_empty();
        wiped_ = true;
        break;
    }
    return etcd_->perform(request, sink, ctx);
  }

  void disarm() {
    std::lock_guard<std::mutex> hold(mutex_);
    disarmed_ = true;
    etcd_->heal();
  }
  /// Whether it takes away what etcd has said yes to.
  bool destroys() const { return fault_ == Fault::LeasesExpired || fault_ == Fault::Emptied; }
  bool reached() const { return count_ >= first_; }
  /// Whether data was lost since begin_writing(); what is lost before anything is there is no loss.
  bool wiped() const { return wiped_; }
  void begin_writing() { wiped_ = false; }

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

  void note_lease(const HttpRequest& request) {
    if (request.path != "/v3/lease/grant") return;
    const auto body = nlohmann::json::parse(request.body);
    std::lock_guard<std::mutex> hold(mutex_);
    leases_.push_back(std::stoll(body.at("ID").get<std::string>()));
  }
  void cut_off() {
    std::lock_guard<std::mutex> hold(mutex_);
    if (!disarmed_) etcd_->partition("actor:1");
  }
  void expire_leases() {
    std::lock_guard<std::mutex> hold(mutex_);
    for (const auto lease : leases_) etcd_->expire_lease(lease);
  }

  const std::shared_ptr<MemoryEtcd> etcd_;
  const Fault fault_;
  const int first_, last_;
  std::mutex mutex_;
  std::vector<std::int64_t> leases_;
  std::atomic<int> count_{0};
  std::atomic<bool> disarmed_{false}, wiped_{false};
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
    const bool explained = code == ErrorCode::Connection || code == ErrorCode::Unavailable ||
                           code == ErrorCode::PermissionDenied;
    const bool lost = code == ErrorCode::Lost || code == ErrorCode::NotFound ||
                      code == ErrorCode::Conflict || code == ErrorCode::Timeout;
    CHECK_MESSAGE((explained || (destroys() && lost)), text_of(result));
    return false;
  }
  /// Then what was there may be gone at any moment; all else still holds.
  bool destroys() const { return sweeper->destroys(); }
  /// The state is `after` if the call succeeded, `before` if it was not applied, else one of them.
  template <class T>
  void agrees(const Result<T>& result, const std::string& key, const std::string& before,
              const std::string& after) {
    is_true(result);
    const auto now = value(key);
    if (destroys()) {
      CHECK((now == before || now == after || now == "none"));
    } else if (result) {
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
    const Stopwatch closing;
    if (actor) actor->close().value();
    other->close().value();
    // What was not given back within the second that close() takes goes with its TTL.
    if (closing.elapsed() >= 1s) etcd->advance(10min);
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

/// Runs the scenario with this fault at each request; returns at how many points there was one.
int sweep(const char* name, Fault fault, const Scenario& scenario) {
  int points = 0;
  for (const int burst : {1, 3}) {
    if (burst > 1 && !bursts(fault)) continue;
    for (int n = 1;; ++n) {
      INFO(std::string(name) << ": " << std::string(kFaultNames[static_cast<int>(fault)])
                             << " at request " << n << ", " << burst << " times");
      World world(fault, n, burst);
      if (world.connect()) scenario(world);
      const bool reached = world.sweeper->reached();
      world.end();
      if (!reached) break;
      ++points;
    }
  }
  return points;
}

/// With each fault: they wait more than they work, so all are tried at once.
int sweep(const char* name, const Scenario& scenario) {
  static std::atomic<int> all{0};
  std::atomic<int> points{0};
  {
    std::vector<Joined> threads;
    for (int fault = 0; fault < kFaults; ++fault) {
      threads.emplace_back([&, fault] {
        try {
          points += sweep(name, static_cast<Fault>(fault), scenario);
        } catch (...) {  // of a REQUIRE, which has said why
          points = -1000000;
        }
      });
    }
  }
  std::printf("fault sweep: %-18s %4d injection points, %d so far\n", name, points.load(),
              all += points);
  return points;
}

// What a lock must be, however it was acquired.

template <class Handle>
void check_held(World& world, Handle& handle) {
  if (world.destroys()) return;
  CHECK(handle.held());
  CHECK(world.has(handle.key()));
}
/// Nobody else has it: where it may have been lost, one who gets it comes after.
void check_alone(World& world, const char* key, const Lock& lock) {
  auto other = world.other->lock().try_acquire(key, 9s);
  if (!world.destroys()) CHECK_FALSE(other);
  if (other) CHECK(other->fencing_token() != lock.fencing_token());
}

/// False if it may still be there: then the next one may find it so.
bool unlock(World& world, Lock& lock) {
  const auto unlocked = lock.unlock();
  CHECK_FALSE(lock.held());
  world.is_true(unlocked);
  if (unlocked) CHECK_FALSE(world.has(lock.key()));
  return unlocked.has_value();
}

void with_lock(World& world) {
  int runs = 0;
  const auto done = world.actor->lock().with_lock("a", 9s, [&](Lock& lock) {
    ++runs;
    check_held(world, lock);
    check_alone(world, "a", lock);
  });
  world.is_true(done);
  CHECK(runs <= 1);
  if (done) CHECK(runs == 1);
}

void exclusive(World& world) {
  auto& locks = world.actor->lock();
  auto lock = locks.acquire("a", 9s);
  if (!world.is_true(lock)) return;
  check_held(world, *lock);
  check_alone(world, "a", *lock);
  const auto renewed = lock->renew(9s);
  world.is_true(renewed);
  const auto token = lock->fencing_token();
  const auto moved = lock->renew(20s);
  world.is_true(moved);
  check_held(world, *lock);
  if (!world.destroys()) {
    CHECK(world.other->client().get(lock->key()).value().create_revision == token);
  }
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
  if (!world.destroys()) CHECK(beside.held());
}

void semaphore(World& world) {
  const auto beside = world.other->lock().semaphore("a", 2).acquire(9s).value();
  auto permits = world.actor->lock().semaphore("a", 2);
  auto one = permits.acquire(9s);
  if (world.is_true(one)) {
    check_held(world, *one);
    if (!world.destroys()) CHECK_FALSE(world.other->lock().semaphore("a", 2).try_acquire(9s));
    if (!unlock(world, *one)) return;
  }
  auto two = permits.try_acquire(9s);
  if (world.is_true(two)) check_held(world, *two);
}

/// It is held by somebody else at first, who gives it back when he is waited for.
template <class Handle>
void take_over(World& world, Handle& first, const std::function<void()>& give_back,
               const std::function<Result<Handle>(Context)>& acquire) {
  Result<Handle> second = Error{};
  std::atomic<bool> done{false};
  {
    Joined waiter([&] {
      second = acquire(Context::with_timeout(world.destroys() ? 500ms : 5000ms));
      done = true;
    });
    CHECK(eventually([&] { return done || world.etcd->keys().size() != 1; }));
    std::this_thread::sleep_for(1ms);
    if (!done && !world.destroys()) CHECK(first.held());
    give_back();
    CHECK(wait_until(
        [&] {
          world.etcd->heal();  // a partition ends before it is too late
          return done.load();
        },
        lenient(6s)));
  }
  if (!world.is_true(second)) return;
  check_held(world, *second);
  if (!world.destroys()) CHECK(second->fencing_token() > first.fencing_token());
}

void contended(World& world) {
  auto first = world.other->lock().acquire("a", 60s).value();
  take_over<Lock>(
      world, first, [&] { static_cast<void>(first.unlock()); },
      [&](Context ctx) { return world.actor->lock().acquire("a", 60s, ctx); });
}

void contended_permit(World& world) {
  auto first = world.other->lock().semaphore("a", 1).acquire(60s).value();
  take_over<Lock>(
      world, first, [&] { static_cast<void>(first.unlock()); },
      [&](Context ctx) { return world.actor->lock().semaphore("a", 1).acquire(60s, ctx); });
}

void contended_office(World& world) {
  auto first = world.other->election().campaign("e", "one", 60s).value();
  take_over<Leadership>(
      world, first, [&] { static_cast<void>(first.resign()); },
      [&](Context ctx) { return world.actor->election().campaign("e", "two", 60s, ctx); });
}

void election(World& world) {
  auto& elections = world.actor->election();
  auto office = elections.campaign("e", "one", 9s);
  if (!world.is_true(office)) return;
  check_held(world, *office);
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
  if (registered && !world.destroys()) CHECK(world.has("/services/web/w1"));
  auto moved = service;
  moved.port = 81;
  const auto again = services.register_service(moved);
  world.is_true(again);
  const auto found = services.discover("web");
  if (world.is_true(found) && again && !world.destroys()) {
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
  const auto seen = world.other->config().get_entry("k");
  CHECK((seen || world.destroys()));
  if (!seen) return;
  world.agrees(values.compare_and_set("k", seen->revision, "three"), "/config/k", "two", "three");
  const auto list = values.list("");
  if (world.is_true(list) && !world.destroys()) CHECK(*list == std::vector<std::string>{"k"});
  world.other->config().set("k", "four").value();
  world.agrees(values.remove("k"), "/config/k", "four", "none");
}

/// Counts once if it says so, and never twice.
void update(World& world) {
  const auto add = [](nlohmann::json& n) { n = n.is_null() ? 1 : n.get<int>() + 1; };
  const auto next = [](const std::string& n) {
    return n == "none" ? "1" : std::to_string(std::stoi(n) + 1);
  };
  for (int i = 0; i < 2; ++i) {
    const auto before = world.value("/config/n");
    world.agrees(world.actor->config().update("n", add), "/config/n", before, next(before));
  }
}

void slots(World& world) {
  auto theirs = world.other->lock().lease_slot("ids", 2, 60s).value();
  auto slot = world.actor->lock().lease_slot("ids", 2, 9s);
  if (!world.is_true(slot)) return;
  check_held(world, *slot);
  if (!world.destroys()) CHECK(slot->number() != theirs.number());
  unlock(world, *slot);
}

/// In office exactly once, unless the office was taken away.
void leads(World& world) {
  int terms = 0;
  const auto done =
      world.actor->election().lead("e", "one", 9s, [&](Leadership& office, const Context&) {
        ++terms;
        check_held(world, office);
      });
  world.is_true(done);
  CHECK((terms == 1 || world.destroys() || !done));
  if (done) CHECK(terms > 0);
}

/// Whatever happens to the record: it is there again, and gone when it is not wanted any more.
void healing(World& world) {
  auto& services = world.actor->registry();
  const auto registered = services.register_service({"w1", "web", "h", 80, {}, 9s});
  if (!world.is_true(registered)) return;
  for (const auto lease : world.etcd->leases()) world.etcd->expire_lease(lease);
  world.etcd->advance(3001ms);  // the renewal tells, where the watch does not
  CHECK(eventually([&] { return world.has("/services/web/w1") || world.sweeper->reached(); }));
  world.sweeper->disarm();
  world.etcd->advance(3001ms);
  CHECK(eventually([&] { return world.has("/services/web/w1"); }));
  const auto ended = services.unregister("w1");
  CHECK_MESSAGE(ended, text_of(ended));
  CHECK_FALSE(world.has("/services/web/w1"));
}

/// Waits for the event that says this; others may come before it where data was lost. False: it may
/// be lost, too.
template <class Event, class Says>
bool hears(World& world, Watch<Event>& watch, Says says) {
  const Stopwatch stopwatch;
  for (;;) {
    const auto event = watch.next(Context::with_timeout(20ms));
    const bool timeout = !event && event.error().code == ErrorCode::Timeout;
    world.etcd->heal();  // a partition ends before it is too late to hear of it
    if (timeout && world.sweeper->wiped()) return false;
    if (timeout && stopwatch.over(lenient(3s)) == 0) continue;
    REQUIRE_MESSAGE(event, text_of(event));
    if (says(*event)) return true;
    CHECK_MESSAGE(world.destroys(), event->revision);
    if (!world.destroys()) return true;
  }
}

/// What is heard while somebody else writes. Where all data is lost meanwhile it is written until
/// it is heard: it may have been lost with the rest, or stand at the revision of what was heard
/// before, and then nobody can tell it from that.
template <class Event>
void follow(World& world, Watch<Event>& watch, const std::function<void(int)>& write,
            const std::function<bool(const Event&, int)>& says) {
  world.sweeper->begin_writing();
  for (int i = 1; i <= 4; ++i) {
    CHECK(eventually([&] {
      write(i);
      return hears(world, watch, [&](const Event& event) { return says(event, i); });
    }));
  }
  if (!world.destroys()) CHECK_FALSE(watch.next(Context::with_timeout(0ms)));
}

/// The same for a view.
void shows(World& world, const std::function<void(int)>& write, const std::function<bool()>& last) {
  CHECK(eventually([&] {
    const bool seen = last();
    world.etcd->heal();
    if (!seen && world.sweeper->wiped()) write(4);
    return seen;
  }));
}

void watches(World& world) {
  auto watch = world.actor->config().watch("k");
  auto view = world.actor->config().view("");
  world.is_true(view);
  if (!world.is_true(watch)) return;
  const auto write = [&](int i) { world.other->config().set("k", i).value(); };
  follow<ConfigEvent>(world, *watch, write,
                      [](const ConfigEvent& event, int i) { return event.value == i; });
  if (!view) return;
  shows(world, write, [&] {
    const auto seen = view->get("k");
    return seen && *seen == 4;
  });
}

void service_watches(World& world) {
  auto watch = world.actor->registry().watch("web");
  auto view = world.actor->registry().view("web");
  world.is_true(view);
  if (!world.is_true(watch)) return;
  const auto write = [&](int i) {
    world.other->registry().register_service({"w", "web", "h", i, {}, 60s}).value();
  };
  follow<ServiceEvent>(world, *watch, write, [](const ServiceEvent& event, int i) {
    return event.type == EventType::Put && event.service.port == i;
  });
  if (!view) return;
  shows(world, write, [&] {
    const auto seen = view->instances();
    return seen.size() == 1 && seen[0].port == 4;
  });
}

void observers(World& world) {
  auto watch = world.actor->election().observe("e");
  if (!world.is_true(watch)) return;
  CHECK_FALSE(watch->next(Context::with_timeout(lenient(2s))).value().exists());
  std::optional<Leadership> office;
  const auto write = [&](int i) {
    const auto value = std::to_string(i);
    if (office && office->proclaim(value)) return;
    office.emplace(world.other->election().campaign("e", value, 60s).value());
  };
  follow<LeaderInfo>(world, *watch, write, [](const LeaderInfo& leader, int i) {
    return leader.value == std::to_string(i);
  });
}

}  // namespace

TEST_CASE("fault sweep: locks") {
  CHECK(sweep("lock", exclusive) > 130);
  CHECK(sweep("try lock", try_exclusive) > 90);
  CHECK(sweep("with_lock", with_lock) > 60);
  CHECK(sweep("contended lock", contended) > 80);
}

TEST_CASE("fault sweep: shared locks and semaphores") {
  CHECK(sweep("shared lock", shared) > 90);
  CHECK(sweep("semaphore", semaphore) > 90);
  CHECK(sweep("contended permit", contended_permit) > 80);
}

TEST_CASE("fault sweep: election") {
  CHECK(sweep("election", election) > 110);
  CHECK(sweep("contended office", contended_office) > 80);
  CHECK(sweep("observe", observers) > 50);
}

TEST_CASE("fault sweep: registry") {
  CHECK(sweep("registry", registry) > 90);
  CHECK(sweep("healing", healing) > 80);
}

TEST_CASE("fault sweep: config") { CHECK(sweep("config", config) > 90); }

TEST_CASE("fault sweep: recipes") {
  CHECK(sweep("update", update) > 80);
  CHECK(sweep("slots", slots) > 60);
  CHECK(sweep("lead", leads) > 60);
}

TEST_CASE("fault sweep: watches and views") {
  CHECK(sweep("config watches", watches) > 70);
  CHECK(sweep("service watches", service_watches) > 70);
}
