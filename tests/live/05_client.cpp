// Client: etcd's own vocabulary on a real etcd; credentials; answers that are not etcd's; retries.
#include <doctest/doctest.h>

#include <thread>

#include "support/live.hpp"
#include "support/local_server.hpp"
#include "support/tcp_proxy.hpp"
#include "support/transports.hpp"

using namespace coordination;
using namespace support;

namespace {

// A Client of the shared etcd, and a folder of keys for each test case.
struct Fixture {
  Coordinator coordinator{connect(shared_etcd())};
  Client& client{coordinator.client()};
  std::string dir{unique_prefix() + "/"};

  void put_all(const std::vector<std::string>& names) {
    for (const auto& name : names) client.put(dir + name, "value of " + name).value();
  }
  RangeRequest all() const {
    RangeRequest request;
    request.key = dir;
    request.range_end = prefix_range_end(dir);
    return request;
  }
};

std::vector<std::string> keys_of(const RangeResponse& response) {
  std::vector<std::string> keys;
  for (const auto& kv : response.kvs) keys.push_back(kv.key);
  return keys;
}

std::string all_bytes() {
  std::string bytes;
  for (int i = 0; i < 256; ++i) bytes += static_cast<char>(i);
  return bytes;
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "client: put, get, overwrite, remove, by contents and revisions") {
  const auto first = client.put(dir + "k", "one").value();
  const auto kv = client.get(dir + "k").value();
  CHECK(kv.key == dir + "k");
  CHECK(kv.value == "one");
  CHECK(kv.create_revision == first.revision);
  CHECK(kv.mod_revision == first.revision);
  CHECK(kv.version == 1);
  CHECK(kv.lease == 0);
  CHECK_FALSE(first.prev_kv.has_value());

  PutRequest again{dir + "k", "two"};
  again.prev_kv = true;
  const auto second = client.put(again).value();
  CHECK(second.revision == first.revision + 1);
  REQUIRE(second.prev_kv.has_value());
  CHECK(second.prev_kv->value == "one");
  const auto changed = client.get(dir + "k").value();
  CHECK(changed.value == "two");
  CHECK(changed.version == 2);
  CHECK(changed.create_revision == first.revision);
  CHECK(changed.mod_revision == second.revision);

  RemoveRequest remove{dir + "k"};
  remove.prev_kv = true;
  const auto removed = client.remove(remove).value();
  CHECK(removed.deleted == 1);
  REQUIRE(removed.prev_kvs.size() == 1);
  CHECK(removed.prev_kvs[0].value == "two");
  CHECK(client.remove(dir + "k").value().deleted == 0);

  const auto gone = client.get(dir + "k");
  REQUIRE_FALSE(gone);
  CHECK(gone.error().code == ErrorCode::NotFound);
}

TEST_CASE_FIXTURE(Fixture, "client: keys and values are bytes") {
  const std::string bytes = all_bytes();
  client.put(dir + bytes, bytes).value();
  const auto kv = client.get(dir + bytes).value();
  CHECK(kv.key == dir + bytes);
  CHECK(kv.value == bytes);
  client.put(dir + "empty", "").value();
  CHECK(client.get(dir + "empty").value().value.empty());
  const std::string large(1'400'000, 'x');
  client.put(dir + "large", large).value();
  CHECK(client.get(dir + "large").value().value == large);
}

TEST_CASE_FIXTURE(Fixture, "client: range in all its options") {
  put_all({"a", "c", "b", "d"});
  auto request = all();
  CHECK(keys_of(client.range(request).value()) ==
        std::vector<std::string>{dir + "a", dir + "b", dir + "c", dir + "d"});

  request.limit = 2;
  const auto page = client.range(request).value();
  CHECK(keys_of(page) == std::vector<std::string>{dir + "a", dir + "b"});
  CHECK(page.more);
  CHECK(page.count == 4);
  CHECK(page.revision >= page.kvs[1].mod_revision);

  request = all();
  request.sort_order = SortOrder::Descend;
  request.sort_target = SortTarget::Create;
  CHECK(keys_of(client.range(request).value()) ==
        std::vector<std::string>{dir + "d", dir + "b", dir + "c", dir + "a"});

  request = all();
  request.keys_only = true;
  const auto bare = client.range(request).value();
  REQUIRE(bare.kvs.size() == 4);
  CHECK(bare.kvs[0].value.empty());

  request = all();
  request.count_only = true;
  const auto counted = client.range(request).value();
  CHECK(counted.kvs.empty());
  CHECK(counted.count == 4);

  request = all();
  request.serializable = true;
  CHECK(client.range(request).value().kvs.size() == 4);

  const auto revision_of_c = client.get(dir + "c").value().mod_revision;
  request = all();
  request.min_mod_revision = revision_of_c + 1;
  CHECK(keys_of(client.range(request).value()) == std::vector<std::string>{dir + "b", dir + "d"});
  request = all();
  request.max_create_revision = revision_of_c;
  CHECK(keys_of(client.range(request).value()) == std::vector<std::string>{dir + "a", dir + "c"});
  request = all();
  request.revision = revision_of_c;
  CHECK(client.range(request).value().count == 2);

  RemoveRequest remove{dir, prefix_range_end(dir)};
  CHECK(client.remove(remove).value().deleted == 4);
  CHECK(client.range(all()).value().kvs.empty());
  CHECK(client.range(all()).value().count == 0);
}

TEST_CASE_FIXTURE(Fixture, "client: put keeps the value or the lease if told so") {
  auto lease = client.grant(30s).value();
  PutRequest put{dir + "k", "v", lease.id()};
  client.put(put).value();
  CHECK(client.get(dir + "k").value().lease == lease.id());
  PutRequest keep_lease{dir + "k", "w"};
  keep_lease.ignore_lease = true;
  client.put(keep_lease).value();
  CHECK(client.get(dir + "k").value().lease == lease.id());
  CHECK(client.get(dir + "k").value().value == "w");
  PutRequest keep_value{dir + "k", ""};
  keep_value.ignore_value = true;
  client.put(keep_value).value();
  CHECK(client.get(dir + "k").value().lease == 0);
  CHECK(client.get(dir + "k").value().value == "w");
}

TEST_CASE_FIXTURE(Fixture, "client: transactions") {
  put_all({"a"});
  const auto a = client.get(dir + "a").value();
  using Is = Compare::Is;

  SUBCASE("both branches, and every kind of operation") {
    const auto txn = Txn{}
                         .when(Compare::exists(dir + "a"))
                         .then(Op::put(dir + "b", "new"))
                         .then(Op::get(dir + "b"))
                         .then(Op::remove(dir + "a"))
                         .otherwise(Op::get(dir + "a"));
    const auto done = client.commit(txn).value();
    CHECK(done.succeeded);
    CHECK(done.revision == a.mod_revision + 1);
    REQUIRE(done.responses.size() == 3);
    CHECK(std::get<PutResponse>(done.responses[0]).revision == done.revision);
    REQUIRE(done.range(1).kvs.size() == 1);
    CHECK(done.range(1).kvs[0].value == "new");
    CHECK(std::get<RemoveResponse>(done.responses[2]).deleted == 1);
    CHECK(done.range(0).kvs.empty());

    const auto otherwise = client.commit(txn).value();
    CHECK_FALSE(otherwise.succeeded);
    REQUIRE(otherwise.responses.size() == 1);
    CHECK(otherwise.range(0).kvs.empty());
  }
  SUBCASE("every kind of compare") {
    const auto holds = [&](Compare compare) {
      return client.commit(Txn{}.when(std::move(compare))).value().succeeded;
    };
    CHECK(holds(Compare::create_revision(dir + "a", Is::Equal, a.create_revision)));
    CHECK_FALSE(holds(Compare::create_revision(dir + "a", Is::Greater, a.create_revision)));
    CHECK(holds(Compare::mod_revision(dir + "a", Is::Less, a.mod_revision + 1)));
    CHECK_FALSE(holds(Compare::mod_revision(dir + "a", Is::NotEqual, a.mod_revision)));
    CHECK(holds(Compare::version(dir + "a", Is::Equal, 1)));
    CHECK(holds(Compare::lease(dir + "a", Is::Equal, 0)));
    CHECK(holds(Compare::value(dir + "a", Is::Equal, "value of a")));
    CHECK_FALSE(holds(Compare::value(dir + "a", Is::Equal, "other")));
    CHECK(holds(Compare::missing(dir + "none")));
    CHECK_FALSE(holds(Compare::missing(dir + "a")));
    CHECK(holds(Compare::exists(dir + "a")));
    auto of_range = Compare::version(dir, Is::Less, 2);
    of_range.range_end = prefix_range_end(dir);
    CHECK(holds(of_range));
  }
  SUBCASE("one in another") {
    auto inner = Txn{}.when(Compare::missing(dir + "x")).then(Op::put(dir + "x", "inner"));
    const auto done = client.commit(Txn{}.then(Op::txn(inner)).then(Op::get(dir + "x"))).value();
    REQUIRE(done.responses.size() == 2);
    const auto nested = std::get<std::shared_ptr<const TxnResponse>>(done.responses[0]);
    REQUIRE(nested);
    CHECK(nested->succeeded);
    CHECK(nested->responses.size() == 1);
    REQUIRE(done.range(1).kvs.size() == 1);
    CHECK(done.range(1).kvs[0].value == "inner");
  }
  SUBCASE("one that etcd refuses") {
    const auto twice =
        client.commit(Txn{}.then(Op::put(dir + "k", "1")).then(Op::put(dir + "k", "2")));
    REQUIRE_FALSE(twice);
    CHECK(twice.error().code == ErrorCode::Validation);
    CHECK(twice.error().outcome == Outcome::NotApplied);
    CHECK(to_string(twice.error()).find("duplicate key") != std::string::npos);
  }
}

TEST_CASE_FIXTURE(Fixture, "client: compaction") {
  const auto first = client.put(dir + "k", "one").value().revision;
  const auto second = client.put(dir + "k", "two").value().revision;
  RangeRequest old{dir + "k"};
  old.revision = first;
  CHECK(client.range(old).value().kvs.at(0).value == "one");
  CHECK(client.compact(second));
  CHECK_MESSAGE(client.compact(second), "done already is a success");
  const auto gone = client.range(old);
  REQUIRE_FALSE(gone);
  CHECK(gone.error().code == ErrorCode::Compacted);
  const auto future = client.compact(second + 1'000'000);
  REQUIRE_FALSE(future);
  CHECK(future.error().code == ErrorCode::Validation);
}

TEST_CASE_FIXTURE(Fixture, "client: status") {
  const auto revision = client.put(dir + "k", "v").value().revision;
  const auto status = client.status().value();
  CHECK(status.version.find("3.") == 0);
  CHECK(status.endpoint.find(shared_etcd().endpoint()) != std::string::npos);
  CHECK(status.db_size > 0);
  CHECK(status.leader != 0);
  CHECK(status.leader == status.member_id);
  CHECK(status.raft_term > 0);
  CHECK(status.revision >= revision);
  CHECK(status.errors.empty());
}

TEST_CASE_FIXTURE(Fixture, "client: what etcd refuses, it refuses whole") {
  for (const std::size_t size : {1'600'000U, 3'000'000U}) {
    const auto put = client.put(dir + "large", std::string(size, 'x'));
    REQUIRE_FALSE(put);
    CHECK(put.error().code == ErrorCode::Validation);
    CHECK(put.error().outcome == Outcome::NotApplied);
    CHECK(to_string(put.error()).find("large") != std::string::npos);
    CHECK(to_string(put.error()).find(shared_etcd().endpoint()) != std::string::npos);
  }
  CHECK_FALSE(client.get(dir + "large"));
  PutRequest leaseless{dir + "k", "v", 4711};
  const auto put = client.put(leaseless);
  REQUIRE_FALSE(put);
  CHECK(put.error().code == ErrorCode::NotFound);
  CHECK(put.error().outcome == Outcome::NotApplied);
  const auto keyless = client.put("", "v");
  REQUIRE_FALSE(keyless);
  CHECK(keyless.error().code == ErrorCode::Validation);
}

// == credentials ================================================================================

namespace {

struct AuthFixture {
  EtcdServer server;
  std::string prefix{"/allowed"};
  std::shared_ptr<CountingTransport> counting{std::make_shared<CountingTransport>()};

