// Section 2: Context, the log and the manual clock. See also detail/02_execution.cpp.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <ctime>
#include <fstream>
#include <iomanip>
#include <sstream>
#include <thread>

#include "coordination.hpp"
#include "support/process.hpp"
#include "support/wait.hpp"

using namespace coordination;
using namespace support;
using std::chrono::steady_clock;

namespace {

/// What `write` prints to standard error.
template <class Fn>
std::string printed_to_stderr(Fn write) {
  const TempDir folder;
  const std::string name = folder.file("stderr");
  const int file = open(name.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
  std::fflush(stderr);
  const int before = dup(STDERR_FILENO);
  dup2(file, STDERR_FILENO);
  write();
  std::fflush(stderr);
  dup2(before, STDERR_FILENO);
  close(before);
  close(file);
  std::ostringstream text;
  text << std::ifstream(name).rdbuf();
  return text.str();
}

/// The first words of lines, and what follows them.
std::pair<std::vector<std::string>, std::string> split_times(const std::string& text) {
  std::istringstream lines(text);
  std::vector<std::string> times;
  std::string rest;
  for (std::string line; std::getline(lines, line);) {
    const auto space = line.find(' ');
    times.push_back(line.substr(0, space));
    CHECK(times.back().size() == std::string("2031-05-07T08:09:10.123Z").size());
    CHECK(times.back().back() == 'Z');
    rest += line.substr(space + 1) + "\n";
  }
  return {times, rest};
}

}  // namespace

TEST_CASE("context: by default it has no end") {
  const Context ctx;
  CHECK_FALSE(ctx.cancelled());
  CHECK_FALSE(ctx.done());
  CHECK_FALSE(ctx.deadline().has_value());
}

TEST_CASE("context: a timeout is a deadline from now") {
  const auto before = steady_clock::now();
  const auto ctx = Context::with_timeout(200ms);
  const auto after = steady_clock::now();
  REQUIRE(ctx.deadline().has_value());
  CHECK(*ctx.deadline() >= before + 200ms);
  CHECK(*ctx.deadline() <= after + 200ms);
  CHECK_FALSE(ctx.done());
  CHECK_FALSE(ctx.cancelled());
}

TEST_CASE("context: it is done when its deadline passes, but not cancelled") {
  const auto soon = Context::with_timeout(20ms);
  CHECK(wait_until([&] { return soon.done(); }, lenient(1s)));
  CHECK(steady_clock::now() >= *soon.deadline());
  CHECK_FALSE(soon.cancelled());
  CHECK(Context::with_timeout(0ms).done());
  CHECK(Context::with_timeout(-5ms).done());
  CHECK(Context::with_deadline(steady_clock::now() - 1s).done());
}

TEST_CASE("context: the largest and smallest times do not overflow") {
  CHECK_FALSE(Context::with_timeout(milliseconds::max()).done());
  CHECK_FALSE(Context::with_timeout(std::chrono::hours(24 * 365 * 1000)).done());
  CHECK(Context::with_timeout(milliseconds::min()).done());
  CHECK_FALSE(Context::with_deadline(steady_clock::time_point::max()).done());
  CHECK(Context::with_deadline(steady_clock::time_point::min()).done());
}

TEST_CASE("context: copies share one state, from any thread") {
  const Context ctx;
  const Context copy = ctx;
  std::thread([copy] { copy.cancel(); }).join();
  CHECK(ctx.cancelled());
  CHECK(ctx.done());
  ctx.cancel();
  CHECK(copy.cancelled());
}

TEST_CASE("context: a child ends with its parent, a parent not with its child") {
  const auto parent = Context::with_timeout(10s);
  const auto child = Context::child_of(parent);
  const auto grandchild = Context::child_of(child);
  CHECK(child.deadline() == parent.deadline());
  CHECK(grandchild.deadline() == parent.deadline());
  grandchild.cancel();
  CHECK(grandchild.cancelled());
  CHECK_FALSE(child.cancelled());
  const auto other = Context::child_of(child);
  parent.cancel();
  CHECK(child.cancelled());
  CHECK(other.cancelled());
  CHECK(Context::child_of(parent).cancelled());
}

TEST_CASE("context: a child and its parent may be destroyed in any order") {
  auto parent = std::make_unique<Context>();
  auto child = std::make_unique<Context>(Context::child_of(*parent));
  SUBCASE("child first") {
    child.reset();
    parent->cancel();
    CHECK(parent->cancelled());
  }
  SUBCASE("parent first") {
    const Context copy = *parent;
    parent.reset();
    CHECK_FALSE(child->cancelled());
    copy.cancel();
    CHECK(child->cancelled());
  }
}

TEST_CASE("context: handlers run once, in the thread that cancels") {
  const Context ctx;
  int calls = 0;
  std::thread::id where;
  const auto hook = ctx.on_cancel([&] {
    ++calls;
    where = std::this_thread::get_id();
    CHECK(ctx.cancelled());
  });
  CHECK(calls == 0);
  std::thread canceller([&] { ctx.cancel(); });
  const auto id = canceller.get_id();
  canceller.join();
  ctx.cancel();
  CHECK(calls == 1);
  CHECK(where == id);
}

TEST_CASE("context: a handler that comes late runs at once; one that is dropped never") {
  const Context ctx;
  int calls = 0;
  auto dropped = ctx.on_cancel([&] { ++calls; });
  dropped.reset();
  ctx.cancel();
  CHECK(calls == 0);
  const auto late = ctx.on_cancel([&] { ++calls; });
  CHECK(calls == 1);
}

TEST_CASE("context: a deadline that passes calls no handler") {
  const auto ctx = Context::with_timeout(10ms);
  int calls = 0;
  const auto hook = ctx.on_cancel([&] { ++calls; });
  CHECK(wait_until([&] { return ctx.done(); }, lenient(1s)));
  std::this_thread::sleep_for(10ms);
  CHECK(calls == 0);
}

TEST_CASE("context: a hook's destructor waits for its handler, unless it is called from it") {
  const Context ctx;
  std::atomic<bool> started{false}, finished{false};
  auto hook = ctx.on_cancel([&] {
    started = true;
    std::this_thread::sleep_for(30ms);
    finished = true;
  });
  Context::Hook own;
  bool survived = false;
  own = ctx.on_cancel([&] {
    own.reset();
    survived = true;
  });
  std::thread canceller([&] { ctx.cancel(); });
  CHECK(wait_until([&] { return started.load(); }, lenient(1s)));
  hook.reset();
  CHECK(finished);
  canceller.join();
  CHECK(survived);
}

TEST_CASE("context: a handler that throws ends nobody else's wait") {
  const Context ctx;
  int calls = 0;
  const auto one = ctx.on_cancel([] { throw std::runtime_error("oh no"); });
  const auto two = ctx.on_cancel([&] { ++calls; });
  ctx.cancel();
  CHECK(calls == 1);
  CHECK(ctx.cancelled());
}

TEST_CASE("context: a handler may use its Context") {
  const Context ctx;
  int inner = 0;
  Context::Hook kept;
  const auto hook = ctx.on_cancel([&] {
    ctx.cancel();
    kept = ctx.on_cancel([&] { ++inner; });
    CHECK(Context::child_of(ctx).cancelled());
  });
  ctx.cancel();
  CHECK(inner == 1);
}

namespace {

/// Registers handlers, drops every second one again, and says how many calls are to be expected.
int register_hooks(const Context& ctx, int how_many, std::atomic<int>& calls,
                   std::vector<Context::Hook>& kept) {
  int expected = 0;
  for (int i = 0; i < how_many; ++i) {
    auto called = std::make_shared<std::atomic<int>>(0);
    auto hook = ctx.on_cancel([&calls, called] { ++calls, ++*called; });
    if (i % 2 == 0) {
      kept.push_back(std::move(hook));
      ++expected;
    } else {
      hook.reset();
      expected += *called;  // what has not come by now must not come any more
    }
  }
  return expected;
}

}  // namespace

TEST_CASE("context: many threads register, drop and cancel: each handler runs once or never") {
  constexpr int kThreads = 4, kHooks = 40;
  for (int round = 0; round < scaled(100); ++round) {
    const Context ctx;
    std::atomic<int> calls{0}, expected{0};
    std::vector<std::vector<Context::Hook>> kept(kThreads);
    std::vector<std::thread> threads;
    for (auto& hooks : kept) {
      threads.emplace_back([&] { expected += register_hooks(ctx, kHooks, calls, hooks); });
    }
    threads.emplace_back([&] { ctx.cancel(); });
    for (auto& thread : threads) thread.join();
    CHECK(calls == expected);
  }
}

TEST_CASE("clock: a manual clock stands still until it is told to move") {
  ManualClock clock;
  const auto start = clock.now();
  std::this_thread::sleep_for(2ms);
  CHECK(clock.now() == start);
  clock.advance(90s);
  CHECK(clock.now() == start + 90s);
  clock.advance(1ms);
  CHECK(clock.now() == start + 90001ms);
}

TEST_CASE("clock: listeners hear of each jump until they return false") {
  ManualClock clock;
  const auto start = clock.now();
  std::vector<std::string> heard;
  clock.on_jump([&] {
    heard.push_back("always");
    CHECK(clock.now() > start);
    return true;
  });
  clock.on_jump([&] {
    heard.push_back("once");
    clock.on_jump([&] {
      heard.push_back("later");
      return true;
    });
    return false;
  });
  clock.advance(1s);
  CHECK(heard == std::vector<std::string>{"always", "once"});
  heard.clear();
  clock.advance(1s);
  std::sort(heard.begin(), heard.end());
  CHECK(heard == std::vector<std::string>{"always", "later"});
}

TEST_CASE("clock: a jump while another is being told is told, too") {
  ManualClock clock;
  const auto start = clock.now();
  std::vector<Clock::time_point> seen;
  clock.on_jump([&] {
    seen.push_back(clock.now());
    if (seen.size() == 1) std::thread([&] { clock.advance(1s); }).join();
    return true;
  });
  clock.advance(1s);
  REQUIRE(seen.size() == 2);
  CHECK(seen[1] == start + 2s);
}

TEST_CASE("clock: from several threads") {
  ManualClock clock;
  const auto start = clock.now();
  std::atomic<int> jumps{0};
  clock.on_jump([&] { return ++jumps, true; });
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 25; ++i) clock.advance(10ms);
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(clock.now() == start + 1000ms);
  CHECK(jumps == 100);
  const int before = jumps;
  clock.advance(1ms);
  CHECK(jumps == before + 1);
}

