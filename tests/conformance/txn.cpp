// Transactions.
#include "subject.hpp"

using namespace conformance;

namespace {

Json compare(const std::string& key, const char* target, const char* result, const char* field,
             const Json& value) {
  return {{"key", b64(key)}, {"target", target}, {"result", result}, {field, value}};
}
Json put(const std::string& key, const std::string& value, Json fields = Json::object()) {
  fields["key"] = b64(key);
  fields["value"] = b64(value);
  return {{"request_put", std::move(fields)}};
}
Json range(const std::string& key, Json fields = Json::object()) {
  fields["key"] = b64(key);
  return {{"request_range", std::move(fields)}};
}
Json delete_range(const std::string& key, Json fields = Json::object()) {
  fields["key"] = b64(key);
  return {{"request_delete_range", std::move(fields)}};
}
Json nested(const Jsons& compares, const Jsons& success, const Jsons& failure = {}) {
  return {{"request_txn", {{"compare", compares}, {"success", success}, {"failure", failure}}}};
}

}  // namespace

CONFORMANCE("a txn takes one branch, and is one revision") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const Jsons missing = {compare(p + "a", "CREATE", "EQUAL", "create_revision", "0")};
  const Jsons take = {put(p + "a", "1"), put(p + "b", "2"), range(p + "a")};
  const Jsons look = {range(p + "a")};

  const auto before = g.revision();
  const auto first = g.txn(missing, take, look);
  CHECK(first.status == 200);
  CHECK(is(first.json, "succeeded"));
  CHECK(first.revision() == before + 1);
  REQUIRE(first.json["responses"].size() == 3);
  for (const std::size_t i : {0u, 1u}) {
    CHECK(revision_of(first.json["responses"][i]["response_put"]) == before + 1);
  }
  const Json seen = first.json["responses"][2]["response_range"];
  CHECK(number(seen["kvs"][0], "mod_revision") == before + 1);
  CHECK(revision_of(seen) == before + 1);

  const auto second = g.txn(missing, take, look);
  CHECK_FALSE(second.json.contains("succeeded"));
  CHECK(second.revision() == before + 1);
  REQUIRE(second.json["responses"].size() == 1);
  CHECK(unb64(second.json["responses"][0]["response_range"]["kvs"][0]["value"]) == "1");
  CHECK(second.json["responses"][0]["response_range"]["header"] ==
        Json{{"revision", std::to_string(before + 1)}});
}

CONFORMANCE("a txn of nothing succeeds and says nothing") {
  const auto reply = etcd.gateway().call("/v3/kv/txn", Json::object());
  CHECK(reply.status == 200);
  CHECK(is(reply.json, "succeeded"));
  CHECK_FALSE(reply.json.contains("responses"));
}

CONFORMANCE("compares: every target, every result") {
  const Gateway g = etcd.gateway();
  const std::string key = etcd.prefix() + "a";
  const auto lease = etcd.lease_id();
  REQUIRE(g.grant(lease, 600).status == 200);
  const auto create = g.put(key, "l").revision();
  const auto mod = g.put(key, "m", {{"lease", std::to_string(lease)}}).revision();
  struct Case {
    const char *target, *field;
    Json less, equal, greater;  // than what the key has
  };
  const auto text = [](std::int64_t n) { return Json(std::to_string(n)); };
  const std::vector<Case> cases = {
      {"VERSION", "version", "1", "2", "3"},
      {"CREATE", "create_revision", text(create - 1), text(create), text(create + 1)},
      {"MOD", "mod_revision", text(mod - 1), text(mod), text(mod + 1)},
      {"LEASE", "lease", text(lease - 1), text(lease), text(lease + 1)},
      {"VALUE", "value", b64("l"), b64("m"), b64("n")}};
  const auto holds = [&](const Case& c, const char* result, const Json& value) {
    return is(g.txn({compare(key, c.target, result, c.field, value)}, {}).json, "succeeded");
  };
  for (const Case& c : cases) {
    CAPTURE(c.target);
    CHECK(holds(c, "EQUAL", c.equal));
    CHECK_FALSE(holds(c, "EQUAL", c.less));
    CHECK(holds(c, "NOT_EQUAL", c.less));
    CHECK_FALSE(holds(c, "NOT_EQUAL", c.equal));
    CHECK(holds(c, "GREATER", c.less));
    CHECK_FALSE(holds(c, "GREATER", c.equal));
    CHECK_FALSE(holds(c, "GREATER", c.greater));
    CHECK(holds(c, "LESS", c.greater));
    CHECK_FALSE(holds(c, "LESS", c.equal));
    CHECK_FALSE(holds(c, "LESS", c.less));
  }
  g.revoke(lease);
}

