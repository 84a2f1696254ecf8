// Leases.
#include <limits>
#include <set>

#include "subject.hpp"

using namespace conformance;

namespace {

Json lease_field(std::int64_t id) { return {{"lease", std::to_string(id)}}; }

/// TTL in the line of a keep-alive answer; -1 if the line has none.
std::int64_t ttl_of(const Json& line) {
  const Json& result = line["result"];
  return result.contains("TTL") ? number(result, "TTL") : -1;
}

const char* const kNotFound = "etcdserver: requested lease not found";

}  // namespace

CONFORMANCE("grant: ids of the client's and of the server's, and the shortest TTL") {
  const Gateway g = etcd.gateway();
  const auto before = g.revision();
  const auto id = etcd.lease_id();
  const auto granted = g.grant(id, 600);
  CHECK(granted.status == 200);
  CHECK(number(granted.json, "ID") == id);
  CHECK(number(granted.json, "TTL") == 600);
  CHECK(granted.revision() == before);
  check_error(etcd, g.grant(id, 600), 400, 9, "etcdserver: lease already exists");

  const auto first = g.grant(0, 600), second = g.grant(0, 600);
  CHECK(number(first.json, "ID") > 0);
  CHECK(number(first.json, "ID") != number(second.json, "ID"));
  for (const std::int64_t ttl : {-5, 0, 1, 2}) {
    const auto short_lived = g.grant(0, ttl);
    CHECK(number(short_lived.json, "TTL") == 2);
    g.revoke(number(short_lived.json, "ID"));
  }
  for (const std::int64_t odd : {std::int64_t{-3}, std::numeric_limits<std::int64_t>::max()}) {
    CHECK(number(g.grant(odd, 600).json, "ID") == odd);
    CHECK(g.revoke(odd).status == 200);
  }
  CHECK(g.grant(0, 9000000000).status == 200);
  check_error(etcd, g.grant(0, 9000000001), 400, 11, "etcdserver: too large lease TTL");
  CHECK(g.revision() == before);
  for (const auto& lease : {granted, first, second}) g.revoke(number(lease.json, "ID"));
}

CONFORMANCE("revoke deletes all keys of the lease, in one revision") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const auto id = etcd.lease_id();
  REQUIRE(g.grant(id, 600).status == 200);
  for (const char* name : {"c", "a", "b"}) g.put(p + name, "1", lease_field(id));
  g.put(p + "free", "1");
  const auto before = g.revision();
  WatchCall watch(g,
                  {create_request(1, p, {{"range_end", b64(coordination::prefix_range_end(p))}})});
  REQUIRE(watch.wait_lines(1));

  const auto revoked = g.revoke(id);
  CHECK(revoked.status == 200);
  CHECK(revoked.revision() == before + 1);
  CHECK(keys_of(g.range(prefix_range(p))) == std::vector<std::string>{p + "free"});
  const auto events = watch.events(1, 3);
  REQUIRE(events.size() == 3);
  std::vector<std::string> deleted;
  for (const Json& event : events) {
    CHECK(event["type"] == "DELETE");
    CHECK(number(event["kv"], "mod_revision") == before + 1);
    deleted.push_back(unb64(event["kv"]["key"]));
  }
  CHECK(deleted == std::vector<std::string>{p + "a", p + "b", p + "c"});
  check_error(etcd, g.revoke(id), 404, 5, kNotFound);

  REQUIRE(g.grant(id, 600).status == 200);
  CHECK(g.revoke(id).revision() == before + 1);  // no keys, no revision
}

CONFORMANCE("a put moves its key from lease to lease") {
  const Gateway g = etcd.gateway();
  const std::string key = etcd.prefix() + "a";
  const auto one = etcd.lease_id(), two = etcd.lease_id();
  g.grant(one, 600);
  g.grant(two, 600);
  g.put(key, "1", lease_field(one));
  g.put(key, "2", lease_field(two));
  CHECK(g.revoke(one).status == 200);
  CHECK(keys_of(g.get(key)).size() == 1);
  g.put(key, "3");
  CHECK(g.revoke(two).status == 200);
  CHECK(keys_of(g.get(key)).size() == 1);
  check_error(etcd, g.put(key, "4", lease_field(one)), 404, 5, kNotFound);
}

CONFORMANCE("a deleted key does not come back to its lease") {
  const Gateway g = etcd.gateway();
  const std::string key = etcd.prefix() + "a";
  const auto id = etcd.lease_id();
  g.grant(id, 600);
  g.put(key, "1", lease_field(id));
  g.remove(key);
  g.put(key, "2");
  CHECK_FALSE(g.time_to_live(id, true).json.contains("keys"));
  g.revoke(id);
  CHECK(keys_of(g.get(key)).size() == 1);
}

