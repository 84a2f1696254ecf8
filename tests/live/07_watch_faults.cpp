// Watches when the network and etcd fail: nothing lost, nothing twice, or Compacted.
#include <doctest/doctest.h>

#include <random>
#include <thread>

#include "support/live.hpp"
#include "support/tcp_proxy.hpp"
#include "support/transports.hpp"
#include "support/watch_support.hpp"

using namespace coordination;
using namespace support;

namespace {

/// The only writer of a store. It knows of every write whether and at what revision it happened.
class Writer {
 public:
  explicit Writer(const EtcdServer& etcd) : coordinator_(connect(etcd)) {}

  void put(const std::string& key, const std::string& value) {
    for (;;) {
      const auto done = coordinator_.client().put(key, value, Context::with_timeout(2s));
      if (done) return add({true, key, value, done->revision});
      const auto now = read(key);
      if (now.kvs.empty() || now.kvs[0].value != value) continue;
      return add({true, key, value, now.kvs[0].mod_revision});
    }
  }
  /// Of a key that is there.
  void remove(const std::string& key) {
    for (;;) {
      const auto done = coordinator_.client().remove(key, Context::with_timeout(2s));
      if (done && done->deleted == 1) return add({false, key, "", done->revision});
      const auto now = read(key);
      // Nobody else writes: the last revision of the store is the one that removed it.
      if (now.kvs.empty()) return add({false, key, "", now.revision});
    }
  }
  std::vector<Change> truth() const { return truth_.all(); }
  std::size_t count() const { return truth_.size(); }
  Client& client() { return coordinator_.client(); }

 private:
  void add(Change change) { truth_.add(std::move(change)); }
  RangeResponse read(const std::string& key) {
    RangeRequest request;
    request.key = key;
    for (;;) {
      auto now = coordinator_.client().range(request, Context::with_timeout(2s));
      if (now) return std::move(*now);
    }
  }

  Coordinator coordinator_;
  Changes truth_;
};

/// Reads a raw watch until it has seen `last`. Where it is told Compacted, it goes on from there.
class RawReader {
 public:
  RawReader(Client& client, std::string prefix, std::int64_t start)
      : client_(client), prefix_(std::move(prefix)), thread_([this, start] { run(start); }) {}
  ~RawReader() {
    ctx_.cancel();
    thread_.join();
  }
  struct Gap {
    std::int64_t begin, end;  // events of these revisions are said to be missing: [begin, end)
  };

  Changes seen;
  Journal<Gap> gaps;
  Journal<std::string> errors;

 private:
  void run(std::int64_t next) {
    while (!ctx_.cancelled()) {
      WatchRequest request;
      request.key = prefix_;
      request.range_end = prefix_range_end(prefix_);
      request.start_revision = next;
      auto watch = client_.watch(request);
      if (!watch) return errors.add(why(watch));
      for (;;) {
        auto event = watch->next(ctx_);
        if (event) {
          next = event->revision + 1;
          seen.add(change_of(*event));
          continue;
        }
        if (ctx_.cancelled()) return;
        if (event.error().code != ErrorCode::Compacted) return errors.add(why(event));
        gaps.add({next, event.error().revision});
        next = event.error().revision;
        break;
      }
    }
  }

