// Watches on a gateway that does what the test says: what a live etcd does too seldom to be tested.
#include <doctest/doctest.h>

#include <future>
#include <map>
#include <set>
#include <thread>

#include "support/live.hpp"
#include "support/watch_support.hpp"

using namespace coordination;
using namespace support;

namespace {

// A Coordinator on a gateway whose store is at revision 10.
struct Fixture {
  std::shared_ptr<FakeGateway> gateway{std::make_shared<FakeGateway>()};
  std::shared_ptr<ManualClock> clock{std::make_shared<ManualClock>()};
  LogKeeper log;
  std::optional<Coordinator> coordinator;

  explicit Fixture(std::vector<std::string> endpoints = {"127.0.0.1:1"},
                   const std::string& username = "") {
    gateway->set_range(10);
    CoordinatorOptions options;
    options.endpoints = std::move(endpoints);
    options.transport = gateway;
    options.clock = clock;
    options.username = username;
    options.logger = log.logger();
    coordinator.emplace(connect(std::move(options)));
  }
  ~Fixture() { coordinator->close().value(); }

  Client& client() { return coordinator->client(); }
  Watch<WatchEvent> watch(const std::string& key) { return client().watch(key).value(); }
  Watch<WatchEvent> watch_from(const std::string& key, std::int64_t revision) {
    WatchRequest request;
    request.key = key;
    request.start_revision = revision;
    return client().watch(request).value();
  }
  /// The next stream, its watches confirmed at `revision`.
  FakeStreamPtr confirmed(std::int64_t revision = 10) {
    auto stream = gateway->next_stream();
    REQUIRE(stream);
    stream->send(created_lines(*stream, revision));
    return stream;
  }
};

Result<WatchEvent> next_of(Watch<WatchEvent>& watch, milliseconds limit = 5s) {
  return watch.next(Context::with_timeout(lenient(limit)));
}
/// Of the next so many events: "11 12 15", and why it is fewer.
std::string revisions(Watch<WatchEvent>& watch, int count) {
  std::string list;
  for (int i = 0; i < count; ++i) {
    auto event = next_of(watch);
    if (!list.empty()) list += ' ';
    if (!event) return list + to_string(event.error());
    list += std::to_string(event->revision);
  }
  return list;
}
/// No event is there, nor comes soon.
bool silent(Watch<WatchEvent>& watch) {
  const auto event = watch.next(Context::with_timeout(50ms));
  return !event && event.error().code == ErrorCode::Timeout;
}
std::string starts(const FakeStream& stream) {
  std::string list;
  for (const auto& create : stream.creates) {
    list += (list.empty() ? "" : " ") + std::to_string(create.start_revision);
  }
  return list;
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "watch: what is sent to etcd") {
  auto first = watch("a");
  const auto stream = confirmed();
  REQUIRE(stream->creates.size() == 1);
  const auto& create = stream->creates[0];
  CHECK(create.id >= 1);
  CHECK(create.key == base64("a"));
  CHECK(create.start_revision == 11);  // after the revision that a read has told
  CHECK(create.progress_notify);
  CHECK(stream->headers["Connection"] == "close");
  CHECK(stream->headers["Grpc-Metadata-hasleader"] == "true");
}

// A watch that comes back asks for the last revision that it has: what etcd does not have any more
// may begin with the next one (etcd discards a delete at the revision of a compaction).

TEST_CASE_FIXTURE(Fixture, "watch: goes on after the last event, never after what `created` says") {
  auto events = watch("k");
  auto stream = confirmed(10);
  REQUIRE(stream->drained());

  SUBCASE("no event yet: the same start again") {
    stream->reset();
    stream = gateway->next_stream();
    REQUIRE(stream);
    CHECK(starts(*stream) == "10");
    stream->send(created_lines(*stream, 50));
    REQUIRE(stream->drained());
    stream->end();
    stream = gateway->next_stream();
    REQUIRE(stream);
    CHECK(starts(*stream) == "10");
  }
  SUBCASE("after events: the last of them") {
    stream->send(event_line(stream->creates[0].id, puts_at({12, 15, 19})));
    CHECK(revisions(events, 3) == "12 15 19");
    stream->reset();
    stream = gateway->next_stream();
    REQUIRE(stream);
    CHECK(starts(*stream) == "19");
  }
  SUBCASE("after progress") {
    stream->send(progress_line(stream->creates[0].id, 30));
    REQUIRE(stream->drained());
    stream->reset();
    stream = gateway->next_stream();
    REQUIRE(stream);
    CHECK(starts(*stream) == "30");
  }
  SUBCASE("progress that is older than an event, or of no watch, moves nothing") {
    stream->send(event_line(stream->creates[0].id, puts_at({40})));
    stream->send(progress_line(stream->creates[0].id, 35));
    stream->send(progress_line(-1, 90));
    REQUIRE(stream->drained());
    stream->reset();
    stream = gateway->next_stream();
    REQUIRE(stream);
    CHECK(starts(*stream) == "40");
  }
}

TEST_CASE_FIXTURE(Fixture, "watch: a start that the caller chose is kept until an event comes") {
  auto events = watch_from("k", 3);
  auto stream = confirmed(10);
  CHECK(starts(*stream) == "3");
  REQUIRE(stream->drained());
  stream->end();
  stream = confirmed(10);
  CHECK(starts(*stream) == "3");
  stream->send(event_line(stream->creates[0].id, puts_at({5})));
  CHECK(revisions(events, 1) == "5");
  stream->end();
  CHECK(starts(*confirmed(10)) == "5");
}

TEST_CASE_FIXTURE(Fixture, "watch: what was delivered already is dropped") {
  auto events = watch("k");
  const auto stream = confirmed(10);
  const auto id = stream->creates[0].id;
  stream->send(event_line(id, puts_at({11, 12})));
  stream->send(event_line(id, puts_at({11, 12, 13})));
  stream->send(event_line(id, puts_at({9})));
  stream->send(event_line(id, puts_at({14})));
  CHECK(revisions(events, 4) == "11 12 13 14");
  CHECK(silent(events));
}

TEST_CASE_FIXTURE(Fixture, "watch: all events of a transaction are delivered, none is half done") {
  auto events = watch("k");
  const auto stream = confirmed(10);
  std::vector<Change> changes{
      put_at(11, "k1"), put_at(11, "k2"), {false, "k3", "", 11}, put_at(12, "k1")};
  stream->send(event_line(stream->creates[0].id, changes));
  for (const auto& change : changes) {
    auto event = next_of(events);
    REQUIRE(event);
    CHECK(change_of(*event) == change);
  }
  stream->reset();
  CHECK(starts(*gateway->next_stream()) == "12");
}

TEST_CASE_FIXTURE(Fixture, "watch: a line in fragments: no transaction is half done") {
  auto events = watch("k");
  auto stream = confirmed(10);
  const auto id = stream->creates[0].id;
  const std::vector<Change> changes{put_at(11, "k1"), put_at(12, "k1"), put_at(12, "k2"),
                                    put_at(12, "k3"), put_at(13, "k1")};
  stream->send(fragment_line(id, {changes[0], changes[1]}));
  CHECK(revisions(events, 1) == "11");
  REQUIRE(stream->drained());
  CHECK(silent(events));

  SUBCASE("the rest comes") {
    stream->send(fragment_line(id, {changes[2]}));
    stream->send(event_line(id, {changes[3], changes[4]}));
    for (std::size_t i = 1; i < changes.size(); ++i) {
      auto event = next_of(events);
      REQUIRE(event);
      CHECK(change_of(*event) == changes[i]);
    }
    stream->reset();
    CHECK(starts(*gateway->next_stream()) == "13");
  }
  SUBCASE("the stream ends in the middle: once more from where it was whole") {
    stream->reset();
    stream = confirmed(13);
    CHECK(starts(*stream) == "11");
    stream->send(event_line(stream->creates[0].id, changes));
    CHECK(revisions(events, 4) == "12 12 12 13");
  }
}

TEST_CASE_FIXTURE(Fixture, "watch: a stream that is never confirmed is given up") {
  auto events = watch("k");
  auto stream = gateway->next_stream();
  REQUIRE(stream);
  clock->advance(9s);
  CHECK(stream->stays(50ms));
  clock->advance(2s);  // the member answers reads all the while
  CHECK(stream->left());
  stream = confirmed(10);
  stream->send(event_line(stream->creates[0].id, puts_at({11})));
  CHECK(revisions(events, 1) == "11");
}

TEST_CASE_FIXTURE(Fixture, "watch: what comes for a watch that has left does not come for ever") {
  auto quiet = watch("quiet");
  const auto first = confirmed(10);
  REQUIRE(first->drained());
  auto busy = std::make_unique<Watch<WatchEvent>>(watch("busy"));
  auto stream = confirmed(10);
  REQUIRE(stream->creates.size() == 2);
  REQUIRE(first->left());
  std::this_thread::sleep_for(20ms);  // nothing else is to be done for these two
  std::map<std::string, std::int64_t> ids;
  for (const auto& create : stream->creates) ids[create.key] = create.id;
  stream->send(event_line(ids[base64("busy")], puts_at({11}, "busy")));
  CHECK(revisions(*busy, 1) == "11");
  busy.reset();
  std::vector<std::int64_t> many;
  for (std::int64_t revision = 12; revision < 1100; ++revision) many.push_back(revision);
  stream->send(event_line(ids[base64("busy")], puts_at(many, "busy")));
  const auto next = confirmed(1100);
  REQUIRE(next->creates.size() == 1);
  CHECK(next->creates[0].key == base64("quiet"));
  CHECK(stream->left());
  next->send(event_line(next->creates[0].id, puts_at({1101}, "quiet")));
  CHECK(revisions(quiet, 1) == "1101");
}

TEST_CASE("watch: a merge that is refused takes nothing from the stream that stands") {
  Fixture f({"127.0.0.1:1"}, "user");
  auto idle = f.watch("idle");
  const auto old = f.confirmed();
  REQUIRE(old->drained());
  auto late = f.watch_from("late", 5);  // asks nothing before: the token may have died
  const auto refused = f.gateway->next_stream();
  REQUIRE(refused);
  CHECK(refused->creates.size() == 2);
  for (int i = 0; i < 2; ++i) {
    refused->send(
        refused_line("rpc error: code = Unauthenticated desc = etcdserver: invalid auth token"));
  }
  const auto next = f.gateway->next_stream();
  REQUIRE(next);
  CHECK(old->stays(50ms));
  old->send(event_line(old->creates[0].id, puts_at({11}, "idle")));
  CHECK(revisions(idle, 1) == "11");
  next->send(created_lines(*next, 11));
  for (const auto& create : next->creates) {
    if (create.key == base64("late")) next->send(event_line(create.id, puts_at({7}, "late")));
  }
  CHECK(revisions(late, 1) == "7");
}

TEST_CASE_FIXTURE(Fixture, "view: that it has ended is told to those who wait") {
  auto view = coordinator->config().view("app").value();
  Result<void> told = Error{};
  std::thread waiting([&] { told = view.wait_for(20); });
  const auto stream = gateway->next_stream();
  REQUIRE(stream);
  stream->send(
      refused_line("rpc error: code = PermissionDenied desc = "
                   "etcdserver: permission denied"));
  waiting.join();
  REQUIRE_FALSE(told);
  CHECK(told.error().code == ErrorCode::PermissionDenied);
  CHECK_FALSE(view.connected());
  clock->advance(3s);
  CHECK(view.age() == 3s);
}

TEST_CASE_FIXTURE(Fixture, "watch: lines come in any pieces") {
  auto events = watch("k");
  auto stream = confirmed(10);
  const auto id = stream->creates[0].id;

  SUBCASE("byte by byte, several at once, the newline alone") {
    for (const char byte : event_line(id, puts_at({11}))) stream->send(std::string(1, byte));
    stream->send(event_line(id, puts_at({12})) + event_line(id, puts_at({13})));
    auto line = event_line(id, puts_at({14}));
    line.pop_back();
    stream->send(line);
    stream->send("\n");
    CHECK(revisions(events, 4) == "11 12 13 14");
  }
  SUBCASE("eight megabytes") {
    const std::string big(6'000'000, 'x');
    const auto line = event_line(id, {{true, "k", big, 11}});
    for (std::size_t at = 0; at < line.size(); at += 16384) stream->send(line.substr(at, 16384));
    const auto event = next_of(events, 20s);
    REQUIRE(event);
    CHECK(event->kv.value == big);
  }
  SUBCASE("half a line at the end is not an event") {
    const auto line = event_line(id, puts_at({11, 12}));
    stream->send(line.substr(0, line.size() - 20));
    stream->reset();
    stream = confirmed(12);
    CHECK(starts(*stream) == "10");
    stream->send(event_line(id, puts_at({11, 12})));
    CHECK(revisions(events, 2) == "11 12");
    CHECK(silent(events));
  }
  SUBCASE("a last line without its newline") {
    auto line = event_line(id, puts_at({11}));
    line.pop_back();
    stream->send(line);
    stream->end();
    CHECK(revisions(events, 1) == "11");
    CHECK(starts(*gateway->next_stream()) == "11");
  }
}

TEST_CASE("watch: an error line and a silent end go to the next member") {
  Fixture f({"127.0.0.1:1", "127.0.0.1:2"});
  auto events = f.watch("k");
  auto stream = f.confirmed();
  const auto first = stream->endpoint;

  SUBCASE("as etcd 3.5 writes it") {
    stream->send("{\"error\":{\"code\":14,\"message\":\"etcdserver: no leader\"}}\n");
  }
  SUBCASE("as etcd 3.4 does, without a newline") {
    stream->send(R"({"error":{"grpc_code":14,"http_code":503,"message":"etcdserver: no leader",)"
                 R"("http_status":"Service Unavailable"}})");
    stream->end();
  }
  SUBCASE("reset") { stream->reset(); }

  stream = f.gateway->next_stream();
  REQUIRE(stream);
  CHECK(stream->endpoint != first);
  CHECK(starts(*stream) == "10");
}

TEST_CASE_FIXTURE(Fixture, "watch: streams that fail at once are tried again, but not in a loop") {
  auto events = watch("k");
  const Stopwatch stopwatch;
  for (int i = 0; i < 5; ++i) {
    const auto stream = gateway->next_stream();
    REQUIRE(stream);
    stream->reset();
  }
  CHECK(stopwatch.elapsed() >= 225ms);  // 20, 40, 80 and 160 ms, up to a quarter less
  CHECK(stopwatch.over(lenient(1s)) == 0);
}

TEST_CASE_FIXTURE(Fixture, "watch: a merge loses and repeats nothing while both streams deliver") {
  auto a = watch("a");
  const auto old = confirmed(10);
  const auto id = old->creates[0].id;
  REQUIRE(old->drained());
  old->send(event_line(id, puts_at({11}, "a")));
  CHECK(revisions(a, 1) == "11");
  REQUIRE(old->drained());

  auto b = watch("b");
  gateway->set_range(100);
  const auto merged = gateway->next_stream();
  REQUIRE(merged);
  REQUIRE(merged->creates.size() == 2);
  CHECK(starts(*merged) == "11 12");  // each from its own next revision

  SUBCASE("the new stream takes over only when it has confirmed everything") {
    old->send(event_line(id, puts_at({12}, "a")));
    CHECK(revisions(a, 1) == "12");
    merged->send(created_line(merged->creates[0].id, 12));
    CHECK(old->stays(50ms));
    merged->send(created_line(merged->creates[1].id, 12));
    merged->send(event_line(id, puts_at({12, 13}, "a")));
    old->send(event_line(id, puts_at({13, 14}, "a")));
    CHECK(old->left());
    merged->send(event_line(id, puts_at({14, 15}, "a")));
    CHECK(revisions(a, 3) == "13 14 15");
    CHECK(silent(a));
    CHECK(silent(b));
  }
  SUBCASE("a new stream that fails leaves the old one alone") {
    merged->send(created_line(merged->creates[0].id, 12));
    merged->reset();
    old->send(event_line(id, puts_at({12}, "a")));
    CHECK(revisions(a, 1) == "12");
    const auto again = confirmed(12);
    std::int64_t b_id = again->creates.size() == 2 ? again->creates[0].id : 0;
    for (const auto& create : again->creates) {
      if (create.key == base64("b")) b_id = create.id;
    }
    again->send(event_line(b_id, puts_at({13}, "b")));
    CHECK(revisions(b, 1) == "13");
    CHECK(silent(a));
  }
  SUBCASE("the old one dies before the new one has confirmed") {
    old->reset();
    merged->send(created_lines(*merged, 12));
    merged->send(event_line(id, puts_at({12}, "a")));
    CHECK(revisions(a, 1) == "12");
  }
}

TEST_CASE_FIXTURE(Fixture, "watch: etcd refuses one of three, in the order of asking") {
  // Nothing else can be opened while this stream is being confirmed: they come in one.
  std::vector<Watch<WatchEvent>> watches;
  for (const char* key : {"a", "b", "c"}) watches.push_back(watch(key));
  std::map<std::string, FakeStreamPtr> at;
  while (at.size() < 3) {
    auto stream = gateway->next_stream();
    REQUIRE(stream);
    std::string lines;
    for (const auto& create : stream->creates) {
      at[create.key] = stream;
      const bool refuse = create.key == base64("b");
      lines += refuse ? refused_line(
                            "rpc error: code = PermissionDenied desc = "
                            "etcdserver: permission denied")
                      : created_line(create.id, 10);
    }
    stream->send(lines);
  }
  const auto refused = next_of(watches[1]);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == ErrorCode::PermissionDenied);
  for (const std::size_t i : {std::size_t{0}, std::size_t{2}}) {
    const std::string key = i == 0 ? "a" : "c";
    const auto stream = at[base64(key)];
    for (const auto& create : stream->creates) {
      if (create.key == base64(key)) stream->send(event_line(create.id, puts_at({11}, key)));
    }
    CHECK(revisions(watches[i], 1) == "11");
  }
}

