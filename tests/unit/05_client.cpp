// Section 5: what the client makes of answers, errors and silence. The transport is a script.
#include <doctest/doctest.h>

#include <atomic>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"
#include "support/scripted_transport.hpp"

using namespace coordination;
using namespace support;
using nlohmann::json;

namespace {

constexpr const char* kRange = "/v3/kv/range";
constexpr const char* kPut = "/v3/kv/put";
constexpr const char* kTxn = "/v3/kv/txn";
constexpr const char* kLogin = "/v3/auth/authenticate";

/// A Coordinator on a script; what connecting has sent is forgotten.
struct Setup {
  std::shared_ptr<ScriptedTransport> etcd{std::make_shared<ScriptedTransport>()};
  CoordinatorOptions options{options_with(etcd)};
  std::unique_ptr<Coordinator> coordinator{};

  Client& client() {
    if (!coordinator) {
      etcd->always(kPut, ok(reply(2)));
      coordinator = std::make_unique<Coordinator>(connect_to(options));
      etcd->clear();
    }
    return coordinator->client();
  }
};

std::string login_reply(const std::string& token) {
  return reply(1, "\"token\":\"" + token + "\"");
}

template <class T>
void check_error(const Result<T>& result, ErrorCode code, Outcome outcome) {
  REQUIRE_FALSE(result);
  INFO(text_of(result));
  CHECK(std::string(to_string(result.error().code)) == to_string(code));
  CHECK(result.error().outcome == outcome);
}

bool mentions(const Error& error, const std::string& text) {
  return to_string(error).find(text) != std::string::npos;
}

}  // namespace

TEST_CASE("client: every call sends its request, and reads its answer") {
  Setup setup;
  auto& client = setup.client();
  auto& etcd = *setup.etcd;
  const auto last = [&] { return json::parse(etcd.seen().back().request.body); };

  etcd.next(kRange, ok(reply(9, R"("kvs":[{"key":"Zm9v","value":"YmFy","mod_revision":"4",
      "create_revision":"3","version":"2"}],"count":"1")")));
  const auto kv = client.get("foo");
  REQUIRE_MESSAGE(kv, text_of(kv));
  CHECK(kv->key == "foo");
  CHECK(kv->value == "bar");
  CHECK(kv->create_revision == 3);
  CHECK(kv->mod_revision == 4);
  CHECK(kv->version == 2);
  CHECK(last() == json::parse(R"({"key":"Zm9v"})"));

  const auto missing = client.get("foo");
  check_error(missing, ErrorCode::NotFound, Outcome::NotApplied);
  CHECK(mentions(missing.error(), "foo"));

  const auto put = client.put("foo", "bar");
  REQUIRE_MESSAGE(put, text_of(put));
  CHECK(put->revision == 2);
  CHECK(etcd.seen().back().request.path == kPut);
  CHECK(last() == json::parse(R"({"key":"Zm9v","value":"YmFy"})"));

  etcd.next("/v3/kv/deleterange", ok(reply(5, R"("deleted":"1")")));
  const auto removed = client.remove("foo");
  REQUIRE_MESSAGE(removed, text_of(removed));
  CHECK(removed->deleted == 1);
  CHECK(removed->revision == 5);
  CHECK(last() == json::parse(R"({"key":"Zm9v"})"));

  etcd.next(kTxn, ok(reply(6, R"("succeeded":true,"responses":[{"response_put":{}}])")));
  const auto done = client.commit(Txn{}.when(Compare::missing("a")).then(Op::put("a", "b")));
  REQUIRE_MESSAGE(done, text_of(done));
  CHECK(done->succeeded);
  CHECK(done->revision == 6);
  CHECK(last()["compare"].size() == 1);

  etcd.next("/v3/kv/compaction", ok(reply(6)));
  CHECK(client.compact(4));
  CHECK(last() == json::parse(R"({"revision":"4"})"));
  etcd.next("/v3/kv/compaction",
            etcd_error(400, 11, "etcdserver: mvcc: required revision has been compacted"));
  CHECK(client.compact(4));

  etcd.next("/v3/maintenance/status", ok(reply(6, R"("version":"3.5.16","dbSize":"7")")));
  const auto status = client.status();
  REQUIRE_MESSAGE(status, text_of(status));
  CHECK(status->endpoint == "http://one:2379");
  CHECK(status->version == "3.5.16");
  CHECK(status->db_size == 7);
  CHECK(last() == json::object());
}

TEST_CASE("client: a txn whose compares failed is no error") {
  Setup setup;
  auto& client = setup.client();
  setup.etcd->next(kTxn, ok(reply(6, R"("responses":[{"response_range":{"count":"3"}}])")));
  const auto done = client.commit(Txn{}.when(Compare::missing("a")).otherwise(Op::get("a")));
  REQUIRE_MESSAGE(done, text_of(done));
  CHECK_FALSE(done->succeeded);
  CHECK(done->range(0).count == 3);
}

// Retries.

TEST_CASE("client: a read is repeated after any failure of the connection") {
  Setup setup;
  auto& client = setup.client();
  for (const auto& failure : {lost(), refused(), etcd_error(503, 14, "etcdserver: no leader"),
                              etcd_error(503, 14, "etcdserver: request timed out"),
                              etcd_error(503, 14, "etcdserver: leader changed"),
                              etcd_error(504, 4, "context deadline exceeded"),
                              etcd34_error(500, 2, "context deadline exceeded"),
                              etcd_error(503, 14, "transport is closing"),
                              answer(502, "<html>Bad Gateway</html>"), answer(500, "")}) {
    setup.etcd->clear();
    setup.etcd->next(kRange, failure, 2);
    const auto response = client.range({"foo"});
    REQUIRE_MESSAGE(response, text_of(response));
    CHECK(setup.etcd->count() == 3);
    std::set<std::string> bodies;
    for (const auto& seen : setup.etcd->seen()) bodies.insert(seen.request.body);
    CHECK(bodies.size() == 1);
  }
}

TEST_CASE("client: max_attempts rounds, and at least one") {
  const std::pair<int, int> cases[] = {{0, 1}, {1, 1}, {2, 2}, {5, 5}};
  for (const auto& [attempts, expected] : cases) {
    Setup setup;
    setup.options.retry_config.max_attempts = attempts;
    auto& client = setup.client();
    setup.etcd->always(kRange, lost());
    check_error(client.range({"foo"}), ErrorCode::Connection, Outcome::NotApplied);
    CHECK(setup.etcd->count(kRange) == expected);
  }
}

TEST_CASE("client: what cannot be reached is tried until the deadline, but not by one attempt") {
  const std::pair<int, bool> cases[] = {{0, false}, {1, false}, {2, true}, {3, true}};
  for (const auto& [attempts, goes_on] : cases) {
    Setup setup;
    setup.options.retry_config.max_attempts = attempts;
    auto& client = setup.client();
    setup.etcd->next(kPut, refused(), 6);
    const Stopwatch watch;
    const auto put = client.put("a", "b");
    CHECK_MESSAGE(put.has_value() == goes_on, text_of(put));
    CHECK(setup.etcd->count(kPut) == (goes_on ? 7 : 1));
    setup.etcd->always(kPut, refused());
    setup.etcd->always(kRange, refused());
    const auto never = client.put("a", "b", Context::with_timeout(300ms));
    check_error(never, ErrorCode::Connection, Outcome::NotApplied);
    CHECK(to_string(never.error()) ==
          "[CONNECTION_ERROR] etcd could not be reached: one:2379: the script says no");
  }
}

TEST_CASE("client: a write is not repeated once it may have been applied") {
  Setup setup;
  auto& client = setup.client();
  struct Case {
    Answer answer;
    ErrorCode code;
  };
  const Case cases[] = {
      {lost(), ErrorCode::Connection},
      {etcd_error(503, 14, "etcdserver: request timed out"), ErrorCode::Unavailable},
      {etcd_error(503, 14,
                  "etcdserver: request timed out, possibly due to previous leader failure"),
       ErrorCode::Unavailable},
      {etcd_error(503, 14, "etcdserver: leader changed"), ErrorCode::Unavailable},
      {etcd_error(504, 4, "context deadline exceeded"), ErrorCode::Timeout},
      {etcd34_error(500, 2, "context deadline exceeded"), ErrorCode::Timeout},
      {etcd_error(503, 14, "error reading from server: EOF"), ErrorCode::Unavailable},
      {etcd34_error(503, 14, "transport is closing"), ErrorCode::Unavailable},
      {answer(502, "<html>Bad Gateway</html>"), ErrorCode::Unavailable},
      {answer(500, ""), ErrorCode::Unavailable},
      {answer(200, "<html>hello</html>"), ErrorCode::Internal},
      {answer(200, "{\"header\":{\"revis"), ErrorCode::Internal}};
  for (const auto& [answer, code] : cases) {
    setup.etcd->clear();
    setup.etcd->next(kPut, answer);
    check_error(client.put("foo", "bar"), code, Outcome::MaybeApplied);
    CHECK(setup.etcd->count(kPut) == 1);
    setup.etcd->next(kTxn, answer);
    check_error(client.commit(Txn{}.then(Op::put("a", "b"))), code, Outcome::MaybeApplied);
    CHECK(setup.etcd->count(kTxn) == 1);
    setup.etcd->next("/v3/kv/deleterange", answer);
    check_error(client.remove("a"), code, Outcome::MaybeApplied);
    CHECK(setup.etcd->count("/v3/kv/deleterange") == 1);
  }
}