CONFORMANCE("compares of a key that is missing") {
  const Gateway g = etcd.gateway();
  const std::string key = etcd.prefix() + "a";
  const auto holds = [&](const char* target, const char* result, const char* field,
                         const Json& value) {
    return is(g.txn({compare(key, target, result, field, value)}, {}).json, "succeeded");
  };
  const std::vector<std::pair<const char*, const char*>> numbers = {{"VERSION", "version"},
                                                                    {"CREATE", "create_revision"},
                                                                    {"MOD", "mod_revision"},
                                                                    {"LEASE", "lease"}};
  for (const auto& number : numbers) {
    const char *target = number.first, *field = number.second;
    CAPTURE(target);
    CHECK(holds(target, "EQUAL", field, "0"));
    CHECK(holds(target, "LESS", field, "1"));
    CHECK_FALSE(holds(target, "GREATER", field, "0"));
  }
  for (const char* result : {"EQUAL", "NOT_EQUAL", "LESS", "GREATER"}) {
    CAPTURE(result);
    CHECK_FALSE(holds("VALUE", result, "value", ""));
    CHECK_FALSE(holds("VALUE", result, "value", b64("x")));
  }
  // Of a field that is not the target's, nothing is taken.
  g.put(key, "1");
  CHECK_FALSE(holds("VALUE", "EQUAL", "version", "1"));
}

CONFORMANCE("compares of a range hold for all of its keys") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  g.put(p + "a", "1");
  g.put(p + "b", "1");
  const auto holds = [&](const std::string& begin, const char* field, const Json& value) {
    Json c = compare(begin, std::string(field) == "version" ? "VERSION" : "VALUE", "EQUAL", field,
                     value);
    c["range_end"] = b64(coordination::prefix_range_end(begin));
    return is(g.txn({c}, {}).json, "succeeded");
  };
  CHECK(holds(p, "value", b64("1")));
  CHECK(holds(p, "version", "1"));
  g.put(p + "b", "2");
  CHECK_FALSE(holds(p, "value", b64("1")));
  CHECK_FALSE(holds(p, "version", "1"));
  CHECK(holds(p + "none", "version", "0"));
  CHECK_FALSE(holds(p + "none", "value", b64("1")));
}

CONFORMANCE("operations of a txn see what those before them did") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  g.put(p + "a", "old");
  const auto before = g.revision();
  const auto reply =
      g.txn({}, {range(p + "a"), put(p + "a", "new", {{"prev_kv", true}}), range(p + "a"),
                 delete_range(p + "b"), range(p + "a", {{"revision", std::to_string(before)}})});
  REQUIRE(reply.status == 200);
  const Json r = reply.json["responses"];
  CHECK(unb64(r[0]["response_range"]["kvs"][0]["value"]) == "old");
  CHECK(revision_of(r[0]["response_range"]) == before);
  CHECK(unb64(r[1]["response_put"]["prev_kv"]["value"]) == "old");
  CHECK(unb64(r[2]["response_range"]["kvs"][0]["value"]) == "new");
  CHECK(revision_of(r[3]["response_delete_range"]) == before + 1);
  CHECK(unb64(r[4]["response_range"]["kvs"][0]["value"]) == "old");

  const auto reads = g.txn({}, {range(p + "a"), delete_range(p + "none")});
  CHECK(reads.revision() == before + 1);
  CHECK(revision_of(reads.json["responses"][1]["response_delete_range"]) == before + 1);
}

