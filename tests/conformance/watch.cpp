// Watch streams.
#include <map>

#include "subject.hpp"

using namespace conformance;

namespace {

std::string text_of(const Json& event) {
  std::string text = event.value("type", "PUT") + " " + unb64(event["kv"]["key"]);
  if (event["kv"].contains("value")) text += "=" + unb64(event["kv"]["value"]);
  return text;
}

std::vector<std::string> texts(const std::vector<Json>& events, const std::string& prefix) {
  std::vector<std::string> result;
  for (const Json& event : events) {
    std::string text = text_of(event);
    const auto at = text.find(prefix);
    if (at != std::string::npos) text.erase(at, prefix.size());
    result.push_back(std::move(text));
  }
  return result;
}

Json create_prefix(std::int64_t id, const std::string& prefix, Json fields = Json::object()) {
  fields["range_end"] = b64(coordination::prefix_range_end(prefix));
  return create_request(id, prefix, std::move(fields));
}

Json from(std::int64_t revision) { return {{"start_revision", std::to_string(revision)}}; }

/// All events of a watch so far: what was written before this call, a sentinel closes.
std::vector<Json> events_until_now(const Gateway& g, const WatchCall& watch, std::int64_t id,
                                   const std::string& sentinel) {
  g.put(sentinel, "end");
  std::vector<Json> events;
  do {
    events = watch.events(id, events.size() + 1);
    REQUIRE_FALSE(events.empty());
  } while (unb64(events.back()["kv"]["key"]) != sentinel);
  events.pop_back();
  return events;
}

}  // namespace

CONFORMANCE("a watch tells of its creation, then of every change") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  g.put(p + "a", "before");
  const auto before = g.revision();
  WatchCall watch(g, {create_request(5, p + "a")});
  REQUIRE(watch.wait_lines(1));
  const Json created = watch.results()[0];
  CHECK(is(created, "created"));
  CHECK_FALSE(created.contains("canceled"));
  CHECK(number(created, "watch_id") == 5);
  CHECK(revision_of(created) == before);
  CHECK_FALSE(created.contains("events"));

  g.put(p + "a", "1");
  g.put(p + "b", "another key");
  g.remove(p + "a");
  g.remove(p + "a");  // nothing to tell
  g.put(p + "a", "2");
  const auto events = watch.events(5, 3);
  CHECK(texts(events, p) == std::vector<std::string>{"PUT a=1", "DELETE a", "PUT a=2"});
  CHECK(events[0] == Json{{"kv",
                           {{"key", b64(p + "a")},
                            {"value", b64("1")},
                            {"create_revision", std::to_string(before)},
                            {"mod_revision", std::to_string(before + 1)},
                            {"version", "2"}}}});
  CHECK(events[1] ==
        Json{{"type", "DELETE"},
             {"kv", {{"key", b64(p + "a")}, {"mod_revision", std::to_string(before + 3)}}}});
  const Json line = watch.results()[1];
  CHECK(revision_of(line) >= before + 1);
  CHECK_FALSE(line.contains("created"));
}

CONFORMANCE("a txn is one line, in the order of its operations") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  g.put(p + "z", "1");
  WatchCall watch(g, {create_prefix(1, p)});
  REQUIRE(watch.wait_lines(1));
  const auto done = g.txn({}, {{{"request_put", {{"key", b64(p + "b")}, {"value", b64("1")}}}},
                               {{"request_delete_range", {{"key", b64(p + "z")}}}},
                               {{"request_put", {{"key", b64(p + "a")}, {"value", b64("2")}}}}});
  REQUIRE(done.status == 200);
  REQUIRE(watch.wait_lines(2));
  const Json line = watch.results()[1];
  CHECK(texts(line["events"], p) == std::vector<std::string>{"PUT b=1", "DELETE z", "PUT a=2"});
  for (const Json& event : line["events"]) {
    CHECK(number(event["kv"], "mod_revision") == done.revision());
  }
}

