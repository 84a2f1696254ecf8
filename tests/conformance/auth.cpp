// Users, tokens and permissions.
#include "subject.hpp"

using namespace conformance;

namespace {

const char* const kDenied = "etcdserver: permission denied";
const char* const kBadToken = "etcdserver: invalid auth token";
const char* const kNoUser = "etcdserver: user name is empty";

Reply login(const Gateway& g, const std::string& name, const std::string& password) {
  return g.call("/v3/auth/authenticate", {{"name", name}, {"password", password}});
}

/// An etcd with authentication, before which somebody put "a/x" on lease 50 and granted lease 51.
struct Guarded {
  explicit Guarded(Subject& like, const std::vector<std::string>& flags = {})
      : etcd(like.fresh(flags)) {
    g.grant(50, 600);
    g.grant(51, 600);
    g.put("a/x", "1", {{"lease", "50"}});
    etcd->enable_auth("bob", "pw", "b/");
    root = g.with_token(login(g, "root", "root-password").json["token"]);
    bob = g.with_token(login(g, "bob", "pw").json["token"]);
  }
  std::unique_ptr<Subject> etcd;
  Gateway g = etcd->gateway();
  Gateway root = g, bob = g;
};

Json put_op(const std::string& key) { return {{"request_put", {{"key", b64(key)}}}}; }

}  // namespace

CONFORMANCE("while authentication is off, there is no login") {
  const Gateway g = etcd.gateway();
  check_error(etcd, login(g, "root", "pw"), 400, 9, "etcdserver: authentication is not enabled");
  const auto reply = g.with_token("some.token").get("a");
  CHECK(reply.status == (etcd.has(Quirk::TokenRefusedWhileOff) ? 401 : 200));
}

CONFORMANCE("login") {
  Guarded e(etcd);
  const auto good = login(e.g, "bob", "pw");
  CHECK(good.status == 200);
  CHECK_FALSE(good.json["token"].get<std::string>().empty());
  const std::string message = "etcdserver: authentication failed, invalid user ID or password";
  check_error(*e.etcd, login(e.g, "bob", "wrong"), 400, 3, message);
  check_error(*e.etcd, login(e.g, "nobody", "pw"), 400, 3, message);
  CHECK(e.bob.put("b/x", "1").status == 200);  // a token is good as long as there are newer ones
}

CONFORMANCE("no token, a bad token, a token") {
  Guarded e(etcd);
  const Gateway bad = e.g.with_token("bad.1");
  const auto check_all = [&](const Gateway& g, int status, int code, const std::string& message) {
    check_error(*e.etcd, g.get("b/x"), status, code, message);
    check_error(*e.etcd, g.put("b/x", "1"), status, code, message);
    check_error(*e.etcd, g.remove("b/x"), status, code, message);
    check_error(*e.etcd, g.txn({}, {put_op("b/x")}), status, code, message);
    check_error(*e.etcd, g.revoke(50), status, code, message);
  };
  check_all(e.g, 400, 3, kNoUser);
  check_all(bad, 401, 16, kBadToken);
  check_error(*e.etcd, bad.grant(60, 600), 401, 16, kBadToken);
  check_error(*e.etcd, e.g.put("", "1"), 400, 3, "etcdserver: key is not provided");
  CHECK(e.bob.put("b/x", "1").status == 200);
  CHECK(e.root.put("b/x", "2").status == 200);
}

CONFORMANCE("a user may touch the keys under his prefix, root all") {
  Guarded e(etcd);
  const auto check_denied = [&](const Reply& reply) {
    check_error(*e.etcd, reply, 403, 7, kDenied);
  };
  CHECK(e.bob.put("b/x", "1").status == 200);
  CHECK(e.bob.get("b/x").status == 200);
  CHECK(e.bob.range(prefix_range("b/")).status == 200);
  CHECK(e.bob.range(prefix_range("b/y")).status == 200);
  CHECK(e.bob.remove("b/x").status == 200);
  CHECK(e.bob.txn({}, {put_op("b/x")}).status == 200);
  check_denied(e.bob.get("a/x"));
  check_denied(e.bob.get("b"));
  check_denied(e.bob.put("b0", "1"));
  check_denied(e.bob.remove("a/x"));
  check_denied(e.bob.range(prefix_range("b")));
  check_denied(e.bob.range({{"key", b64("b/")}, {"range_end", b64(std::string(1, '\0'))}}));
  check_denied(
      e.bob.range({{"key", b64(std::string(1, '\0'))}, {"range_end", b64(std::string(1, '\0'))}}));
  CHECK(e.root.range({{"key", b64(std::string(1, '\0'))}, {"range_end", b64(std::string(1, '\0'))}})
            .status == 200);
  CHECK(e.root.get("a/x").status == 200);
}

