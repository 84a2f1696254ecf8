// Other people's clients, each in its own language, in one queue with us and over the same keys.
// tests/interop/build.sh builds them; what it cannot build is skipped, with the reason.
#include <doctest/doctest.h>
#include <signal.h>

#include <deque>
#include <fstream>
#include <thread>

#include "conformance/gateway.hpp"
#include "support/live.hpp"

using namespace coordination;
using namespace support;
using nlohmann::json;

namespace {

/// A program of another language, or why there is none.
struct Client {
  std::string name;
  Args command{};
  std::string missing{};

  Args of(const EtcdServer& server, const Args& args) const {
    Args argv = command;
    argv.push_back(server.endpoint());
    argv.insert(argv.end(), args.begin(), args.end());
    return argv;
  }
  Process start(const EtcdServer& server, const Args& args) const {
    return Process(of(server, args));
  }
  std::string run(const EtcdServer& server, const Args& args) const {
    const auto result = support::run(of(server, args));
    CHECK_MESSAGE(result.ok(), name << ": " << result.out);
    return result.out;
  }
};

Client client(const std::string& name) {
  Client made{name};
  const char* folder = std::getenv("COORDINATION_CLIENTS");
  if (folder == nullptr) {
    made.missing = "COORDINATION_CLIENTS does not name what tests/interop/build.sh has built";
    return made;
  }
  const std::string base = std::string(folder) + "/" + name;
  std::ifstream command(base + ".command"), why(base + ".skipped");
  for (std::string line; std::getline(command, line);) made.command.push_back(line);
  if (made.command.empty() && !std::getline(why, made.missing)) made.missing = "it was not built";
  return made;
}

/// False, and says so, if it is not there.
bool have(const Client& client) {
  if (client.missing.empty()) return true;
  MESSAGE("SKIPPED: " << client.name << ": " << client.missing);
  return false;
}

/// Our own side of a queue, in a process of its own: "lock" or "elect", as the others do it.
int stand_in_queue(const Args& args) {
  sigset_t end;
  sigemptyset(&end);
  sigaddset(&end, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &end, nullptr);
  CoordinatorOptions options;
  options.endpoints = {args.at(0)};
  auto coordinator = connect(options);
  const auto ttl = std::chrono::seconds(std::stoi(args.back()));
  const auto hold = [&](auto held, auto give_back) {
    held.on_lost([](const Error&) { say("lost"); });
    say("held " + held.key() + " " + std::to_string(held.fencing_token()));
    int number = 0;
    sigwait(&end, &number);
    if (give_back(held)) say("released");
  };
  if (args.at(1) == "lock") {
    hold(coordinator.lock().acquire(args.at(2), ttl).value(), [](Lock& l) { return l.unlock(); });
  } else {
    hold(coordinator.election().campaign(args.at(2), args.at(3), ttl).value(),
         [](Leadership& l) { return l.resign(); });
  }
  return 0;
}
const bool is_ours = child_main("queue", stand_in_queue);

/// A queue that both stand in: theirs, ours, theirs, ... Each comes when the one before has.
class MixedQueue {
 public:
  MixedQueue(const Client& client, const std::string& kind)
      : kind_(kind), prefix_(kind == "lock" ? "/locks/x" : "/elections/x"), client_(client) {}

