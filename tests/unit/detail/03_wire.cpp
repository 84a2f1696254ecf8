// Section 3: what is sent to etcd, byte by byte, and what is made of its answers. The answers are
// those of etcd 3.4 and 3.5 as they came over the wire.
#include <doctest/doctest.h>

#include <limits>
#include <random>

#include "coordination.hpp"
#include "support/wait.hpp"

using namespace coordination;
using namespace coordination::detail;
using namespace support;
using wire::Json;

namespace {

std::string b64(std::string_view bytes) { return wire::base64_encode(bytes); }

std::string random_bytes(std::mt19937_64& random, std::size_t size) {
  std::string bytes(size, '\0');
  for (char& c : bytes) c = static_cast<char>(random() & 0xff);
  return bytes;
}

template <class Request>
void check_encoded(const Request& request, const char* expected) {
  CHECK(Json::parse(wire::body(request)) == Json::parse(expected));
}

template <class Reply>
Reply decoded(const std::string& body) {
  Reply reply;
  REQUIRE_MESSAGE(wire::decode_reply(body, reply), body);
  return reply;
}

std::string nested(const char* open, const char* close, int depth) {
  std::string text;
  for (int i = 0; i < depth; ++i) text += open;
  text += "1";
  for (int i = 0; i < depth; ++i) text += close;
  return text;
}

}  // namespace

// Base64.

TEST_CASE("base64: the vectors of RFC 4648") {
  const std::pair<const char*, const char*> vectors[] = {{"", ""},
                                                         {"f", "Zg=="},
                                                         {"fo", "Zm8="},
                                                         {"foo", "Zm9v"},
                                                         {"foob", "Zm9vYg=="},
                                                         {"fooba", "Zm9vYmE="},
                                                         {"foobar", "Zm9vYmFy"}};
  for (const auto& [bytes, text] : vectors) {
    CHECK(b64(bytes) == text);
    CHECK(wire::base64_decode(text) == std::string(bytes));
  }
  CHECK(b64(std::string("\0", 1)) == "AA==");
  CHECK(b64("\xff\xfe\xfb") == "//77");
}

TEST_CASE("base64: random bytes of every length come back") {
  std::mt19937_64 random(1);
  for (std::size_t size = 0; size < 300; ++size) {
    const auto bytes = random_bytes(random, size);
    const auto text = b64(bytes);
    CHECK(text.size() == (size + 2) / 3 * 4);
    CHECK(text.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                                 "0123456789+/=") == std::string::npos);
    CHECK(wire::base64_decode(text) == bytes);
  }
}

TEST_CASE("base64: what is none is refused") {
  for (const char* text :
       {"Z", "Zg", "Zg=", "Zm9vY", "=", "====", "Z===", "Zg==Zg==", "Z=g=", "=Zg=", "Zm 9v",
        "Zm9\n", "Zm9-", "Zm_v", "Zm9v\xc3\xa4\xc3\xa4", "Zm9v===="}) {
    CHECK_MESSAGE(!wire::base64_decode(text).has_value(), text);
  }
  CHECK_FALSE(wire::base64_decode(std::string_view("Zm\0v", 4)).has_value());
}

// Parsing.

TEST_CASE("parse: what is no JSON is nothing") {
  for (const char* text : {"", " ", "{", "}", "[1,", "nul", "{\"a\":}", "{'a':1}", "1 2", "{}{}",
                           "\"", "<html></html>", "404 page not found\n", "\xff", "1e400"}) {
    CHECK_MESSAGE(!wire::parse(text).has_value(), text);
  }
  CHECK(wire::parse(" {\"a\": [1, -2, 3.5, true, null, \"\"]}\n").has_value());
}

TEST_CASE("parse: depth has a limit, and no depth can do harm") {
  for (const int depth : {1, 100}) {
    CHECK(wire::parse(nested("[", "]", depth)).has_value());
    CHECK(wire::parse(nested("{\"a\":", "}", depth)).has_value());
  }
  for (const int depth : {200, 1000, 200000}) {
    CHECK_FALSE(wire::parse(nested("[", "]", depth)).has_value());
    CHECK_FALSE(wire::parse(nested("{\"a\":", "}", depth)).has_value());
    CHECK_FALSE(wire::parse(std::string(static_cast<std::size_t>(depth), '[')).has_value());
  }
  // Width is none of its business.
  std::string wide = "[0";
  for (int i = 0; i < 10000; ++i) wide += ",[{}]";
  CHECK(wire::parse(wide + "]").has_value());
}

