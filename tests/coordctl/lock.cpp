// coordctl lock: what the command gets, who waits for whom, and what each death does.
#include "coordctl.hpp"

using namespace coordination;
using namespace support;

namespace {

/// A shell that says its pid and waits for ever; `trap` is what it does with SIGTERM.
std::vector<std::string> sleeper(const std::string& trap = "exit 0") {
  return {"sh", "-c", "trap '" + trap + "' TERM; echo pid $$; while :; do sleep 0.05; done"};
}

std::vector<std::string> lock(std::vector<std::string> args, const std::vector<std::string>& run) {
  args.insert(args.begin(), "lock");
  args.emplace_back("--");
  args.insert(args.end(), run.begin(), run.end());
  return args;
}

pid_t pid_of(Process& process) {
  const auto text = process.read_until("pid ", lenient(10s));
  REQUIRE(text.has_value());
  return static_cast<pid_t>(std::stol(*text));
}

struct Fixture {
  EtcdServer server;
  Coordctl ctl{server};
  Etcdctl etcdctl{server};

  bool queue_is(const std::string& name, std::size_t size) const {
    return wait_until([&] { return etcdctl.keys("/locks/" + name + "/").size() == size; },
                      lenient(10s));
  }
};

}  // namespace

TEST_CASE_FIXTURE(Fixture, "coordctl lock: the command has its key, its lease and its token") {
  const auto text = ctl.out(
      lock({"--ttl", "10s", "jobs/x"}, {"sh", "-c", "env | grep ^COORDINATION_LOCK_ | sort"}));
  std::istringstream lines(text);
  std::map<std::string, std::string> got;
  for (std::string line; std::getline(lines, line);) {
    const auto equals = line.find('=');
    got[line.substr(0, equals)] = line.substr(equals + 1);
  }
  REQUIRE(got.size() == 4);
  CHECK(got["COORDINATION_LOCK_NAME"] == "jobs/x");
  CHECK(got["COORDINATION_LOCK_KEY"] == "/locks/jobs/x/" + got["COORDINATION_LOCK_LEASE"]);
  CHECK(std::stoll(got["COORDINATION_LOCK_TOKEN"]) > 1);
  CHECK(etcdctl.keys("/locks/").empty());
  CHECK(etcdctl.leases().empty());
}

TEST_CASE_FIXTURE(Fixture, "coordctl lock: ends as the command did") {
  CHECK(ctl.run(lock({"x"}, {"sh", "-c", "exit 7"})).exit_code == 7);
  CHECK(ctl.run(lock({"x"}, {"sh", "-c", "kill -9 $$"})).exit_code == 128 + 9);
  CHECK(ctl.run(lock({"x"}, {"true"})).exit_code == 0);
  CHECK(ctl.run(lock({"x"}, {"no-such-program"})).exit_code == kNoCommand);
  CHECK(ctl.run(lock({"x"}, {"/etc/passwd"})).exit_code == kNotExecutable);
  CHECK(ctl.run({"lock", "x"}).exit_code == kUsage);
  CHECK(ctl.run(lock({}, {"true"})).exit_code == kUsage);
  CHECK(ctl.run(lock({"x", "--ttl", "soon"}, {"true"})).exit_code == kUsage);
  CHECK(ctl.run(lock({"a//b"}, {"true"})).exit_code == kBadData);
  CHECK(etcdctl.keys("/locks/").empty());
  const Coordctl nobody("http://127.0.0.1:" + std::to_string(closed_port()));
  CHECK(nobody.run(lock({"x", "--command-timeout", "1s"}, {"true"})).exit_code == kUnavailable);
}

TEST_CASE_FIXTURE(Fixture, "coordctl lock: who does not wait, or not long, ends with 75") {
  auto holder = ctl.start(lock({"x"}, sleeper()));
  pid_of(holder);
  const auto tried = ctl.run(lock({"--try", "x"}, {"echo", "ran"}));
  CHECK(tried.exit_code == kHeld);
  CHECK(tried.out.find("ran") == std::string::npos);
  const auto late = ctl.run(lock({"--timeout", "1s", "x"}, {"echo", "ran"}));
  CHECK(late.exit_code == kHeld);
  CHECK(late.out.find("ran") == std::string::npos);
  CHECK(etcdctl.keys("/locks/x/").size() == 1);
}

