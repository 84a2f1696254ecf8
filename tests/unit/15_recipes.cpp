// Section 15: recipes, on an etcd in memory; signals in processes of their own.
#include <doctest/doctest.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <future>
#include <set>

#include "coordination.hpp"
#include "support/child.hpp"
#include "support/memory_cluster.hpp"

using namespace coordination;
using namespace support;
using nlohmann::json;

namespace {

struct Setup : Cluster {
  Coordinator c{connect("one")}, d{connect("two")};
};

Context soon() { return Context::with_timeout(lenient(5s)); }

struct Limits {
  int rate{0};
  bool strict{false};
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Limits, rate, strict)

Result<void> positive(const Limits& limits) {
  if (limits.rate > 0) return {};
  return Error::make(ErrorCode::Validation, "the rate is not positive");
}

}  // namespace

// A Context that sleeps, and one that signals end.

TEST_CASE("context: a sleep that takes its time, and one that is ended") {
  const Stopwatch watch;
  CHECK(Context().sleep_for(30ms));
  CHECK(watch.elapsed() >= 30ms);
  CHECK_FALSE(Context::with_timeout(10ms).sleep_for(1h));
  const Context ctx;
  Joined other([ctx] { ctx.cancel(); });
  CHECK_FALSE(ctx.sleep_for(1h));
  CHECK_FALSE(ctx.sleep_for(0ms));
  CHECK(watch.over(lenient(10s)) == 0);
}

namespace {

void wait_for_ever() {
  while (true) ::pause();
}

const bool kSignalChildren = child_main("until-signal",
                                        [](const Args&) {
                                          const auto ctx = Context::on_signals({SIGINT, SIGTERM});
                                          say("ready");
                                          if (ctx.sleep_for(1h) || !ctx.cancelled()) return 1;
                                          say("ended");
                                          wait_for_ever();  // the second signal is the end
                                          return 2;
                                        }) &&
                             child_main("signal-in-a-thread",
                                        [](const Args&) {
                                          const auto ctx = Context::on_signals({SIGTERM});
                                          std::thread other(wait_for_ever);
                                          pthread_kill(other.native_handle(), SIGTERM);
                                          if (ctx.sleep_for(30s)) return 1;
                                          other.detach();
                                          return ctx.cancelled() ? 0 : 2;
                                        }) &&
                             child_main("two-contexts",
                                        [](const Args&) {
                                          const auto a = Context::on_signals({SIGUSR1});
                                          const auto b = Context::on_signals({SIGUSR1, SIGUSR2});
                                          const auto c = Context::on_signals({SIGUSR2});
                                          raise(SIGUSR1);
                                          if (a.sleep_for(30s) || b.sleep_for(30s) || c.cancelled())
                                            return 1;
                                          raise(SIGUSR2);  // still heard by the third
                                          if (c.sleep_for(30s)) return 2;
                                          const auto again = Context::on_signals({SIGUSR1});
                                          raise(SIGUSR1);
                                          return again.sleep_for(30s) ? 3 : 0;
                                        }) &&
                             child_main("signals-and-fork", [](const Args&) {
                               const auto ctx = Context::on_signals({SIGTERM});
                               const auto pid = fork();
                               if (pid == 0) wait_for_ever();
                               kill(pid, SIGTERM);  // the child has no thread for it: it dies of it
                               int status = 0;
                               if (waitpid(pid, &status, 0) != pid || !WIFSIGNALED(status))
                                 return 1;
                               if (ctx.cancelled()) return 2;  // and its parent does not hear of it
                               const auto second = fork();
                               if (second == 0) {
                                 const auto mine = Context::on_signals({SIGTERM});
                                 raise(SIGTERM);
                                 _exit(mine.sleep_for(30s) || ctx.cancelled() ? 1 : 0);
                               }
                               if (waitpid(second, &status, 0) != second || status != 0) return 3;
                               raise(SIGTERM);
                               return ctx.sleep_for(30s) ? 4 : 0;
                             });

}  // namespace

