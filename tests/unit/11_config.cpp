// Section 11: configuration, on an etcd in memory.
#include <doctest/doctest.h>

#include <limits>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"

using namespace coordination;
using namespace support;
using nlohmann::json;

namespace {

struct Setup : Cluster {
  Coordinator c{connect("one")}, d{connect("two")};
  ConfigCenter& config{c.config()};

  std::string raw(const std::string& key) {
    const auto kv = d.client().get("/config/" + key);
    return kv ? kv->value : text_of(kv);
  }
};

std::string next(Watch<ConfigEvent>& watch) {
  const auto event = watch.next(Context::with_timeout(lenient(2s)));
  if (!event) return text_of(event);
  return to_string(event->type) + (" " + event->key) + "=" + event->value.dump();
}

using Strings = std::vector<std::string>;

}  // namespace

TEST_CASE("config: any value comes back as it went in") {
  Setup s;
  const json values[] = {nullptr,
                         true,
                         42,
                         -1.5,
                         "text",
                         "123",
                         "true",
                         "",
                         " ",
                         "\"q\"",
                         json::array(),
                         json::object(),
                         {1, "2", {{"a", nullptr}}},
                         "\xc3\xa4 \xf0\x9f\x98\x80",
                         std::string("a\0b", 3),
                         std::string(200000, 'x')};
  for (const auto& value : values) {
    REQUIRE(s.config.set("k", value));
    const auto back = s.d.config().get("k");
    REQUIRE_MESSAGE(back, text_of(back));
    CHECK(*back == value);
  }
}

TEST_CASE("config: in etcd a string stands as it is, unless it would be read as something else") {
  Setup s;
  s.config.set("a/b", "plain text").value();
  CHECK(s.etcd->keys() == Strings{"/config/a/b"});
  CHECK(s.raw("a/b") == "plain text");
  s.config.set("a/b", "123").value();
  CHECK(s.raw("a/b") == "\"123\"");
  s.config.set("a/b", 123).value();
  CHECK(s.raw("a/b") == "123");
  s.config.set("a/b", {{"b", 1}, {"a", {true, nullptr}}}).value();
  CHECK(s.raw("a/b") == R"({"a":[true,null],"b":1})");
}

TEST_CASE("config: what others have written") {
  Setup s;
  const auto read = [&](const std::string& bytes) {
    s.d.client().put("/config/k", bytes).value();
    return s.config.get("k").value();
  };
  CHECK(read("no json") == "no json");
  CHECK(read("") == "");
  CHECK(read("5") == 5);
  CHECK(read("{\"a\": 1}\n") == json{{"a", 1}});
  CHECK(read("{\"a\":") == "{\"a\":");
  CHECK(read(std::string(5000, '[')) == std::string(5000, '['));
}

TEST_CASE("config: bytes that only begin as JSON are a string") {
  Setup s;
  const std::string bytes("42\0junk", 7);
  s.d.client().put("/config/k", bytes).value();
  CHECK(s.config.get("k").value() == bytes);
  CHECK(s.config.set("other", bytes));
  CHECK(s.config.get("other").value() == bytes);
}

TEST_CASE("config: get_as") {
  Setup s;
  s.config.set("n", 42).value();
  s.config.set("list", {"a", "b"}).value();
  CHECK(s.config.get_as<int>("n").value() == 42);
  CHECK(s.config.get_as<double>("n").value() == 42.0);
  CHECK(s.config.get_as<Strings>("list").value() == Strings{"a", "b"});
  check_code(s.config.get_as<std::string>("n"), ErrorCode::Validation);
  check_code(s.config.get_as<int>("list"), ErrorCode::Validation);
  check_code(s.config.get_as<int>("none"), ErrorCode::NotFound);
}