TEST_CASE("client: any other call is sent once it may have been applied, unless it only reads") {
  Setup setup;
  auto& client = setup.client();
  auto& etcd = *setup.etcd;
  const char* path = "/v3/cluster/member/add";
  const json body = {{"peerURLs", {"http://a:1"}}};
  etcd.next(path, lost());
  check_error(client.call(path, body), ErrorCode::Connection, Outcome::MaybeApplied);
  CHECK(etcd.count(path) == 1);

  etcd.clear();
  etcd.next(path, refused());
  etcd.next(path, ok(reply(9, R"("member":{"ID":"18446744073709551615"})")));
  const auto added = client.call(path, body);
  REQUIRE_MESSAGE(added, text_of(added));
  CHECK(added->at("member").at("ID") == "18446744073709551615");
  CHECK(etcd.count(path) == 2);
  CHECK(json::parse(etcd.seen().back().request.body) == body);

  etcd.clear();
  path = "/v3/cluster/member/list";
  etcd.next(path, lost());
  etcd.next(path, ok("{}"));
  const auto list = client.call(path, {}, Effect::Reads);
  REQUIRE_MESSAGE(list, text_of(list));
  CHECK(*list == json::object());
  CHECK(etcd.count(path) == 2);
  CHECK(etcd.seen().back().request.body == "{}");

  etcd.next("/v3/maintenance/alarm", ok(R"({"alarms":[{"alarm":"NOSPACE"}]})"));  // of etcd 3.4
  const auto alarms = client.call("/v3/maintenance/alarm", {{"action", "GET"}}, Effect::Reads);
  REQUIRE_MESSAGE(alarms, text_of(alarms));
  CHECK(alarms->at("alarms").size() == 1);

  etcd.next(path, ok("[]"));
  check_error(client.call(path, {}), ErrorCode::Internal, Outcome::MaybeApplied);
}

TEST_CASE("client: a write is repeated where it was certainly not applied") {
  Setup setup;
  auto& client = setup.client();
  for (const auto& failure : {refused(), etcd_error(503, 14, "etcdserver: no leader"),
                              etcd34_error(503, 14, "etcdserver: no leader"),
                              etcd_error(500, 2, "etcdserver: not a primary lessor"),
                              etcd_error(503, 14, "etcdserver: rpc not supported for learner"),
                              etcd_error(429, 8, "etcdserver: too many requests")}) {
    setup.etcd->clear();
    setup.etcd->next(kPut, failure, 2);
    const auto put = client.put("foo", "bar");
    REQUIRE_MESSAGE(put, text_of(put));
    CHECK(setup.etcd->count(kPut) == 3);
    setup.etcd->clear();
    setup.etcd->always(kPut, failure);
    const auto never = client.put("foo", "bar", Context::with_timeout(1s));
    REQUIRE_FALSE(never);
    CHECK(never.error().outcome == Outcome::NotApplied);
    CHECK(setup.etcd->count(kPut) > 2);
    setup.etcd->always(kPut, ok(reply(2)));
  }
}

TEST_CASE("client: an answer that may have followed an applied attempt still says 'maybe'") {
  // A grant has an id of its own, so that it may be sent again after a lost answer.
  Setup setup;
  auto& client = setup.client();
  setup.etcd->next("/v3/lease/grant", lost());
  setup.etcd->next("/v3/lease/grant", refused(), 99);
  setup.etcd->always("/v3/lease/revoke", ok(reply(2)));
  check_error(client.grant(10s, Context::with_timeout(1s)), ErrorCode::Connection,
              Outcome::MaybeApplied);
  CHECK(setup.etcd->count("/v3/lease/grant") > 2);
  std::set<std::string> bodies;
  for (const auto& seen : setup.etcd->seen("/v3/lease/grant")) bodies.insert(seen.request.body);
  CHECK(bodies.size() == 1);
  // What may exist is revoked.
  CHECK(wait_until([&] { return setup.etcd->count("/v3/lease/revoke") >= 1; }, lenient(1s)));
}

TEST_CASE("client: a repeated grant that finds its own lease is a success") {
  Setup setup;
  auto& client = setup.client();
  std::string id;
  setup.etcd->next("/v3/lease/grant", lost());
  for (const int status : {400, 412}) {
    setup.etcd->clear();
    setup.etcd->next("/v3/lease/grant", lost());
    setup.etcd->next("/v3/lease/grant", etcd_error(status, 9, "etcdserver: lease already exists"));
    const auto hook = setup.etcd->next(
        "/v3/lease/keepalive",
        [&](const HttpRequest& request, const auto&, const auto&) -> Result<HttpResponse> {
          id = json::parse(request.body)["ID"];
          return HttpResponse{
              200, "{\"result\":" + reply(3, "\"ID\":\"" + id + "\",\"TTL\":\"10\"") + "}\n"};
        });
    setup.etcd->always("/v3/lease/revoke", ok(reply(2)));
    const auto lease = client.grant(10s);
    REQUIRE_MESSAGE(lease, text_of(lease));
    CHECK(std::to_string(lease->id()) == id);
    CHECK(lease->ttl() == 10s);
    CHECK(lease->held());
  }
}

TEST_CASE("client: the delay between rounds grows, and the next member is tried at once") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  setup.options.retry_config.initial_delay = 20ms;
  setup.options.retry_config.max_delay = 40ms;
  auto& client = setup.client();
  setup.etcd->always(kRange, refused());
  REQUIRE_FALSE(client.range({"a"}, Context::with_timeout(lenient(1s))));
  const auto seen = setup.etcd->seen();
  REQUIRE(seen.size() >= 6);
  const auto gap = [&](std::size_t i) { return seen[i + 1].when - seen[i].when; };
  std::chrono::nanoseconds within{}, between{};
  for (std::size_t i = 0; i + 2 < seen.size(); i += 2) {
    within += gap(i);
    between += gap(i + 1);
  }
  CHECK(within < between / 2);
  CHECK(gap(1) >= 15ms);
  CHECK(gap(3) >= 30ms);
}

// Refusals.

TEST_CASE("client: what etcd refuses is told once, in both shapes, and names the endpoint") {
  Setup setup;
  auto& client = setup.client();
  struct Case {
    int status, code;
    const char* message;
    ErrorCode expected;
  };
  const Case cases[] = {
      {400, 3, "etcdserver: key is not provided", ErrorCode::Validation},
      {400, 3, "etcdserver: request is too large", ErrorCode::Validation},
      {429, 8, "grpc: received message larger than max (2097162 vs. 2097152)",
       ErrorCode::Validation},
      {400, 3, "etcdserver: duplicate key given in txn request", ErrorCode::Validation},
      {400, 3, "etcdserver: key not found", ErrorCode::NotFound},
      {400, 11, "etcdserver: too large lease TTL", ErrorCode::Validation},
      {400, 11, "etcdserver: mvcc: required revision has been compacted", ErrorCode::Compacted},
      {404, 5, "etcdserver: requested lease not found", ErrorCode::NotFound},
      {403, 7, "etcdserver: permission denied", ErrorCode::PermissionDenied},
      {412, 9, "etcdserver: something precious", ErrorCode::Conflict}};
  for (const auto& [status, code, message, expected] : cases) {
    for (const auto& refusal :
         {etcd_error(status, code, message), etcd34_error(status, code, message)}) {
      setup.etcd->clear();
      setup.etcd->next(kPut, refusal);
      const auto put = client.put("foo", "bar");
      check_error(put, expected, Outcome::NotApplied);
      CHECK(mentions(put.error(), "one:2379"));
      CHECK(mentions(put.error(), message));
      CHECK(setup.etcd->count() == 1);
      setup.etcd->next(kRange, refusal);
      const auto range = client.range({"foo"});
      check_error(range, expected, Outcome::NotApplied);
      CHECK(setup.etcd->count() == 2);
    }
  }
}