TEST_CASE("signals: the first ends the Context, the second the process") {
  REQUIRE(kSignalChildren);
  for (const int number : {SIGINT, SIGTERM}) {
    auto child = start_child("until-signal");
    REQUIRE(child.read_line(lenient(10s)) == "ready");
    child.signal(number);
    REQUIRE(child.read_line(lenient(10s)) == "ended");
    child.signal(SIGTERM);
    CHECK(child.wait(lenient(10s)) == 128 + SIGTERM);
  }
}

TEST_CASE("signals: in another thread, of several Contexts, and after fork()") {
  std::vector<std::string> names{"signal-in-a-thread", "two-contexts"};
  // In a child of fork() whose parent had threads ThreadSanitizer keeps signals back for ever.
  if (!thread_sanitized()) names.emplace_back("signals-and-fork");
  for (const auto& name : names) {
    CAPTURE(name);
    ProcessOptions options;  // threads of a child of fork() are none to ThreadSanitizer
    options.env = {"LSAN_OPTIONS=detect_leaks=0", "TSAN_OPTIONS=die_after_fork=0"};
    CHECK(start_child(name, {}, options).wait(lenient(60s)) == 0);
  }
}

// ConfigCenter::update.

TEST_CASE("update: a value that is not there, one that is, and one that stays") {
  Setup s;
  auto& config = s.c.config();
  const auto add = [](json& n) { n = n.is_null() ? 1 : n.get<int>() + 1; };
  const auto first = config.update("n", add).value();
  CHECK(config.get_entry("n").value().revision == first);
  const auto second = config.update("n", add).value();
  CHECK(second > first);
  CHECK(config.get("n").value() == 2);
  CHECK(config.update("n", [](json&) {}).value() == second);
  CHECK(config.update("none", [](json&) {}).value() == 0);
  check_code(config.get("none"), ErrorCode::NotFound);
  check_code(config.update("a//b", add), ErrorCode::Validation);
}

TEST_CASE("update: who was not the first does it again, on what is there now") {
  Setup s;
  auto& config = s.c.config();
  config.set("list", json::array()).value();
  std::vector<json> seen;
  config
      .update("list",
              [&](json& list) {
                seen.push_back(list);
                if (seen.size() < 4) s.d.config().set("list", {seen.size()}).value();
                list.push_back("mine");
              })
      .value();
  CHECK(seen == std::vector<json>{json::array(), {1}, {2}, {3}});
  CHECK(config.get("list").value() == json({3, "mine"}));
}

TEST_CASE("update: many at once lose nothing") {
  Setup s;
  const int rounds = scaled(50);
  std::set<std::int64_t> revisions;
  std::mutex mutex;
  {
    std::vector<Joined> threads;
    for (auto* coordinator : {&s.c, &s.c, &s.d, &s.d}) {
      threads.emplace_back([&, coordinator] {
        for (int i = 0; i < rounds; ++i) {
          const auto done = coordinator->config().update(
              "n", [](json& n) { n = n.is_null() ? 1 : n.get<int>() + 1; },
              Context::with_timeout(lenient(60s)));
          std::lock_guard<std::mutex> hold(mutex);
          if (done) revisions.insert(*done);
        }
      });
    }
  }
  CHECK(s.c.config().get("n").value() == 4 * rounds);
  CHECK(revisions.size() == static_cast<std::size_t>(4 * rounds));
}

TEST_CASE("update: what ends it") {
  Setup s;
  auto& config = s.c.config();
  config.set("n", 1).value();
  SUBCASE("an error of the function") {
    const auto refused = config.update("n", [](json& n) -> Result<void> {
      n = 2;
      return Error::make(ErrorCode::Validation, "no", "of the test");
    });
    check_code(refused, ErrorCode::Validation);
    CHECK(refused.error().cause == "of the test");
  }
  SUBCASE("what it throws") {
    CHECK_THROWS_AS(
        static_cast<void>(config.update("n", [](json&) { throw std::runtime_error("x"); })),
        std::runtime_error);
  }
  SUBCASE("others who are always faster, when its time is over") {
    int round = 1;
    const auto ctx = Context::with_timeout(3s);
    const auto late = config.update(
        "n",
        [&](json& n) {
          s.d.config().set("n", -++round).value();
          n = 2;
          if (round == 4) CHECK_FALSE(ctx.sleep_for(1h));
        },
        ctx);
    check_code(late, ErrorCode::Timeout);
    CHECK(round == 4);
    CHECK(config.get("n").value() == -round);
    return;
  }
  SUBCASE("an answer that is lost, where nobody can tell") {
    s.etcd->drop_replies(1, "/v3/kv/txn");
    const auto unknown = config.update("new", [](json& n) { n = 1; });
    REQUIRE_FALSE(unknown);
    CHECK(unknown.error().outcome == Outcome::MaybeApplied);
  }
  CHECK(config.get("n").value() == 1);
}

