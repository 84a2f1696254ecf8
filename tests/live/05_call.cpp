// Client::call: requests of etcd's gateway that have no function of their own, on a real etcd.
#include <doctest/doctest.h>

#include "support/live.hpp"
#include "support/tcp_proxy.hpp"

using namespace coordination;
using namespace support;
using nlohmann::json;

TEST_CASE("call: the members, as etcdctl names them") {
  auto c = connect(shared_etcd());
  const auto list = c.client().call("/v3/cluster/member/list", {}, Effect::Reads).value();
  REQUIRE(list.at("members").size() == 1);
  CHECK(list["members"][0].at("name") == "test");
  CHECK(list["members"][0].at("clientURLs") == json::array({shared_etcd().url()}));
  CHECK(list.at("header").contains("cluster_id"));
}

TEST_CASE("call: an answer without a header is one, too") {
  auto c = connect(shared_etcd());
  const auto done = c.client().call("/v3/maintenance/defragment", json::object());
  REQUIRE_MESSAGE(done, why(done));
  CHECK(done->is_object());
}

TEST_CASE("call: a user is added once, and the refusal of the second is an error of etcd's") {
  const EtcdServer server;
  auto c = connect(server);
  const json user = {{"name", "u"}, {"password", "p"}};
  const auto added = c.client().call("/v3/auth/user/add", user);
  REQUIRE_MESSAGE(added, why(added));
  const auto again = c.client().call("/v3/auth/user/add", user);
  REQUIRE_FALSE(again);
  CHECK(again.error().cause.find("user name already exists") != std::string::npos);
  CHECK(again.error().message.find("has refused") != std::string::npos);
  const auto list = c.client().call("/v3/auth/user/list", {}, Effect::Reads).value();
  CHECK(list.at("users") == json::array({"u"}));
}

TEST_CASE("call: it has a login like every other call") {
  const EtcdServer server;
  REQUIRE(enable_auth(server, "app", "app-password", "/app/"));
  auto options = options_for(server);
  options.username = "root";
  options.password = "root-password";
  auto root = connect(options);
  const auto users = root.client().call("/v3/auth/user/list", {}, Effect::Reads);
  REQUIRE_MESSAGE(users, why(users));
  CHECK(users->at("users") == json::array({"app", "root"}));
  options.username = "app";
  options.password = "app-password";
  options.key_prefix = "/app";
  auto app = connect(options);
  const auto refused = app.client().call("/v3/auth/user/list", {}, Effect::Reads);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == ErrorCode::PermissionDenied);
}

TEST_CASE("call: what is no path or no object is not sent") {
  auto c = connect(shared_etcd());
  for (const char* path :
       {"", "v3/kv/range", "/v3/kv/range HTTP/1.0\r\nX: y", "/v3/a?b", "/v3/#"}) {
    CHECK(c.client().call(path, {}).error().code == ErrorCode::Validation);
  }
  for (const json& body : {json("{}"), json::array(), json(1)}) {
    CHECK(c.client().call("/v3/cluster/member/list", body).error().code == ErrorCode::Validation);
  }
  const auto unknown =
      c.client().call("/v3/no/such/thing", {}, Context::with_timeout(lenient(20s)));
  REQUIRE_FALSE(unknown);
  CHECK(unknown.error().code == ErrorCode::Unavailable);
}