TEST_CASE("log: lines on standard error, from a level on") {
  const LogFields fields{{"key", "/locks/a"}, {"lease", "7"}};
  const auto all = printed_to_stderr([&] {
    const auto logger = stderr_logger(LogLevel::Debug);
    logger(LogLevel::Debug, "first", {});
    logger(LogLevel::Warn, "second one", fields);
  });
  const auto [times, lines] = split_times(all);
  CHECK(lines == "DEBUG first\nWARN second one key=/locks/a lease=7\n");
  // Now, in UTC: as the clock says it, before and after a second's border.
  REQUIRE(times.size() == 2);
  CHECK(times[0] <= times[1]);
  const auto now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm read{};
  std::istringstream(times[1]) >> std::get_time(&read, "%Y-%m-%dT%H:%M:%S");
  CHECK(std::abs(std::difftime(timegm(&read), now)) < 60);
  const auto some = printed_to_stderr([&] {
    const auto logger = stderr_logger();
    logger(LogLevel::Debug, "a", {});
    logger(LogLevel::Info, "b", {});
    logger(LogLevel::Error, "c", {});
  });
  CHECK(split_times(some).second == "INFO b\nERROR c\n");
}

TEST_CASE("context: a child leaves nothing in its parent" * doctest::skip(sanitized())) {
  const Context parent;
  const auto before = rss_kb();
  for (int i = 0; i < 100000; ++i) static_cast<void>(Context::child_of(parent));
  CHECK(rss_kb() - before < 8000);
}