// LiveConfig.

TEST_CASE("live: the first value, the next ones, and what cannot be used") {
  Setup s;
  auto& config = s.d.config();
  auto live = LiveConfig<Limits>::follow(s.c.config(), "limits", Limits{7, true}, positive).value();
  CHECK(live->rate == 7);
  CHECK(live.revision() == 0);
  REQUIRE(live.error());
  CHECK(live.error()->code == ErrorCode::NotFound);

  const auto set = [&](const json& value) {
    const auto revision = config.set("limits", value).value();
    live.wait_for(revision, soon()).value();
    return revision;
  };
  const auto good = set(Limits{100, false});
  CHECK((*live).rate == 100);
  CHECK(live.revision() == good);
  CHECK_FALSE(live.error());

  for (const json& bad : {json("text"), json({{"rate", 1}}), json(Limits{-1, true})}) {
    set(bad);
    CAPTURE(bad);
    CHECK(live->rate == 100);
    CHECK(live.revision() == good);
    REQUIRE(live.error());
    CHECK(live.error()->code == ErrorCode::Validation);
  }
  live.wait_for(config.remove("limits").value(), soon()).value();
  CHECK(live.error()->code == ErrorCode::NotFound);
  CHECK(live->rate == 100);
  set(Limits{5, true});
  CHECK_FALSE(live.error());
  CHECK(live->rate == 5);
  CHECK(live.view().connected());
}

TEST_CASE("live: what is there at first is looked at, too; a validator may throw") {
  Setup s;
  s.c.config().set("n", 3).value();
  CHECK(*LiveConfig<int>::follow(s.c.config(), "n", 1).value() == 3);
  const auto throws = [](const int&) -> Result<void> { throw std::runtime_error("odd"); };
  const auto live = LiveConfig<int>::follow(s.c.config(), "n", 1, throws).value();
  CHECK(*live == 1);
  REQUIRE(live.error());
  CHECK(live.error()->code == ErrorCode::Validation);
  CHECK(live.error()->cause == "odd");
  check_code(LiveConfig<int>::follow(s.c.config(), "", 1), ErrorCode::Validation);
  s.c.close().value();
  CHECK(*live == 1);
  check_code(LiveConfig<int>::follow(s.c.config(), "n", 1), ErrorCode::Cancelled);
}

TEST_CASE("live: handlers hear of each good value, and of no other") {
  Setup s;
  Notes notes, others;
  s.c.config().set("n", 1).value();
  auto live = LiveConfig<int>::follow(s.c.config(), "n", 0).value();
  const auto copy = live;
  live.on_change([&](int old, int now) {
    notes.add(std::to_string(old) + "->" + std::to_string(now));
    if (now == 2) throw std::runtime_error("x");
  });
  live.on_change([&](int, int now) { others.add(std::to_string(now)); });
  const std::vector<std::string> expected{"1->2", "2->3", "3->4"};
  for (const json& value : {json(2), json("bad"), json(3), json(4)}) {
    s.d.config().set("n", value).value();
    // Each is waited for: several at once may be told as one.
    if (value.is_number()) {
      REQUIRE(eventually([&] { return notes.contain("->" + value.dump()); }));
      REQUIRE(eventually([&] { return others.contain(value.dump()); }));
    } else {
      REQUIRE(eventually([&] { return copy.error().has_value(); }));
    }
  }
  CHECK(notes.lines() == expected);
  CHECK(others.lines() == std::vector<std::string>{"2", "3", "4"});
  CHECK(*copy == 4);
}

