// Holders that do not notice the time: what they may still do, and what they may not.
#include <doctest/doctest.h>

#include <csignal>
#include <map>
#include <set>

#include "support/lock_support.hpp"

using namespace coordination;
using namespace support;

namespace {

CoordinatorOptions options_from(const Args& args) {
  CoordinatorOptions options;
  options.endpoints = {args.at(0)};
  options.key_prefix = args.at(1);
  return options;
}

template <class T>
std::string code_of(const Result<T>& result) {
  return result ? "OK" : to_string(result.error().code);
}

volatile std::sig_atomic_t continued = 0;

// Returns when this process has been stopped and goes on again; says `ready` first.
void wait_until_stopped_and_continued(const std::string& ready) {
  std::signal(SIGCONT, [](int) { continued = 1; });
  say(ready);
  while (continued == 0) std::this_thread::sleep_for(1ms);
}

// Arguments: endpoint, prefix, what to do first. Holds a lock, is stopped, and tries to go on.
int hold_and_be_stopped(const Args& args) {
  auto c = connect(options_from(args));
  const auto x = args.at(1) + "/x";
  LossCount loss;
  auto lock = c.lock().acquire("k", 4s).value();
  lock.on_lost(loss.handler());
  lock.put(x, "first").value();
  wait_until_stopped_and_continued("token " + std::to_string(lock.fencing_token()));
  Txn by_hand;
  by_hand.when(lock.guard()).then(Op::put(x, "by hand"));
  if (args.at(2) == "guard") {
    const auto done = c.client().commit(by_hand);
    say("first " + std::string(done && !done->succeeded ? "REFUSED" : "DONE"));
  } else if (args.at(2) == "put") {
    say("first " + code_of(lock.put(x, "late")));
  } else {
    say(std::string("first ") + (lock.held() ? "HELD" : "NOT HELD"));
  }
  say(std::string("held ") + (lock.held() ? "1" : "0"));
  Txn txn;
  txn.then(Op::put(x, "late"));
  say("put " + code_of(lock.put(x, "late")));
  say("remove " + code_of(lock.remove(x)));
  say("commit " + code_of(lock.commit(txn)));
  say("renew " + code_of(lock.renew(4s)));
  say("ttl " + code_of(lock.ttl()));
  say("told " + std::to_string(loss.wait(1) ? 1 : 0));
  say("unlock " + code_of(lock.unlock()));
  c.close().value();
  say("times " + std::to_string(loss.told()));
  return 0;
}

// --- The counter ----------------------------------------------------------------------------

// The lines that all processes write into one file: a kind, the token, who, and a number.
//   E entered   W has written the number into the file   X is about to leave
//   H held() was true after X   S, L, M the guarded write was done, was refused, may be done
class SharedLog {
 public:
  SharedLog(const std::string& path, std::string who)
      : who_(std::move(who)),
        fd_(open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600)) {}
  SharedLog(const SharedLog&) = delete;
  SharedLog& operator=(const SharedLog&) = delete;
  ~SharedLog() { close(fd_); }
  void write(char kind, std::int64_t token, std::int64_t number = 0) const {
    const auto line =
        kind + (" " + std::to_string(token)) + " " + who_ + " " + std::to_string(number) + "\n";
    if (::write(fd_, line.data(), line.size()) < 0) std::abort();
  }

 private:
  std::string who_;
  int fd_;
};

std::int64_t read_number(const std::string& path) {
  std::ifstream file(path);
  std::int64_t number = 0;
  file >> number;
  return number;
}

void write_number(const std::string& path, std::int64_t number) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  const auto text = std::to_string(number) + "\n";
  if (pwrite(fd, text.data(), text.size(), 0) < 0) std::abort();
  close(fd);
}

// Counts in etcd, under the guard of the lock, and says what it knows of the outcome.
void count_in_etcd(Client& client, Lock& lock, const std::string& prefix, const SharedLog& log) {
  const auto token = lock.fencing_token();
  const auto now = client.get(prefix + "/counter");
  if (!now && now.error().code != ErrorCode::NotFound) return log.write('L', token);
  const auto next = std::to_string((now ? std::stoll(now->value) : 0) + 1);
  Txn txn;
  txn.then(Op::put(prefix + "/counter", next));
  txn.then(Op::put(prefix + "/applied/" + std::to_string(token), next));
  const auto done = lock.commit(txn);
  if (done) return log.write('S', token);
  log.write(done.error().outcome == Outcome::MaybeApplied ? 'M' : 'L', token);
}