  Client& client_;
  const std::string prefix_;
  Context ctx_;
  std::thread thread_;
};

std::map<std::string, std::string> contents(const ConfigView& view) {
  std::map<std::string, std::string> map;
  for (const auto& key : view.keys()) {
    const auto value = view.get(key);
    if (value) map[key] = value->dump();
  }
  return map;
}

bool ascending(const std::vector<Change>& changes) {
  return std::is_sorted(changes.begin(), changes.end(),
                        [](const Change& a, const Change& b) { return a.revision < b.revision; });
}

/// 5,000 writes on 60 keys; one in five removes a key.
void write_much(Writer& writer, const std::string& dir, int least, const std::atomic<bool>& more) {
  std::mt19937 random(7);
  std::set<int> present;
  auto next = std::chrono::steady_clock::now();
  for (int i = 0; i < least || more; ++i) {
    const int k = static_cast<int>(random() % 60);
    const std::string key = dir + "k" + std::to_string(k);
    if (random() % 5 == 0 && present.count(k) > 0) {
      writer.remove(key);
      present.erase(k);
    } else {
      writer.put(key, std::to_string(i));
      present.insert(k);
    }
    next = std::max(next + 1200us, std::chrono::steady_clock::now() - 10ms);
    std::this_thread::sleep_until(next);
  }
}

/// Cuts, kills and compacts while the writer writes; returns the revisions of the compactions.
std::set<std::int64_t> make_trouble(EtcdServer& etcd, TcpProxy& proxy, Writer& writer, int cuts) {
  std::set<std::int64_t> compactions;
  std::mt19937 random(11);
  for (int i = 0; i < cuts; ++i) {
    std::this_thread::sleep_for(milliseconds(20 + random() % 120));
    CHECK(wait_until([&] { return proxy.open_connections() > 0; }, lenient(5s)));
    if (random() % 2 == 0) {
      proxy.cut();
    } else {
      proxy.cut_after(1 + random() % 3000);
    }
    if (i == cuts / 3 || i == 2 * cuts / 3) {
      etcd.kill9();
      etcd.restart();
    }
    if (i % (cuts / 4) != cuts / 8) continue;
    // Nobody can read what is discarded now.
    proxy.refuse();
    const auto before = writer.count();
    wait_until([&] { return writer.count() > before + 40; }, lenient(10s));
    const auto now = writer.truth().back().revision;
    writer.client().compact(now).value();
    compactions.insert(now);
    proxy.refuse(false);
  }
  return compactions;
}

/// Ends every stream as soon as something has come.
class CuttingTransport : public CountingTransport {
 public:
  Result<HttpResponse> perform(const HttpRequest& request, const ChunkSink& sink,
                               const Context& ctx) override {
    if (!sink) return CountingTransport::perform(request, sink, ctx);
    const ChunkSink once = [&](std::string_view piece) { return sink(piece), false; };
    static_cast<void>(CountingTransport::perform(request, once, ctx));
    return Error{ErrorCode::Connection, "it was cut", "", Outcome::MaybeApplied, 0};
  }
};

}  // namespace

TEST_CASE("watch: where streams are confirmed and cut there is no storm of requests [slow]") {
  auto options = options_for(shared_etcd());
  const auto cutting = std::make_shared<CuttingTransport>();
  options.transport = cutting;
  auto coordinator = connect(options);
  auto lease = coordinator.client().grant(60s).value();
  auto watch = coordinator.client().watch("k").value();
  cutting->reset();
  std::this_thread::sleep_for(8s);
  MESSAGE(cutting->requests(), " requests in 8 s, ", cutting->requests("/v3/watch"), " streams");
  CHECK(cutting->requests("/v3/watch") >= 3);
  CHECK(cutting->requests() <= 40);
  CHECK(lease.held());
}