TEST_CASE("watch: a dead token is replaced once, and the watch goes on") {
  Fixture f({"127.0.0.1:1"}, "user");
  auto events = f.watch("k");
  auto stream = f.confirmed();
  const auto token = stream->headers["Authorization"];
  REQUIRE(stream->drained());
  stream->send(event_line(stream->creates[0].id, puts_at({11})));
  CHECK(revisions(events, 1) == "11");
  const int logins = f.gateway->logins();

  SUBCASE("the creation is refused") {
    stream->reset();
    stream = f.gateway->next_stream();
    REQUIRE(stream);
    stream->send(
        refused_line("rpc error: code = Unauthenticated desc = etcdserver: invalid auth token"));
  }
  SUBCASE("the stream ends with it") {
    stream->send("{\"error\":{\"code\":16,\"message\":\"etcdserver: invalid auth token\"}}\n");
  }
  stream = f.gateway->next_stream();
  REQUIRE(stream);
  CHECK(stream->headers["Authorization"] != token);
  CHECK(f.gateway->logins() == logins + 1);
  CHECK(starts(*stream) == "11");
  stream->send(created_lines(*stream, 11));
  stream->send(event_line(stream->creates[0].id, puts_at({12})));
  CHECK(revisions(events, 1) == "12");
}

TEST_CASE("watch: fresh tokens that are refused end the watch after some tries, with pauses") {
  Fixture f({"127.0.0.1:1"}, "user");
  auto events = f.watch("k");
  auto stream = f.confirmed();
  REQUIRE(stream->drained());
  const int logins = f.gateway->logins();
  std::string reason;
  SUBCASE("invalid") { reason = "code = Unauthenticated desc = etcdserver: invalid auth token"; }
  SUBCASE("denied") { reason = "code = PermissionDenied desc = etcdserver: permission denied"; }
  stream->reset();
  std::set<std::string> tokens;
  const Stopwatch stopwatch;
  for (int i = 0; i < 6; ++i) {
    stream = f.gateway->next_stream();
    REQUIRE(stream);
    tokens.insert(stream->headers["Authorization"]);
    stream->send(refused_line("rpc error: " + reason));
  }
  CHECK(tokens.size() == 6);
  CHECK(f.gateway->logins() == logins + 5);
  CHECK(stopwatch.elapsed().count() >= 100);  // five of them, longer and longer
  const auto end = next_of(events);
  REQUIRE_FALSE(end);
  CHECK(end.error().code == ErrorCode::PermissionDenied);
  CHECK(never([&] { return f.gateway->opens(); }, 50ms));
}