// Arguments: endpoint, prefix, folder, name, rounds.
int count_up(const Args& args) {
  auto connected = Coordinator::connect(options_from(args));
  for (int i = 0; i < 50 && !connected; ++i) {
    std::this_thread::sleep_for(100ms);
    connected = Coordinator::connect(options_from(args));
  }
  if (!connected) return 1;
  auto& c = *connected;
  const auto file = args.at(2) + "/counter";
  const SharedLog log(args.at(2) + "/log", args.at(3));
  std::mt19937 random(static_cast<unsigned>(getpid()));
  for (int round = 0; round < std::stoi(args.at(4));) {
    auto lock = c.lock().acquire("counter", 3s, Context::with_timeout(lenient(20s)));
    if (!lock) {
      std::this_thread::sleep_for(20ms);
      continue;
    }
    const auto token = lock->fencing_token();
    log.write('E', token);
    const auto number = read_number(file) + 1;
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
    write_number(file, number);
    log.write('W', token, number);
    count_in_etcd(c.client(), *lock, args.at(1), log);
    log.write('X', token);
    if (lock->held()) log.write('H', token);
    static_cast<void>(lock->unlock());
    ++round;
  }
  return 0;
}

const bool have_children = child_main("fencing-stopped-holder", hold_and_be_stopped) &&
                           child_main("fencing-count-up", count_up);

// What the processes have written.
struct History {
  struct Line {
    char kind{0};
    std::int64_t token{0};
    std::string who;
    std::int64_t number{0};
  };
  std::vector<Line> lines;

  explicit History(const std::string& path) {
    std::ifstream file(path);
    for (Line line; file >> line.kind >> line.token >> line.who >> line.number;) {
      lines.push_back(line);
    }
  }
  int count(char kind, const std::string& who = "") const {
    return static_cast<int>(std::count_if(lines.begin(), lines.end(), [&](const Line& line) {
      return line.kind == kind && (who.empty() || line.who == who);
    }));
  }
  std::set<std::int64_t> tokens(char kind) const {
    std::set<std::int64_t> result;
    for (const auto& line : lines) {
      if (line.kind == kind) result.insert(line.token);
    }
    return result;
  }
  /// Anybody who enters while somebody is inside whose held() was true to the end; and of these: a
  /// wrong order, the same number.
  std::string collision() const {
    const auto held = tokens('H');
    std::int64_t inside = 0, last_token = 0, last_number = 0;
    for (const auto& line : lines) {
      const auto names = std::to_string(line.token) + " and " + std::to_string(inside);
      if (line.kind == 'E' && inside != 0) return "at the same time: " + names;
      if (held.count(line.token) == 0) continue;
      if (line.kind == 'E' && line.token <= last_token) return "out of order: " + names;
      if (line.kind == 'W' && line.number <= last_number) return "a lost increment: " + names;
      if (line.kind == 'W') last_number = line.number;
      if (line.kind == 'E') last_token = line.token;
      if (line.kind == 'E') inside = line.token;
      if (line.kind == 'X') inside = 0;
    }
    return "";
  }
};

// Eight processes that count, and what happens to them and to their etcd.
class CountingRun {
 public:
  static constexpr int kProcesses = 8;
  CountingRun(int rounds, unsigned seed) : rounds_(rounds), random_(seed) {
    for (int i = 0; i < kProcesses; ++i) processes_.push_back(start(i, rounds));
  }

  /// Restarts etcd five times and kills processes, spread over the work.
  void run() {
    const int all = rounds_ * kProcesses;
    for (int i = 1; i <= 9; ++i) {
      if (!wait_for(all * i / 11)) return;
      if (i % 2 == 1) {
        etcd_.restart();
        ++restarts;
      } else {
        kill_one();
      }
    }
    wait_for(all);
  }
  bool finished() {
    bool all = true;
    for (auto& process : processes_) all = process->wait(lenient(20s)) == 0 && all;
    return all;
  }
  History history() const { return History(folder_.file("log")); }
  std::int64_t number_in_file() const { return read_number(folder_.file("counter")); }
  EtcdServer& etcd() { return etcd_; }

  int restarts{0}, kills{0};