TEST_CASE("live: it follows where there is no handler, and says how its view has ended") {
  Setup s;
  s.c.config().set("n", 1).value();
  const auto live = LiveConfig<int>::follow(s.c.config(), "n", 0).value();
  s.d.config().set("n", 2).value();
  CHECK(eventually([&] { return *live == 2; }));
  s.etcd->enable_auth("secret");
  s.etcd->cut_streams();
  REQUIRE(eventually([&] { return live.error().has_value(); }));
  CHECK(live.error()->code == ErrorCode::PermissionDenied);
  CHECK(*live == 2);
}

TEST_CASE("live: the last copy ends it, also from inside its handler") {
  Setup s;
  std::atomic<int> told{0};
  {
    auto live = LiveConfig<int>::follow(s.c.config(), "n", 0).value();
    live.on_change([&](int, int) {
      std::this_thread::sleep_for(20ms);
      ++told;
    });
    s.d.config().set("n", 1).value();
  }
  const int before = told;  // none runs on
  s.d.config().set("n", 2).value();
  s.c.config().get("n").value();
  std::this_thread::sleep_for(50ms);  // time in which none may come
  CHECK(told == before);

  auto owned =
      std::make_unique<LiveConfig<int>>(LiveConfig<int>::follow(s.c.config(), "m", 0).value());
  std::promise<void> gone;
  owned->on_change([&](int, int) {
    owned.reset();
    gone.set_value();
  });
  s.d.config().set("m", 1).value();
  CHECK(gone.get_future().wait_for(lenient(5s)) == std::future_status::ready);
}

TEST_CASE("live: readers see whole values while it changes") {
  Setup s;
  auto live = LiveConfig<Limits>::follow(s.c.config(), "l", Limits{0, false}).value();
  std::atomic<bool> stop{false};
  std::atomic<int> torn{0};
  std::vector<Joined> readers;
  for (int i = 0; i < 2; ++i) {
    readers.emplace_back([&] {
      while (!stop) {
        const auto now = live.get();
        if (now->strict != (now->rate % 2 == 1)) ++torn;
      }
    });
  }
  std::int64_t last = 0;
  const int rounds = scaled(200);
  for (int i = 1; i <= rounds; ++i) {
    last = s.d.config().set("l", Limits{i, i % 2 == 1}).value();
  }
  CHECK(live.wait_for(last, soon()));
  stop = true;
  readers.clear();
  CHECK(torn == 0);
  CHECK(live->rate == rounds);
  const std::weak_ptr<const Limits> old = live.get();
  last = s.d.config().set("l", Limits{0, false}).value();
  CHECK(live.wait_for(last, soon()));
  CHECK(eventually([&] { return old.expired(); }));  // nothing is kept that nobody reads
}

// DistributedLock::lease_slot.

TEST_CASE("slots: each is somebody's alone, and is free again when it is given up") {
  Setup s;
  std::set<int> numbers;
  std::vector<Slot> slots;
  for (int i = 0; i < 3; ++i) {
    slots.push_back((i == 0 ? s.c : s.d).lock().lease_slot("ids", 3, 10s).value());
    numbers.insert(slots.back().number());
    CHECK(slots.back().held());
    CHECK(slots.back().key().find("/locks/ids/" + std::to_string(slots.back().number()) + "/") ==
          0);
  }
  CHECK(numbers == std::set<int>{0, 1, 2});
  const auto full = s.c.lock().lease_slot("ids", 3, 10s);
  check_code(full, ErrorCode::Conflict);
  CHECK(full.error().message == "all 3 slots of ids are taken");
  const auto freed = slots[1].number();
  slots[1].unlock().value();
  CHECK(s.c.lock().lease_slot("ids", 3, 10s).value().number() == freed);
  CHECK(s.c.lock().lease_slot("ids", 4, 10s).value().fencing_token() > 0);
}

TEST_CASE("slots: a lost one is told, and somebody else's") {
  Setup s;
  Notes notes;
  auto slot = s.c.lock().lease_slot("ids", 1, 10s).value();
  slot.on_lost(notes.on_lost());
  s.cut_off("one");
  check_code(s.d.lock().lease_slot("ids", 1, 10s), ErrorCode::Conflict);
  s.etcd->advance(11s);
  CHECK_FALSE(slot.held());
  CHECK(eventually([&] { return notes.lines() == std::vector<std::string>{"LOST"}; }));
  const auto next = s.d.lock().lease_slot("ids", 1, 10s).value();
  CHECK(next.number() == 0);
  CHECK(next.fencing_token() > slot.fencing_token());
}