TEST_CASE("watch: what may not be watched is said at once") {
  Fixture f({"127.0.0.1:1"}, "user");
  auto events = f.watch("k");
  const auto stream = f.gateway->next_stream();
  REQUIRE(stream);
  stream->send(
      refused_line("rpc error: code = PermissionDenied desc = etcdserver: permission denied"));
  const auto end = next_of(events);
  REQUIRE_FALSE(end);
  CHECK(end.error().code == ErrorCode::PermissionDenied);
  CHECK(never([&] { return f.gateway->opens(); }, 50ms));
}

TEST_CASE("watch: two dead tokens in a row, and a third one that is good") {
  Fixture f({"127.0.0.1:1"}, "user");
  auto events = f.watch("k");
  auto stream = f.confirmed();
  REQUIRE(stream->drained());
  stream->reset();
  for (const char* reason : {"invalid auth token", "permission denied", "user name is empty"}) {
    stream = f.gateway->next_stream();
    REQUIRE(stream);
    stream->send(refused_line(std::string("rpc error: desc = etcdserver: ") + reason));
  }
  stream = f.confirmed(10);
  stream->send(event_line(stream->creates[0].id, puts_at({11})));
  CHECK(revisions(events, 1) == "11");
}

TEST_CASE_FIXTURE(Fixture, "watch: a full queue rests and goes on from where it stopped") {
  WatchRequest request;
  request.key = "k";
  request.queue_size = 4;
  auto events = client().watch(request).value();
  auto stream = confirmed(10);
  REQUIRE(stream->drained());
  auto other = watch("other");  // joins it on a new stream: the slow one must not end that
  stream = confirmed(10);
  REQUIRE(stream->creates.size() == 2);
  std::int64_t id = 0, other_id = 0;
  for (const auto& create : stream->creates)
    (create.key == base64("k") ? id : other_id) = create.id;

  stream->send(event_line(id, puts_at({11, 12, 13, 14, 15, 16})));  // what has come is taken
  stream->send(event_line(id, puts_at({17})));
  const auto rest = confirmed(17);  // the dead are as many as the living
  REQUIRE(rest->creates.size() == 1);
  CHECK(rest->creates[0].id == other_id);
  rest->send(event_line(other_id, puts_at({18}, "other")));
  CHECK(revisions(other, 1) == "18");
  CHECK(never([&] { return gateway->opens(); }, 50ms));  // it rests
  CHECK(revisions(events, 3) == "11 12 13");
  CHECK(never([&] { return gateway->opens(); }, 50ms));  // a stream for a few is too dear
  CHECK(revisions(events, 3) == "14 15 16");

  const auto again = gateway->next_stream();
  REQUIRE(again);
  std::optional<std::int64_t> start;
  for (const auto& create : again->creates) {
    if (create.id == id) start = create.start_revision;
  }
  CHECK(start == 16);
  again->send(created_lines(*again, 18));
  again->send(event_line(id, puts_at({17})));
  CHECK(revisions(events, 1) == "17");
  CHECK(silent(events));
}