  /// `ttl` in seconds: who is to be killed has a short one, that is waited for.
  void add(bool theirs, const std::string& ttl) {
    const std::string name = theirs ? prefix_ : "x";
    Args args{kind_, name};
    if (kind_ == "elect") args.push_back(theirs ? "theirs" : "ours");
    args.push_back(ttl);
    const auto before = places();
    if (theirs) {
      members_.push_back(client_.start(server_, args));
    } else {
      args.insert(args.begin(), server_.endpoint());
      members_.push_back(start_child("queue", args));
    }
    CHECK(wait_until([&] { return places() == before + 1; }, lenient(20s)));
  }
  /// The first says that it holds the key that is the oldest, and nobody else does.
  void check_first() {
    const auto line = members_.front().read_until("held ", lenient(30s));
    REQUIRE(line.has_value());
    std::istringstream words(*line);
    std::string key;
    std::int64_t revision = 0;
    words >> key >> revision;
    const auto oldest = first();
    CHECK(key == gateway::unb64(oldest["key"]));
    CHECK(revision == gateway::number(oldest, "create_revision"));
    CHECK(revision > last_);
    last_ = revision;
    for (std::size_t i = 1; i < members_.size(); ++i) CHECK_FALSE(members_[i].read_line(50ms));
  }
  void release() {
    members_.front().signal(SIGTERM);
    CHECK(members_.front().read_line(lenient(10s)).value_or("") == "released");
    members_.pop_front();
  }
  void kill() {
    members_.front().kill9();
    members_.pop_front();
  }
  /// Its lease goes, though it lives.
  void expire() {
    raw_.revoke(gateway::number(first(), "lease"));
    lost_.push_back(std::move(members_.front()));
    members_.pop_front();
  }
  std::size_t size() const { return members_.size(); }

 private:
  json range(std::int64_t limit) const {
    return raw_
        .range({{"key", gateway::b64(prefix_ + "/")},
                {"range_end", gateway::b64(prefix_ + "0")},
                {"sort_order", "ASCEND"},
                {"sort_target", "CREATE"},
                {"limit", std::to_string(limit)}})
        .json;
  }
  std::int64_t places() const { return gateway::number(range(0), "count"); }
  json first() const { return range(1).value("kvs", json::array({json::object()})).at(0); }