  AuthFixture() {
    if (!enable_auth(server, "bob", "pässwörd \"7\"", prefix)) {
      throw std::runtime_error("authentication could not be switched on");
    }
  }
  CoordinatorOptions bob() const {
    auto options = options_for(server);
    options.key_prefix = prefix;
    options.username = "bob";
    options.password = "pässwörd \"7\"";
    options.transport = counting;
    return options;
  }
  int logins() const { return counting->requests("/v3/auth/authenticate"); }

  /// "Changes" bob's password to what it is: that ends his tokens. (A restart does not: etcd
  /// replays the logins from its log.)
  void kill_tokens() const {
    const auto ask = [&](const std::string& path, const nlohmann::json& body,
                         const std::string& token) {
      HttpRequest request;
      request.endpoint = server.url();
      request.path = path;
      request.body = body.dump();
      if (!token.empty()) request.headers.emplace_back("Authorization", token);
      std::string said;
      const auto done = [&] {  // etcd itself gives up where the machine is busy
        const auto answer = make_default_transport()->perform(request, nullptr, {}).value();
        said = answer.body;
        return answer.status == 200;
      };
      if (!wait_until(done, lenient(10s))) throw std::runtime_error(said);
      return nlohmann::json::parse(said);
    };
    const auto root =
        ask("/v3/auth/authenticate", {{"name", "root"}, {"password", "root-password"}}, "");
    ask("/v3/auth/user/changepw", {{"name", "bob"}, {"password", "pässwörd \"7\""}},
        root.at("token").get<std::string>());
  }
};

}  // namespace

TEST_CASE_FIXTURE(AuthFixture, "auth: a user within his rights, and outside them") {
  auto coordinator = connect(bob());
  auto& client = coordinator.client();
  client.put("/allowed/k", "v").value();
  CHECK(client.get("/allowed/k").value().value == "v");
  coordinator.config().set("a/b", 7).value();
  coordinator.lock().acquire("x", 5s).value().unlock().value();
  auto watch = client.watch("/allowed/k").value();
  client.put("/allowed/k", "w").value();
  CHECK(watch.next(Context::with_timeout(lenient(20s))).value().kv.value == "w");

  const auto before = logins();
  const auto outside = client.put("/forbidden/k", "v");
  REQUIRE_FALSE(outside);
  CHECK(outside.error().code == ErrorCode::PermissionDenied);
  CHECK(outside.error().outcome == Outcome::NotApplied);
  const auto read = client.get("/forbidden/k");
  REQUIRE_FALSE(read);
  CHECK(read.error().code == ErrorCode::PermissionDenied);
  CHECK_MESSAGE(logins() == before, "no new login helps where a right is missing");

  auto blind = client.watch("/forbidden/k");
  const auto event =
      blind ? blind->next(Context::with_timeout(lenient(20s))) : Result<WatchEvent>(blind.error());
  REQUIRE_FALSE(event);
  CHECK(event.error().code == ErrorCode::PermissionDenied);
}

TEST_CASE_FIXTURE(AuthFixture, "auth: wrong credentials are no loop, and never logged") {
  LogKeeper log;
  auto options = bob();
  options.password = "wrong-secret";
  options.logger = log.logger();
  const Stopwatch watch;
  const auto refused = Coordinator::connect(options);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == ErrorCode::PermissionDenied);
  CHECK(logins() == 1);
  CHECK(watch.over(lenient(2s)) == 0);
  CHECK_FALSE(log.contains("wrong-secret"));
  CHECK(to_string(refused.error()).find("wrong-secret") == std::string::npos);