TEST_CASE_FIXTURE(Fixture, "watch: a small queue that is read costs no stream") {
  WatchRequest request;
  request.key = "k";
  request.queue_size = 1;
  Changes seen;
  auto handled =
      client().watch(request, [&](const WatchEvent& event) { seen.add(change_of(event)); }).value();
  const auto stream = confirmed(10);
  const auto id = stream->creates[0].id;
  stream->send(event_line(id, puts_at({11})));
  REQUIRE(seen.reaches(1, 5s));
  std::vector<std::int64_t> many;
  for (std::int64_t revision = 12; revision < 112; ++revision) many.push_back(revision);
  for (std::size_t line = 0; line < 5; ++line) {
    stream->send(
        event_line(id, puts_at({many.begin() + static_cast<std::ptrdiff_t>(line * 20),
                                many.begin() + static_cast<std::ptrdiff_t>(line * 20 + 20)})));
  }
  REQUIRE(seen.reaches(101, 5s));
  CHECK(stream->stays(50ms));
  CHECK(gateway->streams() == 1);
}

TEST_CASE_FIXTURE(Fixture, "watch: a small queue that is read holds a megabyte, and not more") {
  std::promise<void> go;
  const auto gone = go.get_future().share();
  WatchRequest request;
  request.key = "k";
  request.queue_size = 1;
  Changes seen;
  const auto slowly = [&](const WatchEvent& event) {
    seen.add(change_of(event));
    gone.wait();
  };
  const auto handled = client().watch(request, slowly).value();
  const auto stream = confirmed(10);
  const auto id = stream->creates[0].id;
  stream->send(event_line(id, puts_at({11})));
  REQUIRE(seen.reaches(1, 5s));
  std::vector<Change> large;
  for (std::int64_t revision = 12; revision < 17; ++revision) {
    large.push_back({true, "k", std::string(300 * 1000, 'v'), revision});
  }
  stream->send(event_line(id, large));
  CHECK(stream->left());
  go.set_value();
  CHECK(seen.reaches(6, 5s));
}

