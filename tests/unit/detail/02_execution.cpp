// Section 2, the parts that only the library sees: lanes, timers, strands, gates, backoff.
#include <doctest/doctest.h>

#include <atomic>
#include <numeric>
#include <thread>

#include "coordination.hpp"
#include "support/no_threads.hpp"
#include "support/wait.hpp"

using namespace coordination;
using namespace coordination::detail;
using namespace support;

namespace {

/// Numbers from several threads, in the order in which they came.
class Record {
 public:
  void add(int n) {
    std::lock_guard<std::mutex> hold(mutex_);
    numbers_.push_back(n);
  }
  std::vector<int> numbers() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return numbers_;
  }
  std::size_t size() const { return numbers().size(); }

 private:
  mutable std::mutex mutex_;
  std::vector<int> numbers_;
};

std::vector<int> count_up(int n) {
  std::vector<int> numbers(static_cast<std::size_t>(n));
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

bool eventually(const std::function<bool()>& condition) {
  return wait_until(condition, lenient(5s));
}

/// A gate that a task waits at until the test opens it.
class Door {
 public:
  void pass() {
    std::unique_lock<std::mutex> lock(mutex_);
    ++waiting_;
    changed_.wait(lock, [this] { return open_; });
  }
  void open() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  int waiting() const { return waiting_; }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<int> waiting_{0};
  bool open_{false};
};

struct Logged {
  std::mutex mutex;
  std::vector<std::string> lines;
  std::shared_ptr<const Log> log() {
    return std::make_shared<const Log>(
        [this](LogLevel level, std::string_view message, const LogFields& fields) {
          std::lock_guard<std::mutex> hold(mutex);
          auto line = std::string(to_string(level)) + " " + std::string(message);
          for (const auto& field : fields) line += " " + field.second;
          lines.push_back(line);
        });
  }
  bool contain(const std::string& line) {
    std::lock_guard<std::mutex> hold(mutex);
    return std::find(lines.begin(), lines.end(), line) != lines.end();
  }
};

std::shared_ptr<Strand> strand_on(const std::shared_ptr<Lane>& lane, Logged& logged) {
  static const auto executor = std::make_shared<Executor>();
  return std::make_shared<Strand>(executor, lane, logged.log(), "that of the test");
}

}  // namespace

TEST_CASE("lane: one thread runs the tasks in order") {
  const auto lane = std::make_shared<Lane>(1);
  Record record;
  for (int i = 0; i < 100; ++i) lane->post([&, i] { record.add(i); });
  CHECK(eventually([&] { return record.size() == 100; }));
  CHECK(record.numbers() == count_up(100));
  lane->stop();
  lane->join(std::nullopt);
}

TEST_CASE("lane: as many threads as there is work, but no more than allowed") {
  const auto lane = std::make_shared<Lane>(3);
  const int before = thread_count();
  Door door;
  std::atomic<int> done{0};
  for (int i = 0; i < 5; ++i) {
    lane->post([&] {
      door.pass();
      ++done;
    });
  }
  CHECK(eventually([&] { return door.waiting() == 3; }));
  CHECK(thread_count() <= before + 3);
  door.open();
  CHECK(eventually([&] { return done == 5; }));
  lane->stop();
  lane->join(std::nullopt);
  CHECK(eventually([&] { return thread_count() <= before; }));
}

TEST_CASE("lane: an idle thread is used again") {
  const auto lane = std::make_shared<Lane>(4);
  const int before = thread_count();
  for (int i = 0; i < 20; ++i) {
    std::atomic<bool> done{false};
    lane->post([&] { done = true; });
    CHECK(eventually([&] { return done.load(); }));
    int turns = 1000;
    lane->drain(turns);  // it is back to waiting
  }
  CHECK(thread_count() <= before + 1);
  lane->stop();
  lane->join(std::nullopt);
}

TEST_CASE("lane: stop drops what has not begun and what comes later") {
  const auto lane = std::make_shared<Lane>(1);
  Door door;
  Record record;
  const auto token = std::make_shared<int>(0);
  lane->post([&] {
    door.pass();
    record.add(0);
  });
  CHECK(eventually([&] { return door.waiting() == 1; }));
  lane->post([&, token] { record.add(1); });
  lane->stop();
  CHECK(token.use_count() == 1);
  lane->post([&, token] { record.add(2); });
  CHECK(token.use_count() == 1);
  door.open();
  lane->join(std::nullopt);
  CHECK(record.numbers() == std::vector<int>{0});
}