TEST_CASE("config: get_entry, and what is not there") {
  Setup s;
  check_code(s.config.get("k"), ErrorCode::NotFound);
  check_code(s.config.get_entry("k"), ErrorCode::NotFound);
  check_code(s.config.remove("k"), ErrorCode::NotFound);
  s.config.set("k", 1).value();
  s.config.set("k", 2).value();
  const auto entry = s.config.get_entry("k");
  REQUIRE_MESSAGE(entry, text_of(entry));
  CHECK(entry->key == "k");
  CHECK(entry->value == 2);
  CHECK(entry->revision == s.etcd->revision());
  CHECK(s.config.remove("k"));
  check_code(s.config.get("k"), ErrorCode::NotFound);
  CHECK(s.etcd->keys().empty());
}

TEST_CASE("config: compare_and_set") {
  Setup s;
  const auto first = s.config.compare_and_set("k", 0, "a");
  REQUIRE_MESSAGE(first, text_of(first));
  CHECK(*first == s.etcd->revision());
  CHECK(s.config.get_entry("k").value().revision == *first);
  check_code(s.config.compare_and_set("k", 0, "b"), ErrorCode::Conflict);
  const auto second = s.config.compare_and_set("k", *first, "b");
  REQUIRE_MESSAGE(second, text_of(second));
  CHECK(*second > *first);
  check_code(s.config.compare_and_set("k", *first, "c"), ErrorCode::Conflict);
  CHECK(s.config.get("k").value() == "b");
  check_code(s.config.compare_and_set("none", *second, "c"), ErrorCode::Conflict);
  s.config.remove("k").value();
  check_code(s.config.compare_and_set("k", *second, "c"), ErrorCode::Conflict);
  CHECK(s.config.compare_and_set("k", 0, "d"));
}

TEST_CASE("config: of many who count with compare_and_set none is forgotten") {
  Setup s;
  s.config.set("n", 0).value();
  const int each = scaled(50);
  std::atomic<int> errors{0};
  {
    std::vector<Joined> threads;
    for (auto* c : {&s.c, &s.d, &s.c}) {
      threads.emplace_back([&, c] {
        for (int done = 0; done < each;) {
          const auto entry = c->config().get_entry("n").value();
          const auto set =
              c->config().compare_and_set("n", entry.revision, entry.value.get<int>() + 1);
          if (set) ++done;
          if (!set && set.error().code != ErrorCode::Conflict) ++errors;
        }
      });
    }
  }
  CHECK(errors == 0);
  CHECK(s.config.get("n").value() == 3 * each);
}

TEST_CASE("config: list") {
  Setup s;
  for (const char* key :
       {"app", "app/b", "app/a", "app/a/deep", "app-1", "app2", "ap", "app.x/y"}) {
    s.config.set(key, 1).value();
  }
  s.d.client().put("/configuration", "").value();
  CHECK(s.config.list("app").value() == Strings{"app", "app/a", "app/a/deep", "app/b"});
  CHECK(s.config.list("app/a").value() == Strings{"app/a", "app/a/deep"});
  CHECK(s.config.list("none").value().empty());
  CHECK(s.config.list("").value().size() == 8);
}

TEST_CASE("config: thousands of keys at one revision") {
  Setup s;
  constexpr int kKeys = 2500;
  for (int begin = 0; begin < kKeys; begin += 100) {
    Txn txn;
    for (int i = begin; i < begin + 100; ++i) {
      txn.then(Op::put("/config/many/" + std::to_string(100000 + i), std::to_string(i)));
    }
    s.c.client().commit(txn).value();
  }
  std::atomic<int> pages{0};
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    if (request.path == "/v3/kv/range" && ++pages == 2) {
      s.etcd
          ->perform(
              {"http://x:1", "/v3/kv/deleterange", {}, R"({"key":"L2NvbmZpZy9tYW55LzEwMjQ5OQ=="})"},
              nullptr, {})
          .value();  // the last key
    }
  });
  const auto keys = s.config.list("many").value();
  CHECK(pages == 3);
  REQUIRE(keys.size() == kKeys);
  CHECK(keys.front() == "many/100000");
  CHECK(keys.back() == "many/102499");
  s.tap->before(nullptr);
  CHECK(s.config.list("many").value().size() == kKeys - 1);
  const auto view = s.config.view("many").value();
  CHECK(view.keys().size() == kKeys - 1);
  CHECK(view.get("many/101234").value() == 1234);
}