CONFORMANCE("nested txns") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  g.put(p + "a", "1");
  // The compares of all levels are judged before anything is written.
  const Json inner = nested({compare(p + "a", "VALUE", "EQUAL", "value", b64("1"))},
                            {put(p + "b", "inner")}, {put(p + "b", "outer")});
  const auto reply = g.txn({}, {put(p + "a", "2"), inner, range(p + "b")});
  REQUIRE(reply.status == 200);
  const Json r = reply.json["responses"];
  CHECK(r[1]["response_txn"]["header"] == Json::object());
  CHECK(is(r[1]["response_txn"], "succeeded"));
  CHECK(revision_of(r[1]["response_txn"]["responses"][0]["response_put"]) == reply.revision());
  CHECK(unb64(r[2]["response_range"]["kvs"][0]["value"]) == "inner");

  const auto again = g.txn({}, {inner});
  CHECK_FALSE(again.json["responses"][0]["response_txn"].contains("succeeded"));
  CHECK(unb64(g.get(p + "b").json["kvs"][0]["value"]) == "outer");
}

CONFORMANCE("a key is written once in a txn") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const auto check_duplicate = [&](const Jsons& ops) {
    CAPTURE(Json(ops).dump());
    const auto before = g.revision();
    check_error(etcd, g.txn({}, ops), 400, 3, "etcdserver: duplicate key given in txn request");
    check_error(etcd, g.txn({compare(p, "VERSION", "EQUAL", "version", "9")}, {}, ops), 400, 3,
                "etcdserver: duplicate key given in txn request");
    CHECK(g.revision() == before);
  };
  const Json whole = {{"range_end", b64(coordination::prefix_range_end(p))}};
  check_duplicate({put(p + "a", "1"), put(p + "a", "2")});
  check_duplicate({put(p + "a", "1"), delete_range(p + "a")});
  check_duplicate({delete_range(p, whole), put(p + "a", "1")});
  check_duplicate({put(p + "a", "1"), nested({}, {put(p + "a", "2")})});
  check_duplicate({put(p + "a", "1"), nested({}, {}, {put(p + "a", "2")})});
  check_duplicate({nested({}, {put(p + "a", "1")}), nested({}, {put(p + "a", "2")})});
  check_duplicate({delete_range(p, whole), nested({}, {put(p + "a", "1")})});
  check_duplicate({nested({}, {delete_range(p + "a")}), put(p + "a", "1")});

  CHECK(g.txn({}, {put(p + "a", "1"), put(p + "b", "1"), delete_range(p + "c")}).status == 200);
  CHECK(g.txn({}, {delete_range(p + "a"), delete_range(p, whole)}).status == 200);
  const Json either = nested({}, {put(p + "a", "1")}, {put(p + "a", "2")});
  CHECK(g.txn({}, {either}).status == 200);
}

CONFORMANCE("a txn has at most 128 operations") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const auto ops = [&](int count, const std::string& name) {
    Jsons list;
    for (int i = 0; i < count; ++i) list.push_back(put(p + name + std::to_string(i), "1"));
    return list;
  };
  const auto compares = [&](int count) {
    Jsons list;
    for (int i = 0; i < count; ++i) list.push_back(compare(p, "VERSION", "EQUAL", "version", "0"));
    return list;
  };
  const auto check_too_many = [&](const Reply& reply) {
    check_error(etcd, reply, 400, 3, "etcdserver: too many operations in txn request");
  };
  CHECK(g.txn(compares(128), ops(128, "a"), ops(128, "a")).status == 200);
  check_too_many(g.txn(compares(129), {}));
  check_too_many(g.txn({}, ops(129, "a")));
  check_too_many(g.txn({}, {}, ops(129, "a")));
  // What an inner one may have is what the outer one leaves... of 128 minus the outer's own.
  CHECK(g.txn({}, {nested({}, ops(127, "a"))}).status == 200);
  check_too_many(g.txn({}, {nested({}, ops(128, "a"))}));
  const auto two = [&](int each) {
    return g.txn({}, {nested({}, ops(each, "a")), nested({}, ops(each, "b"))});
  };
  CHECK(two(126).status == 200);
  check_too_many(two(127));
}