CONFORMANCE("a txn needs the permission for all that it names") {
  Guarded e(etcd);
  const auto check_denied = [&](const Reply& reply) {
    check_error(*e.etcd, reply, 403, 7, kDenied);
  };
  const Json mine = {{"key", b64("b/x")}, {"target", "VERSION"}, {"version", "0"}};
  const Json other = {{"key", b64("a/x")}, {"target", "VERSION"}, {"version", "0"}};
  CHECK(e.bob.txn({mine}, {put_op("b/x")}).status == 200);
  check_denied(e.bob.txn({other}, {put_op("b/x")}));
  check_denied(e.bob.txn({}, {put_op("b/x"), put_op("a/x")}));
  check_denied(e.bob.txn({}, {put_op("b/x")}, {put_op("a/x")}));
  check_denied(e.bob.txn({}, {{{"request_range", {{"key", b64("a/x")}}}}}));
  const auto nested = e.bob.txn({}, {{{"request_txn", {{"success", {put_op("a/x")}}}}}});
  if (e.etcd->has(Quirk::NestedTxnUnchecked)) {
    CHECK(nested.status == 200);
  } else {
    check_denied(nested);
  }
}

CONFORMANCE("a lease with keys that are not the user's") {
  Guarded e(etcd);
  const auto check_denied = [&](const Reply& reply) {
    check_error(*e.etcd, reply, 403, 7, kDenied);
  };
  check_denied(e.bob.put("b/x", "1", {{"lease", "50"}}));
  check_denied(e.bob.revoke(50));
  CHECK(e.bob.put("b/x", "1", {{"lease", "51"}}).status == 200);
  CHECK(number(e.bob.time_to_live(50).json, "grantedTTL") == 600);
  if (e.etcd->has(Quirk::KeysNeedNoToken)) {
    CHECK(e.bob.time_to_live(50, true).json["keys"].size() == 1);
  } else {
    check_denied(e.bob.time_to_live(50, true));
  }
  CHECK(e.bob.time_to_live(51, true).json["keys"].size() == 1);
  CHECK(e.bob.revoke(51).status == 200);
  check_error(*e.etcd, e.bob.revoke(51), 404, 5, "etcdserver: requested lease not found");
}

CONFORMANCE("lease and maintenance calls, with and without a token") {
  Guarded e(etcd);
  const bool open = e.etcd->has(Quirk::LeasesNeedNoToken);
  const auto check_guarded = [&](const Reply& reply, const Reply& of_user, int status) {
    if (open) {
      CHECK(reply.status == 200);
      CHECK(of_user.status == 200);
    } else {
      check_error(*e.etcd, reply, 400, 3, kNoUser);
      CHECK(of_user.status == status);
    }
  };
  const auto leases = [](const Gateway& g) { return g.call("/v3/lease/leases", Json::object()); };
  const auto status = [](const Gateway& g) {
    return g.call("/v3/maintenance/status", Json::object());
  };
  check_guarded(e.g.grant(61, 600), e.bob.grant(62, 600), 200);
  check_guarded(e.g.time_to_live(51), e.bob.time_to_live(51), 200);
  check_guarded(leases(e.g), leases(e.bob), 403);
  check_guarded(status(e.g), status(e.bob), e.etcd->has(Quirk::StatusForAllUsers) ? 200 : 403);
  const Gateway bad = e.g.with_token("bad.1");
  for (const Reply& reply : {bad.time_to_live(51), leases(bad), status(bad)}) {
    if (open) CHECK(reply.status == 200);
    if (!open) check_error(*e.etcd, reply, 401, 16, kBadToken);
  }
  CHECK(leases(e.root).status == 200);
  CHECK(status(e.root).status == 200);
  const auto compacted = e.bob.compact(1);
  CHECK((open ? compacted.status == 200 : compacted.code() == 7));
  CHECK(e.root.compact(2).status == 200);
}