TEST_CASE("parse: very many tiny values are no JSON of etcd's, very many of its own are") {
  const auto list = [](const std::string& value, std::size_t count) {
    std::string text = "[";
    for (std::size_t i = 1; i < count; ++i) text += value + ",";
    return text + value + "]";
  };
  CHECK(wire::parse(list("0", 900'000)));
  CHECK_FALSE(wire::parse(list("0", 1'100'000)));
  CHECK_FALSE(wire::parse(list("{}", 600'000)));
  CHECK(wire::count_values(list(R"({"ID":"7587870000000000001"})", 1'100'000)) == 2'200'001);
  CHECK(wire::count_values(list(R"({"key":"YQ==","version":"1"})", 500'000)) == 1'500'001);
}

TEST_CASE("parse: members of an odd kind are zero") {
  const wire::Document document(R"({"n":"12","m":-3,"f":2.0,"big":"18446744073709551615",
      "neg":"-9223372036854775808","bad":"x1","null":null,"obj":{},"arr":[],"t":true,"s":"text",
      "b":"Zm9v","nob":"***","s":"last of two"})");
  REQUIRE(document.root());
  const auto& json = *document.root();
  CHECK(wire::number(json, "n") == 12);
  CHECK(wire::number(json, "m") == -3);
  CHECK(wire::number(json, "f") == 2);
  CHECK(static_cast<std::uint64_t>(wire::number(json, "big")) == 18446744073709551615u);
  CHECK(wire::number(json, "neg") == std::numeric_limits<std::int64_t>::min());
  for (const char* name : {"bad", "null", "obj", "arr", "t", "missing"}) {
    CHECK(wire::number(json, name) == 0);
  }
  CHECK(wire::text(json, "s") == "last of two");
  CHECK(wire::text(json, "m").empty());
  CHECK(wire::bytes(json, "b") == "foo");
  CHECK(wire::bytes(json, "nob").empty());
  CHECK(wire::bytes(json, "m").empty());
  CHECK(wire::flag(json, "t"));
  CHECK_FALSE(wire::flag(json, "s"));
  CHECK_FALSE(wire::flag(json, "missing"));
  for (const char* other : {"null", "[]", "1", "\"text\""}) {
    const wire::Document odd(other);
    REQUIRE(odd.root());
    CHECK(wire::number(*odd.root(), "n") == 0);
    CHECK(wire::text(*odd.root(), "n").empty());
  }
}

TEST_CASE("parse: a value is what nlohmann makes of the text") {
  for (const char* text :
       {"null", "true", "-7", "18446744073709551615", "-9223372036854775808", "1.5", "-0.0", "1e3",
        R"("")", R"("a\u00e4\n\u0000b")", "[]", "{}", "[[],{},[{}],0]",
        R"({"a":{"b":[1,{"c":null}],"d":"e"},"f":[true,false],"":"","a2":3,"a2":{"last":1}})"}) {
    CAPTURE(text);
    const auto value = wire::parse(text);
    REQUIRE(value);
    CHECK(*value == Json::parse(text));
    CHECK(value->dump() == Json::parse(text).dump());
  }
}

// Requests.

TEST_CASE("requests: range") {
  RangeRequest request;
  request.key = "foo";
  check_encoded(request, R"({"key":"Zm9v"})");
  request.range_end = "fop";
  request.limit = 5;
  request.revision = 9007199254740993;
  request.sort_order = SortOrder::Descend;
  request.sort_target = SortTarget::Create;
  request.serializable = request.keys_only = request.count_only = true;
  request.min_mod_revision = 1;
  request.max_mod_revision = 2;
  request.min_create_revision = 3;
  request.max_create_revision = 4;
  check_encoded(request, R"({"key":"Zm9v","range_end":"Zm9w","limit":"5",
      "revision":"9007199254740993","sort_order":"DESCEND","sort_target":"CREATE",
      "serializable":true,"keys_only":true,"count_only":true,"min_mod_revision":"1",
      "max_mod_revision":"2","min_create_revision":"3","max_create_revision":"4"})");
}

TEST_CASE("requests: every sort order and target has its name") {
  RangeRequest request;
  request.key = "a";
  const std::pair<SortTarget, const char*> targets[] = {{SortTarget::Key, "KEY"},
                                                        {SortTarget::Version, "VERSION"},
                                                        {SortTarget::Create, "CREATE"},
                                                        {SortTarget::Mod, "MOD"},
                                                        {SortTarget::Value, "VALUE"}};
  for (const auto& [target, name] : targets) {
    request.sort_target = target;
    request.sort_order = SortOrder::Ascend;
    CHECK(Json::parse(wire::body(request))["sort_order"] == "ASCEND");
    CHECK(Json::parse(wire::body(request))["sort_target"] == name);
    request.sort_order = SortOrder::None;
    const auto unordered = Json::parse(wire::body(request));  // etcd sorts upwards by it
    CHECK(unordered.value("sort_target", "KEY") == name);
    CHECK(unordered.contains("sort_target") == (target != SortTarget::Key));
  }
}

TEST_CASE("requests: all keys") {
  RangeRequest request;
  request.range_end = std::string(1, '\0');
  check_encoded(request, R"({"key":"AA==","range_end":"AA=="})");
  RemoveRequest remove;
  remove.range_end = std::string(1, '\0');
  check_encoded(remove, R"({"key":"AA==","range_end":"AA=="})");
}

TEST_CASE("requests: prefix_range_end") {
  CHECK(prefix_range_end("foo") == "fop");
  CHECK(prefix_range_end("/a/") == "/a0");
  CHECK(prefix_range_end("a\xff") == "b");
  CHECK(prefix_range_end("a\xff\xff") == "b");
  CHECK(prefix_range_end("\xff\xff") == std::string(1, '\0'));
  CHECK(prefix_range_end("") == std::string(1, '\0'));
  CHECK(prefix_range_end("\x7f") == "\x80");
}

TEST_CASE("requests: put") {
  PutRequest request;
  request.key = "foo";
  check_encoded(request, R"({"key":"Zm9v"})");
  request.value = "\xff\xfe\xfb";
  request.lease = -1;
  request.prev_kv = true;
  check_encoded(request, R"({"key":"Zm9v","value":"//77","lease":"-1","prev_kv":true})");
  request.ignore_value = true;  // etcd refuses a value beside it
  check_encoded(request, R"({"key":"Zm9v","lease":"-1","prev_kv":true,"ignore_value":true})");
  request.ignore_value = false;
  request.ignore_lease = true;
  check_encoded(request, R"({"key":"Zm9v","value":"//77","prev_kv":true,"ignore_lease":true})");
}

TEST_CASE("requests: remove") {
  RemoveRequest request;
  request.key = "foo";
  check_encoded(request, R"({"key":"Zm9v"})");
  request.range_end = "fop";
  request.prev_kv = true;
  check_encoded(request, R"({"key":"Zm9v","range_end":"Zm9w","prev_kv":true})");
}

TEST_CASE("requests: compares") {
  using Is = Compare::Is;
  const std::pair<Compare, const char*> cases[] = {
      {Compare::create_revision("a", Is::Equal, 7),
       R"({"key":"YQ==","result":"EQUAL","target":"CREATE","create_revision":"7"})"},
      {Compare::mod_revision("a", Is::Greater, 7),
       R"({"key":"YQ==","result":"GREATER","target":"MOD","mod_revision":"7"})"},
      {Compare::version("a", Is::Less, 7),
       R"({"key":"YQ==","result":"LESS","target":"VERSION","version":"7"})"},
      {Compare::lease("a", Is::NotEqual, 7),
       R"({"key":"YQ==","result":"NOT_EQUAL","target":"LEASE","lease":"7"})"},
      {Compare::value("a", Is::Equal, "foo"),
       R"({"key":"YQ==","result":"EQUAL","target":"VALUE","value":"Zm9v"})"},
      {Compare::exists("a"),
       R"({"key":"YQ==","result":"GREATER","target":"CREATE","create_revision":"0"})"},
      {Compare::missing("a"),
       R"({"key":"YQ==","result":"EQUAL","target":"CREATE","create_revision":"0"})"}};
  for (const auto& [compare, expected] : cases) check_encoded(compare, expected);
  auto range = Compare::missing("a");
  range.range_end = "b";
  check_encoded(range, R"({"key":"YQ==","range_end":"Yg==","result":"EQUAL","target":"CREATE",
      "create_revision":"0"})");
}

TEST_CASE("requests: txn, also one inside another") {
  check_encoded(Txn{}, R"({"compare":[],"success":[],"failure":[]})");
  PutRequest put;
  put.key = "p";
  put.lease = 5;
  put.ignore_value = true;
  RemoveRequest remove;
  remove.key = "r";
  RangeRequest range;
  range.key = "g";
  range.limit = 1;
  Txn inner;
  inner.then(Op::get("i"));
  const auto txn = Txn{}
                       .when(Compare::missing("a"))
                       .when(Compare::exists("b"))
                       .then(Op::put("k", "v", 9))
                       .then(Op::put(put))
                       .then(Op::range(range))
                       .otherwise(Op::remove("x"))
                       .otherwise(Op::remove(remove))
                       .otherwise(Op::txn(inner));
  check_encoded(txn, R"({
    "compare":[{"key":"YQ==","result":"EQUAL","target":"CREATE","create_revision":"0"},
               {"key":"Yg==","result":"GREATER","target":"CREATE","create_revision":"0"}],
    "success":[{"request_put":{"key":"aw==","value":"dg==","lease":"9"}},
               {"request_put":{"key":"cA==","lease":"5","ignore_value":true}},
               {"request_range":{"key":"Zw==","limit":"1"}}],
    "failure":[{"request_delete_range":{"key":"eA=="}},
               {"request_delete_range":{"key":"cg=="}},
               {"request_txn":{"compare":[],"failure":[],
                "success":[{"request_range":{"key":"aQ=="}}]}}]})");
}

TEST_CASE("requests: leases, compaction, login") {
  CHECK(wire::grant_body(777, 5) == R"({"ID":"777","TTL":"5"})");
  CHECK(wire::lease_body(9223372036854775807) == R"({"ID":"9223372036854775807"})");
  CHECK(wire::compaction_body(2734) == R"({"revision":"2734"})");
  CHECK(wire::login_body("root", "p\"w\n") == R"({"name":"root","password":"p\"w\n"})");
}

TEST_CASE("requests: watch") {
  const auto check = [](const WatchRequest& request, std::int64_t start, const char* expected) {
    CHECK(Json::parse(wire::watch_body(request, 3, start)) == Json::parse(expected));
  };
  WatchRequest request;
  request.key = "wa";
  check(request, 0, R"({"create_request":{"key":"d2E=","watch_id":"3","progress_notify":true,
      "fragment":true}})");
  request.range_end = "wb";
  request.prev_kv = true;
  request.no_put = true;
  check(request, 8, R"({"create_request":{"key":"d2E=","range_end":"d2I=","watch_id":"3",
      "start_revision":"8","prev_kv":true,"progress_notify":true,"fragment":true,
      "filters":["NOPUT"]}})");
  request.no_put = false;
  request.no_delete = true;
  request.prev_kv = false;
  check(request, 8, R"({"create_request":{"key":"d2E=","range_end":"d2I=","watch_id":"3",
      "start_revision":"8","progress_notify":true,"fragment":true,"filters":["NODELETE"]}})");
  WatchRequest all;
  all.range_end = std::string(1, '\0');
  check(all, 0, R"({"create_request":{"key":"AA==","range_end":"AA==","watch_id":"3",
      "progress_notify":true,"fragment":true}})");
}