TEST_CASE("config: no key can leave its prefix") {
  Setup s;
  auto options = s.options();
  options.key_prefix = "/tenants/a";
  auto c = connect_to(options);
  c.config().set("x", 1).value();
  CHECK(s.etcd->keys() == Strings{"/tenants/a/config/x"});
  check_code(c.config().set("../b/config/x", 1), ErrorCode::Validation);
  check_code(c.config().set("./x", 1), ErrorCode::Validation);
  CHECK(c.config().list("").value() == Strings{"x"});
  CHECK(s.config.list("").value().empty());
}

TEST_CASE("config: a set whose answer was lost is settled, not guessed; a remove cannot be") {
  Setup s;
  s.etcd->drop_replies(1);
  CHECK(s.config.set("k", 1));
  CHECK(s.config.get("k").value() == 1);
  s.etcd->drop_replies(1);
  const auto removed = s.config.remove("k");  // by us, or by somebody else while ours waits?
  check_code(removed, ErrorCode::Connection);
  CHECK(removed.error().outcome == Outcome::MaybeApplied);
  CHECK(s.etcd->keys().empty());
}

TEST_CASE("config: a compare_and_set whose answer was lost says 'maybe', and no Conflict") {
  Setup s;
  const auto first = s.config.compare_and_set("k", 0, 1).value();
  s.etcd->drop_replies(1);
  const auto set = s.config.compare_and_set("k", first, 2);
  check_code(set, ErrorCode::Connection);
  CHECK(set.error().outcome == Outcome::MaybeApplied);
  CHECK(s.config.get("k").value() == 2);
  CHECK(s.config.get_entry("k").value().revision == s.etcd->revision());  // applied once
}

TEST_CASE("config: a compare_and_set that was lost on its way is sent again") {
  Setup s;
  const auto first = s.config.compare_and_set("k", 0, 1).value();
  s.tap->reset();
  s.tap->lose(1, "/v3/kv/txn");
  const auto second = s.config.compare_and_set("k", first, 2);
  REQUIRE_MESSAGE(second, text_of(second));
  CHECK(*second == s.etcd->revision());
  CHECK(s.tap->count("/v3/kv/txn") == 2);
  // What does not exist could be made, removed by somebody, and made once more: that is sent once.
  s.tap->lose(1, "/v3/kv/txn");
  const auto made = s.config.compare_and_set("other", 0, 1);
  check_code(made, ErrorCode::Connection);
  CHECK(made.error().outcome == Outcome::MaybeApplied);
  CHECK(s.tap->count("/v3/kv/txn") == 3);
}

TEST_CASE("config: a value over etcd's limit is Validation, and names the endpoint") {
  Setup s;
  for (const std::size_t size : {std::size_t{2} << 20, std::size_t{4} << 20}) {
    const auto ctx = Context::with_timeout(lenient(10s));
    const auto set = s.config.set("k", std::string(size, 'x'), ctx);
    check_code(set, ErrorCode::Validation);
    CHECK(set.error().outcome == Outcome::NotApplied);
    CHECK(text_of(set).find("one:1") != std::string::npos);
  }
  CHECK(s.etcd->keys().empty());
}

TEST_CASE("config: watch one key") {
  Setup s;
  s.config.set("k", 0).value();
  auto watch = s.config.watch("k").value();
  const auto revision = s.etcd->revision();
  s.d.config().set("k", 1).value();
  s.d.config().set("k/deeper", 2).value();
  s.d.config().set("k", {{"a", 1}}).value();
  s.d.config().remove("k").value();
  const auto first = watch.next(Context::with_timeout(lenient(2s)));
  REQUIRE_MESSAGE(first, text_of(first));
  CHECK(first->type == EventType::Put);
  CHECK(first->key == "k");
  CHECK(first->value == 1);
  CHECK(first->revision == revision + 1);
  CHECK(first->timestamp > std::chrono::system_clock::now() - 1min);
  CHECK(next(watch) == R"(PUT k={"a":1})");
  CHECK(next(watch) == "DELETE k=null");
}