 private:
  std::unique_ptr<Process> start(int i, int rounds) {
    return std::make_unique<Process>(start_child(
        "fencing-count-up",
        {etcd_.url(), "/p", folder_.path(), "p" + std::to_string(i), std::to_string(rounds)}));
  }
  bool wait_for(int sections) {
    const bool there = wait_until(
        [&] {
          std::this_thread::sleep_for(20ms);  // reading the log is work
          return history().count('X') >= sections;
        },
        lenient(60s));
    CHECK_MESSAGE(there, "stuck at " << history().count('X') << " of " << sections);
    return there;
  }
  void kill_one() {
    const int i = static_cast<int>(random_() % kProcesses);
    auto& process = processes_[static_cast<std::size_t>(i)];
    process->kill9();
    const int done = history().count('X', "p" + std::to_string(i));
    process = start(i, rounds_ - done);
    ++kills;
  }

  const int rounds_;
  std::mt19937 random_;
  EtcdServer etcd_;
  TempDir folder_;
  std::vector<std::unique_ptr<Process>> processes_;
};

}  // namespace

TEST_CASE("fencing: a holder that was stopped for longer than its TTL [slow]") {
  REQUIRE(have_children);
  std::string first, expected;
  SUBCASE("asks") { first = "held", expected = "NOT HELD"; }
  SUBCASE("writes without asking") { first = "put", expected = "LOST"; }
  SUBCASE("writes by the plain client, with guard()") { first = "guard", expected = "REFUSED"; }
  auto options = options_for(lease_etcd());
  auto c = connect(options);
  Process child =
      start_child("fencing-stopped-holder", {lease_etcd().url(), options.key_prefix, first});
  const auto token = child.read_until("token ", lenient(5s));
  REQUIRE(token);
  child.stop_signal();
  auto next = c.lock().acquire("k", 20s, Context::with_timeout(lenient(30s)));
  REQUIRE_MESSAGE(next, why(next));
  CHECK(next->fencing_token() > std::stoll(*token));
  REQUIRE(next->put(options.key_prefix + "/x", "next"));
  child.continue_signal();
  const auto says = [&](const std::string& what) {
    return child.read_until(what + " ", lenient(5s)).value_or("nothing");
  };
  CHECK(says("first") == expected);
  CHECK(says("held") == "0");
  for (const std::string call : {"put", "remove", "commit", "renew", "ttl"}) {
    CAPTURE(call);
    CHECK(says(call) == "LOST");
  }
  CHECK(says("told") == "1");
  CHECK(says("unlock") == "LOST");
  CHECK(says("times") == "1");
  CHECK(child.wait(lenient(5s)) == 0);
  CHECK(next->held());
  CHECK(c.client().get(options.key_prefix + "/x").value().value == "next");
  CHECK(next->unlock());
}

TEST_CASE("fencing: a guarded write is refused from the moment the key is gone") {
  Onlooker onlooker(lease_etcd());
  auto options = options_for(lease_etcd());
  auto c = connect(options);
  const auto x = options.key_prefix + "/x";
  auto lock = c.lock().acquire("k", 20s).value();
  LossCount loss;
  lock.on_lost(loss.handler());
  REQUIRE(lock.put(x, "mine"));
  CHECK(lock.remove(x).value().deleted == 1);
  REQUIRE(lock.put(x, "mine"));
  onlooker.client().remove(lock.key()).value();
  SUBCASE("and nobody has taken it") {}
  SUBCASE("and somebody has made one of the same name, with the same lease") {
    PutRequest put{lock.key(), ""};
    put.lease = lease_of_key(lock.key());
    onlooker.client().put(put).value();
  }
  const auto refused = lock.put(x, "stale");  // at once: held() has not heard of it yet
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == ErrorCode::Lost);
  CHECK(refused.error().outcome == Outcome::NotApplied);
  CHECK_FALSE(lock.held());  // and now it has
  CHECK(lock.remove(x).error().code == ErrorCode::Lost);
  CHECK(c.client().get(x).value().value == "mine");
  CHECK(loss.wait(1));
  CHECK(lock.unlock().error().code == ErrorCode::Lost);
  CHECK(lock.unlock().error().code == ErrorCode::Validation);
  c.close().value();
  CHECK(loss.told() == 1);
}