CONFORMANCE("prev_kv is what was before the txn") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  g.put(p + "old", "1");
  WatchCall watch(g, {create_prefix(1, p, {{"prev_kv", true}})});
  REQUIRE(watch.wait_lines(1));
  // Only in inner txns may a key be put and then deleted.
  const auto inner = [](const Json& op) { return Json{{"request_txn", {{"success", Jsons{op}}}}}; };
  const auto put = [&](const char* name) {
    return inner({{"request_put", {{"key", b64(p + name)}, {"value", b64("2")}}}});
  };
  const auto remove = [&](const char* name) {
    return inner({{"request_delete_range", {{"key", b64(p + name)}, {"prev_kv", true}}}});
  };
  const auto done = g.txn({}, {put("new"), put("old"), remove("new"), remove("old")});
  REQUIRE(done.status == 200);
  const Json last = done.json["responses"][3]["response_txn"]["responses"][0];
  CHECK(unb64(last["response_delete_range"]["prev_kvs"][0]["value"]) == "2");
  const auto events = watch.events(1, 4);
  CHECK(texts(events, p) ==
        std::vector<std::string>{"PUT new=2", "PUT old=2", "DELETE new", "DELETE old"});
  CHECK_FALSE(events[0].contains("prev_kv"));
  CHECK_FALSE(events[2].contains("prev_kv"));
  for (const std::size_t i : {1u, 3u}) CHECK(unb64(events[i]["prev_kv"]["value"]) == "1");
}

CONFORMANCE("ranges of watches") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const Json end = {{"range_end", b64(p + "c")}};
  const Json all = {{"range_end", b64(std::string(1, '\0'))}};
  WatchCall watch(g, {create_prefix(1, p), create_request(2, p + "b", end),
                      create_request(3, p + "b", all), create_request(4, "", all)});
  REQUIRE(watch.wait_lines(4));
  for (const char* name : {"a", "b", "bb", "c"}) g.put(p + name, "1");
  CHECK(texts(watch.events(1, 4), p) ==
        std::vector<std::string>{"PUT a=1", "PUT b=1", "PUT bb=1", "PUT c=1"});
  CHECK(texts(watch.events(2, 2), p) == std::vector<std::string>{"PUT b=1", "PUT bb=1"});
  CHECK(texts(watch.events(3, 3), p) == std::vector<std::string>{"PUT b=1", "PUT bb=1", "PUT c=1"});
  CHECK(watch.events(4, 4).size() == 4);
}

CONFORMANCE("prev_kv and filters") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const Json no_put = {{"filters", {"NOPUT"}}}, no_delete = {{"filters", {"NODELETE"}}};
  WatchCall watch(g, {create_prefix(1, p, {{"prev_kv", true}}), create_prefix(2, p, no_put),
                      create_prefix(3, p, no_delete), create_prefix(4, p, {{"filters", {1}}})});
  REQUIRE(watch.wait_lines(4));
  g.put(p + "a", "1");
  g.put(p + "a", "2");
  g.remove(p + "a");
  g.put(p + "a", "3");
  const auto events = watch.events(1, 4);
  REQUIRE(events.size() == 4);
  CHECK_FALSE(events[0].contains("prev_kv"));
  CHECK(unb64(events[1]["prev_kv"]["value"]) == "1");
  CHECK(unb64(events[2]["prev_kv"]["value"]) == "2");
  CHECK(events[2]["prev_kv"]["version"] == "2");
  CHECK_FALSE(events[3].contains("prev_kv"));
  CHECK(texts(watch.events(2, 1), p) == std::vector<std::string>{"DELETE a"});
  for (const int id : {3, 4}) {
    CHECK(texts(watch.events(id, 3), p) ==
          std::vector<std::string>{"PUT a=1", "PUT a=2", "PUT a=3"});
    CHECK_FALSE(watch.events(id, 3)[1].contains("prev_kv"));
  }
}