TEST_CASE_FIXTURE(Fixture, "coordctl lock: two of it and etcdctl's take turns") {
  auto first = ctl.start(lock({"x"}, sleeper()));
  pid_of(first);
  auto second = etcdctl.start({"lock", "/locks/x"});
  REQUIRE(queue_is("x", 2));
  auto third = ctl.start(lock({"x"}, sleeper()));
  REQUIRE(queue_is("x", 3));
  CHECK_FALSE(second.read_line(200ms).has_value());
  CHECK(first.terminate() == 0);  // what the command makes of it
  const auto key = second.read_line(lenient(10s));
  REQUIRE(key.has_value());
  CHECK(key->find("/locks/x/") == 0);
  REQUIRE(queue_is("x", 2));
  CHECK_FALSE(third.read_until("pid ", 200ms).has_value());  // it may say that it waits
  second.terminate();
  pid_of(third);
  CHECK(third.terminate() == 0);
  CHECK(etcdctl.keys("/locks/").empty());
}

TEST_CASE_FIXTURE(Fixture, "coordctl lock: shared ones and permits") {
  auto a = ctl.start(lock({"--shared", "x"}, sleeper()));
  pid_of(a);
  CHECK(ctl.run(lock({"--shared", "--try", "x"}, {"true"})).exit_code == 0);
  CHECK(ctl.run(lock({"--try", "x"}, {"true"})).exit_code == kHeld);
  auto b = ctl.start(lock({"--permits", "2", "s"}, sleeper()));
  auto c = ctl.start(lock({"--permits", "2", "s"}, sleeper()));
  pid_of(b);
  pid_of(c);
  CHECK(ctl.run(lock({"--permits", "2", "--try", "s"}, {"true"})).exit_code == kHeld);
  CHECK(ctl.run(lock({"--permits", "2", "--shared", "s"}, {"true"})).exit_code == kUsage);
}

TEST_CASE_FIXTURE(Fixture, "coordctl lock: signals are given on to the whole group") {
  const auto script =
      "trap 'echo outer; wait; exit 5' USR1; "
      "sh -c 'trap \"echo inner; exit 0\" USR1; echo ready; "
      "while :; do sleep 0.05; done' & "
      "while :; do sleep 0.05; done";
  auto process = ctl.start(lock({"x"}, {"sh", "-c", script}));
  REQUIRE(process.read_until("ready", lenient(10s)).has_value());
  process.signal(SIGUSR1);
  const auto rest = process.read_all(lenient(10s));
  CHECK(rest.find("inner") != std::string::npos);
  CHECK(rest.find("outer") != std::string::npos);
  CHECK(process.wait(5s) == 5);
}

TEST_CASE_FIXTURE(Fixture, "coordctl lock: SIGTERM while waiting ends it, and leaves nothing") {
  auto holder = ctl.start(lock({"x"}, sleeper()));
  pid_of(holder);
  auto waiter = ctl.start(lock({"x"}, {"echo", "ran"}));
  REQUIRE(queue_is("x", 2));
  waiter.signal(SIGTERM);
  CHECK(waiter.wait(lenient(5s)) == 128 + SIGTERM);
  CHECK(waiter.read_all(1s).find("ran") == std::string::npos);
  CHECK(etcdctl.keys("/locks/x/").size() == 1);
  CHECK(wait_until([&] { return etcdctl.leases().size() == 1; }, lenient(10s)));
}

TEST_CASE_FIXTURE(Fixture, "coordctl lock: who waits long says whom it waits for") {
  auto holder = ctl.start(lock({"x"}, sleeper()));
  pid_of(holder);
  auto waiter = ctl.start(lock({"x"}, {"true"}));
  const auto line = waiter.read_until("coordctl: waiting for x, ", lenient(20s));
  REQUIRE(line.has_value());
  CHECK(line->find("held by ") != std::string::npos);
  CHECK(line->find(":" + std::to_string(holder.pid()) + " (token ") != std::string::npos);
}

TEST_CASE_FIXTURE(Fixture, "coordctl lock: the command killed, the lock is free at once") {
  auto holder = ctl.start(lock({"--ttl", "60s", "x"}, sleeper()));
  const auto pid = pid_of(holder);
  kill(pid, SIGKILL);
  CHECK(holder.wait(lenient(10s)) == 128 + SIGKILL);
  CHECK(etcdctl.keys("/locks/").empty());
}