TEST_CASE("fencing: commit keeps the Txn's own conditions, inside the guard") {
  auto options = options_for(lease_etcd());
  auto c = connect(options);
  const auto x = options.key_prefix + "/x";
  auto lock = c.lock().acquire("k", 20s).value();
  Txn txn;
  txn.when(Compare::missing(x)).then(Op::put(x, "1")).otherwise(Op::get(x));
  const auto first = lock.commit(txn);
  REQUIRE(first);
  CHECK(first->succeeded);
  CHECK(first->revision == c.client().get(x).value().mod_revision);
  const auto second = lock.commit(txn);
  REQUIRE(second);
  CHECK_FALSE(second->succeeded);
  REQUIRE(second->range(0).kvs.size() == 1);
  CHECK(second->range(0).kvs[0].value == "1");
  CHECK(lock.held());
  auto moved = std::move(lock);
  CHECK(moved.held());
  CHECK_FALSE(lock.held());
}

TEST_CASE("fencing: every later holder has a greater token, whoever it is") {
  auto options = options_for(lease_etcd());
  auto a = connect(options), b = connect(options);
  std::int64_t last = 0;
  for (int i = 0; i < 20; ++i) {
    auto lock = (i % 2 == 0 ? a : b).lock().acquire("k", 20s).value();
    CHECK(lock.fencing_token() > last);
    last = lock.fencing_token();
  }
}

TEST_CASE("fencing: with_lock says whether the lock was held to the end") {
  Onlooker onlooker(lease_etcd());
  auto options = options_for(lease_etcd());
  auto c = connect(options);
  int calls = 0;
  CHECK(c.lock().with_lock("k", 20s, [&](Lock& lock) {
    ++calls;
    CHECK(lock.held());
    CHECK(onlooker.has(lock.key(), lock.fencing_token()));
    const auto second = c.lock().try_acquire("k", 20s);
    CHECK_FALSE(second);
  }));
  CHECK(onlooker.count(options.key_prefix) == 0);
  const auto lost = c.lock().with_lock("k", 20s, [&](Lock& lock) {
    ++calls;
    onlooker.client().remove(lock.key()).value();
  });
  REQUIRE_FALSE(lost);
  CHECK(lost.error().code == ErrorCode::Lost);
  auto held = c.lock().acquire("k", 20s).value();
  const auto timeout = c.lock().with_lock(
      "k", 20s, [&](Lock&) { ++calls; }, Context::with_timeout(30ms));
  REQUIRE_FALSE(timeout);
  CHECK(timeout.error().code == ErrorCode::Timeout);
  CHECK(calls == 2);
}

TEST_CASE("fencing: eight processes count while etcd and they themselves are killed [slow]") {
  REQUIRE(have_children);
  const unsigned seed = test_seed();
  MESSAGE("COORDINATION_TEST_SEED=" << seed);
  const Stopwatch watch;
  CountingRun run(scaled(200), seed);
  run.run();
  REQUIRE(run.finished());
  CHECK(run.restarts == 5);
  CHECK(run.kills == 4);

  const auto history = run.history();
  const auto held = history.tokens('H');
  CHECK(history.count('X') == scaled(200) * CountingRun::kProcesses);
  CHECK(history.collision() == "");
  CHECK(static_cast<int>(held.size()) >= history.count('X') / 2);  // most had nothing to suffer
  CHECK(static_cast<int>(history.tokens('S').size()) >= history.count('X') / 2);
  // The file: nobody's increment was lost, except that of one who had lost the lock himself.
  CHECK(run.number_in_file() >= static_cast<std::int64_t>(held.size()));
  CHECK(run.number_in_file() <= history.count('W') + run.kills);

  // etcd: the counter is the number of guarded writes that were done, exactly.
  Onlooker onlooker(run.etcd());
  std::set<std::int64_t> applied;
  for (const auto& kv : onlooker.keys("/p/applied/")) {
    applied.insert(std::stoll(kv.key.substr(kv.key.rfind('/') + 1)));
  }
  const auto counter = std::stoll(onlooker.client().get("/p/counter").value().value);
  CHECK(counter == static_cast<std::int64_t>(applied.size()));
  const auto yes = history.tokens('S'), no = history.tokens('L'), maybe = history.tokens('M');
  for (const auto token : yes) CHECK(applied.count(token) == 1);
  for (const auto token : no) CHECK(applied.count(token) == 0);
  int settled = 0;
  for (const auto token : applied) {
    if (maybe.count(token) > 0) ++settled;
  }
  // The rest was killed between the write and its line in the log.
  CHECK(counter - static_cast<std::int64_t>(yes.size()) - settled <= run.kills);
  MESSAGE(history.count('X') << " sections in " << watch.seconds() << " s, " << held.size()
                             << " held to the end; guarded writes: " << yes.size() << " done, "
                             << no.size() << " refused or not sent, " << maybe.size()
                             << " unknown (" << settled << " of them done)");
}