TEST_CASE("config: watch a prefix, with what is there") {
  Setup s;
  s.config.set("app/z", 1).value();
  s.config.set("app", 2).value();
  s.config.set("app2", 3).value();
  WatchOptions options;
  options.include_existing = true;
  auto watch = s.config.watch_prefix("app", options).value();
  auto all = s.config.watch_prefix("").value();
  s.d.config().set("app2/x", 4).value();
  s.d.config().set("app/a/b", 5).value();
  s.d.config().remove("app").value();
  CHECK(next(watch) == "PUT app/z=1");
  CHECK(next(watch) == "PUT app=2");
  CHECK(next(watch) == "PUT app/a/b=5");
  CHECK(next(watch) == "DELETE app=null");
  CHECK(next(all) == "PUT app2/x=4");
  CHECK(next(all) == "PUT app/a/b=5");
  CHECK(next(all) == "DELETE app=null");
}

TEST_CASE("config: handlers hear everything, in order, also through cuts and compaction") {
  Setup s;
  Notes notes;
  const auto handler = [&](const ConfigEvent& event) {
    notes.add(to_string(event.type) + (" " + event.key) + "=" + event.value.dump());
  };
  auto one = s.config.watch("k", handler);
  REQUIRE_MESSAGE(one, text_of(one));
  Strings expected;
  for (int i = 0; i < 20; ++i) {
    if (i % 5 == 3) s.etcd->cut_streams(i % 2 == 0);
    s.d.config().set("k", i).value();
    expected.push_back("PUT k=" + std::to_string(i));
    if (i % 10 == 9) CHECK(eventually([&] { return notes.size() == expected.size(); }));
    if (i % 10 == 9) s.etcd->compact();
  }
  CHECK(notes.lines() == expected);
  one->cancel();
  s.d.config().set("k", "unheard").value();
  std::this_thread::sleep_for(5ms);
  CHECK(notes.size() == expected.size());
}

TEST_CASE("config: after a compaction that it has missed, a watch delivers the difference") {
  Setup s;
  s.config.set("a", 1).value();
  s.config.set("b", 2).value();
  s.config.set("c", 3).value();
  auto watch = s.config.watch_prefix("").value();
  s.config.set("a", 10).value();
  CHECK(next(watch) == "PUT a=10");
  s.cut_off("one");
  s.d.config().set("a", 11).value();
  s.d.config().set("a", 12).value();
  s.d.config().remove("b").value();
  s.d.config().set("d", 4).value();
  s.etcd->compact();
  s.etcd->heal();
  CHECK(next(watch) == "PUT a=12");
  CHECK(next(watch) == "PUT d=4");
  CHECK(next(watch) == "DELETE b=null");
  s.d.config().set("c", 5).value();
  CHECK(next(watch) == "PUT c=5");
}

namespace {

/// While the answer to a write is lost and its effect is looked for, somebody else writes.
Hook write_before_reads(Setup& s, const std::string& value) {
  s.etcd->drop_replies(1);
  return s.tap->before([&s, value](const HttpRequest& request) {
    if (request.path == "/v3/kv/range")
      s.ask("/v3/kv/put", {{"key", "L2NvbmZpZy9r"}, {"value", value}});
  });
}

template <class T>
void check_maybe(const Result<T>& result) {
  REQUIRE_FALSE(result);
  CHECK(result.error().outcome == Outcome::MaybeApplied);
}

}  // namespace