TEST_CASE("slots: what is wrong") {
  Setup s;
  check_code(s.c.lock().lease_slot("ids", 0, 10s), ErrorCode::Validation);
  check_code(s.c.lock().lease_slot("ids", -1, 10s), ErrorCode::Validation);
  check_code(s.c.lock().lease_slot("", 3, 10s), ErrorCode::Validation);
  check_code(s.c.lock().lease_slot("ids", 3, 0s), ErrorCode::Validation);
  s.c.close().value();
  check_code(s.c.lock().lease_slot("ids", 3, 10s), ErrorCode::Cancelled);
}

// ServiceView::pick.

namespace {

struct Services : Setup {
  void add(const std::string& id, const std::string& zone) {
    auto service = ServiceInfo::named("pay").with_id(id).at("10.0.0.1", 80);
    service.metadata["zone"] = zone;
    last = d.registry().register_service(service).value();
  }
  ServiceView open() {
    auto view = c.registry().view("pay").value();
    view.wait_for(last, soon()).value();
    return view;
  }
  /// How often each was picked in so many.
  static std::map<std::string, int> picks(ServiceView& view,
                                          const ServiceView::PickOptions& options, int n = 30) {
    std::map<std::string, int> counts;
    for (int i = 0; i < n; ++i) ++counts[view.pick(options).value().id];
    return counts;
  }
  std::int64_t last{0};
};
using Counts = std::map<std::string, int>;

}  // namespace

TEST_CASE("pick: by a predicate and by zone, in turn") {
  Services s;
  s.add("1", "a");
  s.add("2", "a");
  s.add("3", "b");
  auto view = s.open();
  ServiceView::PickOptions options;
  CHECK(s.picks(view, options) == Counts{{"1", 10}, {"2", 10}, {"3", 10}});
  options.zone = "a";
  CHECK(s.picks(view, options) == Counts{{"1", 15}, {"2", 15}});
  options.zone = "c";  // nobody's: any
  CHECK(s.picks(view, options) == Counts{{"1", 10}, {"2", 10}, {"3", 10}});
  options.zone = "b";
  options.matches = [](const ServiceInfo& one) { return one.id != "3"; };
  CHECK(s.picks(view, options) == Counts{{"1", 15}, {"2", 15}});
  CHECK(view.pick([](const ServiceInfo& one) { return one.id == "3"; }).value().id == "3");
  check_code(view.pick([](const ServiceInfo&) { return false; }), ErrorCode::NotFound);
  options.how = ServiceView::Pick::Random;
  const auto random = s.picks(view, options, 200);
  CHECK(random.size() == 2);
}

TEST_CASE("pick: by weight") {
  Services s;
  s.add("1", "a");
  s.add("2", "a");
  s.add("3", "a");
  auto view = s.open();
  ServiceView::PickOptions options;
  options.weight = [](const ServiceInfo& one) { return one.id == "2" ? 3.0 : one.id == "1"; };
  auto counts = s.picks(view, options, 4000);
  CHECK(counts.count("3") == 0);
  CHECK(counts["1"] > 800);  // 1000; the seventh standard deviation is at 192
  CHECK(counts["1"] < 1200);
  options.weight = [](const ServiceInfo& one) {
    return one.id == "1" ? std::numeric_limits<double>::infinity() : std::nan("");
  };
  CHECK(s.picks(view, options) == Counts{{"1", 30}});
  options.weight = [](const ServiceInfo&) { return -1.0; };
  check_code(view.pick(options), ErrorCode::NotFound);
}