CONFORMANCE("a watch of the past replays it, one of the future waits") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const auto first = g.put(p + "a", "1").revision();
  g.put(p + "a", "2");
  g.remove(p + "a");
  const auto now = g.revision();
  WatchCall watch(g, {create_prefix(1, p, from(first)), create_prefix(2, p, from(first + 1)),
                      create_prefix(3, p, from(now)), create_prefix(4, p, from(now + 1)),
                      create_prefix(5, p, from(now + 2))});
  REQUIRE(watch.wait_lines(5));
  // A line of the past has the present revision in its header.
  REQUIRE(watch.events(1, 3).size() == 3);
  for (const Json& result : watch.results()) CHECK(revision_of(result) == now);
  g.put(p + "a", "3");
  g.put(p + "a", "4");
  const std::vector<std::string> all = {"PUT a=1", "PUT a=2", "DELETE a", "PUT a=3", "PUT a=4"};
  for (int id = 1; id <= 5; ++id) {
    CAPTURE(id);
    const std::vector<std::string> expected(all.begin() + id - 1, all.end());
    CHECK(texts(watch.events(id, expected.size()), p) == expected);
  }
}

CONFORMANCE("a replay comes in lines of at most 1000 revisions") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const auto first = g.revision() + 1;
  const int count = 2200;
  for (int i = 0; i < count; ++i) REQUIRE(g.put(p + "a", std::to_string(i)).status == 200);
  WatchCall watch(g, {create_request(1, p + "a", from(first))});
  const auto events = watch.events(1, count);
  REQUIRE(events.size() == count);
  for (int i = 0; i < count; ++i) {
    REQUIRE(number(events[static_cast<std::size_t>(i)]["kv"], "mod_revision") == first + i);
  }
  std::vector<std::size_t> sizes;
  for (const Json& result : watch.results()) {
    if (result.contains("events")) sizes.push_back(result["events"].size());
  }
  CHECK(sizes == std::vector<std::size_t>{1000, 1000, 200});
}

CONFORMANCE("watch ids") {
  const Gateway g = etcd.gateway();
  const std::string key = etcd.prefix() + "a";
  Json no_id = create_request(0, key);
  no_id["create_request"].erase("watch_id");
  WatchCall watch(g, {create_request(1, key), no_id, no_id, create_request(-7, key),
                      create_request(1, key), create_request(99, key)});
  REQUIRE(watch.wait_lines(6));
  const auto results = watch.results();
  CHECK(number(results[0], "watch_id") == 1);
  CHECK_FALSE(results[1].contains("watch_id"));  // 0
  CHECK(number(results[2], "watch_id") == 2);    // 1 is taken
  CHECK(number(results[3], "watch_id") == -7);
  CHECK(number(results[5], "watch_id") == 99);
  CHECK(number(results[4], "watch_id") == -1);
  CHECK(is(results[4], "created"));
  CHECK(is(results[4], "canceled"));
  CHECK(results[4]["cancel_reason"] == "mvcc: duplicate watch ID provided on the WatchStream");
  g.put(key, "1");
  for (const int id : {1, 0, 2, -7, 99}) CHECK(watch.events(id, 1).size() == 1);
}

CONFORMANCE("a watch that cannot be is refused in its turn, and the others live on") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const auto refuse = [&](const std::string& key, const std::string& end) {
    return create_request(2, key, {{"range_end", b64(end)}});
  };
  WatchCall watch(g, {create_request(1, p + "a"), refuse(p + "b", p + "a"),
                      refuse(p + "a", p + "a"), create_request(3, p + "a")});
  REQUIRE(watch.wait_lines(4));
  const auto results = watch.results();
  for (const std::size_t i : {1u, 2u}) {
    CHECK(number(results[i], "watch_id") == -1);
    CHECK(is(results[i], "created"));
    CHECK(is(results[i], "canceled"));
    CHECK(results[i]["cancel_reason"] == "mvcc: watcher range is empty");
  }
  g.put(p + "a", "1");
  CHECK(watch.events(1, 1).size() == 1);
  CHECK(watch.events(3, 1).size() == 1);
}