TEST_CASE("config: a write whose answer was lost, and somebody else has written meanwhile") {
  Setup s;
  s.config.set("k", 0).value();
  const auto hook = write_before_reads(s, "Mg==");
  SUBCASE("set") { check_maybe(s.config.set("k", 1)); }
  SUBCASE("remove") { check_maybe(s.config.remove("k")); }
  s.tap->before(nullptr);
}

TEST_CASE("config: what is beside a prefix is neither watched nor viewed") {
  Setup s;
  auto watch = s.config.watch_prefix("app").value();
  for (const char* key : {"app-1", "app.x", "app/a"}) s.d.config().set(key, 1).value();
  CHECK(next(watch) == "PUT app/a=1");
  const auto view = s.config.view("app").value();
  CHECK(view.get("app/a"));
  check_code(view.get("app-1"), ErrorCode::NotFound);
  CHECK(view.keys() == Strings{"app/a"});
}

TEST_CASE("config: a read in pages that a compaction overtakes is repeated") {
  Setup s;
  for (int begin = 0; begin < 1200; begin += 100) {
    Txn txn;
    for (int i = begin; i < begin + 100; ++i) {
      txn.then(Op::put("/config/many/" + std::to_string(100000 + i), "1"));
    }
    s.c.client().commit(txn).value();
  }
  std::atomic<int> pages{0};
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    if (request.path != "/v3/kv/range" || ++pages != 2) return;
    s.ask("/v3/kv/put", {{"key", "L2NvbmZpZy9r"}, {"value", "MQ=="}});
    s.etcd->compact();
  });
  const auto keys = s.config.list("many");
  s.tap->before(nullptr);
  REQUIRE_MESSAGE(keys, text_of(keys));
  CHECK(keys->size() == 1200);
}

TEST_CASE("config: get_as takes a number as it is or not at all") {
  auto c = Coordinator::in_memory();
  auto& config = c.config();
  const auto is_refused = [&](const auto& result, const std::string& says) {
    check_code(result, ErrorCode::Validation);
    INFO(text_of(result));
    CHECK(to_string(result.error()).find("the value of n is not " + says) != std::string::npos);
  };
  const std::string as_int = "an integer from -2147483648 to 2147483647: it is a ";
  config.set("n", 5000000000).value();
  is_refused(config.get_as<int>("n"), as_int + "number");
  CHECK(config.get_as<std::int64_t>("n").value() == 5000000000);
  config.set("n", -1).value();
  CHECK(config.get_as<int>("n").value() == -1);
  is_refused(config.get_as<unsigned>("n"), "an integer from 0 to 4294967295: it is a number");
  is_refused(config.get_as<std::uint64_t>("n"), "an integer from 0 to ");
  config.set("n", 3.7).value();
  is_refused(config.get_as<int>("n"), as_int + "number with a fraction");
  CHECK(config.get_as<double>("n").value() == 3.7);
  config.set("n", 1e300).value();
  is_refused(config.get_as<float>("n"), "a number of 4 bytes");
  config.set("n", true).value();
  is_refused(config.get_as<int>("n"), as_int + "boolean");
  CHECK(config.get_as<bool>("n").value());
  config.set("n", 1).value();
  is_refused(config.get_as<bool>("n"), "true or false: it is a number");
  is_refused(config.get_as<std::string>("n"), "a string: it is a number");
  CHECK(config.get_as<double>("n").value() == 1.0);
  config.set("n", (std::numeric_limits<std::uint64_t>::max)()).value();
  CHECK(config.get_as<std::uint64_t>("n").value() == (std::numeric_limits<std::uint64_t>::max)());
  is_refused(config.get_as<std::int64_t>("n"), "an integer from -9223372036854775808 to ");
  config.set("n", (std::numeric_limits<std::int64_t>::min)()).value();
  CHECK(config.get_as<std::int64_t>("n").value() == (std::numeric_limits<std::int64_t>::min)());
  const auto view = config.view("n").value();
  is_refused(view.get_as<int>("n"), as_int + "number");
  CHECK(config.get_as<nlohmann::json>("n").value().is_number_integer());
}