TEST_CASE("requests: a body has no line break, whatever is in it") {
  std::mt19937_64 random(2);
  for (int i = 0; i < 50; ++i) {
    WatchRequest watch;
    watch.key = random_bytes(random, 20) + "\n\r\n";
    CHECK(wire::watch_body(watch, 1, 2).find_first_of("\r\n") == std::string::npos);
    const auto txn = Txn{}.then(Op::put(watch.key, watch.key));
    CHECK(wire::body(txn).find_first_of("\r\n") == std::string::npos);
  }
  CHECK(wire::login_body("a\nb", "c\r\nd").find_first_of("\r\n") == std::string::npos);
}

// Answers.

namespace {
const char* const kHeader =
    R"("header":{"cluster_id":"14841639068965178418","member_id":"10276657743932975437",)"
    R"("revision":"9007199254740993","raft_term":"2"})";

std::string reply(const std::string& rest) {
  return "{" + std::string(kHeader) + (rest.empty() ? "" : ", " + rest) + "}";
}
}  // namespace

TEST_CASE("answers: range") {
  const auto response = decoded<RangeResponse>(reply(
      R"("kvs":[{"key":"Zm9v","create_revision":"2","mod_revision":"3","version":"2","value":"//77",
      "lease":"7587862094675018508"},{"key":"Zm9w"}],"more":true,"count":"20")"));
  CHECK(response.revision == 9007199254740993);
  CHECK(response.more);
  CHECK(response.count == 20);
  REQUIRE(response.kvs.size() == 2);
  CHECK(response.kvs[0].key == "foo");
  CHECK(response.kvs[0].value == "\xff\xfe\xfb");
  CHECK(response.kvs[0].create_revision == 2);
  CHECK(response.kvs[0].mod_revision == 3);
  CHECK(response.kvs[0].version == 2);
  CHECK(response.kvs[0].lease == 7587862094675018508);
  CHECK(response.kvs[1].key == "fop");
  CHECK(response.kvs[1].value.empty());
  CHECK(response.kvs[1].lease == 0);
}