TEST_CASE("client: of a store that is full nobody knows what it has done") {
  // etcd says so also of a write that it has just applied: its server/etcdserver/apply.go looks at
  // the space before, and answers after.
  Setup setup;
  auto& client = setup.client();
  setup.etcd->clear();
  setup.etcd->next(kPut, etcd_error(429, 8, "etcdserver: mvcc: database space exceeded"));
  check_error(client.put("foo", "bar"), ErrorCode::Unavailable, Outcome::MaybeApplied);
  CHECK(setup.etcd->count() == 1);
}

TEST_CASE("client: a future revision is waited for: the member may be behind") {
  Setup setup;
  auto& client = setup.client();
  setup.etcd->next(kRange,
                   etcd_error(400, 11, "etcdserver: mvcc: required revision is a future revision"));
  CHECK(client.range({"foo"}));
  CHECK(setup.etcd->count() == 2);
}

TEST_CASE("client: another server, or a gateway that is off: the error says so and names it") {
  Setup setup;
  auto& client = setup.client();
  struct Case {
    Answer answer;
    ErrorCode code;
    const char* hint;
  };
  const std::string html = "<html><body>Welcome to nginx!</body></html>";
  const Case cases[] = {
      {answer(404, "404 page not found\n"), ErrorCode::Unavailable, "gateway"},
      {answer(404, "Not Found\n"), ErrorCode::Unavailable, "gateway"},
      {answer(404, R"({"code":5, "message":"Not Found"})"), ErrorCode::Unavailable, "gateway"},
      {answer(404, html), ErrorCode::Unavailable, "404"},
      {answer(301, ""), ErrorCode::Unavailable, "301"},
      {answer(403, html), ErrorCode::Unavailable, "403"},
      {answer(502, html), ErrorCode::Unavailable, "502"},
      {answer(200, html), ErrorCode::Internal, "nginx"},
      {answer(200, ""), ErrorCode::Internal, "one:2379"},
      {answer(200, "{}"), ErrorCode::Internal, "not a reply"},
      {answer(200, "[]"), ErrorCode::Internal, "not a reply"},
      {answer(200, "{\"header\":"), ErrorCode::Internal, "not a reply"},
      {answer(200, std::string(200000, '[')), ErrorCode::Internal, "not a reply"},
      {answer(200, std::string("\xff\0\x01", 3)), ErrorCode::Internal, "one:2379"}};
  for (const auto& [answer, code, hint] : cases) {
    setup.etcd->clear();
    setup.etcd->next(kRange, answer, 99);
    const auto range = client.range({"foo"});
    REQUIRE_FALSE(range);
    INFO(text_of(range));
    CHECK(std::string(to_string(range.error().code)) == to_string(code));
    CHECK(mentions(range.error(), "one:2379"));
    CHECK(mentions(range.error(), hint));
    CHECK(to_string(range.error()).size() < 500);
  }
}

TEST_CASE("client: a key or a value that cannot be read is an error, not an empty one") {
  const char* const kvs[] = {R"("kvs":[{"key":"YQ==","value":"aGVsbG8"}],"count":"1")",
                             R"("kvs":[{"key":"YQ==","value":"aGVs*G8="}],"count":"1")",
                             R"("kvs":[{"key":"Y","value":"YQ=="}],"count":"1")"};
  for (const auto* kv : kvs) {
    Setup setup;
    auto& client = setup.client();
    setup.etcd->always(kRange, ok(reply(5, kv)));
    check_error(client.get("a"), ErrorCode::Internal, Outcome::NotApplied);
    const std::string range = std::string("\"responses\":[{\"response_range\":{") + kv + "}}]";
    setup.etcd->always(kTxn, ok(reply(5, range)));
    check_error(client.commit(Txn().then(Op::get("a"))), ErrorCode::Internal,
                Outcome::MaybeApplied);
  }
  Setup setup;
  auto& client = setup.client();
  setup.etcd->always(kPut, ok(reply(5, R"("prev_kv":{"key":"YQ==","value":"!"})")));
  PutRequest put{"a", "b"};
  put.prev_kv = true;
  check_error(client.put(put), ErrorCode::Internal, Outcome::MaybeApplied);
}

TEST_CASE("client: what is too large for a proxy is the caller's affair, and no member's") {
  std::atomic<int> warnings{0};
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  setup.options.logger = [&](LogLevel level, std::string_view, const LogFields&) {
    warnings += level >= LogLevel::Warn;
  };
  auto& client = setup.client();
  setup.etcd->always(kPut, answer(413, "<html>413 Request Entity Too Large</html>"));
  const auto put = client.put("a", "b");
  check_error(put, ErrorCode::Validation, Outcome::NotApplied);
  CHECK(mentions(put.error(), "413 Request Entity Too Large"));
  CHECK(setup.etcd->count(kPut) == 1);
  setup.coordinator->close().value();  // its log is complete then
  CHECK(warnings == 0);
}

TEST_CASE("client: http that was spoken to an https port is named as that") {
  Setup setup;
  auto& client = setup.client();
  setup.etcd->always(kPut, answer(400, "Client sent an HTTP request to an HTTPS server.\n"));
  CHECK(mentions(client.put("a", "b").error(), "http spoken to an https port"));
}

TEST_CASE("client: a stranger's bytes forge no lines of a log") {
  const std::string evil = "busy\r\nERROR all is lost\n\x1b[31mred\xc2\x9b" + std::string(1, '\0');
  const std::string tame = "busy\\x0d\\x0aERROR all is lost\\x0a\\x1b[31mred\xc2\\x9b";
  Setup setup;
  auto& client = setup.client();
  setup.etcd->always(kPut, answer(503, evil));
  CHECK(mentions(client.put("a", "b").error(), "\"" + tame + "\\x00\""));
  setup.etcd->always(kPut, answer(200, evil));
  CHECK(mentions(client.put("a", "b").error(), "\"" + tame + "\\x00\""));
  setup.etcd->always(kPut, answer(500, json{{"code", 2}, {"message", "no\nway\x1b"}}.dump()));
  CHECK(mentions(client.put("a", "b").error(), "no\\x0away\\x1b"));
}

TEST_CASE("client: what a transport throws is an error of that one call") {
  const Answer throws = [](const auto&, const auto&, const auto&) -> Result<HttpResponse> {
    throw std::runtime_error("the transport says no");
  };
  Setup setup;
  auto& client = setup.client();
  setup.etcd->next(kPut, throws);
  const auto put = client.put("a", "b");
  check_error(put, ErrorCode::Connection, Outcome::MaybeApplied);
  CHECK(mentions(put.error(), "the transport says no"));
  CHECK(client.put("a", "b"));

  Setup login;  // the first login is lost, and the next one is not
  login.options.username = "joe";
  login.options.password = "secret";
  login.options.retry_config.max_attempts = 1;
  login.etcd->always(kLogin, ok(login_reply("t")));
  login.etcd->next(kLogin, throws);
  const auto connected = Coordinator::connect(login.options);
  check_error(connected, ErrorCode::Connection, Outcome::NotApplied);
  CHECK(mentions(connected.error(), "the transport says no"));

  Setup watched;  // a stream that throws is a stream that has ended
  auto& watcher = watched.client();
  watched.etcd->next("/v3/watch", throws);
  watched.etcd->always("/v3/watch", silence());
  auto watch = watcher.watch("a");
  CHECK(wait_until([&] { return watched.etcd->count("/v3/watch") >= 2; }, lenient(5s)));
}

TEST_CASE("client: a client certificate with a CN is named as what it is") {
  Setup setup;
  auto& client = setup.client();
  setup.etcd->next(kRange, answer(400,
                                  "CommonName of client sending a request against gateway "
                                  "will be ignored and not used as expected\n"));
  const auto range = client.range({"foo"});
  check_error(range, ErrorCode::PermissionDenied, Outcome::NotApplied);
  CHECK(mentions(range.error(), "CommonName"));
  CHECK(setup.etcd->count() == 1);
}

// Login.

namespace {

/// A script that wants a token and knows one: "token-<number of logins>".
struct Guarded : Setup {
  std::atomic<int> logins{0};
  Hook login{etcd->always(kLogin, [this](const auto&, const auto&, const auto&) {
    return HttpResponse{200, login_reply("token-" + std::to_string(++logins))};
  })};

  Guarded() {
    options.username = "joe";
    options.password = "secret";
  }
};

std::vector<std::string> tokens(const ScriptedTransport& etcd, const std::string& path) {
  std::vector<std::string> result;
  for (const auto& seen : etcd.seen(path)) result.push_back(header(seen.request, "Authorization"));
  return result;
}

}  // namespace