  options.username = "nobody";
  const auto unknown = Coordinator::connect(options);
  REQUIRE_FALSE(unknown);
  CHECK(unknown.error().code == ErrorCode::PermissionDenied);
}

TEST_CASE_FIXTURE(AuthFixture, "auth: no credentials") {
  auto options = options_for(server);
  options.key_prefix = prefix;
  // etcd 3.4 tells its status to anybody, so it may be the first call that is refused.
  auto connected = Coordinator::connect(options);
  const auto put = connected ? connected->client().put("/allowed/k", "v")
                             : Result<PutResponse>(connected.error());
  REQUIRE_FALSE(put);
  CHECK(put.error().code == ErrorCode::PermissionDenied);
  CHECK(put.error().outcome == Outcome::NotApplied);
}

TEST_CASE_FIXTURE(AuthFixture, "auth: a token that died is replaced, once") {
  auto coordinator = connect(bob());
  auto& client = coordinator.client();
  client.put("/allowed/k", "v").value();
  CHECK(logins() == 1);

  SUBCASE("a read") {
    kill_tokens();
    const auto kv = client.get("/allowed/k", Context::with_timeout(lenient(20s)));
    REQUIRE_MESSAGE(kv, why(kv));
    CHECK(kv->value == "v");
    CHECK(logins() == 2);
  }
  SUBCASE("a write") {
    kill_tokens();
    const auto put = client.put("/allowed/k", "w", Context::with_timeout(lenient(20s)));
    REQUIRE_MESSAGE(put, why(put));
    CHECK(client.get("/allowed/k").value().version == 2);
    CHECK(logins() == 2);
  }
  SUBCASE("many at once log in together") {
    kill_tokens();
    std::atomic<int> good{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 16; ++i) {
      threads.emplace_back([&] {
        if (client.get("/allowed/k", Context::with_timeout(lenient(20s)))) ++good;
      });
    }
    for (auto& thread : threads) thread.join();
    CHECK(good == 16);
    CHECK(logins() == 2);
  }
  SUBCASE("the user is no more") {
    const Etcdctl root(server, {"--user=root:root-password"});
    REQUIRE(root.run({"user", "delete", "bob"}).ok());
    const auto before = logins();
    const auto put = client.put("/allowed/k", "w");
    REQUIRE_FALSE(put);
    CHECK(put.error().code == ErrorCode::PermissionDenied);
    CHECK(put.error().outcome == Outcome::NotApplied);
    CHECK(logins() <= before + 2);
  }
}