TEST_CASE("answers: what is zero is left out") {
  const auto range = decoded<RangeResponse>(reply(""));
  CHECK(range.kvs.empty());
  CHECK(range.count == 0);
  CHECK_FALSE(range.more);
  const auto put = decoded<PutResponse>(reply(""));
  CHECK(put.revision == 9007199254740993);
  CHECK_FALSE(put.prev_kv.has_value());
  const auto removed = decoded<RemoveResponse>(reply(""));
  CHECK(removed.deleted == 0);
  CHECK(removed.prev_kvs.empty());
  const auto txn = decoded<TxnResponse>(reply(""));
  CHECK_FALSE(txn.succeeded);
  CHECK(txn.responses.empty());
  CHECK(txn.range(0).kvs.empty());
  const auto lease = decoded<wire::LeaseReply>(reply(""));
  CHECK(lease.ttl == 0);
}

TEST_CASE("answers: put and remove with what was there before") {
  const auto put =
      decoded<PutResponse>(reply(R"("prev_kv":{"key":"Zm9v","value":"YQ==","mod_revision":"4"})"));
  REQUIRE(put.prev_kv.has_value());
  CHECK(put.prev_kv->value == "a");
  CHECK(put.prev_kv->mod_revision == 4);
  const auto removed =
      decoded<RemoveResponse>(reply(R"("deleted":"2","prev_kvs":[{"key":"YQ=="},{"key":"Yg=="}])"));
  CHECK(removed.deleted == 2);
  REQUIRE(removed.prev_kvs.size() == 2);
  CHECK(removed.prev_kvs[1].key == "b");
}