TEST_CASE("login: once, at connect; then every request has the token") {
  Guarded setup;
  setup.etcd->always(kPut, ok(reply(2)));
  setup.coordinator = std::make_unique<Coordinator>(connect_to(setup.options));
  const auto seen = setup.etcd->seen();
  REQUIRE(seen.size() == 2);
  CHECK(seen[0].request.path == kLogin);
  CHECK(json::parse(seen[0].request.body) == json::parse(R"({"name":"joe","password":"secret"})"));
  CHECK(header(seen[0].request, "Authorization").empty());
  CHECK(header(seen[1].request, "Authorization") == "token-1");
  CHECK(setup.coordinator->client().put("a", "b"));
  CHECK(tokens(*setup.etcd, kPut) == std::vector<std::string>{"token-1"});
  CHECK(setup.logins == 1);
}

TEST_CASE("login: without a username no token is sent") {
  Setup setup;
  CHECK(setup.client().put("a", "b"));
  CHECK(tokens(*setup.etcd, kPut) == std::vector<std::string>{""});
  CHECK(header(setup.etcd->seen().back().request, "Authorization").empty());
}

TEST_CASE("login: every sign of a dead token leads to one new login, and the call succeeds") {
  Guarded setup;
  auto& client = setup.client();
  const Answer signs[] = {etcd_error(401, 16, "etcdserver: invalid auth token"),
                          etcd34_error(401, 16, "etcdserver: invalid auth token"),
                          etcd_error(400, 3, "etcdserver: revision of auth store is old"),
                          etcd34_error(400, 3, "etcdserver: user name is empty")};
  int expected = 1;
  for (const auto& sign : signs) {
    setup.etcd->clear();
    setup.etcd->next(kPut, sign);
    const auto put = client.put("a", "b");
    REQUIRE_MESSAGE(put, text_of(put));
    const auto before = "token-" + std::to_string(expected);
    const auto after = "token-" + std::to_string(++expected);
    CHECK(tokens(*setup.etcd, kPut) == std::vector<std::string>{before, after});
    CHECK(setup.etcd->count(kLogin) == 1);
  }
}

TEST_CASE("login: tokens that die in a row are replaced, and no call is lost") {
  Guarded setup;
  auto& client = setup.client();
  setup.etcd->next(kPut, etcd_error(401, 16, "etcdserver: invalid auth token"), 4);
  const auto put = client.put("a", "b");
  REQUIRE_MESSAGE(put, text_of(put));
  CHECK(setup.etcd->count(kPut) == 5);
  CHECK(setup.etcd->count(kLogin) == 4);
}

TEST_CASE("login: a token that is always refused is no storm, and ends in time") {
  Guarded setup;
  setup.options.retry_config = {};
  auto& client = setup.client();
  setup.etcd->always(kPut, etcd_error(401, 16, "etcdserver: invalid auth token"));
  const auto put = client.put("a", "b", Context::with_timeout(1s));
  REQUIRE_FALSE(put);
  CHECK(put.error().outcome == Outcome::NotApplied);
  if (put.error().code != ErrorCode::Timeout) {  // its time may be over in the midst of a login
    check_error(put, ErrorCode::PermissionDenied, Outcome::NotApplied);
    CHECK(mentions(put.error(), "invalid auth token"));
  }
  CHECK(setup.etcd->count(kPut) > 1);
  CHECK(setup.etcd->count(kPut) < 20);
}

TEST_CASE("login: all who wait for one login get its result, also a refusal") {
  Guarded setup;
  auto& client = setup.client();
  setup.etcd->always(kRange, etcd_error(401, 16, "etcdserver: invalid auth token"));
  std::atomic<int> refused_logins{0};
  const auto hook = setup.etcd->always(kLogin, [&](const auto& a, const auto& b, const auto& c) {
    ++refused_logins;
    std::this_thread::sleep_for(20ms);  // as long as bcrypt takes
    return etcd_error(400, 3, "etcdserver: authentication failed, invalid user ID or password")(
        a, b, c);
  });
  std::atomic<int> denied{0};
  const Stopwatch watch;
  std::vector<std::thread> threads;
  for (int i = 0; i < 64; ++i) {
    threads.emplace_back([&] {
      const auto range = client.range({"a"});
      denied += !range && range.error().code == ErrorCode::PermissionDenied;
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(denied == 64);
  CHECK(refused_logins <= 1 + watch.elapsed() / 1s);
}

TEST_CASE("login: a connection that is closed without an answer may mean a dead token") {
  Guarded setup;
  auto& client = setup.client();
  std::this_thread::sleep_for(1100ms);  // the token was not proven lately
  setup.etcd->clear();
  setup.etcd->next(kRange, lost());
  CHECK(client.range({"a"}));
  CHECK(setup.etcd->count(kLogin) == 1);
  setup.etcd->next(kRange, lost());  // and now it was
  CHECK(client.range({"a"}));
  CHECK(setup.etcd->count(kLogin) == 1);
}

TEST_CASE("login: a connection that is closed says nothing of a token that has just served") {
  Guarded setup;
  auto& client = setup.client();
  std::this_thread::sleep_for(1100ms);
  CHECK(client.range({"a"}));
  setup.etcd->clear();
  setup.etcd->next(kRange, lost());
  CHECK(client.range({"a"}));
  CHECK(setup.etcd->count(kLogin) == 0);
}

TEST_CASE("login: a wrong password is told at once, and no loop") {
  Guarded setup;
  for (const auto& refusal :
       {etcd_error(400, 3, "etcdserver: authentication failed, invalid user ID or password"),
        etcd34_error(400, 3, "etcdserver: authentication failed, invalid user ID or password")}) {
    setup.etcd->clear();
    setup.etcd->always(kLogin, refusal);
    const auto connected = Coordinator::connect(setup.options);
    REQUIRE_FALSE(connected);
    CHECK(connected.error().code == ErrorCode::PermissionDenied);
    CHECK(mentions(connected.error(), "joe"));
    CHECK_FALSE(mentions(connected.error(), "secret"));
    CHECK(setup.etcd->count() == 1);
  }
}

TEST_CASE("login: authentication that is off needs no token") {
  for (const int status : {400, 412}) {
    Guarded setup;
    setup.etcd->always(kPut, ok(reply(2)));
    setup.etcd->always(kLogin, etcd_error(status, 9, "etcdserver: authentication is not enabled"));
    setup.coordinator = std::make_unique<Coordinator>(connect_to(setup.options));
    CHECK(setup.coordinator->client().put("a", "b"));
    CHECK(tokens(*setup.etcd, kPut) == std::vector<std::string>{""});
  }
}

TEST_CASE("login: etcd demands one and none was given") {
  Setup setup;
  setup.etcd->always(kRange, etcd_error(400, 3, "etcdserver: user name is empty"));
  const auto connected = Coordinator::connect(setup.options);
  REQUIRE_FALSE(connected);
  CHECK(connected.error().code == ErrorCode::PermissionDenied);
  CHECK(mentions(connected.error(), "username"));
  CHECK(setup.etcd->count() == 1);
}

TEST_CASE("login: many calls at once share one login") {
  Guarded setup;
  auto& client = setup.client();
  std::atomic<int> good{0};
  setup.etcd->always(
      kPut, [&](const HttpRequest& request, const auto&, const auto&) -> Result<HttpResponse> {
        if (header(request, "Authorization") == "token-2") return HttpResponse{200, reply(3)};
        return HttpResponse{401, R"({"code":16,"message":"etcdserver: invalid auth token"})"};
      });
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&] {
      if (client.put("a", "b")) ++good;
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(good == 8);
  CHECK(setup.etcd->count(kLogin) == 1);
}

TEST_CASE("login: no password and no token is ever logged") {
  std::mutex mutex;
  std::string log;
  Guarded setup;
  setup.options.logger = [&](LogLevel, std::string_view message, const LogFields& fields) {
    std::lock_guard<std::mutex> hold(mutex);
    log += message;
    for (const auto& [name, value] : fields) log += " " + name + "=" + value;
    log += "\n";
  };
  auto& client = setup.client();
  setup.etcd->next(kPut, etcd_error(401, 16, "etcdserver: invalid auth token"));
  CHECK(client.put("a", "private value"));
  setup.coordinator->close().value();
  std::lock_guard<std::mutex> hold(mutex);
  CHECK(log.find("logged in") != std::string::npos);
  for (const char* never : {"secret", "token-", "private"}) {
    CHECK(log.find(never) == std::string::npos);
  }
}

// Members.

TEST_CASE("members: one that fails is passed over, and the next one stays in use") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379", "three:2379"};
  auto& client = setup.client();
  setup.etcd->endpoint("http://one:2379", refused());
  CHECK(client.range({"a"}));
  CHECK(setup.etcd->endpoints() == std::vector<std::string>{"http://one:2379", "http://two:2379"});
  setup.etcd->clear();
  for (int i = 0; i < 5; ++i) CHECK(client.range({"a"}));
  CHECK(setup.etcd->endpoints() == std::vector<std::string>(5, "http://two:2379"));
  setup.etcd->clear();
  setup.etcd->endpoint("http://two:2379", etcd_error(503, 14, "etcdserver: no leader"));
  CHECK(client.put("a", "b"));  // three is asked who it is before it is given a write
  CHECK(setup.etcd->endpoints() ==
        std::vector<std::string>{"http://two:2379", "http://three:2379", "http://three:2379"});
}

TEST_CASE("members: where all fail each is tried once a round, and all are named in no loop") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379", "three:2379"};
  auto& client = setup.client();
  setup.etcd->always(kRange, refused());
  const auto range = client.range({"a"}, Context::with_timeout(lenient(1s)));
  check_error(range, ErrorCode::Connection, Outcome::NotApplied);
  CHECK(to_string(range.error()) ==
        "[CONNECTION_ERROR] none of 3 members could be reached: one:2379: the script says no; "
        "two:2379: the script says no; three:2379: the script says no");
  const auto seen = setup.etcd->endpoints();
  REQUIRE(seen.size() >= 9);
  for (std::size_t round = 0; round < 3; ++round) {
    const auto begin = seen.begin() + static_cast<std::ptrdiff_t>(3 * round);
    CHECK(std::set<std::string>(begin, begin + 3).size() == 3);
  }
}

TEST_CASE("members: one that was down is tried again after a rest") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  auto& client = setup.client();
  setup.etcd->endpoint("http://one:2379", refused());
  CHECK(client.range({"a"}));
  setup.etcd->endpoint("http://one:2379", nullptr);
  setup.etcd->endpoint("http://two:2379", refused());
  setup.etcd->clear();
  CHECK(client.range({"a"}));  // nobody else is left, so it is tried before its time
  CHECK(setup.etcd->endpoints() == std::vector<std::string>{"http://two:2379", "http://one:2379"});
}

