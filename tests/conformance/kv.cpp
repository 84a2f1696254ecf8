// Range, put, delete, compaction and status.
#include "subject.hpp"

using namespace conformance;

namespace {

/// Puts so many keys "<prefix>k0", "<prefix>k1", ... and returns the first revision.
std::int64_t put_keys(const Gateway& g, const std::string& prefix, int count) {
  std::int64_t first = 0;
  for (int i = 0; i < count; ++i) {
    const auto revision =
        g.put(prefix + "k" + std::to_string(i), "v" + std::to_string(i)).revision();
    if (i == 0) first = revision;
  }
  return first;
}

Json kv_of(const Reply& reply) {
  REQUIRE(reply.json.contains("kvs"));
  REQUIRE(reply.json["kvs"].size() == 1);
  return reply.json["kvs"][0];
}

std::vector<std::string> with_prefix(const std::string& prefix,
                                     const std::vector<std::string>& names) {
  std::vector<std::string> keys;
  for (const auto& name : names) keys.push_back(prefix + name);
  return keys;
}

}  // namespace

CONFORMANCE("a key has a value, revisions and a version; what is zero is left out") {
  const Gateway g = etcd.gateway();
  const std::string key = etcd.prefix() + "a";
  const auto missing = g.get(key);
  CHECK(missing.status == 200);
  CHECK(missing.json.size() == 1);  // the header

  const auto first = g.put(key, "1");
  CHECK(first.status == 200);
  CHECK(first.json.size() == 1);
  CHECK(g.put(key, "").revision() == first.revision() + 1);
  const auto got = g.get(key);
  CHECK(number(got.json, "count") == 1);
  CHECK(got.revision() == first.revision() + 1);
  CHECK(kv_of(got) == Json{{"key", b64(key)},
                           {"create_revision", std::to_string(first.revision())},
                           {"mod_revision", std::to_string(first.revision() + 1)},
                           {"version", "2"}});

  CHECK(g.remove(key).json["deleted"] == "1");
  CHECK_FALSE(g.remove(key).json.contains("deleted"));
  const auto reborn = g.put(key, "3");
  CHECK(kv_of(g.get(key))["version"] == "1");
  CHECK(number(kv_of(g.get(key)), "create_revision") == reborn.revision());
}

CONFORMANCE("keys and values are bytes") {
  const Gateway g = etcd.gateway();
  const std::string key = etcd.prefix() + std::string("\0\xff\n\"", 4);
  std::string value;
  for (int c = 0; c < 256; ++c) value += static_cast<char>(c);
  REQUIRE(g.put(key, value).status == 200);
  const Json kv = kv_of(g.get(key));
  CHECK(unb64(kv["key"]) == key);
  CHECK(unb64(kv["value"]) == value);
}

CONFORMANCE("a write's answer has the revision it made, a read's the store's") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const auto before = g.revision();
  CHECK(g.put(p + "a", "1").revision() == before + 1);
  CHECK(g.get(p + "a").revision() == before + 1);
  CHECK(g.remove(p + "b").revision() == before + 1);
  CHECK(g.remove(p + "a").revision() == before + 2);
  CHECK(g.revision() == before + 2);
}

CONFORMANCE("ranges: one key, an interval, a prefix, all from a key on") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  put_keys(g, p, 5);
  const auto range = [&](const std::string& key, const std::string& end) {
    return keys_of(g.range({{"key", b64(key)}, {"range_end", b64(end)}}));
  };
  CHECK(range(p + "k1", p + "k3") == with_prefix(p, {"k1", "k2"}));
  CHECK(range(p + "k3", p + "k1").empty());
  CHECK(range(p + "k1", p + "k1").empty());
  CHECK(keys_of(g.range(prefix_range(p))).size() == 5);
  const auto from = range(p + "k3", std::string(1, '\0'));
  REQUIRE(from.size() >= 2);
  CHECK(from[0] == p + "k3");
  CHECK(from[1] == p + "k4");
  const auto all = range(std::string(1, '\0'), std::string(1, '\0'));
  CHECK(all.size() >= 5);
  CHECK(std::is_sorted(all.begin(), all.end()));
}

CONFORMANCE("limit, more and count") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  put_keys(g, p, 5);
  const auto limited = [&](Json limit) { return g.range(prefix_range(p, {{"limit", limit}})); };
  CHECK(keys_of(limited("2")) == with_prefix(p, {"k0", "k1"}));
  CHECK(is(limited("2").json, "more"));
  CHECK(number(limited("2").json, "count") == 5);
  CHECK(keys_of(limited(4)).size() == 4);
  for (const int limit : {0, 5, 6, -1}) {
    const auto reply = limited(limit);
    CHECK(keys_of(reply).size() == 5);
    CHECK_FALSE(reply.json.contains("more"));
    CHECK(number(reply.json, "count") == 5);
  }
}