TEST_CASE("watch: 50 cuts, two kills and compactions under 5000 writes [slow]") {
  EtcdServer etcd;
  TcpProxy proxy(etcd.port());
  auto options = options_for(etcd);
  options.endpoints = {proxy.endpoint()};
  const std::string dir = options.key_prefix + "/config/app/";
  Writer writer(etcd);
  writer.put(dir + "first", "0");
  writer.put(dir + "second", "0");
  writer.remove(dir + "first");
  const auto before = writer.truth();
  auto coordinator = connect(options);

  std::atomic<int> told{0};  // outlives its handler
  auto view = coordinator.config().view("app").value();
  view.on_change([&] { ++told; });
  Changes history;  // with what was there
  WatchOptions existing;
  existing.include_existing = true;
  auto follow = coordinator.config()
                    .watch_prefix(
                        "app", [&](const ConfigEvent& e) { history.add(change_of(e)); }, existing)
                    .value();
  RawReader raw(coordinator.client(), dir, before.back().revision + 1);

  std::atomic<bool> trouble{true};
  std::thread writing([&] { write_much(writer, dir, scaled(5000), trouble); });
  const int cuts = sanitized() ? 16 : 50;
  const auto compactions = make_trouble(etcd, proxy, writer, cuts);
  trouble = false;
  writing.join();
  writer.put(dir + "last", "1");
  const auto truth = writer.truth();
  const auto last = truth.back();
  MESSAGE(truth.size(), " writes, ", proxy.accepted(), " connections");
  CHECK(proxy.accepted() >= cuts * 3 / 4);  // a cut may meet one that is about to end

  // The raw watch: everything once and in order, but for what it has said to be missing.
  wait_until([&] { return raw.seen.size() > 0 && raw.seen.all().back() == last; }, lenient(15s));
  CHECK(raw.errors.all() == std::vector<std::string>{});
  const auto gaps = raw.gaps.all();
  std::vector<Change> expected;
  std::size_t missing = 0;
  for (const auto& change : truth) {
    if (change.revision <= before.back().revision) continue;
    const bool gone = std::any_of(gaps.begin(), gaps.end(), [&](const RawReader::Gap& gap) {
      return change.revision >= gap.begin && change.revision < gap.end;
    });
    if (gone) ++missing;
    if (!gone) expected.push_back(change);
  }
  MESSAGE("raw: ", raw.seen.size(), " events, ", missing, " in ", gaps.size(), " gaps");
  CHECK(first_difference(raw.seen.all(), expected) == "none");
  CHECK(gaps.size() >= 1);  // the compactions were meant to be noticed
  CHECK(gaps.size() <= compactions.size());
  for (const auto& gap : gaps) {
    CHECK(gap.begin < gap.end);
    CHECK(compactions.count(gap.end - 1) == 1);  // nothing is missing that etcd still had
  }

  // The view: the same as a fresh read.
  REQUIRE(wait_until([&] { return view.revision() >= last.revision; }, lenient(15s)));
  std::map<std::string, std::string> fresh;
  for (const auto& [key, value] : applied(truth)) fresh["app" + key.substr(dir.size() - 1)] = value;
  CHECK(contents(view) == fresh);
  for (const auto& key : coordinator.config().list("app").value()) {
    CHECK(coordinator.config().get(key).value().dump() == fresh[key]);
  }
  CHECK(told > 0);

  // Its events, applied, give the same; each is one that happened, none came twice.
  wait_until([&] { return history.size() > 0 && history.all().back().revision == last.revision; },
             lenient(15s));
  const auto heard = history.all();
  CHECK(applied(heard) == fresh);
  CHECK(ascending(heard));
  std::set<std::pair<std::int64_t, std::string>> puts, real;
  for (const auto& change : truth) {
    if (change.put) real.emplace(change.revision, change.value);
  }
  std::set<std::string> present;
  for (const auto& change : heard) {
    if (!change.put) CHECK(present.erase(change.key) == 1);  // none goes that was not there
    if (!change.put) continue;
    present.insert(change.key);
    CHECK(puts.emplace(change.revision, change.value).second);
    CHECK(real.count({change.revision, change.value}) == 1);
  }
  MESSAGE("watch_prefix: ", heard.size(), " events");
}

namespace {

/// A user who may read and write under his prefix, and root.
struct Guarded {
  EtcdServer etcd;
  std::string prefix{unique_prefix()};
  std::shared_ptr<CountingTransport> transport{std::make_shared<CountingTransport>()};
  TcpProxy proxy{etcd.port()};
  LogKeeper log;
  CoordinatorOptions options;

  Guarded() {
    REQUIRE(enable_auth(etcd, "bob", "old-password", prefix));
    options.endpoints = {proxy.endpoint()};
    options.username = "bob";
    options.password = "old-password";
    options.key_prefix = prefix;
    options.transport = transport;
    options.logger = log.logger();
  }
  Coordinator root() {
    CoordinatorOptions as_root;
    as_root.endpoints = {etcd.url()};
    as_root.username = "root";
    as_root.password = "root-password";
    return connect(as_root);
  }
  /// Kills all his tokens.
  void set_password(const std::string& password) {
    const auto transport_of_root = make_default_transport();
    HttpRequest request;
    request.endpoint = etcd.url();
    request.path = "/v3/auth/authenticate";
    request.body = R"({"name":"root","password":"root-password"})";
    auto answer =
        transport_of_root->perform(request, nullptr, Context::with_timeout(lenient(20s))).value();
    const auto token = nlohmann::json::parse(answer.body).at("token").get<std::string>();
    request.path = "/v3/auth/user/changepw";
    request.headers.emplace_back("Authorization", token);
    request.body = R"({"name":"bob","password":")" + password + "\"}";
    answer =
        transport_of_root->perform(request, nullptr, Context::with_timeout(lenient(20s))).value();
    REQUIRE(answer.status == 200);
  }
};

std::string value_of(Watch<WatchEvent>& watch) {
  const auto event = watch.next(Context::with_timeout(lenient(5s)));
  return event ? event->kv.value : why(event);
}

}  // namespace