TEST_CASE("lane: join gives up at its limit, and does not wait for the thread that calls it") {
  const auto lane = std::make_shared<Lane>(2);
  Door door;
  lane->post([&] { door.pass(); });
  CHECK(eventually([&] { return door.waiting() == 1; }));
  Stopwatch watch;
  lane->stop();
  lane->join(steady_clock::now() + 20ms);
  CHECK(watch.elapsed() >= 20ms);
  CHECK(watch.over(lenient(500ms)) == 0);
  door.open();
  lane->join(std::nullopt);

  const auto other = std::make_shared<Lane>(1);
  std::atomic<bool> joined{false};
  other->post([&] {
    other->stop();
    other->join(std::nullopt);
    joined = true;
  });
  CHECK(eventually([&] { return joined.load(); }));
}

TEST_CASE("lane: it may be dropped by its own last task") {
  std::atomic<bool> done{false};
  {
    auto lane = std::make_shared<Lane>(1);
    auto* raw = lane.get();
    raw->post([lane, &done] {
      lane->stop();
      done = true;
    });
  }
  CHECK(eventually([&] { return done.load(); }));
}

TEST_CASE("timer: tasks run at their times, in the order of their times") {
  Door door;
  Record record;
  Timer timer;
  timer.after(0ms, [&] { door.pass(); });
  CHECK(eventually([&] { return door.waiting() == 1; }));  // until all of them are asked for
  const auto now = steady_clock::now();
  timer.at(now + 30ms, [&] { record.add(2); });
  timer.at(now + 10ms, [&] { record.add(0); });
  timer.at(now + 20ms, [&] {
    record.add(1);
    CHECK(steady_clock::now() >= now + 20ms);
  });
  timer.at(now + 30ms, [&] { record.add(3); });  // the same time: in the order of asking
  door.open();
  CHECK(eventually([&] { return record.size() == 4; }));
  CHECK(record.numbers() == count_up(4));
  timer.stop();
  timer.join(steady_clock::now() + 1s);
}

TEST_CASE("timer: an earlier task does not wait for a later one") {
  Record record;
  Timer timer;
  timer.after(std::chrono::hours(1), [&] { record.add(9); });
  timer.after(1ms, [&] { record.add(0); });
  timer.at(steady_clock::now() - 1s, [&] { record.add(1); });
  CHECK(eventually([&] { return record.size() == 2; }));
  timer.stop();
  timer.join(steady_clock::now() + 1s);
  CHECK(record.size() == 2);
}

TEST_CASE("timer: what was cancelled, or is asked for after stop, never runs") {
  Door door;
  Record record;
  Timer timer;
  timer.after(0ms, [&] { door.pass(); });
  CHECK(eventually([&] { return door.waiting() == 1; }));  // so none is too late to be cancelled
  const auto token = std::make_shared<int>(0);
  const auto id = timer.after(1ms, [&, token] { record.add(1); });
  timer.after(2ms, [&] { record.add(2); });
  timer.cancel(id);
  CHECK(token.use_count() == 1);
  timer.cancel(id);
  door.open();
  CHECK(eventually([&] { return record.size() == 1; }));
  CHECK(record.numbers() == std::vector<int>{2});
  timer.after(std::chrono::hours(1), [token] {});
  timer.stop();
  CHECK(token.use_count() == 1);
  timer.after(0ms, [&, token] { record.add(3); });
  CHECK(token.use_count() == 1);
  timer.join(steady_clock::now() + 1s);
  CHECK(record.size() == 1);
}

TEST_CASE("timer: a task may ask for another, and cancel it") {
  Record record;
  Timer timer;
  timer.after(1ms, [&] {
    record.add(0);
    const auto id = timer.after(1ms, [&] { record.add(9); });
    timer.cancel(id);
    timer.after(1ms, [&] { record.add(1); });
  });
  CHECK(eventually([&] { return record.size() == 2; }));
  CHECK(record.numbers() == count_up(2));
  timer.stop();
  timer.join(steady_clock::now() + 1s);
}