TEST_CASE("members: a refusal says nothing against a member") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  auto& client = setup.client();
  setup.etcd->next(kPut, etcd_error(403, 7, "etcdserver: permission denied"));
  CHECK_FALSE(client.put("a", "b"));
  CHECK(client.put("a", "b"));
  CHECK(setup.etcd->endpoints() == std::vector<std::string>(2, "http://one:2379"));
}

TEST_CASE("members: a read that one member swallows is answered by another in time") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  setup.options.timeout = lenient(3s);
  auto& client = setup.client();
  setup.etcd->endpoint("http://one:2379", silence());
  const auto range = client.range({"a"});
  REQUIRE_MESSAGE(range, text_of(range));
}

namespace {

/// An answer that takes its time, and is given up when nobody waits for it.
Answer late(milliseconds time, Answer then) {
  return [=](const HttpRequest& request, const ChunkSink& sink, const Context& ctx) {
    const auto own = Context::with_timeout(time);
    const auto hook = ctx.on_cancel([own] { own.cancel(); });
    static_cast<void>(blocked(own, Outcome::MaybeApplied));
    if (!ctx.done()) return then(request, sink, ctx);
    return Result<HttpResponse>(
        Error{ErrorCode::Cancelled, "the script did not answer", "", Outcome::MaybeApplied, 0});
  };
}

std::string reply_of(std::uint64_t cluster, std::int64_t revision) {
  return "{\"header\":{\"cluster_id\":\"" + std::to_string(cluster) + "\",\"revision\":\"" +
         std::to_string(revision) + "\"}}";
}

}  // namespace

TEST_CASE("members: who serves again rests no more; who has failed more often rests longer") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  auto& client = setup.client();
  for (const char* url : {"http://one:2379", "http://two:2379"}) {
    setup.etcd->endpoint(url, refused());
  }
  CHECK_FALSE(client.range({"a"}, Context::with_timeout(300ms)));
  setup.etcd->endpoint("http://two:2379", nullptr);
  REQUIRE(client.range({"a"}));
  setup.etcd->clear();
  CHECK(client.range({"a"}));
  CHECK(setup.etcd->endpoints() == std::vector<std::string>{"http://two:2379"});
  setup.etcd->clear();
  setup.etcd->next(kRange, refused());
  CHECK(client.range({"a"}));
  CHECK(setup.etcd->endpoints() == std::vector<std::string>(2, "http://two:2379"));
}

TEST_CASE("members: one that has rested is tried by one call, and not by all") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  auto& client = setup.client();
  const auto reads_at_one = [&] {
    const auto seen = setup.etcd->seen(kRange);
    return std::count_if(seen.begin(), seen.end(), [](const auto& one) {
      return one.request.endpoint == "http://one:2379" && one.request.body == R"({"key":"YQ=="})";
    });
  };
  setup.etcd->endpoint("http://one:2379", refused());
  CHECK(client.range({"a"}));
  setup.etcd->endpoint("http://one:2379", silence());
  std::this_thread::sleep_for(600ms);  // its rest
  setup.etcd->clear();
  setup.etcd->next(kRange, refused());  // by the other one
  Joined first([&] { CHECK(client.range({"a"})); });
  REQUIRE(eventually([&] { return reads_at_one() == 1; }));
  CHECK(client.range({"a"}));
  CHECK(reads_at_one() == 1);
}

TEST_CASE("members: one that has failed proves itself before it is given a write") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  auto& client = setup.client();
  setup.etcd->next(kPut, refused());
  CHECK(client.put("a", "b"));
  setup.etcd->clear();
  setup.etcd->next(kPut, refused());
  CHECK(client.put("a", "b"));
  const auto seen = setup.etcd->seen();
  REQUIRE(seen.size() == 3);
  CHECK(seen[1].request.path == kRange);
  CHECK(seen[2].request.path == kPut);
  CHECK(seen[1].request.endpoint == seen[2].request.endpoint);
}

TEST_CASE("members: the one that has answered beside another stays in use") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  auto& client = setup.client();
  setup.etcd->endpoint("http://one:2379", late(1500ms, ok(reply(7))));  // slow, not dead
  setup.etcd->endpoint("http://two:2379", ok(reply(8)));
  REQUIRE(client.range({"a"}));
  std::this_thread::sleep_for(100ms);  // it is preferred a moment after it has answered
  setup.etcd->clear();
  CHECK(client.range({"b"}).value().revision == 8);
  std::vector<std::string> asked;
  for (const auto& seen : setup.etcd->seen(kRange)) {
    if (seen.request.body == R"({"key":"Yg=="})") asked.push_back(seen.request.endpoint);
  }
  CHECK(asked == std::vector<std::string>{"http://two:2379"});
}

TEST_CASE("members: what fails while another is asked beside it is not the call's failure") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  auto& client = setup.client();
  setup.etcd->endpoint("http://one:2379", late(1500ms, refused()));
  setup.etcd->endpoint("http://two:2379", late(1500ms, ok(reply(8))));
  REQUIRE(client.range({"a"}));
  int asked = 0;
  for (const auto& seen : setup.etcd->seen(kRange)) {
    const auto& request = seen.request;
    asked += request.endpoint == "http://two:2379" && request.body == R"({"key":"YQ=="})";
  }
  CHECK(asked == 1);
}

TEST_CASE("members: a second attempt beside the first may find what that has done") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  setup.client();
  setup.etcd->next(kTxn, silence());
  setup.etcd->always(kTxn, ok(reply(9)));  // changed since: by whom?
  auto config = setup.coordinator->config();
  const auto set = config.compare_and_set("a", 7, 1, Context::with_timeout(lenient(6s)));
  check_error(set, ErrorCode::Connection, Outcome::MaybeApplied);
  CHECK(setup.etcd->count(kTxn) == 2);
}

TEST_CASE("members: who may not read the first key does not find its member dead") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  auto& client = setup.client();
  setup.etcd->endpoint("http://one:2379",
                       [](const auto& request, const auto& sink, const auto& ctx) {
                         const auto slow = late(2600ms, ok(reply(9)));
                         const auto denied = etcd_error(403, 7, "etcdserver: permission denied");
                         return (request.path == kPut ? slow : denied)(request, sink, ctx);
                       });
  const auto put = client.put("a", "b", Context::with_timeout(lenient(8s)));
  REQUIRE_MESSAGE(put, text_of(put));
  CHECK(put->revision == 9);
}

TEST_CASE("members: whose call was cancelled has not failed, however long it took") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  auto& client = setup.client();
  setup.etcd->next(kPut, [](const auto& request, const auto& sink, const Context& ctx) {
    static_cast<void>(blocked(ctx, Outcome::MaybeApplied));
    return lost()(request, sink, ctx);  // as a socket says it that was closed
  });
  Context ctx;
  Joined canceller([ctx] {
    std::this_thread::sleep_for(1200ms);
    ctx.cancel();
  });
  check_error(client.put("a", "b", ctx), ErrorCode::Cancelled, Outcome::MaybeApplied);
  canceller.join();
  setup.etcd->clear();
  CHECK(client.range({"a"}));
  CHECK(setup.etcd->endpoints() == std::vector<std::string>{"http://one:2379"});
}