TEST_CASE("answers: txn") {
  const auto txn = decoded<TxnResponse>(reply(
      R"("succeeded":true,"responses":[{"response_put":{"header":{"revision":"5"}}},
      {"response_range":{"header":{"revision":"4"},"kvs":[{"key":"YQ=="}],"count":"1"}},
      {"response_delete_range":{"header":{"revision":"5"},"deleted":"3"}},
      {"response_txn":{"header":{},"succeeded":true,
       "responses":[{"response_range":{"header":{}}}]}},{}])"));
  CHECK(txn.succeeded);
  REQUIRE(txn.responses.size() == 5);
  CHECK(std::get<PutResponse>(txn.responses[0]).revision == 5);
  CHECK(txn.range(1).kvs.size() == 1);
  CHECK(txn.range(1).revision == 4);
  CHECK(txn.range(0).kvs.empty());  // it was a put
  CHECK(txn.range(9).kvs.empty());
  CHECK(std::get<RemoveResponse>(txn.responses[2]).deleted == 3);
  const auto inner = std::get<std::shared_ptr<const TxnResponse>>(txn.responses[3]);
  CHECK(inner->succeeded);
  CHECK(inner->responses.size() == 1);
}

TEST_CASE("answers: grant, time to live, token, status") {
  const auto granted = decoded<wire::LeaseReply>(reply(R"("ID":"777","TTL":"5")"));
  CHECK(granted.id == 777);
  CHECK(granted.ttl == 5);
  const auto dead = decoded<wire::LeaseReply>(reply(R"("ID":"777","TTL":"-1")"));
  CHECK(dead.ttl == -1);
  CHECK(decoded<wire::Token>(reply(R"("token":"dxVVKPEFNyeEusUI.22")")).text ==
        "dxVVKPEFNyeEusUI.22");
  const auto status = decoded<Status>(reply(
      R"("version":"3.4.23","dbSize":"20480","leader":"10276657743932975437","raftIndex":"9",
      "raftTerm":"2","errors":["etcdserver: no leader"])"));
  CHECK(status.version == "3.4.23");
  CHECK(status.db_size == 20480);
  CHECK(status.leader == 10276657743932975437u);
  CHECK(status.member_id == 10276657743932975437u);
  CHECK(status.raft_term == 2);
  CHECK(status.revision == 9007199254740993);
  CHECK(status.errors == std::vector<std::string>{"etcdserver: no leader"});
}

TEST_CASE("answers: what is no answer of etcd's") {
  RangeResponse response;
  for (const char* body : {"", "{}", "null", "[]", "1", "{\"header\":1}", "<html>",
                           "{\"header\":{}", "{\"kvs\":[]}"}) {
    CHECK_MESSAGE(!wire::decode_reply(body, response), body);
  }
}

TEST_CASE("answers: members of a wrong kind do no harm") {
  for (const char* rest :
       {R"("kvs":{},"count":[],"more":"yes")", R"("kvs":[1,null,"x",[],{"key":5,"value":{}}])",
        R"("responses":{"a":1},"succeeded":"true")", R"("prev_kv":[],"deleted":{},"prev_kvs":1)",
        R"("events":[1,{}, {"kv":3}],"watch_id":{},"errors":{"a":[]},"version":4)"}) {
    const auto body = reply(rest);
    decoded<RangeResponse>(body);
    decoded<PutResponse>(body);
    decoded<RemoveResponse>(body);
    decoded<TxnResponse>(body);
    decoded<Status>(body);
    decoded<wire::LeaseReply>(body);
  }
  const auto txn = decoded<TxnResponse>(reply(R"("responses":[1,null,"x",[],{"response_put":1},
      {"response_txn":[]},{"response_delete_range":null},{"response_range":"x"}])"));
  CHECK(txn.responses.size() == 8);
}

// Errors.

TEST_CASE("errors of etcd: the shapes of either gateway") {
  const std::pair<const char*, wire::EtcdError> cases[] = {
      {R"({"error":"etcdserver: key is not provided","message":"etcdserver: key is not provided",
        "code":3})",
       {3, "etcdserver: key is not provided"}},
      {R"({"code":3, "message":"etcdserver: key is not provided"})",
       {3, "etcdserver: key is not provided"}},
      {"{ \"message\" : \"etcdserver: no leader\",\n \"code\":  14, \"details\":[ ] }",
       {14, "etcdserver: no leader"}},
      {R"({"error":{"grpc_code":14,"http_code":503,"message":"etcdserver: no leader",
        "http_status":"Service Unavailable"}})",
       {14, "etcdserver: no leader"}},
      {R"({"error":{"code":14,"message":"etcdserver: no leader"}})", {14, "etcdserver: no leader"}},
      {R"({"error":"illegal base64 data","code":2})", {2, "illegal base64 data"}},
      {R"({"code":5})", {5, ""}},
      {R"({"error":{"message":"etcdserver: no leader"}})", {0, "etcdserver: no leader"}}};
  for (const auto& entry : cases) {
    const std::string body = entry.first;  // a message's lambda cannot take a structured binding
    const auto& expected = entry.second;
    const auto error = wire::decode_error_body(body);
    REQUIRE_MESSAGE(error.has_value(), body);
    CHECK(error->code == expected.code);
    CHECK(error->message == expected.message);
  }
  for (const char* body : {"", "{}", "404 page not found\n", "{\"header\":{}}", "[]", "null",
                           "{\"error\":{}}", "{\"error\":[]}", "{\"error\":null}"}) {
    CHECK_MESSAGE(!wire::decode_error_body(body).has_value(), body);
  }
}