CONFORMANCE("cancel") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const auto cancel = [](int id) {
    return Json{{"cancel_request", {{"watch_id", std::to_string(id)}}}};
  };
  WatchCall watch(g, {create_request(1, p + "a"), create_request(2, p + "a"), cancel(77), cancel(1),
                      create_request(1, p + "b")});
  REQUIRE(watch.wait_lines(4));
  const auto results = watch.results();
  CHECK(number(results[2], "watch_id") == 1);
  CHECK(is(results[2], "canceled"));
  CHECK_FALSE(results[2].contains("created"));
  CHECK_FALSE(results[2].contains("cancel_reason"));
  CHECK(is(results[3], "created"));
  g.put(p + "a", "1");
  g.put(p + "b", "1");
  CHECK(texts(watch.events(2, 1), p) == std::vector<std::string>{"PUT a=1"});
  CHECK(texts(watch.events(1, 1), p) == std::vector<std::string>{"PUT b=1"});
}

CONFORMANCE("progress requests") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  g.put(p + "a", "1");
  const Json progress = {{"progress_request", Json::object()}};
  const auto is_progress = [](const Json& result) {
    return number(result, "watch_id") == -1 && !result.contains("created") &&
           !result.contains("events");
  };
  const auto count = [&](const WatchCall& watch) {
    const auto results = watch.results();
    return std::count_if(results.begin(), results.end(), is_progress);
  };
  WatchCall none(g, {progress, create_request(1, p + "a"), create_request(2, p + "a")});
  REQUIRE(none.wait_lines(2));
  g.put(p + "a", "2");
  REQUIRE(none.events(2, 1).size() == 1);
  CHECK(count(none) == (etcd.has(Quirk::ProgressWithoutWatcher) ? 1 : 0));

  WatchCall some(g, {create_request(1, p + "a"), progress});
  REQUIRE(some.wait_lines(2));
  CHECK(count(some) == 1);
  for (const Json& result : some.results()) CHECK(revision_of(result) == g.revision());
}

CONFORMANCE("progress_notify is taken, and objects that say nothing are ignored") {
  const Gateway g = etcd.gateway();
  const std::string key = etcd.prefix() + "a";
  WatchCall watch(g, {Json::object(),
                      {{"unknown", 1}},
                      create_request(1, key, {{"progress_notify", true}, {"fragment", true}})});
  REQUIRE(watch.wait_lines(1));
  g.put(key, "1");
  CHECK(watch.events(1, 1).size() == 1);
  CHECK(watch.results().size() == 2);
}

CONFORMANCE("many watches in one body") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const int count = 1000;
  Jsons orders;
  for (int id = 1; id <= count; ++id) {
    orders.push_back(create_request(id, p + std::to_string(id)));
  }
  WatchCall watch(g, orders);
  REQUIRE(watch.wait_lines(count));
  const auto results = watch.results();
  for (int id = 1; id <= count; ++id) {  // created in the order of the requests
    REQUIRE(number(results[static_cast<std::size_t>(id) - 1], "watch_id") == id);
  }
  for (const int id : {1, 500, 1000}) {
    g.put(p + std::to_string(id), "x");
    CHECK(watch.events(id, 1).size() == 1);
  }
}

CONFORMANCE("each watch of a stream has its events in order, none missing") {
  const Gateway g = etcd.gateway();
  const std::string p = etcd.prefix();
  const auto first = g.revision() + 1;
  for (int i = 0; i < 50; ++i) g.put(p + "a", std::to_string(i));
  Jsons orders;
  for (int id = 1; id <= 20; ++id) orders.push_back(create_prefix(id, p, from(first + id)));
  WatchCall watch(g, orders);
  for (int i = 50; i < 100; ++i) g.put(p + "a", std::to_string(i));
  for (int id = 1; id <= 20; ++id) {
    const auto events = watch.events(id, static_cast<std::size_t>(100 - id));
    REQUIRE(events.size() == static_cast<std::size_t>(100 - id));
    for (int i = id; i < 100; ++i) {
      REQUIRE(unb64(events[static_cast<std::size_t>(i - id)]["kv"]["value"]) == std::to_string(i));
    }
  }
}