TEST_CASE("watch: tokens die, the watch goes on; a wrong password is no loop") {
  Guarded g;
  auto root = g.root();
  const std::string key = g.prefix + "/config/k";
  auto coordinator = connect(g.options);
  auto watch = coordinator.client().watch(key).value();
  auto view = coordinator.config().view("").value();
  root.client().put(key, "1").value();
  CHECK(value_of(watch) == "1");
  const int logins = g.transport->requests("/v3/auth/authenticate");

  // The stream that is open does not notice; the next is refused.
  g.set_password("old-password");
  root.client().put(key, "2").value();
  CHECK(value_of(watch) == "2");
  g.proxy.cut();
  root.client().put(key, "3").value();
  CHECK(value_of(watch) == "3");
  CHECK(g.transport->requests("/v3/auth/authenticate") == logins + 1);

  // Simple tokens do not survive a restart.
  g.etcd.restart();
  root.client().put(key, "4").value();
  CHECK(value_of(watch) == "4");
  CHECK(wait_until([&] { return view.get("k").value().dump() == "4"; }, lenient(5s)));

  SUBCASE("his password was changed: the watch ends, and etcd is left in peace") {
    g.set_password("new-password");
    const int before = g.transport->requests("/v3/auth/authenticate");
    g.proxy.cut();
    const auto end = watch.next(Context::with_timeout(lenient(5s)));
    REQUIRE_FALSE(end);
    CHECK_MESSAGE(end.error().code == ErrorCode::PermissionDenied, why(end));
    CHECK_FALSE(view.connected());
    std::this_thread::sleep_for(2s);
    CHECK(g.transport->requests("/v3/auth/authenticate") - before <= 4);
    for (const auto& line : g.log.lines()) CHECK(line.find("password=") == std::string::npos);
  }
  SUBCASE("his right was taken away: the next stream refuses it") {
    root.close().value();
    const Etcdctl ctl(g.etcd, {"--user=root:root-password"});
    const auto revoked =
        ctl.run({"role", "revoke-permission", "--prefix=true", "bob-role", g.prefix});
    REQUIRE_MESSAGE(revoked.ok(), revoked.out);
    g.proxy.cut();
    const auto end = watch.next(Context::with_timeout(lenient(5s)));
    REQUIRE_FALSE(end);
    CHECK_MESSAGE(end.error().code == ErrorCode::PermissionDenied, why(end));
    CHECK(wait_until([&] { return !view.connected(); }, 5s));
  }
}

TEST_CASE("watch: permission denied") {
  Guarded g;
  auto coordinator = connect(g.options);
  const auto now = coordinator.client().watch("/elsewhere");
  REQUIRE_FALSE(now);
  CHECK(now.error().code == ErrorCode::PermissionDenied);

  WatchRequest request;
  request.key = "/elsewhere";
  request.start_revision = 1;
  auto later = coordinator.client().watch(request).value();
  const auto end = later.next(Context::with_timeout(lenient(5s)));
  REQUIRE_FALSE(end);
  CHECK(end.error().code == ErrorCode::PermissionDenied);
  // The stream and its other watches live on.
  auto allowed = coordinator.client().watch(g.prefix + "/k").value();
  coordinator.client().put(g.prefix + "/k", "v").value();
  CHECK(value_of(allowed) == "v");
}

TEST_CASE("watch: a delete at the very revision of a compaction is not lost silently") {
  // etcd before 3.5.18 discards it, and still lets a watch start there.
  EtcdServer etcd;
  TcpProxy proxy(etcd.port());
  auto options = options_for(etcd);
  options.endpoints = {proxy.endpoint()};
  auto direct = connect(etcd);
  const auto key = options.key_prefix + "/config/app/k";
  direct.client().put(key, "1").value();
  auto coordinator = connect(options);
  auto view = coordinator.config().view("app").value();
  auto follow = coordinator.config().watch_prefix("app").value();
  auto raw = coordinator.client().watch(key).value();
  direct.client().put(key, "2").value();
  CHECK(value_of(raw) == "2");
  REQUIRE(follow.next(Context::with_timeout(lenient(5s))));

  proxy.refuse();
  const auto removed = direct.client().remove(key).value().revision;
  direct.client().compact(removed).value();
  proxy.refuse(false);
  const auto event = raw.next(Context::with_timeout(lenient(5s)));
  if (event) {
    CHECK(change_of(*event) == Change{false, key, "", removed});
  } else {
    CHECK_MESSAGE(event.error().code == ErrorCode::Compacted, why(event));
  }
  const auto gone = follow.next(Context::with_timeout(lenient(5s)));
  REQUIRE_MESSAGE(gone, why(gone));
  CHECK(gone->type == EventType::Delete);
  CHECK(gone->key == "app/k");
  CHECK(wait_until([&] { return view.keys().empty(); }, lenient(5s)));
}