// Streams.

namespace {

const char* const kStream =
    R"({"result":{"header":{"revision":"7"},"watch_id":"1","created":true}})"
    "\n"
    R"({"result":{"header":{"revision":"8"},"watch_id":"1","events":[{"kv":{"key":"YQ==",)"
    R"("create_revision":"8","mod_revision":"8","version":"1","value":"eA=="}}]}})"
    "\n\n"
    R"({"error":{"grpc_code":14,"http_code":503,"message":"transport is closing"}})";

std::vector<std::string> cut(const std::vector<std::string_view>& pieces) {
  wire::Lines lines;
  std::vector<std::string> result;
  const auto take = [&](std::string_view line) { return result.emplace_back(line), true; };
  for (const auto piece : pieces) CHECK(lines.feed(piece, take));
  lines.finish(take);
  return result;
}

}  // namespace

TEST_CASE("lines: cut at every byte, they stay the same") {
  const std::string_view stream = kStream;
  const auto whole = cut({stream});
  REQUIRE(whole.size() == 3);  // the empty one is none, the last one has no end
  CHECK(whole[0].find("created") != std::string::npos);
  CHECK(whole[2].find("transport is closing") != std::string::npos);
  for (std::size_t i = 0; i <= stream.size(); ++i) {
    CHECK(cut({stream.substr(0, i), stream.substr(i)}) == whole);
    CHECK(cut({stream.substr(0, i), "", stream.substr(i)}) == whole);
  }
  std::vector<std::string_view> bytes;
  for (std::size_t i = 0; i < stream.size(); ++i) bytes.push_back(stream.substr(i, 1));
  CHECK(cut(bytes) == whole);
}

TEST_CASE("lines: none comes before it is complete, and none after the reader is through") {
  wire::Lines lines;
  std::vector<std::string> seen;
  const auto take = [&](std::string_view line) {
    seen.emplace_back(line);
    return line != "stop";
  };
  CHECK(lines.feed("on", take));
  CHECK(seen.empty());
  CHECK(lines.feed("e\ntwo", take));
  CHECK(seen == std::vector<std::string>{"one"});
  CHECK_FALSE(lines.feed("\nstop\nthree\n", take));
  CHECK(seen == std::vector<std::string>{"one", "two", "stop"});
}

TEST_CASE("lines: a line of 8 MB in small pieces") {
  const std::string line(8 << 20, 'x');
  wire::Lines lines;
  std::size_t size = 0;
  const auto take = [&](std::string_view text) { return size = text.size(), true; };
  for (std::size_t i = 0; i < line.size(); i += 1000) {
    lines.feed(std::string_view(line).substr(i, 1000), take);
  }
  CHECK(size == 0);
  lines.feed("\n", take);
  CHECK(size == line.size());
}

TEST_CASE("lines: what a watch says") {
  const auto decode = [](const std::string& text) {
    auto line = wire::decode_line<wire::WatchLine>(text);
    REQUIRE_MESSAGE(std::holds_alternative<wire::WatchLine>(line), text);
    return std::get<wire::WatchLine>(line);
  };
  const auto created =
      decode(R"({"result":{"header":{"revision":"7"},"watch_id":"3","created":true}})");
  CHECK(created.id == 3);
  CHECK(created.created);
  CHECK_FALSE(created.canceled);
  CHECK(created.revision == 7);
  const auto events = decode(
      R"({"result":{"header":{"revision":"9"},"watch_id":"3","events":[{"kv":{"key":"ZjI=",
      "create_revision":"8","mod_revision":"8","version":"1","value":"eA==","lease":"5"},
      "prev_kv":{"key":"ZjI=","value":"YQ=="}},
      {"type":"DELETE","kv":{"key":"d2E=","mod_revision":"9"}}]}})");
  REQUIRE(events.events.size() == 2);
  CHECK(events.events[0].type == EventType::Put);
  CHECK(events.events[0].kv.key == "f2");
  CHECK(events.events[0].kv.value == "x");
  CHECK(events.events[0].kv.lease == 5);
  CHECK(events.events[0].revision == 8);
  REQUIRE(events.events[0].prev_kv.has_value());
  CHECK(events.events[0].prev_kv->value == "a");
  CHECK(events.events[1].type == EventType::Delete);
  CHECK(events.events[1].kv.key == "wa");
  CHECK(events.events[1].revision == 9);
  CHECK_FALSE(events.events[1].prev_kv.has_value());
  const auto compacted = decode(
      R"({"result":{"header":{"raft_term":"2"},"watch_id":"7","canceled":true,
      "compact_revision":"2734"}})");
  CHECK(compacted.canceled);
  CHECK(compacted.compact_revision == 2734);
  const auto refused = decode(
      R"({"result":{"header":{},"watch_id":"-1","created":true,"canceled":true,
      "cancel_reason":"mvcc: watcher range is empty"}})");
  CHECK(refused.id == -1);
  CHECK(refused.created);
  CHECK(refused.canceled);
  CHECK(refused.cancel_reason == "mvcc: watcher range is empty");
  const auto progress = decode(R"({"result":{"header":{"revision":"9"},"watch_id":"3"}})");
  CHECK(progress.events.empty());
  CHECK(progress.revision == 9);
}