CONFORMANCE("time to live") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const auto id = etcd.lease_id();
  g.grant(id, 600);
  g.put(p + "a", "1", lease_field(id));
  g.put(p + "b", "1", lease_field(id));
  const auto plain = g.time_to_live(id);
  CHECK(number(plain.json, "ID") == id);
  CHECK(number(plain.json, "grantedTTL") == 600);
  CHECK(number(plain.json, "TTL") <= 600);
  CHECK(number(plain.json, "TTL") > 580);
  CHECK_FALSE(plain.json.contains("keys"));
  const auto with_keys = g.time_to_live(id, true);
  std::set<std::string> keys;
  for (const Json& key : with_keys.json["keys"]) keys.insert(unb64(key));
  CHECK(keys == std::set<std::string>{p + "a", p + "b"});
  g.revoke(id);
  const auto gone = g.time_to_live(id, true);
  CHECK(gone.status == 200);
  CHECK(number(gone.json, "TTL") == -1);
  CHECK_FALSE(gone.json.contains("grantedTTL"));
}

CONFORMANCE("the list of leases") {
  const auto own = etcd.fresh();
  const Gateway g = own->gateway();
  const auto ids = [&] {
    std::set<std::int64_t> found;
    const auto reply = g.call("/v3/lease/leases", Json::object());
    CHECK(reply.status == 200);
    for (const Json& lease : reply.json.value("leases", Json::array())) {
      found.insert(number(lease, "ID"));
    }
    return found;
  };
  CHECK(ids().empty());
  g.grant(7, 600);
  g.grant(8, 600);
  CHECK(ids() == std::set<std::int64_t>{7, 8});
  g.revoke(7);
  CHECK(ids() == std::set<std::int64_t>{8});
}

CONFORMANCE("keep-alive: one line for each object, none lost, in order") {
  const Gateway g = etcd.gateway();
  const auto one = etcd.lease_id(), dead = etcd.lease_id(), two = etcd.lease_id();
  g.grant(one, 600);
  g.grant(two, 500);
  Reply end;
  const auto lines = g.keep_alive({one, dead, two, one}, &end);
  CHECK(end.status == 200);
  REQUIRE(lines.size() == 4);
  CHECK(ttl_of(lines[0]) == 600);
  CHECK(ttl_of(lines[1]) == -1);
  CHECK(number(lines[1]["result"], "ID") == dead);
  CHECK(ttl_of(lines[2]) == 500);
  CHECK(number(lines[3]["result"], "ID") == one);
  CHECK(revision_of(lines[0]["result"]) == g.revision());

  std::vector<std::int64_t> many;
  for (int i = 0; i < 300; ++i) many.push_back(i % 2 == 0 ? one : two);
  CHECK(g.keep_alive(many).size() == 300);
  CHECK(g.stream("/v3/lease/keepalive", "").empty());
  const std::string glued =
      R"({"ID":")" + std::to_string(one) + R"("} {"ID":)" + std::to_string(two) + "}";
  CHECK(g.stream("/v3/lease/keepalive", glued).size() == 2);
  g.revoke(one);
  g.revoke(two);
}

CONFORMANCE("a keep-alive stream with something malformed in it ends there, without a word") {
  const Gateway g = etcd.gateway();
  const auto id = etcd.lease_id();
  g.grant(id, 600);
  const std::string good = R"({"ID":")" + std::to_string(id) + R"("})";
  CHECK(g.stream("/v3/lease/keepalive", good + "\nrubbish\n" + good).size() == 1);
  g.revoke(id);
}

CONFORMANCE("keep-alive as a single call") {
  const Gateway g = etcd.gateway();
  const auto id = etcd.lease_id();
  g.grant(id, 600);
  const auto reply = g.call("/v3/lease/keepalive", {{"ID", std::to_string(id)}});
  CHECK(reply.status == 200);
  CHECK(ttl_of(reply.json) == 600);
  CHECK(reply.body.back() == '\n');
  g.revoke(id);
}

CONFORMANCE("a lease that is not kept alive runs out, one that is does not") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const auto kept = etcd.lease_id(), left = etcd.lease_id();
  REQUIRE(g.grant(kept, 8).status == 200);
  REQUIRE(g.grant(left, 4).status == 200);
  g.put(p + "kept", "1", lease_field(kept));
  g.put(p + "left", "1", lease_field(left));
  const auto before = g.revision();
  WatchCall watch(g,
                  {create_request(1, p, {{"range_end", b64(coordination::prefix_range_end(p))}})});
  REQUIRE(watch.wait_lines(1));
  etcd.let_pass(2500ms);
  CHECK(ttl_of(g.keep_alive({kept})[0]) == 8);
  etcd.let_pass(2500ms);
  const bool gone = support::wait_until(
      [&] {
        CHECK(ttl_of(g.keep_alive({kept})[0]) == 8);
        return keys_of(g.get(p + "left")).empty();
      },
      20s);
  CHECK(gone);
  const auto events = watch.events(1, 1);
  REQUIRE(events.size() == 1);
  CHECK(unb64(events[0]["kv"]["key"]) == p + "left");
  CHECK(events[0]["type"] == "DELETE");
  CHECK(number(events[0]["kv"], "mod_revision") == before + 1);
  CHECK(keys_of(g.get(p + "kept")).size() == 1);
  CHECK(ttl_of(g.keep_alive({left})[0]) == -1);
  CHECK(number(g.time_to_live(left).json, "TTL") == -1);
  check_error(etcd, g.revoke(left), 404, 5, kNotFound);
  g.revoke(kept);
}