TEST_CASE("members: slow is not dead: what one of them answers in time is not thrown away") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379", "three:2379"};
  setup.options.timeout = lenient(3s);
  auto& client = setup.client();
  for (const char* url : {"http://one:2379", "http://two:2379", "http://three:2379"}) {
    setup.etcd->endpoint(url, late(1400ms, ok(reply(7))));
  }
  const auto range = client.range({"a"});
  REQUIRE_MESSAGE(range, text_of(range));
  CHECK(range->revision == 7);
  std::set<std::string> reads;
  for (const auto& seen : setup.etcd->seen(kRange)) reads.insert(seen.request.body);
  CHECK(reads.count(R"({"key":"YQ=="})") == 1);
  setup.etcd->clear();
  const auto put = client.put("a", "b");  // it is slow, too, and sent once
  CHECK(setup.etcd->count(kPut) <= 1);
  if (put) CHECK(put->revision == 7);
}

TEST_CASE("members: a read that is late is asked for beside, and the first answer counts") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  setup.options.timeout = lenient(3s);
  auto& client = setup.client();
  setup.etcd->endpoint("http://one:2379", silence());
  setup.etcd->endpoint("http://two:2379", ok(reply(8)));
  const Stopwatch watch;
  const auto range = client.range({"a"});
  REQUIRE_MESSAGE(range, text_of(range));
  CHECK(range->revision == 8);
  CHECK(watch.elapsed() >= 900ms);  // not before it is late
  CHECK(watch.over(lenient(1500ms)) == 0);
  setup.etcd->clear();
  CHECK(client.range({"a"}));  // who has answered stays in use
  const auto seen = setup.etcd->endpoints();
  CHECK(std::count(seen.begin(), seen.end(), "http://two:2379") >= 1);
}

TEST_CASE("members: who answers beside another one has not failed") {
  Notes log;
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  setup.options.timeout = lenient(3s);
  setup.options.logger = log.logger();
  auto& client = setup.client();
  setup.etcd->endpoint("http://one:2379", silence());
  setup.etcd->endpoint("http://two:2379", ok(reply(8)));
  REQUIRE(client.range({"a"}));
  setup.coordinator->close().value();
  CHECK_FALSE(log.contain("a member has failed endpoint=http://two:2379"));
}

TEST_CASE("members: a write is never sent twice, and ends when its member is found dead") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  auto& client = setup.client();
  setup.etcd->endpoint("http://one:2379", silence());
  const Stopwatch watch;
  const auto put = client.put("a", "b", Context::with_timeout(lenient(8s)));
  check_error(put, ErrorCode::Unavailable, Outcome::MaybeApplied);
  INFO(text_of(put));
  CHECK(setup.etcd->count(kPut) == 1);
  CHECK(watch.over(lenient(4s)) == 0);
  CHECK(client.put("a", "b"));  // by the other one
  CHECK(setup.etcd->seen(kPut).back().request.endpoint == "http://two:2379");
}

TEST_CASE("members: a write ends also where its member is found dead late") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  auto& client = setup.client();
  setup.etcd->endpoint("http://one:2379", silence());
  const Stopwatch watch;
  const auto elected = ok(reply(9)), not_yet = etcd_error(503, 14, "etcdserver: no leader");
  const auto hook = setup.etcd->endpoint(
      "http://two:2379", [&](const auto& request, const auto& sink, const auto& ctx) {
        return (watch.elapsed() < 4s ? not_yet : elected)(request, sink, ctx);
      });
  const auto put = client.put("a", "b", Context::with_timeout(lenient(12s)));
  check_error(put, ErrorCode::Unavailable, Outcome::MaybeApplied);
  CHECK(watch.elapsed() >= 4s);
  CHECK(watch.over(lenient(9s)) == 0);
}

TEST_CASE("members: that another cluster answers is no sign that ours is dead") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  setup.etcd->always(kRange, ok(reply_of(7, 1)));
  auto& client = setup.client();
  setup.etcd->endpoint("http://one:2379", late(3500ms, ok(reply_of(7, 9))));
  setup.etcd->endpoint("http://two:2379", ok(reply_of(8, 99)));
  const auto put = client.put("a", "b", Context::with_timeout(lenient(9s)));
  REQUIRE_MESSAGE(put, text_of(put));
  CHECK(put->revision == 9);
}

TEST_CASE("members: a write waits where its member answers something else") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  auto& client = setup.client();
  setup.etcd->always(kPut, late(2600ms, ok(reply(9))));  // a slow disk: reads are quick
  const auto put = client.put("a", "b", Context::with_timeout(lenient(8s)));
  REQUIRE_MESSAGE(put, text_of(put));
  CHECK(put->revision == 9);
  CHECK(setup.etcd->count(kPut) == 1);
}

TEST_CASE("members: what may be done twice is sent again where its answer stays out") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379", "three:2379"};
  auto& client = setup.client();
  setup.etcd->next(kTxn, silence());  // a leader that has gone had it; reads are served
  setup.etcd->always(kTxn, ok(reply(9, R"("succeeded":true)")));
  const Stopwatch watch;
  auto config = setup.coordinator->config();
  const auto set = config.compare_and_set("a", 7, 1, Context::with_timeout(lenient(6s)));
  REQUIRE_MESSAGE(set, text_of(set));
  CHECK(watch.over(lenient(4s)) == 0);
  CHECK(setup.etcd->count(kTxn) == 2);
  setup.etcd->clear();
  setup.etcd->next(kTxn, late(4s, ok(reply(10))));
  Txn txn;  // a user's: nobody knows whether it may
  txn.then(Op::put("a", "b"));
  CHECK(client.commit(txn, Context::with_timeout(lenient(8s))));
  CHECK(setup.etcd->count(kTxn) == 1);
}

TEST_CASE("members: one that was silent proves itself before it is given a write") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  auto& client = setup.client();
  CHECK(client.put("a", "b"));
  CHECK(setup.etcd->count() == 1);  // it was heard of a moment ago
  setup.etcd->endpoint("http://one:2379", silence());
  std::this_thread::sleep_for(2100ms);
  setup.etcd->clear();
  const auto put = client.put("a", "b");
  REQUIRE_MESSAGE(put, text_of(put));
  const auto puts = setup.etcd->seen(kPut);
  REQUIRE(puts.size() == 1);
  CHECK(puts.front().request.endpoint == "http://two:2379");
}

TEST_CASE("members: an endpoint of another cluster is not believed, and named") {
  std::string log;
  std::mutex mutex;
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  setup.options.logger = [&](LogLevel, std::string_view, const LogFields& fields) {
    std::lock_guard<std::mutex> hold(mutex);
    for (const auto& [name, value] : fields) log += name + "=" + value + "\n";
  };
  setup.etcd->always(kRange, ok(reply_of(7, 1)));
  auto& client = setup.client();
  setup.etcd->endpoint("http://one:2379", refused());
  setup.etcd->endpoint("http://two:2379", ok(reply_of(8, 99)));
  for (int i = 0; i < 3; ++i) {
    const auto range = client.range({"a"}, Context::with_timeout(500ms));
    check_error(range, ErrorCode::Connection, Outcome::NotApplied);
    CHECK(mentions(range.error(), "two:2379: it belongs to another cluster"));
    CHECK(mentions(range.error(), "one:2379: the script says no"));
    const auto put = client.put("a", "b", Context::with_timeout(500ms));
    check_error(put, ErrorCode::Connection, Outcome::NotApplied);
  }
  for (const auto& seen : setup.etcd->seen(kPut)) {
    CHECK(seen.request.endpoint == "http://one:2379");  // no write goes astray
  }
  // Nor its refusals, which do not say whose they are.
  setup.etcd->endpoint("http://two:2379",
                       [](const HttpRequest& request, const auto& sink, const auto& ctx) {
                         const auto& body = request.body;
                         auto knock = body.find("keys_only") != std::string::npos;
                         return knock ? ok(reply_of(8, 99))(request, sink, ctx)
                                      : etcd_error(400, 11,
                                                   "etcdserver: mvcc: required revision "
                                                   "has been compacted")(request, sink, ctx);
                       });
  check_error(client.range({"a"}, Context::with_timeout(500ms)), ErrorCode::Connection,
              Outcome::NotApplied);
  setup.etcd->endpoint("http://one:2379", nullptr);
  CHECK(client.range({"a"}));
  std::lock_guard<std::mutex> hold(mutex);
  const auto first = log.find("another cluster");
  REQUIRE(first != std::string::npos);
  CHECK(log.find("another cluster", first + 1) == std::string::npos);
}