TEST_CASE("lines: what a keep-alive says") {
  const auto decode = [](const std::string& text) {
    return std::get<wire::LeaseReply>(wire::decode_line<wire::LeaseReply>(text));
  };
  const auto alive = decode(R"({"result":{"header":{"revision":"21"},"ID":"777","TTL":"5"}})");
  CHECK(alive.id == 777);
  CHECK(alive.ttl == 5);
  const auto dead = decode(R"({"result":{"header":{"revision":"21"},"ID":"778"}})");
  CHECK(dead.id == 778);
  CHECK(dead.ttl == 0);
}

TEST_CASE("lines: an error, and what is no line of etcd's") {
  using Line = decltype(wire::decode_line<wire::WatchLine>(""));
  const Line failed = wire::decode_line<wire::WatchLine>(
      R"({"error":{"grpc_code":14,"http_code":503,"message":"transport is closing"}})");
  REQUIRE(std::holds_alternative<wire::EtcdError>(failed));
  CHECK(std::get<wire::EtcdError>(failed).message == "transport is closing");
  for (const char* text : {"", "{", R"({"result":{"header":{"revision")", "{}", "<html>", "null",
                           R"({"result":5})", R"({"result":null})"}) {
    const Line line = wire::decode_line<wire::WatchLine>(text);
    CHECK_MESSAGE(std::holds_alternative<std::monostate>(line), text);
  }
}

TEST_CASE("lines: a line that ends at any byte is no line, and never a shorter event") {
  const std::string line(R"({"result":{"header":{"revision":"8"},"watch_id":"1","events":[{"kv":)"
                         R"({"key":"YQ==","mod_revision":"8","value":"eA=="}}]}})");
  for (std::size_t i = 0; i < line.size(); ++i) {
    const auto half = wire::decode_line<wire::WatchLine>(std::string_view(line).substr(0, i));
    CHECK(std::holds_alternative<std::monostate>(half));
  }
}

// Service records.

TEST_CASE("services: written as the Go module writes them, and read back") {
  ServiceInfo service{"api-1", "api", "10.0.0.1", 8080, {{"zone", "eu"}, {"v", "2"}}, 30s};
  CHECK(Json::parse(wire::encode_service(service)) ==
        Json::parse(R"({"id":"api-1","name":"api","address":"10.0.0.1","port":8080,
                    "metadata":{"v":"2","zone":"eu"},"ttl":30000000000})"));
  CHECK(wire::decode_service(wire::encode_service(service)) == service);
  service.metadata.clear();
  service.ttl = 1500ms;
  CHECK(wire::decode_service(wire::encode_service(service)) == service);
  service.metadata = {{"", ""}, {"q\"uote", "line\nbreak"}, {"\xc3\xa4", "\xe2\x82\xac"}};
  CHECK(wire::decode_service(wire::encode_service(service)) == service);
}

TEST_CASE("services: read as Go writes them") {
  const auto service = wire::decode_service(
      R"({"id":"api-1","name":"api","address":"10.0.0.1","port":8080,"metadata":{"zone":"eu"},)"
      R"("ttl":30000000000})");
  REQUIRE(service.has_value());
  CHECK(service->id == "api-1");
  CHECK(service->name == "api");
  CHECK(service->address == "10.0.0.1");
  CHECK(service->port == 8080);
  CHECK(service->metadata == std::map<std::string, std::string>{{"zone", "eu"}});
  CHECK(service->ttl == 30s);
  const auto bare = wire::decode_service(
      R"({"id":"a","name":"b","address":"","port":0,"metadata":null,"ttl":0})");
  REQUIRE(bare.has_value());
  CHECK(bare->metadata.empty());
  CHECK(bare->ttl == 0ms);
}

TEST_CASE("services: what cannot be read is nothing") {
  for (const char* record :
       {"", "{", "null", "[]", "5", "\"api\"", "{}", R"({"id":"a"})", R"({"name":"a"})",
        R"({"id":"","name":"a","port":1})", R"({"id":"a","name":"","port":1})",
        R"({"id":5,"name":"a","port":1})", R"({"id":"a","name":"b","port":65536})",
        R"({"id":"a","name":"b","port":-1})", R"({"id":"a","name":"b","port":1e300})"}) {
    CHECK_MESSAGE(!wire::decode_service(record).has_value(), record);
  }
}

// Configuration values.