CONFORMANCE("keys_only, count_only, serializable") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const auto lease = etcd.lease_id();
  g.grant(lease, 600);
  put_keys(g, p, 2);
  g.put(p + "k2", "v2", {{"lease", std::to_string(lease)}});
  for (const char* target : {"KEY", "VALUE"}) {
    const auto keys = g.range(prefix_range(p, {{"keys_only", true}, {"sort_target", target}}));
    REQUIRE(keys_of(keys).size() == 3);
    for (const Json& kv : keys.json["kvs"]) CHECK_FALSE(kv.contains("value"));
    const bool by_index = etcd.has(Quirk::KeysOnlyHasNoLease) && target == std::string("KEY");
    CHECK(number(keys.json["kvs"][2], "lease") == (by_index ? 0 : lease));
  }
  g.revoke(lease);
  put_keys(g, p, 3);
  const auto count = g.range(prefix_range(p, {{"count_only", true}, {"limit", 1}}));
  CHECK_FALSE(count.json.contains("kvs"));
  CHECK_FALSE(count.json.contains("more"));
  CHECK(number(count.json, "count") == 3);
  CHECK(keys_of(g.range(prefix_range(p, {{"serializable", true}}))).size() == 3);
}

CONFORMANCE("sorting, by each target and in each order") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  g.put(p + "b", "2");
  g.put(p + "c", "1");
  g.put(p + "a", "3");
  g.put(p + "c", "0");  // versions a 1, b 3, c 2; mod c < b; create b < c < a
  g.put(p + "b", "2");
  g.put(p + "b", "2");
  const auto sorted = [&](const char* order, const char* target, Json fields = Json::object()) {
    fields["sort_order"] = order;
    fields["sort_target"] = target;
    return keys_of(g.range(prefix_range(p, fields)));
  };
  CHECK(sorted("ASCEND", "KEY") == with_prefix(p, {"a", "b", "c"}));
  CHECK(sorted("DESCEND", "KEY") == with_prefix(p, {"c", "b", "a"}));
  CHECK(sorted("NONE", "KEY") == with_prefix(p, {"a", "b", "c"}));
  CHECK(sorted("ASCEND", "VERSION") == with_prefix(p, {"a", "c", "b"}));
  CHECK(sorted("DESCEND", "VERSION") == with_prefix(p, {"b", "c", "a"}));
  CHECK(sorted("ASCEND", "CREATE") == with_prefix(p, {"b", "c", "a"}));
  CHECK(sorted("DESCEND", "CREATE") == with_prefix(p, {"a", "c", "b"}));
  CHECK(sorted("ASCEND", "MOD") == with_prefix(p, {"a", "c", "b"}));
  CHECK(sorted("DESCEND", "MOD") == with_prefix(p, {"b", "c", "a"}));
  CHECK(sorted("NONE", "MOD") == with_prefix(p, {"a", "c", "b"}));
  CHECK(sorted("ASCEND", "VALUE") == with_prefix(p, {"c", "b", "a"}));
  CHECK(sorted("DESCEND", "VALUE") == with_prefix(p, {"a", "b", "c"}));
  CHECK(sorted("ASCEND", "CREATE", {{"limit", 1}}) == with_prefix(p, {"b"}));
  CHECK(sorted("DESCEND", "CREATE", {{"limit", 2}}) == with_prefix(p, {"a", "c"}));
  CHECK(sorted("DESCEND", "KEY", {{"limit", 1}}) == with_prefix(p, {"c"}));
  // Without an order the limit comes first, and cuts by key.
  CHECK(sorted("NONE", "CREATE", {{"limit", 1}}) == with_prefix(p, {"b"}));
  const auto by_number = g.range(prefix_range(p, {{"sort_order", 2}, {"sort_target", 2}}));
  CHECK(keys_of(by_number) == with_prefix(p, {"a", "c", "b"}));
}