TEST_CASE("members: who may not read the first key is believed all the same") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  setup.etcd->always(kRange, ok(reply_of(7, 1)));
  auto& client = setup.client();
  setup.etcd->endpoint("http://one:2379", refused());
  setup.etcd->endpoint("http://two:2379", etcd_error(403, 7, "etcdserver: permission denied"));
  check_error(client.range({"a"}), ErrorCode::PermissionDenied, Outcome::NotApplied);
}

TEST_CASE("members: what needs a quorum says so, and how much time there is") {
  Setup setup;
  auto& client = setup.client();
  setup.etcd->always("/v3/maintenance/status", ok(reply(6)));
  client.put("a", "b", Context::with_timeout(4s)).value();
  RangeRequest serializable{"a"};
  serializable.serializable = true;
  client.range({"a"}).value();
  client.range(serializable).value();
  client.status().value();
  const auto seen = setup.etcd->seen();
  REQUIRE(seen.size() == 4);
  const char* leaders[] = {"true", "true", "", ""};
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(header(seen[i].request, "Grpc-Metadata-hasleader") == leaders[i]);
    const auto time = header(seen[i].request, "Grpc-Timeout");
    REQUIRE(time.size() > 1);
    CHECK(time.back() == 'm');
    const auto ms = std::stoi(time);
    CHECK(ms <= (i == 0 ? 4000 : 5000));
    CHECK(ms > (i == 0 ? 2000 : 2500));  // there is time enough to be told all but a little
  }
}

TEST_CASE("members: the same endpoint twice is one") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "http://one:2379", "one:02379"};
  auto& client = setup.client();
  setup.etcd->always(kRange, refused());
  const auto range = client.range({"a"}, Context::with_timeout(500ms));
  check_error(range, ErrorCode::Connection, Outcome::NotApplied);
  CHECK(mentions(range.error(), "etcd could not be reached: one:2379: "));
}

// Time.

TEST_CASE("time: a deadline ends a call, also one in a transport that overruns it") {
  for (const auto& hang : {silence(), deaf_to_deadlines()}) {
    Setup setup;
    auto& client = setup.client();
    setup.etcd->always(kRange, hang);
    setup.etcd->always(kPut, hang);
    const Stopwatch watch;
    check_error(client.range({"a"}, Context::with_timeout(50ms)), ErrorCode::Timeout,
                Outcome::NotApplied);
    CHECK(watch.elapsed() >= 50ms);
    CHECK(watch.over(lenient(150ms)) == 0);
    check_error(client.put("a", "b", Context::with_timeout(500ms)), ErrorCode::Timeout,
                Outcome::MaybeApplied);
    CHECK(watch.over(lenient(750ms)) == 0);
  }
}

TEST_CASE("time: options.timeout where the Context says nothing") {
  Setup setup;
  setup.options.timeout = 40ms;
  auto& client = setup.client();
  setup.etcd->always(kRange, silence());
  const Stopwatch watch;
  check_error(client.range({"a"}), ErrorCode::Timeout, Outcome::NotApplied);
  CHECK(watch.elapsed() >= 40ms);
  CHECK(watch.over(lenient(140ms)) == 0);
}

TEST_CASE("time: a deadline in the far future is no hurry") {
  Setup setup;
  auto& client = setup.client();
  setup.etcd->always(
      kRange, [](const auto&, const auto&, const Context& ctx) -> Result<HttpResponse> {
        std::this_thread::sleep_for(40ms);  // longer than the grace that transports get
        if (ctx.done()) return Error{ErrorCode::Cancelled, "done too early", "", {}, 0};
        return HttpResponse{200, reply(1)};
      });
  for (const auto& far : {Context::with_deadline(std::chrono::steady_clock::time_point::max()),
                          Context::with_timeout(milliseconds::max()), Context()}) {
    const auto range = client.range({"a"}, far);
    CHECK_MESSAGE(range, text_of(range));
  }
}

TEST_CASE("time: a delay between rounds ends with the deadline") {
  Setup setup;
  setup.options.retry_config.initial_delay = 10s;
  setup.options.retry_config.max_delay = 10s;
  auto& client = setup.client();
  setup.etcd->always(kPut, refused());
  const Stopwatch watch;
  const auto put = client.put("a", "b", Context::with_timeout(200ms));
  check_error(put, ErrorCode::Connection, Outcome::NotApplied);
  CHECK(mentions(put.error(), "the script says no"));
  CHECK(watch.over(lenient(300ms)) == 0);
}

TEST_CASE("time: what passes is asked for often, whatever the delays between rounds") {
  Setup setup;
  setup.options.retry_config.initial_delay = setup.options.retry_config.max_delay = 2s;
  auto& client = setup.client();
  setup.etcd->next(kRange, refused(), 2);
  const Stopwatch watch;
  CHECK(client.range({"a"}));
  CHECK(watch.over(lenient(1500ms)) == 0);
}

TEST_CASE("time: that etcd cannot be reached is said also where the last try took too long") {
  Setup setup;
  auto& client = setup.client();
  setup.etcd->always(kRange, after(600ms, refused()));
  const auto range = client.range({"a"}, Context::with_timeout(500ms));
  check_error(range, ErrorCode::Connection, Outcome::NotApplied);
}

TEST_CASE("time: a cancelled call returns within 100 ms, wherever it is") {
  Setup setup;
  setup.options.retry_config.initial_delay = 10s;
  setup.options.retry_config.max_delay = 10s;
  auto& client = setup.client();
  for (const auto& wait : {silence(), deaf_to_deadlines(), refused()}) {
    setup.etcd->clear();
    setup.etcd->always(kPut, wait);
    const Context ctx;
    Stopwatch watch;
    std::thread canceller([&] {
      wait_until([&] { return setup.etcd->count() > 0; }, lenient(5s));
      std::this_thread::sleep_for(5ms);  // some of them have begun to wait then
      watch.reset();
      ctx.cancel();
    });
    const auto put = client.put("a", "b", ctx);
    CHECK(watch.over(lenient(100ms)) == 0);
    canceller.join();
    REQUIRE_FALSE(put);
    CHECK(put.error().code == ErrorCode::Cancelled);
    CHECK(setup.etcd->count(kPut) == 1);
  }
}

TEST_CASE("time: a timeout says for what, and how long was waited") {
  Setup setup;
  auto& client = setup.client();
  setup.etcd->always(kRange, silence());
  const Stopwatch watch;
  const auto range = client.range({"some/key"}, Context::with_timeout(120ms));
  check_error(range, ErrorCode::Timeout, Outcome::NotApplied);
  INFO(text_of(range));
  double done = 0, answered = 0;
  const auto& error = range.error();
  REQUIRE(std::sscanf(error.message.c_str(), "the read of some/key was not done in %lf s", &done));
  REQUIRE(std::sscanf(error.cause.c_str(), "one:2379: no answer in %lf s", &answered));
  for (const double told : {done, answered}) {
    CHECK(told >= 0.1);
    CHECK(told <= watch.seconds() + 0.1);
  }
}

TEST_CASE("time: a Context that is over sends nothing") {
  Setup setup;
  auto& client = setup.client();
  const Context cancelled;
  cancelled.cancel();
  check_error(client.put("a", "b", cancelled), ErrorCode::Cancelled, Outcome::NotApplied);
  check_error(client.put("a", "b", Context::with_timeout(0ms)), ErrorCode::Timeout,
              Outcome::NotApplied);
  check_error(client.range({"a"}, Context::child_of(cancelled)), ErrorCode::Cancelled,
              Outcome::NotApplied);
  CHECK(setup.etcd->count() == 0);
}

TEST_CASE("time: close() ends the calls that are under way") {
  Setup setup;
  auto& client = setup.client();
  setup.etcd->always(kPut, silence());
  Result<PutResponse> put = PutResponse{};
  std::thread caller([&] { put = client.put("a", "b", Context::with_timeout(10s)); });
  CHECK(wait_until([&] { return setup.etcd->count() > 0; }, lenient(5s)));
  const Stopwatch watch;
  setup.coordinator->close().value();
  caller.join();
  CHECK(watch.over(lenient(1s)) == 0);
  check_error(put, ErrorCode::Cancelled, Outcome::MaybeApplied);
  check_error(client.range({"a"}), ErrorCode::Cancelled, Outcome::NotApplied);
  CHECK(setup.etcd->count(kPut) == 1);
}

// Bad input.