TEST_CASE_FIXTURE(Fixture, "watch: what comes after cancel() is nobody's, and the stream ends") {
  auto events = watch("k");
  const auto stream = confirmed();
  REQUIRE(stream->drained());
  events.cancel();
  CHECK(stream->left());
  const auto end = next_of(events);
  REQUIRE_FALSE(end);
  CHECK(end.error().code == ErrorCode::Cancelled);
  CHECK(never([&] { return gateway->opens(); }, 50ms));
}

TEST_CASE_FIXTURE(Fixture, "watch: compaction ends a raw watch, after what had come before") {
  auto events = watch("k");
  const auto stream = confirmed(10);
  const auto id = stream->creates[0].id;
  stream->send(event_line(id, puts_at({11})));
  stream->send(compacted_line(id, 40));
  CHECK(revisions(events, 1) == "11");
  const auto end = next_of(events);
  REQUIRE_FALSE(end);
  CHECK(end.error().code == ErrorCode::Compacted);
  CHECK(end.error().revision == 41);  // complete from here on
}

TEST_CASE_FIXTURE(Fixture, "watch: a compaction of what it has had already ends no watch") {
  auto events = watch("k");
  auto stream = confirmed(10);
  const auto id = stream->creates[0].id;
  stream->send(event_line(id, puts_at({41})));
  stream->send(compacted_line(id, 40));
  CHECK(revisions(events, 1) == "41");
  stream = confirmed(41);
  stream->send(event_line(id, puts_at({42})));
  CHECK(revisions(events, 1) == "42");
}

TEST_CASE_FIXTURE(Fixture, "watch: a merge after a compaction does not end an idle watch") {
  // The old stream has it all; only the new one cannot go back so far.
  auto idle = watch("idle");
  const auto old = confirmed(10);
  REQUIRE(old->drained());
  auto other = watch("other");
  const auto merged = gateway->next_stream();
  REQUIRE(merged);
  std::int64_t id = old->creates[0].id;
  merged->send(created_lines(*merged, 50));
  merged->send(compacted_line(id, 40));
  REQUIRE(merged->drained());
  old->send(event_line(id, puts_at({51}, "idle")));
  CHECK(revisions(idle, 1) == "51");
}