TEST_CASE_FIXTURE(AuthFixture, "auth: all goes on after a restart and with a dead token [slow]") {
  auto coordinator = connect(bob());
  auto lock = coordinator.lock().acquire("x", 12s).value();
  ServiceInfo service{"1", "web", "10.0.0.1", 80};
  service.ttl = 12s;
  coordinator.registry().register_service(service).value();
  auto watch = coordinator.config().watch("k").value();
  server.restart();  // cuts the streams
  kill_tokens();
  coordinator.config().set("k", "after", Context::with_timeout(lenient(20s))).value();
  CHECK(watch.next(Context::with_timeout(lenient(20s))).value().value == "after");
  CHECK(never([&] { return !lock.held(); }, 13s));
  CHECK(coordinator.registry().discover("web").value().size() == 1);
  CHECK(lock.unlock());
}

// == answers that are not etcd's ================================================================

namespace {

void check_connect_names(const std::string& answer, const std::string& hint) {
  const LocalServer server(answer);
  CoordinatorOptions options;
  options.endpoints = {server.endpoint()};
  options.timeout = 3s;
  const Stopwatch watch;
  const auto connected = Coordinator::connect(options);
  REQUIRE_FALSE(connected);
  const std::string text = to_string(connected.error());
  CAPTURE(text);
  CHECK(text.find(server.endpoint()) != std::string::npos);
  CHECK(text.find(hint) != std::string::npos);
  CHECK(connected.error().code != ErrorCode::Timeout);
  CHECK(watch.over(lenient(3s)) == 0);
}

}  // namespace