CONFORMANCE("a watch of compacted history is ended with the oldest revision that is left") {
  const auto own = etcd.fresh();
  const Gateway g = own->gateway();
  for (int i = 2; i < 12; ++i) REQUIRE(g.put("a", std::to_string(i)).revision() == i);
  REQUIRE(g.compact(8).status == 200);
  WatchCall watch(g, {create_request(1, "a", from(7)), create_request(2, "a", from(8)),
                      create_request(3, "a", {{"start_revision", "8"}, {"prev_kv", true}})});
  CHECK(texts(watch.events(2, 4), "") ==
        std::vector<std::string>{"PUT a=8", "PUT a=9", "PUT a=10", "PUT a=11"});
  const auto kept = watch.events(3, 4);
  REQUIRE(kept.size() == 4);
  CHECK_FALSE(kept[0].contains("prev_kv"));
  CHECK(unb64(kept[1]["prev_kv"]["value"]) == "8");
  REQUIRE(watch.lines().wait(
      [&](const auto& lines) {
        return std::any_of(lines.begin(), lines.end(),
                           [](const Json& line) { return is(line["result"], "canceled"); });
      },
      20s));
  int ended = 0;
  for (const Json& result : watch.results()) {
    if (!is(result, "canceled")) continue;
    ++ended;
    CHECK(number(result, "watch_id") == 1);
    CHECK(number(result, "compact_revision") == 8);
    CHECK_FALSE(result["header"].contains("revision"));
    CHECK(result["header"]["cluster_id"] == g.get("a").json["header"]["cluster_id"]);
    CHECK_FALSE(result.contains("created"));
  }
  CHECK(ended == 1);
  CHECK(is(watch.results()[0], "created"));
  CHECK_FALSE(is(watch.results()[0], "canceled"));
  // The stream and its other watches live on, also past a compaction.
  g.compact(11);
  g.put("a", "12");
  CHECK(texts(watch.events(2, 5), "").back() == "PUT a=12");
}

CONFORMANCE("a watch from a negative revision") {
  const auto own = etcd.fresh();
  const Gateway g = own->gateway();
  WatchCall watch(g, {create_request(1, "a", from(-5)), create_request(2, "a")});
  REQUIRE(watch.wait_lines(own->has(Quirk::NegativeStartCompacts) ? 3 : 2));
  const auto results = watch.results();
  for (const Json& result : results) {
    if (!is(result, "canceled")) continue;
    if (own->has(Quirk::NegativeStartCompacts)) {
      CHECK(number(result, "watch_id") == 1);
      CHECK(number(result, "compact_revision") == -1);
    } else {
      CHECK(number(result, "watch_id") == -1);
      CHECK(is(result, "created"));
      CHECK(result["cancel_reason"] == "etcdserver: mvcc: required revision has been compacted");
    }
  }
}

CONFORMANCE("compaction at the revision of a delete") {
  const auto own = etcd.fresh();
  const Gateway g = own->gateway();
  g.put("a", "1");
  REQUIRE(g.remove("a").revision() == 3);
  REQUIRE(g.call("/v3/kv/compaction", {{"revision", "3"}, {"physical", true}}).status == 200);
  WatchCall watch(
      g,
      {create_request(1, "", {{"range_end", b64(std::string(1, '\0'))}, {"start_revision", "3"}})});
  const auto events = events_until_now(g, watch, 1, "z");
  const std::vector<std::string> all = {"DELETE a"};
  CHECK(texts(events, "") ==
        (own->has(Quirk::CompactionEatsDelete) ? std::vector<std::string>{} : all));
}

CONFORMANCE("a watch stream stays open until its client ends it") {
  const Gateway g = etcd.gateway();
  const std::string key = etcd.prefix() + "a";
  WatchCall watch(g, {create_request(1, key), {{"cancel_request", {{"watch_id", "1"}}}}});
  REQUIRE(watch.wait_lines(2));
  CHECK(watch.end(50ms) == nullptr);
  watch.cancel();
  REQUIRE(watch.end());
  CHECK(watch.end()->error().code == coordination::ErrorCode::Cancelled);
}