CONFORMANCE("filters by revision leave count alone") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const auto first = put_keys(g, p, 4);
  g.put(p + "k0", "again");
  const auto filtered = [&](const char* name, std::int64_t revision) {
    const auto reply = g.range(prefix_range(p, {{name, std::to_string(revision)}}));
    CHECK(number(reply.json, "count") == 4);
    return keys_of(reply);
  };
  CHECK(filtered("min_mod_revision", first + 3) == with_prefix(p, {"k0", "k3"}));
  CHECK(filtered("max_mod_revision", first + 2) == with_prefix(p, {"k1", "k2"}));
  CHECK(filtered("min_create_revision", first + 2) == with_prefix(p, {"k2", "k3"}));
  CHECK(filtered("max_create_revision", first + 1) == with_prefix(p, {"k0", "k1"}));
  const auto limited =
      g.range(prefix_range(p, {{"min_mod_revision", std::to_string(first + 2)}, {"limit", 2}}));
  CHECK(keys_of(limited) == with_prefix(p, {"k0", "k2"}));
  CHECK(is(limited.json, "more"));
}

CONFORMANCE("a read of an old revision sees what was then") {
  const Gateway g = etcd.gateway();
  const std::string key = etcd.prefix() + "a";
  const auto first = g.put(key, "1").revision();
  g.put(key, "2");
  g.remove(key);
  const auto at = [&](std::int64_t revision) {
    return g.range({{"key", b64(key)}, {"revision", std::to_string(revision)}});
  };
  CHECK(unb64(kv_of(at(first))["value"]) == "1");
  CHECK(unb64(kv_of(at(first + 1))["value"]) == "2");
  CHECK(keys_of(at(first + 2)).empty());
  CHECK(keys_of(at(first - 1)).empty());
  CHECK(at(first).revision() == first + 2);  // of the store all the same
  CHECK(at(-1).status == 200);
  check_error(etcd, at(first + 3), 400, 11,
              "etcdserver: mvcc: required revision is a future revision");
}

CONFORMANCE("put: prev_kv, ignore_value, ignore_lease") {
  const Gateway g = etcd.gateway();
  const std::string key = etcd.prefix() + "a";
  const auto lease = etcd.lease_id();
  REQUIRE(g.grant(lease, 600).status == 200);
  CHECK_FALSE(g.put(key, "1", {{"prev_kv", true}}).json.contains("prev_kv"));
  const auto second = g.put(key, "2", {{"prev_kv", true}, {"lease", std::to_string(lease)}});
  CHECK(unb64(second.json["prev_kv"]["value"]) == "1");
  CHECK(second.json["prev_kv"]["version"] == "1");
  CHECK(number(kv_of(g.get(key)), "lease") == lease);

  CHECK(g.put(key, "3", {{"ignore_lease", true}}).status == 200);
  CHECK(number(kv_of(g.get(key)), "lease") == lease);
  CHECK(unb64(kv_of(g.get(key))["value"]) == "3");
  CHECK(g.put(key, "", {{"ignore_value", true}}).status == 200);  // no lease: it is detached
  CHECK(number(kv_of(g.get(key)), "lease") == 0);
  CHECK(unb64(kv_of(g.get(key))["value"]) == "3");

  const std::string missing = key + "?";
  check_error(etcd, g.put(missing, "", {{"ignore_value", true}}), 400, 3,
              "etcdserver: key not found");
  check_error(etcd, g.put(missing, "1", {{"ignore_lease", true}}), 400, 3,
              "etcdserver: key not found");
  const Json neither = {{"ignore_value", true}, {"lease", std::to_string(etcd.lease_id())}};
  check_error(etcd, g.put(missing, "", neither), 404, 5, "etcdserver: requested lease not found");
  check_error(etcd, g.put(key, "1", {{"ignore_value", true}}), 400, 3,
              "etcdserver: value is provided");
  check_error(etcd, g.put(key, "1", {{"ignore_lease", true}, {"lease", std::to_string(lease)}}),
              400, 3, "etcdserver: lease is provided");
  g.revoke(lease);
}

CONFORMANCE("delete: ranges and prev_kv") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  put_keys(g, p, 4);
  const auto before = g.revision();
  const auto removed = g.remove(p + "k1", {{"range_end", b64(p + "k3")}, {"prev_kv", true}});
  CHECK(removed.json["deleted"] == "2");
  REQUIRE(removed.json["prev_kvs"].size() == 2);
  CHECK(unb64(removed.json["prev_kvs"][1]["value"]) == "v2");
  CHECK(removed.revision() == before + 1);
  const auto none = g.remove(p + "k1", {{"range_end", b64(p + "k3")}, {"prev_kv", true}});
  CHECK(none.json.size() == 1);
  CHECK(g.call("/v3/kv/deleterange", prefix_range(p)).json["deleted"] == "2");
}