TEST_CASE("strand: handlers run in order and one at a time, on many threads") {
  const auto lane = std::make_shared<Lane>(4);
  Logged logged;
  const auto strand = strand_on(lane, logged);
  Record record;
  std::atomic<int> inside{0}, most{0};
  for (int i = 0; i < 200; ++i) {
    strand->post([&, i] {
      most = std::max<int>(most, ++inside);
      record.add(i);
      --inside;
    });
  }
  CHECK(eventually([&] { return record.size() == 200; }));
  CHECK(record.numbers() == count_up(200));
  CHECK(most == 1);
  lane->stop();
  lane->join(std::nullopt);
}

TEST_CASE("strand: a slow handler of one handle does not keep another handle waiting") {
  const auto lane = std::make_shared<Lane>(2);
  Logged logged;
  const auto slow = strand_on(lane, logged);
  const auto fast = strand_on(lane, logged);
  Door door;
  Record record;
  for (int i = 0; i < 10; ++i) slow->post([&] { door.pass(); });
  CHECK(eventually([&] { return door.waiting() == 1; }));
  for (int i = 0; i < 10; ++i) fast->post([&, i] { record.add(i); });
  CHECK(eventually([&] { return record.size() == 10; }));
  CHECK(door.waiting() == 1);
  door.open();
  slow->close();
  lane->stop();
  lane->join(std::nullopt);
}

TEST_CASE("strand: close waits for the handler that runs, drops the rest, and keeps closed") {
  const auto lane = std::make_shared<Lane>(2);
  Logged logged;
  const auto strand = strand_on(lane, logged);
  std::atomic<bool> started{false}, finished{false};
  Record record;
  strand->post([&] {
    started = true;
    std::this_thread::sleep_for(20ms);
    finished = true;
  });
  strand->post([&] { record.add(1); });
  CHECK(eventually([&] { return started.load(); }));
  strand->close();
  CHECK(finished);
  strand->post([&] { record.add(2); });
  strand->close();
  lane->stop();
  lane->join(std::nullopt);
  CHECK(record.size() == 0);
}

TEST_CASE("strand: close from inside a handler returns at once") {
  const auto lane = std::make_shared<Lane>(2);
  Logged logged;
  const auto strand = strand_on(lane, logged);
  Record record;
  strand->post([&] {
    strand->post([&] { record.add(1); });
    strand->close();
    record.add(0);
  });
  CHECK(eventually([&] { return record.size() == 1; }));
  strand->close();
  lane->stop();
  lane->join(std::nullopt);
  CHECK(record.numbers() == std::vector<int>{0});
}

TEST_CASE("strand: what a handler throws is caught and logged, and the next one runs") {
  const auto lane = std::make_shared<Lane>(1);
  Logged logged;
  const auto strand = strand_on(lane, logged);
  Record record;
  strand->post([] { throw std::runtime_error("oh no"); });
  strand->post([] { throw 5; });
  strand->post([&] { record.add(0); });
  CHECK(eventually([&] { return record.size() == 1; }));
  lane->stop();
  lane->join(std::nullopt);
  CHECK(logged.lines == std::vector<std::string>{
                            "ERROR a handler has thrown oh no",
                            "ERROR a handler has thrown an exception that is no std::exception"});
}

TEST_CASE("strand: who is waited for is said after ten seconds [slow]") {
  const auto lane = std::make_shared<Lane>(2);
  Logged logged;
  const auto strand = strand_on(lane, logged);
  Door door;
  strand->post([&] { door.pass(); });
  CHECK(eventually([&] { return door.waiting() == 1; }));
  std::thread closing([&] { strand->close(); });
  lane->stop();
  Logged of_lane;
  std::thread joining([&] { lane->join(std::nullopt, *of_lane.log()); });
  const std::string line = "WARN a handler that does not return is waited for that of the test";
  CHECK(wait_until([&] { return logged.contain(line) && of_lane.contain(line); }, lenient(15s)));
  door.open();
  closing.join();
  joining.join();
}