TEST_CASE("pick: who has failed rests for a while, unless all do") {
  Services s;
  s.add("1", "a");
  s.add("2", "a");
  s.add("3", "b");
  auto view = s.open();
  ServiceView::PickOptions any, near;
  near.zone = "a";
  view.report_failure("1", 5s);
  view.report_failure("nobody");
  CHECK(s.picks(view, any) == Counts{{"2", 15}, {"3", 15}});
  CHECK(view.instances().size() == 3);
  view.report_failure("2", (milliseconds::max)());
  CHECK(s.picks(view, near) == Counts{{"3", 30}});  // better far than dead
  view.report_failure("3", 60s);
  CHECK(s.picks(view, any) == Counts{{"1", 10}, {"2", 10}, {"3", 10}});
  s.etcd->advance(6s);
  CHECK(view.pick().value().id == "1");
  CHECK(s.picks(view, any) == Counts{{"1", 30}});
  view.report_failure("2", 0s);
  CHECK(s.picks(view, near) == Counts{{"1", 15}, {"2", 15}});
}

TEST_CASE("pick: nobody is there") {
  Setup s;
  auto view = s.c.registry().view("none").value();
  check_code(view.pick(), ErrorCode::NotFound);
  check_code(view.pick(ServiceView::PickOptions{}), ErrorCode::NotFound);
  view.report_failure("1");
  auto taken = std::move(view);
  check_code(view.pick(), ErrorCode::Cancelled);
  view.report_failure("1");
}

// Election::lead.

TEST_CASE("lead: what the function returns, and the office is free after it") {
  Setup s;
  auto& election = s.c.election();
  std::string leader;
  const auto look = [&](Leadership& ours, const Context& office) {
    CHECK(ours.held());
    CHECK_FALSE(office.done());
    leader = s.d.election().leader("x").value().value;
  };
  CHECK(election.lead("x", "me", 10s, look));
  CHECK(leader == "me");
  check_code(s.d.election().leader("x"), ErrorCode::NotFound);
  const auto refused = election.lead("x", "me", 10s, [](Leadership&, const Context&) {
    return Result<void>(Error::make(ErrorCode::Conflict, "of the test"));
  });
  check_code(refused, ErrorCode::Conflict);
  check_code(s.d.election().leader("x"), ErrorCode::NotFound);
  CHECK_THROWS_AS(
      static_cast<void>(election.lead(
          "x", "me", 10s, [](Leadership&, const Context&) { throw std::runtime_error("x"); })),
      std::runtime_error);
  check_code(s.d.election().leader("x"), ErrorCode::NotFound);
}

TEST_CASE("lead: who loses the office campaigns again") {
  Setup s;
  std::vector<std::int64_t> tokens;
  const auto work = [&](Leadership& ours, const Context& office) -> Result<void> {
    tokens.push_back(ours.fencing_token());
    if (tokens.size() == 3) return {};
    s.d.client().remove(ours.key()).value();
    CHECK_FALSE(office.sleep_for(lenient(10s)));
    return Error::make(ErrorCode::Lost, "is not passed on");
  };
  CHECK(s.c.election().lead("x", "me", 10s, work, Context::with_timeout(lenient(60s))));
  CHECK(tokens.size() == 3);
  CHECK(std::is_sorted(tokens.begin(), tokens.end()));
}

TEST_CASE("lead: cut off for longer than the TTL, another one leads") {
  Setup s;
  std::promise<void> in_office;
  std::atomic<int> terms{0};
  const Context ctx;
  Joined first([&] {
    check_code(s.c.election().lead(
                   "x", "one", 10s,
                   [&](Leadership&, const Context& office) {
                     if (++terms == 1) in_office.set_value();
                     office.sleep_for(1h);
                   },
                   ctx),
               ErrorCode::Cancelled);
  });
  in_office.get_future().wait();
  s.cut_off("one");
  s.etcd->advance(11s);
  CHECK(s.d.election().lead(
      "x", "two", 10s,
      [&](Leadership&, const Context&) {
        CHECK(s.d.election().leader("x").value().value == "two");
      },
      soon()));
  ctx.cancel();
  first.join();
  CHECK(terms == 1);
}

TEST_CASE("lead: its Context ends it, before and in office") {
  Setup s;
  auto other = s.d.election().campaign("x", "other", 10s).value();
  const auto never = [](Leadership&, const Context&) { FAIL("it does not lead"); };
  check_code(s.c.election().lead("x", "me", 10s, never, Context::with_timeout(50ms)),
             ErrorCode::Timeout);
  other.resign().value();
  const Context ctx;
  bool ended = false;
  CHECK(s.c.election().lead(
      "x", "me", 10s,
      [&](Leadership& ours, const Context& office) {
        ctx.cancel();
        ended = office.cancelled() && ours.held();
      },
      ctx));
  CHECK(ended);
  check_code(s.d.election().leader("x"), ErrorCode::NotFound);
}