namespace {

std::optional<Json> through_etcd(const Json& value) {
  const auto bytes = wire::encode_config(value);
  if (!bytes) return std::nullopt;
  return wire::decode_config(*bytes);
}

Json random_json(std::mt19937_64& random, int depth) {
  const auto kind = random() % (depth > 0 ? 9 : 7);
  if (kind == 0) return nullptr;
  if (kind == 1) return random() % 2 == 0;
  if (kind == 2) return static_cast<std::int64_t>(random());
  if (kind == 3) return random();
  if (kind == 4)
    return std::ldexp(1.0 + static_cast<double>(random()), -static_cast<int>(random() % 600));
  if (kind == 5) return std::to_string(random() % 1000);
  if (kind == 6) return "\xc3\xa4\n\"" + std::string(random() % 3, '\0') + "\xf0\x9f\x98\x80";
  Json json = kind == 7 ? Json::array() : Json::object();
  for (std::uint64_t i = random() % 4; i > 0; --i) {
    auto child = random_json(random, depth - 1);
    if (kind == 7) {
      json.push_back(std::move(child));
    } else {
      json["k" + std::to_string(random() % 9)] = std::move(child);
    }
  }
  return json;
}

}  // namespace

TEST_CASE("config: a string stands as it is, unless it would be read as something else") {
  for (const char* text : {"hello", "", " ", "two words", "True", "nan", "{not json", "[1",
                           "\"half", "0x10", "1.2.3", "\xc3\xa4", "http://a/b?c=d"}) {
    CHECK(wire::encode_config(text) == std::string(text));
    CHECK(wire::decode_config(text) == Json(text));
  }
  for (const char* text :
       {"123", "-1.5e3", "true", "null", "\"quoted\"", "{}", "[1,2]", " 5 ", "{\"a\":1}\n",
        "\xef\xbb\xbf"
        "1"}) {
    CHECK(wire::encode_config(text) == Json(text).dump());
    CHECK(through_etcd(text) == Json(text));
    CHECK(through_etcd(text)->is_string());
  }
}

TEST_CASE("config: any JSON value comes back as it went in") {
  const Json values[] = {nullptr,
                         true,
                         false,
                         0,
                         -1,
                         1.5,
                         -0.0,
                         1e300,
                         5e-324,
                         0.1,
                         std::numeric_limits<std::int64_t>::min(),
                         std::numeric_limits<std::uint64_t>::max(),
                         "",
                         "text",
                         Json::array(),
                         Json::object(),
                         {1, "2", nullptr},
                         {{"a", {{"b", 1}}}},
                         std::string("a\0b", 3)};
  for (const Json& value : values) {
    CHECK(through_etcd(value) == value);
    CHECK(through_etcd(value)->is_number_float() == value.is_number_float());
  }
  std::mt19937_64 random(3);
  for (int i = 0; i < 2000; ++i) {
    const Json value = random_json(random, 4);
    const auto back = through_etcd(value);
    REQUIRE_MESSAGE(back.has_value(), value.dump());
    CHECK_MESSAGE(*back == value, value.dump());
    CHECK(back->dump() == value.dump());
  }
}

TEST_CASE("config: strings that are deep JSON by accident") {
  const auto text = nested("[", "]", 300);
  CHECK(through_etcd(text) == Json(text));
  const auto huge = std::string(200000, '[');
  CHECK(through_etcd(huge) == Json(huge));
}

TEST_CASE("config: what cannot come back as it was is refused") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double infinite = std::numeric_limits<double>::infinity();
  CHECK_FALSE(wire::encode_config("\xff").has_value());
  CHECK_FALSE(wire::encode_config({{"a", "\xff\xfe"}}).has_value());
  CHECK_FALSE(wire::encode_config({{"\xc3", 1}}).has_value());
  CHECK_FALSE(wire::encode_config(nan).has_value());
  CHECK_FALSE(wire::encode_config({{"a", {1, infinite}}}).has_value());
  CHECK_FALSE(wire::encode_config(Json::binary({1, 2, 3})).has_value());
  CHECK_FALSE(wire::encode_config({{"a", Json::binary({1, 2, 3})}}).has_value());
  CHECK_FALSE(wire::encode_config(Json(Json::value_t::discarded)).has_value());
}

TEST_CASE("config: a value that is too deep is refused, not a crash") {
  for (const int depth : {200, 100000}) {
    Json deep = 1;
    for (int i = 0; i < depth; ++i) {
      Json outer = Json::array();
      outer.push_back(std::move(deep));
      deep = std::move(outer);
    }
    CHECK_FALSE(wire::encode_config(deep).has_value());
  }
}

TEST_CASE("config: bytes that are no JSON read back as a string") {
  CHECK(wire::decode_config("plain") == Json("plain"));
  CHECK(wire::decode_config("") == Json(""));
  CHECK(wire::decode_config("{\"a\":") == Json("{\"a\":"));
  CHECK(wire::decode_config("\xff\xfe") == Json("\xff\xfe"));
  CHECK(wire::decode_config("{\"a\": 1}") == Json({{"a", 1}}));
}