TEST_CASE("loss: every handler hears of it once, whichever comes first") {
  const auto lane = std::make_shared<Lane>(1);
  Logged logged;
  LossSignal signal(strand_on(lane, logged));
  std::mutex mutex;
  std::vector<std::string> heard;
  const auto handler = [&](const std::string& name) {
    return [&, name](const Error& error) {
      std::lock_guard<std::mutex> hold(mutex);
      heard.push_back(name + ":" + error.message);
    };
  };
  std::vector<std::string> expected;
  SUBCASE("the handler first") {
    signal.add(handler("a"));
    signal.add(handler("b"));
    signal.fire(make_error(ErrorCode::Lost, "one"));
    signal.fire(make_error(ErrorCode::Lost, "two"));
    expected = {"a:one", "b:one"};
  }
  SUBCASE("the loss first") {
    signal.fire(make_error(ErrorCode::Lost, "one"));
    signal.fire(make_error(ErrorCode::Lost, "two"));
    signal.add(handler("a"));
    signal.add(handler("b"));
    expected = {"a:one", "b:one"};
  }
  SUBCASE("closed") {
    signal.add(handler("a"));
    signal.close();
    signal.fire(make_error(ErrorCode::Lost, "one"));
    signal.add(handler("b"));
  }
  Record last;
  lane->post([&] { last.add(0); });
  CHECK(eventually([&] { return last.size() == 1; }));
  lane->stop();
  lane->join(std::nullopt);
  CHECK(heard == expected);
}

TEST_CASE("backoff: grows to its limit, with jitter, and begins anew") {
  Backoff backoff(100ms, 350ms, 2.0);
  for (int round = 0; round < 2; ++round) {
    for (const auto full : {100ms, 200ms, 350ms, 350ms, 350ms}) {
      const auto time = backoff.next();
      CHECK(time <= full);
      CHECK(time >= full - full / 4);
    }
    backoff.reset();
  }
}

TEST_CASE("backoff: odd settings give odd but finite times") {
  Backoff tiny(1ms, 1ms, 10.0);
  for (int i = 0; i < 5; ++i) CHECK(tiny.next() == 1ms);
  Backoff falling(100ms, 10ms, 2.0);
  for (int i = 0; i < 5; ++i) CHECK(falling.next() <= 10ms);
  Backoff huge(1ms, milliseconds::max() / 4, 1e12);
  for (int i = 0; i < 10; ++i) CHECK(huge.next() >= 0ms);
  Backoff slow(1ms, 1000ms, 1.001);
  for (int i = 0; i < 10; ++i) CHECK(slow.next() == 1ms);
}

TEST_CASE("jitter: between three quarters and all, and not always the same") {
  std::set<std::int64_t> seen;
  for (int i = 0; i < 200; ++i) {
    const auto time = jittered(1000ms);
    CHECK(time >= 750ms);
    CHECK(time <= 1000ms);
    seen.insert(time.count());
  }
  CHECK(seen.size() > 50);
  CHECK(jittered(0ms) == 0ms);
  CHECK(jittered(1ms) == 1ms);
}

TEST_CASE("gate: it waits for what it is told, a deadline, a limit or a cancel") {
  Gate gate;
  bool ready = false;
  const auto wait = [&](const Context& ctx, std::optional<SteadyTime> limit = std::nullopt) {
    return gate.wait(
        ctx, [&] { return ready; }, limit);
  };
  CHECK_FALSE(wait(Context::with_timeout(5ms)));
  CHECK_FALSE(wait(Context::with_timeout(10s), steady_clock::now() + 5ms));
  CHECK_FALSE(wait({}, steady_clock::now() + 5ms));
  const Context ctx;
  std::thread canceller([&] {
    std::this_thread::sleep_for(5ms);
    ctx.cancel();
  });
  CHECK_FALSE(wait(ctx));
  canceller.join();
  std::thread opener([&] {
    std::this_thread::sleep_for(5ms);
    std::lock_guard<std::mutex> hold(gate.mutex);
    ready = true;
    gate.changed.notify_all();
  });
  CHECK(wait({}));
  opener.join();
  CHECK(wait(ctx));  // what is there counts, however late
}

TEST_CASE("pause: its time, or until the Context is done") {
  Stopwatch watch;
  CHECK(pause({}, 10ms));
  CHECK(watch.elapsed() >= 10ms);
  CHECK_FALSE(pause(Context::with_timeout(5ms), 10s));
  const Context ctx;
  ctx.cancel();
  CHECK_FALSE(pause(ctx, 10s));
  CHECK(watch.over(lenient(1s)) == 0);
}

TEST_CASE("contexts: joined, they end with the first") {
  const auto early = Context::with_timeout(1s), late = Context::with_timeout(2s);
  const auto end = steady_clock::now() + 500ms;
  CHECK(join_contexts({&early, &late}).deadline() == early.deadline());
  CHECK(join_contexts({&late, &early}).deadline() == early.deadline());
  CHECK(join_contexts({&late, &early}, end).deadline() == end);
  CHECK(join_contexts({&early}, end + 10s).deadline() == early.deadline());
  const auto both = join_contexts({&early, &late});
  late.cancel();
  CHECK(both.cancelled());
  CHECK_FALSE(early.cancelled());
}