TEST_CASE_FIXTURE(Fixture, "watch: nor does it where a neighbour hears something meanwhile") {
  auto idle = watch("idle");
  const auto first = confirmed(10);
  REQUIRE(first->drained());
  auto busy = watch("busy");
  const auto old = confirmed(10);
  REQUIRE(old->creates.size() == 2);
  std::map<std::string, std::int64_t> ids;
  for (const auto& create : old->creates) ids[create.key] = create.id;
  REQUIRE(first->left());
  auto other = watch("other");
  REQUIRE(confirmed(10)->drained());
  auto another = watch("another");  // now it is worth a merge
  const auto merged = gateway->next_stream();
  REQUIRE(merged);
  REQUIRE(merged->creates.size() == 4);
  merged->send(created_lines(*merged, 50));
  merged->send(compacted_line(ids[base64("idle")], 40));
  REQUIRE(merged->drained());
  old->send(event_line(ids[base64("busy")], puts_at({51}, "busy")));
  CHECK(revisions(busy, 1) == "51");
  CHECK(old->stays(300ms));
  old->send(event_line(ids[base64("idle")], puts_at({52}, "idle")));
  CHECK(revisions(idle, 1) == "52");
}

TEST_CASE_FIXTURE(Fixture, "watch: new events during the look at an old history end nothing") {
  auto events = watch("k");
  auto stream = confirmed(10);
  stream->send(event_line(stream->creates[0].id, puts_at({20})));
  CHECK(revisions(events, 1) == "20");
  stream->reset();
  stream = gateway->next_stream();
  REQUIRE(stream);
  const auto id = stream->creates[0].id;
  // A member that is behind says 15. While the question how far the cluster is (30) is on its
  // way, it catches up.
  std::atomic<bool> asked{false};
  const auto hook = gateway->on_read([&, stream] {
    if (!asked.exchange(true)) {
      stream->send(event_line(id, puts_at({29, 31, 32})));
      stream->drained();
    }
    return FakeGateway::range_answer(30, nlohmann::json::array({kv_json("k", "v20", 20)}));
  });
  stream->send(created_lines(*stream, 15));
  CHECK(revisions(events, 3) == "29 31 32");
  CHECK(wait_until([&] { return asked.load(); }, lenient(2s)));
  CHECK(silent(events));
  stream->send(event_line(id, puts_at({33})));
  CHECK(revisions(events, 1) == "33");
}

TEST_CASE_FIXTURE(Fixture, "watch: a store that was wiped is Compacted for a raw watch") {
  auto events = watch("k");
  auto stream = confirmed(10);
  stream->send(event_line(stream->creates[0].id, puts_at({20})));
  CHECK(revisions(events, 1) == "20");
  gateway->set_range(3);
  stream->reset();
  stream = confirmed(3);
  const auto end = next_of(events);
  REQUIRE_FALSE(end);
  CHECK(end.error().code == ErrorCode::Compacted);
}

TEST_CASE_FIXTURE(Fixture,
                  "watch: a store is another one once, and not at each break from then on") {
  auto before = watch("k");
  auto stream = confirmed(10);
  stream->send(event_line(stream->creates[0].id, puts_at({20})));
  CHECK(revisions(before, 1) == "20");
  gateway->set_range(3);
  stream->reset();
  stream = confirmed(3);
  CHECK_FALSE(next_of(before));

  auto after = watch("k");
  stream = confirmed(3);
  std::atomic<int> reads{0};
  const auto hook = gateway->on_read_of([&](const nlohmann::json&) {
    ++reads;
    return FakeGateway::range_answer(3);
  });
  stream->reset();
  stream = confirmed(3);
  REQUIRE(wait_until([&] { return reads > 0; }, lenient(5s)));
  stream->send(event_line(stream->creates[0].id, puts_at({4})));
  CHECK(revisions(after, 1) == "4");
  CHECK(silent(after));
}

TEST_CASE_FIXTURE(Fixture, "watch: a store is known again by the key of another watch") {
  auto one = watch("a");
  const auto first = confirmed(10);
  REQUIRE(first->drained());
  auto other = watch("b");
  auto stream = confirmed(10);
  REQUIRE(stream->creates.size() == 2);
  REQUIRE(first->left());
  auto id_of = [&](const std::string& key) {
    const auto& creates = stream->creates;
    return creates[creates[0].key == base64(key) ? 0 : 1].id;
  };
  stream->send(event_line(id_of("b"), puts_at({20}, "b")));
  CHECK(revisions(other, 1) == "20");
  std::atomic<int> reads{0};
  const auto hook = gateway->on_read_of([&](const nlohmann::json& request) {
    ++reads;
    const bool known = request.value("key", "") == base64("b") && !request.contains("range_end");
    return known ? FakeGateway::range_answer(20, nlohmann::json::array({kv_json("b", "", 20)}))
                 : FakeGateway::range_answer(20);
  });
  stream->reset();
  stream = confirmed(20);
  REQUIRE(wait_until([&] { return reads > 0; }, lenient(5s)));
  stream->send(event_line(id_of("a"), puts_at({21}, "a")));
  CHECK(revisions(one, 1) == "21");
  CHECK(silent(one));
  CHECK(silent(other));
}

TEST_CASE_FIXTURE(Fixture, "view: a wiped store with the same revisions and other values") {
  const std::string key = "/config/app/k";
  gateway->set_range(10, nlohmann::json::array({kv_json(key, "old", 10)}));
  auto view = coordinator->config().view("app").value();
  CHECK(view.get("app/k").value() == "old");
  const auto first = confirmed(10);
  REQUIRE(first->drained());
  Changes changes;
  auto watch = coordinator->config()
                   .watch_prefix("app", [&](const ConfigEvent& e) { changes.add(change_of(e)); })
                   .value();
  auto stream = confirmed(10);
  REQUIRE(stream->creates.size() == 2);
  REQUIRE(first->left());
  REQUIRE(wait_until([&] { return view.connected(); }, lenient(5s)));

  // The new store says 3, and is at 10 again when all is read.
  const auto hook = gateway->on_read_of([&](const nlohmann::json& request) {
    if (request.contains("keys_only")) return FakeGateway::range_answer(3);
    return FakeGateway::range_answer(10, nlohmann::json::array({kv_json(key, "new", 10)}));
  });
  stream->reset();
  stream = confirmed(3);
  CHECK(wait_until([&] { return view.get("app/k").value() == "new"; }, lenient(3s)));
  CHECK(changes.reaches(1, 3s));
  for (const auto& change : changes.all()) CHECK(change == Change{true, "app/k", "\"new\"", 10});
}