CONFORMANCE("keep-alive streams and tokens") {
  Guarded e(etcd);
  const bool open = e.etcd->has(Quirk::LeasesNeedNoToken);
  const auto check_refused = [&](const Gateway& g, int status, int code, const char* message) {
    Reply end;
    const auto lines = g.keep_alive({50}, &end);
    if (open) {
      CHECK(end.status == 200);
      REQUIRE(lines.size() == 1);
      CHECK(lines[0]["result"]["TTL"] == "600");
    } else {
      CHECK(lines.empty());
      CHECK(end.status == status);
      check_error_line(*e.etcd, end.json, code, message);
    }
  };
  check_refused(e.g, 400, 3, kNoUser);
  check_refused(e.g.with_token("bad.1"), 401, 16, kBadToken);
  check_refused(e.bob, 403, 7, kDenied);
  Reply end;
  const auto lines = e.bob.keep_alive({51, 50, 51}, &end);
  CHECK(end.status == 200);
  REQUIRE(lines.size() == (open ? 3 : 2));
  CHECK(lines[0]["result"]["TTL"] == "600");
  if (!open) check_error_line(*e.etcd, lines[1], 7, kDenied);
}

CONFORMANCE("a signed token is refused after any change of users, but where it shows none") {
  if (etcd.is_memory()) return;  // its tokens are of the other kind
  const support::TempDir folder;
  const std::string key = folder.file("key.pem"), pub = folder.file("pub.pem");
  const auto openssl = [](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "openssl");
    REQUIRE(support::run(arguments).ok());
  };
  openssl({"genrsa", "-out", key, "2048"});
  openssl({"rsa", "-in", key, "-pubout", "-out", pub});
  Guarded e(etcd, {"--auth-token=jwt,pub-key=" + pub + ",priv-key=" + key + ",sign-method=RS256"});
  REQUIRE(e.bob.put("b/x", "1").status == 200);
  REQUIRE(e.root.call("/v3/auth/role/add", {{"name", "new"}}).status == 200);

  const char* const kOld = "etcdserver: revision of auth store is old";
  check_error(*e.etcd, e.bob.get("b/x"), 400, 3, kOld);
  check_error(*e.etcd, e.bob.range({{"key", b64("b/x")}, {"serializable", true}}), 400, 3, kOld);
  check_error(*e.etcd, e.bob.put("b/x", "2"), 400, 3, kOld);
  check_error(*e.etcd, e.bob.txn({}, {put_op("b/x")}), 400, 3, kOld);
  WatchCall watch(e.bob, {create_request(1, "b/x")});
  REQUIRE(watch.wait_lines(1));
  CHECK(is(watch.results()[0], "canceled"));
  CHECK(watch.results()[0]["cancel_reason"] ==
        std::string("rpc error: code = InvalidArgument desc = ") + kOld);
  // What asks for no permission does not see that the token is old.
  CHECK(e.bob.grant(60, 600).status == 200);
  CHECK(e.bob.keep_alive({60})[0]["result"]["TTL"] == "600");
  CHECK(e.bob.time_to_live(60).status == 200);
  CHECK(e.bob.revoke(60).status == 200);

  const Gateway again = e.g.with_token(login(e.g, "bob", "pw").json["token"]);
  CHECK(unb64(again.get("b/x").json["kvs"][0]["value"]) == "1");
}

CONFORMANCE("watches without the right are refused one by one") {
  Guarded e(etcd);
  const auto check_refused = [](const Json& result, const std::string& reason) {
    CHECK(number(result, "watch_id") == -1);
    CHECK(is(result, "created"));
    CHECK(is(result, "canceled"));
    CHECK(result["cancel_reason"] == "rpc error: code = " + reason);
  };
  const Json empty = create_request(3, "a/x", {{"range_end", b64("a/x")}});
  const Jsons orders = {create_request(1, "a/x"), create_request(1, "b/x"), empty};
  WatchCall none(e.g, orders), bad(e.g.with_token("bad.1"), orders), some(e.bob, orders);
  for (WatchCall* watch : {&none, &bad, &some}) REQUIRE(watch->wait_lines(3));
  for (int i : {0, 1, 2}) {
    const auto at = static_cast<std::size_t>(i);
    check_refused(none.results()[at], std::string("InvalidArgument desc = ") + kNoUser);
    check_refused(bad.results()[at], std::string("Unauthenticated desc = ") + kBadToken);
    if (i != 1)
      check_refused(some.results()[at], std::string("PermissionDenied desc = ") + kDenied);
  }
  CHECK(number(some.results()[1], "watch_id") == 1);
  e.root.put("b/x", "1");
  CHECK(some.events(1, 1).size() == 1);
  CHECK(none.end(20ms) == nullptr);
}