  const std::string kind_, prefix_;
  const Client& client_;
  EtcdServer server_;
  gateway::Gateway raw_{make_default_transport(), server_.url()};
  std::deque<Process> members_, lost_;
  std::int64_t last_{0};
};

void stand_together(const Client& client, const std::string& kind) {
  CAPTURE(client.name);
  CAPTURE(kind);
  MixedQueue queue(client, kind);
  const std::vector<void (MixedQueue::*)()> ends{&MixedQueue::release, &MixedQueue::kill,
                                                 &MixedQueue::expire};
  for (std::size_t i = 0; i < 2 * ends.size() + 1; ++i) {
    queue.add(i % 2 == 0, ends[i % ends.size()] == &MixedQueue::kill ? "4" : "12");
  }
  // Both sides end in every way: the third time around it is the other's turn.
  for (std::size_t i = 0; queue.size() > 1; ++i) {
    queue.check_first();
    (queue.*ends[i % ends.size()])();
  }
  queue.check_first();
  queue.release();
}

struct Fixture {
  EtcdServer server;
  Coordinator coordinator{connect([this] {
    CoordinatorOptions options;
    options.endpoints = {server.endpoint()};
    return options;
  }())};
};

std::string without_newline(std::string text) {
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

}  // namespace

TEST_CASE("clients: one lock queue with Go, Python and Rust [slow]") {
  for (const char* name : {"go", "python", "rust"}) {
    const auto other = client(name);
    if (have(other)) stand_together(other, "lock");
  }
}

TEST_CASE("clients: one election with Go, Python, Rust and Node [slow]") {
  for (const char* name : {"go", "python", "rust", "node"}) {
    const auto other = client(name);
    if (have(other)) stand_together(other, "elect");
  }
}

TEST_CASE_FIXTURE(Fixture, "clients: configuration, read and written by all [slow]") {
  auto& config = coordinator.config();
  for (const char* name : {"go", "python", "rust", "node"}) {
    const auto other = client(name);
    if (!have(other)) continue;
    const std::string key = std::string("app/") + name;
    for (const json& value : {json("größe <&> \u2028"), json(5432), json{{"host", "h"}, {"n", 1}},
                              json("17"), json(nullptr)}) {
      config.set(key, value).value();
      const auto text = without_newline(other.run(server, {"get", "/config/" + key}));
      const bool raw = value.is_string() && !json::accept(value.get<std::string>());
      CHECK(text == (raw ? value.get<std::string>() : value.dump()));
      other.run(server, {"put", "/config/" + key + "/back", text});
      CHECK(config.get(key + "/back").value() == value);
    }
  }
}

TEST_CASE_FIXTURE(Fixture, "clients: the Go module's records, read and written by Go [slow]") {
  const auto go = client("go");
  if (!have(go)) return;
  go.run(server, {"register", "/services/svc/", "theirs"});
  ServiceInfo expected{"theirs", "svc", "10.0.0.7", 8080};
  expected.metadata = {{"zone", "b"}, {"größe", "<x>"}};
  expected.ttl = 2500ms;
  CHECK(coordinator.registry().discover("svc").value() == std::vector<ServiceInfo>{expected});

  auto ours = expected;
  ours.id = "ours";
  coordinator.registry().register_service(ours).value();
  const std::string rest = " svc 10.0.0.7 8080 map[größe:<x> zone:b] 2.5s\n";
  CHECK(go.run(server, {"discover", "/services/svc/"}) == "ours" + rest + "theirs" + rest);
}

namespace {

/// What a counter says that everybody raises who holds the lock, unguarded.
std::int64_t raise(gateway::Gateway& raw) {
  const auto reply = raw.get("/counter");
  const auto before =
      reply.json.contains("kvs") ? std::stoll(gateway::unb64(reply.json["kvs"][0]["value"])) : 0;
  raw.put("/counter", std::to_string(before + 1));
  return before + 1;
}

/// The keys of a queue as they came and went, by create revision.
struct Passage {
  std::vector<std::int64_t> came, went;
};

Passage passage_of(Watch<WatchEvent>& watch, std::size_t all) {
  std::map<std::string, std::int64_t> there;
  Passage passage;
  while (passage.went.size() < all) {
    const auto event = watch.next(Context::with_timeout(lenient(20s))).value();
    if (event.type == EventType::Put) {
      there[event.kv.key] = event.kv.create_revision;
      passage.came.push_back(event.kv.create_revision);
    } else {
      passage.went.push_back(there[event.kv.key]);
    }
  }
  return passage;
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "clients: hand-overs between Go's Mutex and us, in order [slow]") {
  const auto go = client("go");
  if (!have(go)) return;
  const char* given = std::getenv("COORDINATION_HANDOVERS");
  const int rounds = given != nullptr ? std::atoi(given) : 100;  // of each side
  WatchRequest request{"/locks/baton/"};
  request.range_end = prefix_range_end(request.key);
  auto watch = coordinator.client().watch(request).value();
  gateway::Gateway raw(make_default_transport(), server.url());
  auto theirs = go.start(server, {"pass", "/locks/baton", "10", std::to_string(rounds)});
  REQUIRE(theirs.read_until("begins", lenient(10s)));
  std::vector<std::int64_t> ours;
  for (int i = 0; i < rounds; ++i) {
    auto lock = coordinator.lock().acquire("baton", 10s, Context::with_timeout(lenient(20s)));
    REQUIRE_MESSAGE(lock, why(lock));
    ours.push_back(lock->fencing_token());
    raise(raw);
    CHECK(lock->unlock());
  }
  std::vector<std::int64_t> held;
  while (const auto line = theirs.read_until("held ", lenient(10s))) {
    held.push_back(std::stoll(*line));
  }
  const auto passage = passage_of(watch, ours.size() + held.size());
  CHECK(held.size() == static_cast<std::size_t>(rounds));
  CHECK_MESSAGE(passage.came == passage.went, "first come, first served");
  int handovers = 0;
  bool last = false;
  for (std::size_t i = 0; i < passage.went.size(); ++i) {
    const bool mine = std::binary_search(ours.begin(), ours.end(), passage.went[i]);
    CHECK(mine != std::binary_search(held.begin(), held.end(), passage.went[i]));
    handovers += i > 0 && mine != last;
    last = mine;
  }
  MESSAGE(handovers, " hand-overs between the languages");
  CHECK(handovers >= rounds / 4);  // a busy machine lets one of them in several times
  CHECK_MESSAGE(raise(raw) == 2 * rounds + 1, "nobody was inside together with another");
}