CONFORMANCE("a txn that is refused changes nothing") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  g.put(p + "a", "1");
  const auto before = g.revision();
  const auto check_refused = [&](const Json& op, int status, int code, const std::string& message) {
    check_error(etcd, g.txn({}, {put(p + "x", "1"), op}), status, code, message);
    check_error(etcd, g.txn({}, {put(p + "x", "1"), nested({}, {op})}), status, code, message);
  };
  check_refused(Json::object(), 400, 3, "etcdserver: key not found");
  check_refused(put("", "1"), 400, 3, "etcdserver: key is not provided");
  check_refused(range(""), 400, 3, "etcdserver: key is not provided");
  check_refused(delete_range(""), 400, 3, "etcdserver: key is not provided");
  check_refused(put(p + "y", "1", {{"lease", std::to_string(etcd.lease_id())}}), 404, 5,
                "etcdserver: requested lease not found");
  check_refused(put(p + "y", "1", {{"ignore_lease", true}}), 400, 3, "etcdserver: key not found");
  // A put by itself would say that there is no such lease.
  const Json no_lease = {{"ignore_value", true}, {"lease", std::to_string(etcd.lease_id())}};
  if (etcd.has(Quirk::LeaseBeforeKeyInTxn)) {
    check_refused(put(p + "y", "", no_lease), 404, 5, "etcdserver: requested lease not found");
  } else {
    check_refused(put(p + "y", "", no_lease), 400, 3, "etcdserver: key not found");
  }
  check_refused(put(p + "a", "1", {{"ignore_value", true}}), 400, 3,
                "etcdserver: value is provided");
  check_refused(range(p + "a", {{"revision", std::to_string(before + 1)}}), 400, 11,
                "etcdserver: mvcc: required revision is a future revision");
  check_error(etcd, g.txn({compare("", "VERSION", "EQUAL", "version", "0")}, {}), 400, 3,
              "etcdserver: key is not provided");
  CHECK(g.revision() == before);
  // What is wrong with the branch that is not taken does not matter, if it is a matter of data.
  const Jsons fails = {compare(p + "a", "VERSION", "EQUAL", "version", "9")};
  const Jsons bad = {put(p + "y", "1", {{"lease", std::to_string(etcd.lease_id())}})};
  CHECK(g.txn(fails, bad, {put(p + "x", "1")}).status == 200);
}

CONFORMANCE("a txn that is wrong in two ways") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const Json future = range(p + "a", {{"revision", std::to_string(g.revision() + 1)}});
  const Json no_lease = put(p + "y", "1", {{"lease", std::to_string(etcd.lease_id())}});
  CHECK(g.txn({}, {no_lease, future}).code() == 5);
  CHECK(g.txn({}, {future, no_lease}).code() == (etcd.has(Quirk::TxnRefusedByFirst) ? 11 : 5));
}

CONFORMANCE("a txn that reads a compacted revision is refused") {
  const auto own = etcd.fresh();
  const Gateway g = own->gateway();
  for (int i = 0; i < 4; ++i) g.put("a", std::to_string(i));
  REQUIRE(g.compact(4).status == 200);
  check_error(*own, g.txn({}, {range("a", {{"revision", "3"}}), put("b", "1")}), 400, 11,
              "etcdserver: mvcc: required revision has been compacted");
  CHECK(g.txn({}, {range("a", {{"revision", "4"}})}).status == 200);
}

CONFORMANCE("an unknown result of a compare") {
  const Gateway g = etcd.gateway();
  const auto reply = g.txn({compare(etcd.prefix(), "VERSION", "SAME", "version", "0")}, {});
  if (etcd.has(Quirk::UnknownEnumRefused)) {
    CHECK(reply.status == 400);
  } else {
    CHECK(is(reply.json, "succeeded"));  // it was taken for EQUAL
  }
}