TEST_CASE("watch: an explicit start in the past, in the future, and before a compaction") {
  auto coordinator = connect(shared_etcd());
  auto& client = coordinator.client();
  const auto key = unique_prefix() + "/k";
  std::vector<std::int64_t> revisions;
  for (int i = 0; i < 5; ++i)
    revisions.push_back(client.put(key, std::to_string(i)).value().revision);
  WatchRequest request;
  request.key = key;
  request.start_revision = revisions[1];
  auto past = client.watch(request).value();
  for (int i = 1; i < 5; ++i) CHECK(value_of(past) == std::to_string(i));

  request.start_revision = revisions[4] + 3;
  auto future = client.watch(request).value();
  for (int i = 5; i < 10; ++i) client.put(key, std::to_string(i)).value();
  const auto first = future.next(Context::with_timeout(lenient(5s)));
  REQUIRE(first);
  CHECK(first->revision == revisions[4] + 3);

  client.compact(revisions[3]).value();
  request.start_revision = revisions[1];
  auto compacted = client.watch(request).value();
  const auto end = compacted.next(Context::with_timeout(lenient(5s)));
  REQUIRE_FALSE(end);
  CHECK(end.error().code == ErrorCode::Compacted);
  CHECK(end.error().revision == revisions[3] + 1);  // complete from here on
  request.start_revision = end.error().revision;
  auto again = client.watch(request).value();
  CHECK(value_of(again) == "4");
}

TEST_CASE("watch: filters and previous values") {
  auto coordinator = connect(shared_etcd());
  auto& client = coordinator.client();
  const auto key = unique_prefix() + "/k";
  WatchRequest request;
  request.key = key;
  request.prev_kv = true;
  auto all = client.watch(request).value();
  request.no_put = true;
  auto deletes = client.watch(request).value();
  request.no_put = false;
  request.no_delete = true;
  auto puts = client.watch(request).value();
  client.put(key, "1").value();
  client.put(key, "2").value();
  client.remove(key).value();
  client.put(key, "3").value();

  const auto list = [](Watch<WatchEvent>& watch, int count) {
    std::string text;
    for (int i = 0; i < count; ++i) {
      const auto event = watch.next(Context::with_timeout(lenient(5s)));
      if (!event) return text + why(event);
      text += to_string(event->type) + event->kv.value;
      text += "<" + (event->prev_kv ? event->prev_kv->value : "") + " ";
    }
    return text;
  };
  CHECK(list(all, 4) == "PUT1< PUT2<1 DELETE<2 PUT3< ");
  CHECK(list(deletes, 1) == "DELETE<2 ");
  CHECK(list(puts, 3) == "PUT1< PUT2<1 PUT3< ");
}

TEST_CASE("watch: compaction while connected takes nothing from an idle watch") {
  auto coordinator = connect(shared_etcd());
  auto& client = coordinator.client();
  const auto dir = unique_prefix() + "/";
  auto idle = client.watch(dir + "idle").value();
  auto follow = client.watch(dir + "busy").value();
  std::int64_t revision = 0;
  for (int i = 0; i < 20; ++i) {
    revision = client.put(dir + "busy", std::to_string(i)).value().revision;
    CHECK(value_of(follow) == std::to_string(i));
  }
  client.compact(revision).value();
  // Each makes a new stream with all of them.
  std::vector<Watch<WatchEvent>> more;
  for (int i = 0; i < 8; ++i) {
    more.push_back(client.watch(dir + std::to_string(i)).value());
    std::this_thread::sleep_for(60ms);
  }
  std::this_thread::sleep_for(300ms);
  client.put(dir + "idle", "at last").value();
  CHECK(value_of(idle) == "at last");
  client.put(dir + "busy", "still").value();
  CHECK(value_of(follow) == "still");
  for (int i = 0; i < 8; ++i) {
    client.put(dir + std::to_string(i), "v").value();
    CHECK(value_of(more[static_cast<std::size_t>(i)]) == "v");
  }
}