TEST_CASE("executor: nothing runs after stop, and no thread is left") {
  const int before = thread_count();
  const auto executor = std::make_unique<Executor>();
  std::atomic<int> ran{0};
  for (auto* lane : {executor->callbacks.get(), executor->renewals.get(),
                     executor->background.get(), executor->streams.get()}) {
    lane->post([&] { ++ran; });
  }
  executor->timer.after(1ms, [&] { ++ran; });
  CHECK(eventually([&] { return ran == 5; }));
  executor->timer.after(std::chrono::hours(1), [&] { ++ran; });
  executor->stop(steady_clock::now() + 1s);
  CHECK(eventually([&] { return thread_count() <= before; }));
  executor->callbacks->post([&] { ++ran; });
  executor->timer.after(0ms, [&] { ++ran; });
  CHECK(ran == 5);
}

TEST_CASE("log: lines in order, one at a time; those that are too many are counted") {
  Logged logged;
  Door door;
  std::atomic<int> inside{0};
  const auto executor = std::make_shared<Executor>(
      [&, log = logged.log()](LogLevel level, std::string_view message, const LogFields& fields) {
        CHECK(++inside == 1);
        door.pass();
        (*log)(level, message, fields);
        --inside;
      });
  for (int i = 0; i < 1234; ++i) (*executor->log)(LogLevel::Info, std::to_string(i));
  CHECK(logged.lines.empty());
  door.open();
  CHECK(eventually([&] { return logged.contain("WARN the Logger is too slow 234"); }));
  (*executor->log)(LogLevel::Info, "the last");
  executor->stop(steady_clock::now() + 10s);
  REQUIRE(logged.lines.size() == 1002);
  for (int i = 0; i < 1000; ++i) CHECK(logged.lines[std::size_t(i)] == "INFO " + std::to_string(i));
  CHECK(logged.lines.back() == "INFO the last");
  (*executor->log)(LogLevel::Info, "later");
  CHECK(logged.lines.size() == 1002);
}

TEST_CASE("executor: every lane tries again when there is no thread, and says it" *
          doctest::skip(sanitized())) {
  Logged logged;
  const auto executor = std::make_shared<Executor>(
      [log = logged.log()](LogLevel level, std::string_view message, const LogFields& fields) {
        (*log)(level, message, fields);
      });
  REQUIRE(executor->timer.start());
  std::atomic<int> ran{0};
  const auto& e = *executor;
  const auto lanes = {e.callbacks, e.losses,     e.renewals, e.asides, e.logs,
                      e.logins,    e.background, e.readers,  e.streams};
  {
    const NoThreads none;
    for (const auto& lane : lanes) {
      for (int i = 0; i < 10; ++i) CHECK(lane->post([&] { ++ran; }));
    }
    CHECK(executor->timer.start());
    CHECK(ran == 0);
  }
  CHECK(wait_until([&] { return ran == 90; }, 10s));
  executor->stop(steady_clock::now() + 10s);
  CHECK(logged.lines ==
        std::vector<std::string>(8, "ERROR the system has no thread to give; it is asked again"));
}

TEST_CASE("seconds are rounded up") {
  CHECK(seconds_up(1ms) == 1);
  CHECK(seconds_up(1000ms) == 1);
  CHECK(seconds_up(1001ms) == 2);
  CHECK(seconds_up(30s) == 30);
}

TEST_CASE("guarded: what is thrown becomes text") {
  CHECK_FALSE(guarded([] {}).has_value());
  CHECK(guarded([] { throw std::runtime_error("text"); }) == "text");
  CHECK(guarded([] { throw 1; }).has_value());
}

TEST_CASE("printable: without control characters, and what is none stays") {
  const std::string nul(1, '\0');
  CHECK(printable("a\r\n\tb" + nul + "\x1b[1m\x7f") == "a\\x0d\\x0a\\x09b\\x00\\x1b[1m\\x7f");
  CHECK(printable("\xc2\x85\xc2\x9b") == "\xc2\\x85\xc2\\x9b");
  for (const char* text : {"", "plain", "\xc3\xbc\xc2\xa0", "\xc2:2379", "\xc2", "\xff\x9b"}) {
    CHECK(printable(text) == text);
  }
}