CONFORMANCE("requests without a key") {
  const Gateway g = etcd.gateway();
  const std::string message = "etcdserver: key is not provided";
  check_error(etcd, g.range(Json::object()), 400, 3, message);
  check_error(etcd, g.range({{"range_end", b64("a")}}), 400, 3, message);
  check_error(etcd, g.put("", "1"), 400, 3, message);
  check_error(etcd, g.remove(""), 400, 3, message);
  check_error(etcd, g.post("/v3/kv/range", ""), 400, 3, message);
}

CONFORMANCE("requests that cannot be read") {
  const Gateway g = etcd.gateway();
  for (const std::string body : {"{", "[1]", "nonsense", R"({"key":1})", R"({"key":"?"})"}) {
    CAPTURE(body);
    const auto reply = g.post("/v3/kv/range", body);
    CHECK(reply.status == 400);
    CHECK(reply.code() == 3);
    CHECK_FALSE(reply.message().empty());
  }
  const auto trailing = g.post("/v3/kv/range", R"({"key":"YQ=="} rubbish)");
  CHECK(trailing.status == 200);
  CHECK(g.range({{"key", "YQ=="}, {"revision", nullptr}, {"unknown", 1}}).status == 200);
  const auto enumerator = g.range({{"key", "YQ=="}, {"sort_order", "UP"}});
  CHECK(enumerator.status == (etcd.has(Quirk::UnknownEnumRefused) ? 400 : 200));
}

CONFORMANCE("unknown paths") {
  const auto reply = etcd.gateway().call("/v3/kv/nothing", Json::object());
  CHECK(reply.status == 404);
  if (etcd.has(Quirk::NotFoundIsText)) {
    CHECK(reply.body == "Not Found\n");
  } else {
    check_error(etcd, reply, 404, 5, "Not Found");
  }
}

CONFORMANCE("the limits on the size of a request") {
  const Gateway g = etcd.gateway();
  const std::string key = etcd.prefix() + "a";
  CHECK(g.put(key, std::string(1572700, 'x')).status == 200);
  check_error(etcd, g.put(key, std::string(1573000, 'x')), 400, 3,
              "etcdserver: request is too large");
  const auto huge = g.put(key, std::string(2200000, 'x'));
  CHECK(huge.status == 429);
  CHECK(huge.code() == 8);
  CHECK(huge.message().find("grpc: received message larger than max") == 0);
  g.remove(key);
}

CONFORMANCE("compaction") {
  const auto own = etcd.fresh();
  const Gateway g = own->gateway();
  const std::string compacted = "etcdserver: mvcc: required revision has been compacted";
  for (int i = 0; i < 8; ++i) g.put("a", std::to_string(i));  // revisions 2 to 9
  g.remove("a");                                              // 10
  g.put("b", "1");                                            // 11
  const auto at = [&](std::int64_t revision) {
    return g.range({{"key", b64("a")}, {"revision", std::to_string(revision)}});
  };
  check_error(*own, g.compact(12), 400, 11,
              "etcdserver: mvcc: required revision is a future revision");
  CHECK(g.compact(5).status == 200);
  CHECK(g.compact(5).code() == 11);
  check_error(*own, g.compact(5), 400, 11, compacted);
  check_error(*own, g.compact(2), 400, 11, compacted);
  check_error(*own, at(4), 400, 11, compacted);
  CHECK(unb64(kv_of(at(5))["value"]) == "3");
  CHECK(unb64(kv_of(at(7))["value"]) == "5");
  CHECK(g.compact(10).status == 200);
  check_error(*own, at(9), 400, 11, compacted);
  CHECK(keys_of(at(10)).empty());
  const auto last = g.compact(11);
  CHECK(last.status == 200);
  CHECK(last.revision() == 11);
  CHECK(keys_of(g.get("b")).size() == 1);
  CHECK(g.put("a", "new").revision() == 12);
  CHECK(kv_of(g.get("a"))["version"] == "1");
}

CONFORMANCE("status") {
  const auto reply = etcd.gateway().call("/v3/maintenance/status", Json::object());
  CHECK(reply.status == 200);
  CHECK(reply.json["version"].is_string());
  CHECK(number(reply.json, "dbSize") > 0);
  CHECK(reply.json["leader"] == reply.json["header"]["member_id"]);
  CHECK(number(reply.json, "raftTerm") > 0);
  CHECK(reply.json["header"].contains("cluster_id"));
  CHECK(reply.json["header"]["raft_term"] == reply.json["raftTerm"]);
  CHECK(reply.revision() >= 1);
  CHECK_FALSE(reply.json.contains("errors"));
}