TEST_CASE_FIXTURE(Fixture, "view: an empty one cannot know its store again, and reads once more") {
  auto view = coordinator->config().view("app").value();
  auto stream = confirmed(10);
  REQUIRE(stream->drained());
  // Another store, that is beyond the old one, has a key of before.
  gateway->on_read_of([](const nlohmann::json& request) {
    bool ours = request.contains("range_end") && !request.contains("keys_only");
    auto kvs = nlohmann::json::array();
    if (ours) kvs.push_back(kv_json("/config/app/k", "1", 5));
    return FakeGateway::range_answer(20, kvs);
  });
  stream->reset();
  stream = confirmed(20);
  CHECK(wait_until([&] { return view.get("app/k").has_value(); }, lenient(3s)));
}

TEST_CASE_FIXTURE(Fixture,
                  "view: in another store it stands for no revision before it has read it") {
  auto view = coordinator->config().view("app").value();
  CHECK(view.wait_for(10, Context::with_timeout(1ms)));
  auto stream = confirmed(10);
  REQUIRE(stream->drained());
  gateway->on_read_of([](const nlohmann::json& request) -> Result<HttpResponse> {
    if (request.contains("keys_only")) return FakeGateway::range_answer(3);
    return Error{ErrorCode::Timeout, "frozen", "", Outcome::MaybeApplied, 0};
  });
  stream->reset();
  stream = confirmed(3);
  CHECK(wait_until([&] { return !view.wait_for(3, Context::with_timeout(1ms)); }, lenient(3s)));
}

TEST_CASE_FIXTURE(Fixture,
                  "view: where the store is the same, a stream that breaks costs one look") {
  const auto kv = [](const std::string& value, std::int64_t revision) {
    return nlohmann::json::array({kv_json("/config/app/k", value, revision)});
  };
  gateway->set_range(10, kv("1", 10));
  auto view = coordinator->config().view("app").value();
  auto stream = confirmed(10);
  REQUIRE(stream->drained());
  std::atomic<int> looks{0}, reads{0};
  const auto hook = gateway->on_read_of([&](const nlohmann::json& request) {
    ++(request.contains("keys_only") ? looks : reads);
    return FakeGateway::range_answer(10, kv("1", 10));
  });
  stream->reset();
  stream = confirmed(10);
  REQUIRE(wait_until([&] { return looks > 0; }, lenient(3s)));
  stream->send(event_line(stream->creates[0].id, {{true, "/config/app/k", "2", 11}}));
  CHECK(wait_until([&] { return view.get("app/k").value() == 2; }, lenient(3s)));
  CHECK(looks == 1);
  CHECK(reads == 0);
}

TEST_CASE_FIXTURE(Fixture, "view: one that may not read again ends, and says so") {
  auto view = coordinator->config().view("app").value();
  const auto stream = confirmed(10);
  Journal<std::string> ends;
  view.on_end([&](const Error& error) { ends.add(to_string(error.code)); });
  const auto hook = gateway->on_read([] {
    return HttpResponse{403, R"({"code":7,"message":"etcdserver: permission denied"})"};
  });
  stream->send(compacted_line(stream->creates[0].id, 40));
  REQUIRE(ends.reaches(1, 3s));
  CHECK(ends.all().front() == "PERMISSION_DENIED");
}

TEST_CASE_FIXTURE(Fixture, "view: one that goes while it is read again leaves no watch behind") {
  std::promise<void> go;
  const auto gone = go.get_future().share();
  std::atomic<int> reads{0};
  std::optional<ConfigView> view = coordinator->config().view("app").value();
  const auto stream = confirmed(10);
  const auto hook = gateway->on_read([&] {
    ++reads;
    gone.wait();
    return FakeGateway::range_answer(50);
  });
  stream->send(compacted_line(stream->creates[0].id, 40));
  REQUIRE(wait_until([&] { return reads > 0; }, lenient(3s)));
  view.reset();
  go.set_value();
  const auto next = gateway->next_stream(200ms);
  CHECK((!next || next->left()));
}

TEST_CASE_FIXTURE(Fixture, "view: its age counts from what it has heard last, on whatever stream") {
  auto view = coordinator->config().view("app").value();
  const auto stream = confirmed(10);
  REQUIRE(stream->drained());
  clock->advance(1s);
  stream->send(progress_line(stream->creates[0].id, 12));
  REQUIRE(stream->drained());
  clock->advance(1s);
  stream->reset();
  REQUIRE(gateway->next_stream());
  CHECK_FALSE(view.connected());
  CHECK(view.age() == 1s);
}

TEST_CASE_FIXTURE(Fixture, "view: connected again as soon as a silent member answers") {
  auto view = coordinator->config().view("app").value();
  const auto stream = confirmed(10);
  REQUIRE(stream->drained());
  REQUIRE(wait_until([&] { return view.connected(); }, lenient(5s)));
  const auto hook = gateway->on_read([] {
    return Error{ErrorCode::Timeout, "frozen", "", Outcome::MaybeApplied, 0};
  });
  clock->advance(5s);
  REQUIRE(wait_until([&] { return !view.connected(); }, lenient(3s)));
  CHECK(view.age() == 5s);
  CHECK(stream->left());
  gateway->set_range(10);
  const auto next = confirmed(10);
  CHECK(next->creates[0].start_revision == 10);  // one more than it needs
  CHECK(wait_until([&] { return view.connected(); }, lenient(3s)));
}