TEST_CASE("not etcd: connect says which endpoint answered, and what") {
  SUBCASE("a page") {
    check_connect_names(
        LocalServer::http("200 OK", "text/html", "<!DOCTYPE html><html>Welcome</html>"), "html");
  }
  SUBCASE("404") {
    check_connect_names(LocalServer::http("404 Not Found", "text/plain", "404 page not found\n"),
                        "404");
  }
  SUBCASE("half of a JSON text") {
    check_connect_names(LocalServer::http("200 OK", "application/json", "{\"header\":{"), "JSON");
  }
  SUBCASE("JSON of another kind") {
    check_connect_names(LocalServer::http("200 OK", "application/json", "[1,2,3]"), "");
  }
  SUBCASE("nothing") { check_connect_names(LocalServer::http("200 OK", "text/plain", ""), ""); }
  SUBCASE("500 with a page") {
    check_connect_names(LocalServer::http("500 Oops", "text/html", "<html>proxy</html>"), "500");
  }
  SUBCASE("no HTTP at all") { check_connect_names("220 mail.example ESMTP\r\n", ""); }
  SUBCASE("JSON that is very deep") {
    check_connect_names(LocalServer::http("200 OK", "application/json", std::string(200'000, '[')),
                        "");
  }
}

TEST_CASE("not etcd: a call says so, too, when the member turns into something else") {
  const std::vector<std::string> answers{
      LocalServer::http("200 OK", "text/html", "<html>Welcome</html>"),
      LocalServer::http("404 Not Found", "text/plain", "404 page not found\n"),
      LocalServer::http("200 OK", "application/json", "{\"kvs\":\"no list\"}"),
      LocalServer::http("200 OK", "application/json", "{\"kvs\":[{\"key\":\"?not base64?\"}]}"),
      LocalServer::http("200 OK", "application/json", "{\"header\":{")};
  for (const auto& answer : answers) {
    CAPTURE(answer);
    TcpProxy proxy(shared_etcd().port());
    auto options = options_for(shared_etcd());
    options.endpoints = {proxy.endpoint()};
    options.timeout = 3s;
    auto coordinator = connect(options);
    const LocalServer impostor(answer);
    proxy.set_target(impostor.port());
    proxy.cut();
    const auto got = coordinator.client().get("k");
    REQUIRE_FALSE(got);
    CAPTURE(to_string(got.error()));
    CHECK(got.error().code != ErrorCode::NotFound);
    CHECK(got.error().code != ErrorCode::Timeout);
    CHECK(to_string(got.error()).find(proxy.endpoint()) != std::string::npos);
    const auto put = coordinator.client().put("k", "v");
    CHECK_FALSE(put);
  }
}

// == retries, members, time =====================================================================

namespace {

struct FaultFixture {
  std::shared_ptr<FaultTransport> faults{std::make_shared<FaultTransport>()};
  Coordinator coordinator{connect([this] {
    auto options = options_for(shared_etcd());
    options.transport = faults;
    options.retry_config.initial_delay = 10ms;
    return options;
  }())};
  Client& client{coordinator.client()};
  std::string key{unique_prefix()};
};

}  // namespace

TEST_CASE_FIXTURE(FaultFixture, "retry: reads on any failure, writes only if certainly not done") {
  client.put(key, "one").value();

  faults->refuse_next("/v3/kv/range", 2);
  CHECK(client.get(key).value().value == "one");
  faults->lose_answers("/v3/kv/range", 2);
  CHECK(client.get(key).value().value == "one");
  CHECK(faults->faults() == 4);

  faults->refuse_next("/v3/kv/put", 2);
  client.put(key, "two").value();
  CHECK(client.get(key).value().version == 2);

  faults->lose_answers("/v3/kv/put", 1);
  const auto unknown = client.put(key, "three");
  REQUIRE_FALSE(unknown);
  CHECK(unknown.error().outcome == Outcome::MaybeApplied);
  CHECK(client.get(key).value().value == "three");
  CHECK_MESSAGE(client.get(key).value().version == 3, "it was not sent twice");

  faults->lose_answers("/v3/kv/deleterange", 1);
  const auto removed = client.remove(key);
  REQUIRE_FALSE(removed);
  CHECK(removed.error().outcome == Outcome::MaybeApplied);

  faults->refuse_next("/v3/kv/put", 1000);
  const auto refused = client.put(key, "four", Context::with_timeout(1s));
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == ErrorCode::Connection);
  CHECK(refused.error().outcome == Outcome::NotApplied);
}

TEST_CASE_FIXTURE(FaultFixture, "retry: a lost answer to the lock's own requests is settled") {
  faults->lose_answers("/v3/lease/grant", 1);
  faults->lose_answers("/v3/kv/txn", 1);
  auto lock = coordinator.lock().acquire("x", 10s);
  REQUIRE_MESSAGE(lock, why(lock));
  CHECK(lock->held());
  CHECK(client.get(lock->key()).value().create_revision == lock->fencing_token());
  faults->lose_answers("/v3/kv/txn", 1);
  faults->lose_answers("/v3/kv/deleterange", 1);
  const auto unlocked = lock->unlock();
  // It is gone, but nobody can tell whether by this call.
  if (!unlocked) CHECK(unlocked.error().outcome == Outcome::MaybeApplied);
  CHECK_FALSE(client.get(lock->key()));
}

TEST_CASE("members: calls go on when one dies, also the one that was first") {
  TcpProxy first(shared_etcd().port()), second(shared_etcd().port());
  auto options = options_for(shared_etcd());
  options.endpoints = {first.endpoint(), second.endpoint()};
  auto coordinator = connect(options);
  auto& client = coordinator.client();
  const std::string key = unique_prefix();
  client.put(key, "0").value();
  TcpProxy* proxies[] = {&first, &second};
  for (int i = 1; i <= 4; ++i) {
    proxies[i % 2]->refuse();
    proxies[1 - i % 2]->refuse(false);
    wait_until([&] { return connection_count(proxies[i % 2]->port()) == 0; }, 1s);
    const Stopwatch watch;
    const auto put = client.put(key, std::to_string(i));
    REQUIRE_MESSAGE(put, why(put));
    CHECK(client.get(key).value().value == std::to_string(i));
    CHECK(watch.over(lenient(1s)) == 0);
  }
}

TEST_CASE("connections: one that etcd closed while it was idle costs no error") {
  TcpProxy proxy(shared_etcd().port());
  auto options = options_for(shared_etcd());
  options.endpoints = {proxy.endpoint()};
  auto coordinator = connect(options);
  const std::string key = unique_prefix();
  for (int i = 1; i <= 10; ++i) {
    const auto put = coordinator.client().put(key, std::to_string(i));
    REQUIRE_MESSAGE(put, why(put));
    proxy.cut();
    wait_until([&] { return connection_count(proxy.port()) == 0; }, 1s);
  }
  CHECK(coordinator.client().get(key).value().version == 10);
}

TEST_CASE("time: an answer that drips in does not stretch the deadline") {
  TcpProxy proxy(shared_etcd().port());
  auto options = options_for(shared_etcd());
  options.endpoints = {proxy.endpoint()};
  auto coordinator = connect(options);
  const LocalServer dripping(
      LocalServer::http("200 OK", "application/json", std::string(1000, ' ') + "{}"), true);
  proxy.set_target(dripping.port());
  proxy.cut();
  const Stopwatch watch;
  const auto got = coordinator.client().get("k", Context::with_timeout(500ms));
  REQUIRE_FALSE(got);
  CHECK(got.error().code == ErrorCode::Timeout);
  CHECK(dripping.requests() >= 1);
  CHECK(watch.over(lenient(600ms)) == 0);
}

TEST_CASE("time: a call ends at its deadline, at the default one, or when it is cancelled") {
  TcpProxy proxy(shared_etcd().port());
  auto options = options_for(shared_etcd());
  options.endpoints = {proxy.endpoint()};
  options.timeout = 700ms;
  const auto patient = Context::with_timeout(lenient(20s));
  auto coordinator = Coordinator::connect(options, patient).value();
  auto& client = coordinator.client();
  client.put("k", "v", patient).value();
  proxy.pause();
  Stopwatch watch;

  SUBCASE("its own") {
    const auto got = client.get("k", Context::with_timeout(300ms));
    REQUIRE_FALSE(got);
    CHECK(got.error().code == ErrorCode::Timeout);
    CHECK(watch.elapsed() >= 290ms);
    CHECK(watch.over(lenient(400ms)) == 0);
  }
  SUBCASE("the default") {
    const auto put = client.put("k", "w");
    REQUIRE_FALSE(put);
    CHECK(put.error().code == ErrorCode::Timeout);
    CHECK(put.error().outcome == Outcome::MaybeApplied);
    CHECK(watch.elapsed() >= 690ms);
    CHECK(watch.over(lenient(800ms)) == 0);
  }
  SUBCASE("cancelled") {
    const Context ctx;
    std::thread canceller([&] {
      std::this_thread::sleep_for(100ms);
      watch.reset();
      ctx.cancel();
    });
    const auto got = client.get("k", ctx);
    const auto late = watch.over(lenient(100ms));
    canceller.join();
    REQUIRE_FALSE(got);
    CHECK(got.error().code == ErrorCode::Cancelled);
    CHECK(late == 0);
  }
  SUBCASE("a deadline that has passed, and a Context that was cancelled, send nothing") {
    const auto late = client.get("k", Context::with_deadline(std::chrono::steady_clock::now()));
    REQUIRE_FALSE(late);
    CHECK(late.error().code == ErrorCode::Timeout);
    const Context cancelled;
    cancelled.cancel();
    const auto put = client.put("k", "w", cancelled);
    REQUIRE_FALSE(put);
    CHECK(put.error().code == ErrorCode::Cancelled);
    CHECK(put.error().outcome == Outcome::NotApplied);
    CHECK(watch.over(lenient(100ms)) == 0);
  }
}