// CoordinatorOptions::on_request.

namespace {

/// What on_request was told.
class Requests {
 public:
  std::function<void(const RequestEvent&)> handler() {
    return [this](const RequestEvent& event) {
      std::lock_guard<std::mutex> hold(mutex_);
      events_.push_back(event);
    };
  }
  /// Those of this path, as soon as there are so many.
  std::vector<RequestEvent> of(const std::string& path, std::size_t n) {
    std::vector<RequestEvent> found;
    CHECK(eventually([&] {
      std::lock_guard<std::mutex> hold(mutex_);
      found.clear();
      for (const auto& event : events_) {
        if (event.path == path) found.push_back(event);
      }
      return found.size() >= n;
    }));
    REQUIRE(found.size() >= n);
    return found;
  }

 private:
  std::mutex mutex_;
  std::vector<RequestEvent> events_;
};

}  // namespace

TEST_CASE("on_request: each attempt, what it took and what became of it") {
  Cluster cluster;
  Requests requests;
  auto options = cluster.options();
  options.on_request = requests.handler();
  auto c = connect_to(options);
  c.client().put("/a", std::string(3000, 'x')).value();
  const auto put = requests.of("/v3/kv/put", 1).front();
  CHECK(put.endpoint == "http://one:1");
  CHECK(put.status == 200);
  CHECK(put.bytes_sent > 4000);  // in base64
  CHECK(put.bytes_received > 20);
  CHECK(put.bytes_received < 1000);
  CHECK_FALSE(put.error);
  cluster.etcd->fail_next(1, "/v3/kv/deleterange");
  cluster.etcd->delay(20ms);
  c.client().remove("/a").value();
  cluster.etcd->delay(0ms);
  const auto removals = requests.of("/v3/kv/deleterange", 2);
  CHECK(removals.size() == 2);
  REQUIRE(removals[0].error);
  CHECK(removals[0].error->code == ErrorCode::Connection);
  CHECK(removals[0].status == 0);
  CHECK(removals[0].bytes_received == 0);
  CHECK_FALSE(removals[1].error);
  CHECK(removals[1].duration >= 20ms);
}

TEST_CASE("on_request: a stream, when it is over") {
  Cluster cluster;
  Requests requests;
  auto options = cluster.options();
  options.on_request = requests.handler();
  auto c = connect_to(options);
  auto d = cluster.connect("two");
  {
    auto watch = c.config().watch("k").value();
    d.config().set("k", std::string(5000, 'x')).value();
    CHECK(watch.next(soon()));
    cluster.etcd->cut_streams();
    d.config().set("k", 1).value();
    CHECK(watch.next(soon()));
  }
  const auto stream = requests.of("/v3/watch", 1).front();
  CHECK(stream.bytes_received > 5000);
  CHECK(stream.duration > 0us);
}

TEST_CASE("on_request: one that throws or sleeps harms nobody") {
  Cluster cluster;
  std::promise<void> go;
  const auto gone = go.get_future().share();
  std::atomic<int> told{0};
  Notes log, losses;
  auto options = cluster.options();
  options.logger = log.logger();
  options.on_request = [&, gone](const RequestEvent&) {
    ++told;
    gone.wait();
    throw std::runtime_error("of the test");
  };
  auto c = connect_to(options);
  auto d = cluster.connect("two");
  auto lock = c.lock().acquire("x", 10s).value();
  lock.on_lost(losses.on_lost());
  for (int i = 0; i < 20; ++i) cluster.etcd->advance(3s);
  CHECK(lock.held());
  for (int i = 0; i < 1100; ++i) static_cast<void>(c.client().get("/none"));
  d.client().remove(lock.key()).value();
  CHECK(eventually([&] { return losses.size() == 1; }));
  CHECK(eventually([&] { return told == 1; }));
  go.set_value();
  CHECK(eventually([&] { return log.contain("WARN the Logger is too slow lines lost="); }));
  CHECK(told > 900);
}