TEST_CASE_FIXTURE(Fixture, "watch: after cancel() nothing is read from the queue") {
  auto cancelled = watch("k");
  auto stream = confirmed();
  stream->send(event_line(stream->creates[0].id, puts_at({11, 12})));
  CHECK(next_of(cancelled));
  cancelled.cancel();
  const auto event = next_of(cancelled);
  REQUIRE_FALSE(event);
  CHECK(event.error().code == ErrorCode::Cancelled);
}

TEST_CASE("watch: a member that is silent and does not answer is left") {
  Fixture f({"127.0.0.1:1", "127.0.0.1:2"});
  auto view = f.coordinator->config().view("app").value();
  const auto stream = f.confirmed(10);
  REQUIRE(stream->drained());
  REQUIRE(wait_until([&] { return view.connected(); }, lenient(5s)));
  f.gateway->freeze(stream->endpoint);
  f.clock->advance(2500ms);
  const Stopwatch stopwatch;
  const auto next = f.gateway->next_stream(10s);
  REQUIRE(next);
  CHECK(stopwatch.over(lenient(3500ms)) == 0);
  CHECK(next->endpoint != stream->endpoint);
  CHECK_FALSE(view.connected());
  CHECK(view.age() >= 2500ms);

  CHECK(stream->left());
  next->send(created_lines(*next, 10));
  CHECK(wait_until([&] { return view.connected(); }, lenient(5s)));
}

TEST_CASE("watch: a slow member is not left") {
  Fixture f({"127.0.0.1:1", "127.0.0.1:2"});
  auto view = f.coordinator->config().view("app").value();
  const auto stream = f.confirmed(10);
  REQUIRE(stream->drained());
  REQUIRE(wait_until([&] { return view.connected(); }, lenient(5s)));
  f.gateway->freeze(stream->endpoint);
  f.clock->advance(2500ms);
  std::this_thread::sleep_for(1s);  // this long the answer takes
  f.gateway->freeze("");
  std::this_thread::sleep_for(2500ms);
  CHECK(never([&] { return f.gateway->opens(); }, 0ms));
  CHECK(view.connected());
}

TEST_CASE("watch: a call that fails makes the streams of its member suspect at once") {
  Fixture f({"127.0.0.1:1", "127.0.0.1:2"});
  auto view = f.coordinator->config().view("app").value();
  const auto stream = f.confirmed(10);
  REQUIRE(stream->drained());
  REQUIRE(wait_until([&] { return view.connected(); }, lenient(5s)));
  f.gateway->freeze(stream->endpoint);
  f.gateway->on_read_of([](const nlohmann::json&) { return FakeGateway::range_answer(10); });
  const Stopwatch stopwatch;
  static_cast<void>(f.client().get("k", Context::with_timeout(lenient(3s))));
  const auto next = f.gateway->next_stream(5s);
  REQUIRE(next);
  CHECK(next->endpoint != stream->endpoint);
  CHECK(stopwatch.over(lenient(4s)) == 0);  // a second until the call is late, then three
}

TEST_CASE("watch: a stream that ends well and has confirmed nothing is its member's failure") {
  Fixture f({"127.0.0.1:1", "127.0.0.1:2"});
  auto events = f.watch("k");
  auto stream = f.gateway->next_stream();
  REQUIRE(stream);
  const auto first = stream->endpoint;
  stream->end();
  stream = f.gateway->next_stream();
  REQUIRE(stream);
  CHECK(stream->endpoint != first);
}

TEST_CASE("watch: a member that serves but does not confirm watches is left") {
  Fixture f({"127.0.0.1:1", "127.0.0.1:2"});
  auto events = f.watch("k");
  const auto stream = f.gateway->next_stream();
  REQUIRE(stream);
  f.clock->advance(11s);
  CHECK(stream->left());
  const auto next = f.gateway->next_stream();
  REQUIRE(next);
  CHECK(next->endpoint != stream->endpoint);
}

TEST_CASE_FIXTURE(Fixture, "watch: streams that are confirmed and cut are no storm") {
  auto events = watch("k");
  const Stopwatch stopwatch;
  int streams = 0;
  while (stopwatch.elapsed() < 4s) {
    const auto stream = gateway->next_stream(100ms);
    if (!stream) continue;
    ++streams;
    stream->send(created_lines(*stream, 10));
    stream->drained();
    stream->end();
  }
  CHECK(streams >= 5);
  CHECK(streams <= 12);  // after 20, 40, ... 640, 1000, 1000 ms, up to a quarter less
}

TEST_CASE_FIXTURE(Fixture, "watch: a part of a request that etcd has not seen is asked for again") {
  std::vector<Watch<WatchEvent>> watches;
  watches.push_back(watch("0"));
  const auto first = confirmed(10);
  REQUIRE(first->drained());
  for (int i = 1; i < 10; ++i) watches.push_back(watch(std::string(300, 'k') + std::to_string(i)));
  // Of each request only the first creation arrives.
  bool padded = false;
  std::set<std::int64_t> confirmed_ids{first->creates[0].id};
  const Stopwatch stopwatch;
  while (confirmed_ids.size() < watches.size() && stopwatch.over(lenient(15s)) == 0) {
    clock->advance(200ms);
    const auto stream = gateway->next_stream(100ms);
    if (!stream) continue;
    const bool whole = stream->body_size > 256 * 1024;
    padded = padded || whole;
    for (const auto& create : stream->creates) {
      stream->send(created_line(create.id, 10));
      confirmed_ids.insert(create.id);
      stream->drained();
      if (!whole) break;
    }
  }
  CHECK(padded);
  CHECK(confirmed_ids.size() == watches.size());
}