TEST_CASE("bad input: nothing is sent") {
  Setup setup;
  auto& client = setup.client();
  const auto invalid = [&](const auto& result) {
    CHECK_FALSE(result);
    if (result) return;
    CHECK_MESSAGE(result.error().code == ErrorCode::Validation, text_of(result));
    CHECK(result.error().outcome == Outcome::NotApplied);
    CHECK_FALSE(result.error().message.empty());
  };
  invalid(client.get(""));
  invalid(client.range({}));
  invalid(client.put("", "value"));
  invalid(client.remove(""));
  invalid(client.grant(0ms));
  invalid(client.grant(-5s));
  invalid(client.watch(""));
  WatchRequest negative;
  negative.key = "a";
  negative.start_revision = -1;
  invalid(client.watch(negative));
  WatchRequest nothing;
  nothing.key = "a";
  nothing.no_put = nothing.no_delete = true;
  invalid(client.watch(nothing));
  WatchRequest good;
  good.key = "a";
  invalid(client.watch(good, nullptr));

  auto& lock = setup.coordinator->lock();
  auto& election = setup.coordinator->election();
  auto& config = setup.coordinator->config();
  auto& registry = setup.coordinator->registry();
  for (const char* const text :
       {"", "/", "/a", "a/", "a//b", "..", "a/..", "../b", "a/../b", ".", "a/./b", "a/."}) {
    const std::string key = text;
    INFO(key);
    invalid(lock.acquire(key, 10s));
    invalid(lock.try_acquire(key, 10s));
    invalid(lock.acquire_shared(key, 10s));
    invalid(lock.try_acquire_shared(key, 10s));
    invalid(lock.semaphore(key, 2).acquire(10s));
    invalid(lock.semaphore(key, 2).try_acquire(10s));
    invalid(election.campaign(key, "me", 10s));
    invalid(election.leader(key));
    invalid(election.observe(key));
    invalid(election.observe(key, [](const LeaderInfo&) {}));
    invalid(config.get(key));
    invalid(config.get_as<int>(key));
    invalid(config.get_entry(key));
    invalid(config.set(key, 1));
    invalid(config.compare_and_set(key, 0, 1));
    invalid(config.remove(key));
    invalid(config.watch(key));
    invalid(config.watch(key, [](const ConfigEvent&) {}));
    if (key.empty()) continue;  // it means all of them
    invalid(config.list(key));
    invalid(config.watch_prefix(key));
    invalid(config.watch_prefix(key, [](const ConfigEvent&) {}));
    invalid(config.view(key));
  }
  for (const auto ttl : {0ms, -1ms, milliseconds(-10000)}) {
    invalid(lock.acquire("a", ttl));
    invalid(lock.try_acquire("a", ttl));
    invalid(lock.acquire_shared("a", ttl));
    invalid(lock.semaphore("a", 1).acquire(ttl));
    invalid(election.campaign("a", "me", ttl));
    invalid(registry.register_service({"id", "name", "host", 80, {}, ttl}));
  }
  invalid(lock.semaphore("a", 0).acquire(10s));
  invalid(lock.semaphore("a", -1).try_acquire(10s));
  invalid(config.compare_and_set("a", -1, 1));
  invalid(config.set("a", "\xff"));
  invalid(config.set("a", {{"b", "\xff"}}));
  invalid(config.set("a", std::numeric_limits<double>::quiet_NaN()));

  const ServiceInfo right{"id", "name", "host", 80, {}, 10s};
  for (const char* segment : {"", "/", "a/b", "/a", "a/", ".", ".."}) {
    INFO(std::string(segment));
    auto service = right;
    service.id = segment;
    invalid(registry.register_service(service));
    invalid(registry.unregister(segment));
    service = right;
    service.name = segment;
    invalid(registry.register_service(service));
    invalid(registry.discover(segment));
    invalid(registry.watch(segment));
    invalid(registry.watch(segment, [](const ServiceEvent&) {}));
    invalid(registry.view(segment));
  }
  for (const int port : {0, -1, 65536, 1 << 30}) {
    auto service = right;
    service.port = port;
    invalid(registry.register_service(service));
  }
  auto service = right;
  service.address = "";
  invalid(registry.register_service(service));

  CHECK(setup.etcd->count() == 0);
  setup.coordinator->close().value();
  CHECK(setup.etcd->count() == 0);
}

TEST_CASE("time: a caller's deadline may be longer than options.timeout") {
  Setup setup;
  setup.options.timeout = 100ms;
  setup.client();
  setup.etcd->next(kRange, [](const HttpRequest&, const ChunkSink&, const Context& ctx) {
    std::this_thread::sleep_for(250ms);
    return ctx.done() ? Result<HttpResponse>(Error{ErrorCode::Timeout, "late"})
                      : Result<HttpResponse>(HttpResponse{200, reply(1)});
  });
  CHECK(setup.client().range({"a"}, Context::with_timeout(5s)));
}

TEST_CASE("members: a short deadline is not held against one") {
  Setup setup;
  setup.options.endpoints = {"one:2379", "two:2379"};
  setup.client();
  setup.etcd->next(kPut, silence());
  check_error(setup.client().put("a", "b", Context::with_timeout(200ms)), ErrorCode::Timeout,
              Outcome::MaybeApplied);
  CHECK(setup.client().range({"a"}));
  for (const auto& endpoint : setup.etcd->endpoints()) CHECK(endpoint == "http://one:2379");
}

TEST_CASE("time: close() ends the pause between two attempts") {
  Setup setup;
  setup.options.retry_config.initial_delay = setup.options.retry_config.max_delay = 4s;
  setup.client();
  setup.etcd->always(kPut, refused());
  const Stopwatch watch;
  std::thread caller([&] {
    const auto put = setup.client().put("a", "b");
    CHECK_FALSE(put);
    if (!put) CHECK_MESSAGE(put.error().code == ErrorCode::Cancelled, text_of(put));
  });
  CHECK(wait_until([&] { return setup.etcd->count(kPut) > 0; }, lenient(2s)));
  setup.coordinator->close().value();
  caller.join();
  CHECK(watch.over(lenient(2s)) == 0);
}

TEST_CASE("client: JSON that is no reply of etcd is not quoted in the error") {
  Setup setup;
  setup.client();
  setup.etcd->always(kRange, ok(R"({"kvs":[{"key":"YQ==","value":"c2VjcmV0")"));
  const auto got = setup.client().get("a");
  REQUIRE_FALSE(got);
  CHECK_FALSE(mentions(got.error(), "c2VjcmV0"));
}

TEST_CASE("members: a stream that our own deadline ended is not held against one") {
  Cluster cluster;
  Notes log;
  auto options = cluster.options();
  options.logger = log.logger();
  auto c = connect_to(options), d = cluster.connect("two");
  const auto held = d.lock().acquire("a", 9s).value();
  const auto waited = c.lock().acquire("a", 9s, Context::with_timeout(400ms));
  REQUIRE_FALSE(waited);
  CHECK(waited.error().code == ErrorCode::Timeout);
  c.close().value();
  CHECK_FALSE(log.contain("a member has failed"));
}

TEST_CASE("client: a request leaves no timer behind" * doctest::skip(sanitized())) {
  Cluster cluster;
  auto c = cluster.connect();
  for (int i = 0; i < 1000; ++i) static_cast<void>(c.client().get("x"));
  const auto before = rss_kb();
  for (int i = 0; i < 20000; ++i) static_cast<void>(c.client().get("x"));
  CHECK(rss_kb() - before < 3000);
}

TEST_CASE("client: what is to be ignored must not be given, and must be there") {
  auto c = Coordinator::in_memory();
  PutRequest put;
  put.key = "a";
  put.value = "1";
  put.ignore_value = true;
  check_error(c.client().put(put), ErrorCode::Validation, Outcome::NotApplied);
  check_error(c.client().commit(Txn().then(Op::put(put))), ErrorCode::Validation,
              Outcome::NotApplied);
  check_error(c.client().commit(Txn().otherwise(Op::txn(Txn().then(Op::put(put))))),
              ErrorCode::Validation, Outcome::NotApplied);
  put.value.clear();
  check_error(c.client().put(put), ErrorCode::NotFound, Outcome::NotApplied);
  check_error(c.client().commit(Txn().then(Op::put(put))), ErrorCode::NotFound,
              Outcome::NotApplied);
  put.value = "1";
  put.ignore_value = false;
  put.ignore_lease = true;
  put.lease = 7;
  check_error(c.client().put(put), ErrorCode::Validation, Outcome::NotApplied);
  put.lease = 0;
  check_error(c.client().put(put), ErrorCode::NotFound, Outcome::NotApplied);
  CHECK(c.client().put("a", "0"));
  CHECK(c.client().put(put));
  CHECK(c.client().get("a").value().value == "1");
}

TEST_CASE("client: a sort target without an order sorts upwards") {
  auto c = Coordinator::in_memory();
  for (const char* key : {"/c", "/a", "/b"}) c.client().put(key, "").value();
  RangeRequest range;
  range.key = "/";
  range.range_end = prefix_range_end("/");
  range.sort_target = SortTarget::Mod;
  const auto found = c.client().range(range).value();
  REQUIRE(found.kvs.size() == 3);
  CHECK(found.kvs[0].key == "/c");
  CHECK(found.kvs[1].key == "/a");
  CHECK(found.kvs[2].key == "/b");
}