TEST_CASE_FIXTURE(Fixture,
                  "coordctl lock: coordctl killed, the whole group is ended by its guard") {
  const auto script =
      "trap 'echo told; exit 0' TERM; "
      "sh -c 'trap \"\" TERM; echo pid $$; while :; do sleep 0.05; done' & wait";
  auto holder = ctl.start(lock({"--ttl", "2s", "--grace", "500ms", "x"}, {"sh", "-c", script}));
  const auto stubborn = pid_of(holder);
  holder.kill9();
  CHECK(holder.read_until("told", lenient(10s)).has_value());
  CHECK(ends(stubborn));
  CHECK(ctl.run(lock({"--timeout", "20s", "x"}, {"true"})).exit_code == 0);
}

TEST_CASE_FIXTURE(Fixture, "coordctl lock: etcd killed for good: SIGTERM, then SIGKILL, 76") {
  const Stopwatch watch;
  auto holder = ctl.start(lock({"--ttl", "2s", "--grace", "300ms", "--command-timeout", "3s", "x"},
                               sleeper("echo told")));
  const auto pid = pid_of(holder);
  server.kill9();
  CHECK(holder.read_until("told", lenient(20s)).has_value());
  CHECK(holder.wait(lenient(20s)) == kLost);
  CHECK_FALSE(is_alive(pid));
  CHECK(watch.over(lenient(30s)) == 0);
}

TEST_CASE_FIXTURE(Fixture, "coordctl lock: etcd stopped for longer than the TTL: the same") {
  auto holder = ctl.start(
      lock({"--ttl", "2s", "--command-timeout", "3s", "x"}, sleeper("echo told; exit 3")));
  pid_of(holder);
  server.stop_signal();
  CHECK(holder.read_until("told", lenient(20s)).has_value());
  CHECK(holder.wait(lenient(20s)) == kLost);
  server.continue_signal();
}

TEST_CASE_FIXTURE(Fixture, "coordctl lock: etcd killed and back in time costs nothing") {
  auto holder = ctl.start(lock({"--ttl", "60s", "x"}, sleeper("exit 3")));
  pid_of(holder);
  const auto before = etcdctl.keys("/locks/");
  server.restart();
  REQUIRE(wait_until([&] { return etcdctl.keys("/locks/") == before; }, lenient(20s)));
  CHECK(holder.running());
  CHECK(holder.terminate(lenient(10s)) == 3);
  CHECK(etcdctl.keys("/locks/").empty());
}

TEST_CASE_FIXTURE(Fixture,
                  "coordctl lock: its key deleted: the command is told, and it ends with 76") {
  auto holder = ctl.start(lock({"x"}, sleeper("echo told; exit 0")));
  pid_of(holder);
  REQUIRE(etcdctl.run({"del", "--prefix", "/locks/x/"}).ok());
  CHECK(holder.read_until("told", lenient(20s)).has_value());
  CHECK(holder.wait(lenient(10s)) == kLost);
}

TEST_CASE_FIXTURE(Fixture,
                  "coordctl lock: the command inherits what coordctl was given, and no more") {
  // The shell gives coordctl descriptor 7, and an ignored SIGHUP. What is blocked is grep's: a
  // shell blocks all while it starts somebody.
  const auto script =
      "trap '' HUP; exec 7< /dev/null; exec \"$0\" --endpoints \"$1\" lock x -- sh -c '"
      "ls /proc/$$/fd; grep -E \"^Sig(Blk|Ign)\" /proc/self/status'";
  Process process({"sh", "-c", script, COORDCTL, server.url()}, with_env({}));
  const auto text = process.read_all(lenient(10s));
  CAPTURE(text);
  CHECK(process.wait(5s) == 0);
  std::istringstream words(text);
  std::set<std::string> descriptors;
  std::string word, blocked, ignored;
  while (words >> word && word.find("Sig") != 0) descriptors.insert(word);
  words >> blocked >> word >> ignored;
  // 10 and above are the shell's own.
  for (const auto& fd : descriptors) {
    CHECK_MESSAGE((std::stoi(fd) <= 2 || fd == "7" || std::stoi(fd) >= 10), "descriptor " << fd);
  }
  CHECK(descriptors.count("7") == 1);
  CHECK(std::stoull(blocked, nullptr, 16) == 0);
  CHECK(std::stoull(ignored, nullptr, 16) == 1ULL << (SIGHUP - 1));
}