TEST_CASE("config: writes return their revision, and a view can wait for it") {
  auto c = Coordinator::in_memory();
  const auto view = c.config().view("app").value();
  const auto set = c.config().set("app/a", 1).value();
  CHECK(c.config().get_entry("app/a").value().revision == set);
  CHECK(view.wait_for(set));
  CHECK(view.keys() == std::vector<std::string>{"app/a"});
  const auto removed = c.config().remove("app/a").value();
  CHECK(removed == set + 1);
  CHECK(view.wait_for(removed));
  CHECK(view.keys().empty());
  const Result<void> as_before = c.config().set("app/a", 2);
  CHECK(as_before);
  const Result<void> not_there = c.config().remove("app/b");
  check_code(not_there, ErrorCode::NotFound);
}

TEST_CASE("config: wait_for without a Context ends by options.timeout") {
  CoordinatorOptions options;
  options.transport = std::make_shared<MemoryEtcd>();
  options.timeout = 50ms;
  auto c = Coordinator::connect(options).value();
  const auto view = c.config().view("app").value();
  const Stopwatch watch;
  check_code(view.wait_for(1000), ErrorCode::Timeout);
  CHECK(watch.elapsed() >= 50ms);
}

TEST_CASE("config: a view is told of what it shows") {
  auto c = Coordinator::in_memory();
  auto view = c.config().view("app").value();
  std::atomic<int> told{0};
  view.on_change([&] { ++told; });
  const auto other = c.config().set("app-other", 1).value();
  CHECK(view.wait_for(other));
  CHECK(view.wait_for(c.config().set("app/a", 1).value()));
  CHECK(wait_until([&] { return told > 0; }, lenient(2s)));
  CHECK(told == 1);
  CHECK(view.wait_for(c.config().set("app", 1).value()));
  CHECK(view.keys() == std::vector<std::string>{"app", "app/a"});
  CHECK(c.config().list("app").value() == view.keys());
}

TEST_CASE("config: the right to what is under a prefix is enough") {
  auto etcd = std::make_shared<MemoryEtcd>();
  CoordinatorOptions options;
  options.transport = etcd;
  {
    auto c = Coordinator::connect(options).value();
    c.config().set("app", 0).value();
    c.config().set("app/a", 1).value();
  }
  etcd->enable_auth("root");
  etcd->add_user("u", "p", "/config/app/");
  options.username = "u";
  options.password = "p";
  auto c = Coordinator::connect(options).value();
  CHECK(c.config().list("app").value() == std::vector<std::string>{"app/a"});
  const auto view = c.config().view("app").value();
  CHECK(view.keys() == std::vector<std::string>{"app/a"});
  auto watch = c.config().watch_prefix("app").value();
  Notes notes;
  const auto heard =
      c.config().watch_prefix("app", [&](const ConfigEvent& event) { notes.add(event.key); });
  REQUIRE_MESSAGE(heard, text_of(heard));
  const auto revision = c.config().set("app/b", 2).value();
  CHECK(watch.next(Context::with_timeout(lenient(2s))).value().key == "app/b");
  CHECK(view.wait_for(revision));
  CHECK(wait_until([&] { return notes.size() == 1; }, lenient(2s)));
  check_code(c.config().list("ap"), ErrorCode::PermissionDenied);
  check_code(c.config().list(""), ErrorCode::PermissionDenied);
}

TEST_CASE("config: a write that was not done is an error, also if the same value is there") {
  Cluster cluster;
  auto options = cluster.options();
  options.retry_config.max_attempts = 1;
  auto c = connect_to(options);
  c.config().set("k", 1).value();
  cluster.etcd->fail_next(1, "/v3/kv/put");
  const auto again = c.config().set("k", 1);
  REQUIRE_FALSE(again);
  check_code(again, ErrorCode::Connection);
  CHECK(again.error().outcome == Outcome::NotApplied);
}
