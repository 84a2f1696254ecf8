// Configuration on a real etcd: any JSON value as it went in, keys, revisions, events, views.
#include <doctest/doctest.h>

#include <limits>
#include <mutex>
#include <thread>

#include "support/live.hpp"
#include "support/transports.hpp"

using namespace coordination;
using namespace support;
using nlohmann::json;

namespace {

constexpr auto kSoon = 30s;

struct Fixture {
  CoordinatorOptions options{options_for(shared_etcd())};
  std::shared_ptr<CountingTransport> counting{std::make_shared<CountingTransport>()};
  Coordinator coordinator{connect([this] {
    options.transport = counting;
    return options;
  }())};
  Coordinator other{connect(options)};
  ConfigCenter& config{coordinator.config()};
  ConfigCenter& reader{other.config()};
  Client& client{coordinator.client()};

  std::string etcd_key(const std::string& key) const {
    return options.key_prefix + "/config/" + key;
  }
  std::string raw(const std::string& key) { return client.get(etcd_key(key)).value().value; }
  void put_raw(const std::string& key, const std::string& value) {
    client.put(etcd_key(key), value).value();
  }
};

using Keys = std::vector<std::string>;

std::string text(const ConfigEvent& event) {
  return std::string(to_string(event.type)) + " " + event.key + "=" + event.value.dump();
}

template <class Event>
Keys take(Watch<Event>& watch, std::size_t count) {
  Keys texts;
  while (texts.size() < count) {
    const auto event = watch.next(Context::with_timeout(lenient(kSoon)));
    if (!event) return texts.push_back(to_string(event.error())), texts;
    texts.push_back(text(*event));
  }
  return texts;
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "config: any JSON value comes back as it went in") {
  const std::vector<json> values{nullptr,
                                 true,
                                 false,
                                 0,
                                 -1,
                                 std::numeric_limits<std::int64_t>::min(),
                                 std::numeric_limits<std::int64_t>::max(),
                                 std::numeric_limits<std::uint64_t>::max(),
                                 0.1,
                                 1.0,
                                 1e300,
                                 "",
                                 "text",
                                 "123",
                                 "-0.5e3",
                                 "true",
                                 "null",
                                 "\"quoted\"",
                                 "{\"a\":1}",
                                 "[1,2]",
                                 " 1 ",
                                 "{broken",
                                 "\\",
                                 "line\nbreak\ttab",
                                 std::string("nul\0byte", 8),
                                 "größe 日本 🎈",
                                 json::array(),
                                 json::object(),
                                 json::array({1, "2", nullptr, json::array({json::object()})}),
                                 {{"host", "db1"}, {"port", 5432}, {"tags", {"a", "b"}}}};
  for (const auto& value : values) {
    CAPTURE(value.dump());
    const auto set = config.set("k", value);
    REQUIRE_MESSAGE(set, why(set));
    const auto got = reader.get("k").value();
    CHECK(got == value);
    CHECK(got.dump() == value.dump());  // == alone takes 1 for 1.0
  }
}

TEST_CASE_FIXTURE(Fixture, "config: how values stand in etcd") {
  const std::vector<std::pair<json, std::string>> cases{{"plain text", "plain text"},
                                                        {"123", "\"123\""},
                                                        {"true", "\"true\""},
                                                        {"", ""},
                                                        {123, "123"},
                                                        {true, "true"},
                                                        {{{"a", 1}}, "{\"a\":1}"},
                                                        {"{broken", "{broken"}};
  for (const auto& [value, expected] : cases) {
    config.set("k", value).value();
    CHECK(raw("k") == expected);
  }
  const std::vector<std::pair<std::string, json>> read{
      {"plain text", "plain text"}, {"123", 123},           {" {\"a\" : [1, 2]} ", {{"a", {1, 2}}}},
      {"\"quoted\"", "quoted"},     {"{broken", "{broken"}, {"", ""}};
  for (const auto& [bytes, expected] : read) {
    put_raw("k", bytes);
    CHECK(reader.get("k").value() == expected);
  }
  put_raw("k", std::string(100'000, '['));
  CHECK(reader.get("k").value() == std::string(100'000, '['));
}

TEST_CASE_FIXTURE(Fixture, "config: as a C++ type") {
  config.set("port", 5432).value();
  config.set("name", "db1").value();
  config.set("tags", {"a", "b"}).value();
  CHECK(reader.get_as<int>("port").value() == 5432);
  CHECK(reader.get_as<std::string>("name").value() == "db1");
  CHECK(reader.get_as<std::vector<std::string>>("tags").value() == Keys{"a", "b"});
  const auto wrong = reader.get_as<int>("name");
  REQUIRE_FALSE(wrong);
  CHECK(wrong.error().code == ErrorCode::Validation);
  CHECK(reader.get_as<int>("none").error().code == ErrorCode::NotFound);
}

TEST_CASE_FIXTURE(Fixture, "config: entries, revisions, compare and set") {
  CHECK(config.get_entry("k").error().code == ErrorCode::NotFound);
  const auto created = config.compare_and_set("k", 0, "one").value();
  const auto taken = reader.compare_and_set("k", 0, "mine");
  REQUIRE_FALSE(taken);
  CHECK(taken.error().code == ErrorCode::Conflict);
  CHECK(taken.error().outcome == Outcome::NotApplied);

  const auto entry = reader.get_entry("k").value();
  CHECK(entry.key == "k");
  CHECK(entry.value == "one");
  CHECK(entry.revision == created);
  const auto changed = config.compare_and_set("k", created, {{"n", 2}}).value();
  CHECK(changed > created);
  CHECK(config.compare_and_set("k", created, "stale").error().code == ErrorCode::Conflict);
  CHECK(reader.get_entry("k").value().revision == changed);
  CHECK(reader.get("k").value() == json{{"n", 2}});

  config.remove("k").value();
  CHECK(config.remove("k").error().code == ErrorCode::NotFound);
  CHECK(config.get("k").error().code == ErrorCode::NotFound);
  CHECK(config.compare_and_set("k", changed, "late").error().code == ErrorCode::Conflict);
  CHECK(config.compare_and_set("k", 0, "again").value() > changed);
}

TEST_CASE_FIXTURE(Fixture, "config: compare and set counts right under contention") {
  config.set("counter", 0).value();
  constexpr int kThreads = 4;
  const int each = scaled(25);
  std::vector<std::thread> threads;
  std::atomic<int> failures{0};
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      auto& center = t % 2 == 0 ? config : reader;
      for (int done = 0; done < each;) {
        const auto entry = center.get_entry("counter");
        if (!entry) return static_cast<void>(++failures);
        const auto set =
            center.compare_and_set("counter", entry->revision, entry->value.get<int>() + 1);
        if (set)
          ++done;
        else if (set.error().code != ErrorCode::Conflict)
          return static_cast<void>(++failures);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(failures == 0);
  CHECK(config.get("counter").value() == kThreads * each);
}

TEST_CASE_FIXTURE(Fixture, "config: list lists what stands under a prefix, and the prefix itself") {
  for (const auto* key : {"app", "app/a", "app/b/c", "app2", "ap", "b"}) {
    config.set(key, 1).value();
  }
  CHECK(reader.list("app").value() == Keys{"app", "app/a", "app/b/c"});
  CHECK(reader.list("app/b").value() == Keys{"app/b/c"});
  CHECK(reader.list("app/b/c").value() == Keys{"app/b/c"});
  CHECK(reader.list("none").value().empty());
  CHECK(reader.list("").value() == Keys{"ap", "app", "app/a", "app/b/c", "app2", "b"});
}

TEST_CASE_FIXTURE(Fixture, "config: no key can leave its prefix, and nothing is sent for it") {
  counting->reset();
  for (const std::string bad :
       {"", "/", "/a", "a/", "a//b", "..", "../x", "a/../../x", ".", "a/."}) {
    CAPTURE(bad);
    CHECK(config.get(bad).error().code == ErrorCode::Validation);
    CHECK(config.get_entry(bad).error().code == ErrorCode::Validation);
    CHECK(config.set(bad, 1).error().code == ErrorCode::Validation);
    CHECK(config.compare_and_set(bad, 0, 1).error().code == ErrorCode::Validation);
    CHECK(config.remove(bad).error().code == ErrorCode::Validation);
    CHECK(config.watch(bad).error().code == ErrorCode::Validation);
    if (bad.empty()) continue;  // list("") lists all
    CHECK(config.list(bad).error().code == ErrorCode::Validation);
    CHECK(config.watch_prefix(bad).error().code == ErrorCode::Validation);
  }
  CHECK(counting->requests() == 0);
  config.set("ünïcode/with space/..a", 1).value();
  CHECK(reader.get("ünïcode/with space/..a").value() == 1);
}

TEST_CASE_FIXTURE(Fixture, "config: a string that is not UTF-8") {
  counting->reset();
  for (const json& value : {json("\xff\xfe"), json::array({"\xff"}), json{{"\xff", 1}}}) {
    const auto refused = config.set("k", value);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code == ErrorCode::Validation);
    CHECK(config.compare_and_set("k", 0, value).error().code == ErrorCode::Validation);
  }
  CHECK(counting->requests() == 0);
  put_raw("k", "\xff\xfe");
  CHECK(reader.get("k").value().get<std::string>() == "\xff\xfe");
}

TEST_CASE_FIXTURE(Fixture, "config: a value over etcd's limit") {
  const std::string large(1'600'000, 'x');
  config.set("k", "small").value();
  const auto refused = config.set("k", large);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == ErrorCode::Validation);
  CHECK(refused.error().outcome == Outcome::NotApplied);
  CHECK(reader.get("k").value() == "small");
  const std::string fits(1'400'000, 'y');
  config.set("k", fits).value();
  CHECK(reader.get("k").value() == fits);
}

TEST_CASE_FIXTURE(Fixture, "config: watching a key and a prefix") {
  config.set("app", "before").value();
  auto one = reader.watch("app").value();
  auto all = reader.watch_prefix("app").value();
  config.set("app/a", {1, 2}).value();
  config.set("app2", "elsewhere").value();
  config.set("app", "123").value();
  config.remove("app/a").value();
  config.remove("app").value();
  CHECK(take(one, 2) == Keys{"PUT app=\"123\"", "DELETE app=null"});
  CHECK(take(all, 4) ==
        Keys{"PUT app/a=[1,2]", "PUT app=\"123\"", "DELETE app/a=null", "DELETE app=null"});
  config.set("app", 1).value();
  const auto event = one.next(Context::with_timeout(lenient(kSoon))).value();
  CHECK(event.revision == reader.get_entry("app").value().revision);
  CHECK(std::chrono::system_clock::now() - event.timestamp < lenient(5s));
}

TEST_CASE_FIXTURE(Fixture, "config: watching with handlers, and what is there first") {
  config.set("app/a", 1).value();
  config.set("app/b", 2).value();
  std::mutex mutex;
  Keys one, all;
  const auto into = [&mutex](Keys& list) {
    return [&mutex, &list](const ConfigEvent& event) {
      std::lock_guard<std::mutex> hold(mutex);
      list.push_back(text(event));
    };
  };
  const auto size = [&](const Keys& list) {
    std::lock_guard<std::mutex> hold(mutex);
    return list.size();
  };
  WatchOptions existing;
  existing.include_existing = true;
  auto first = reader.watch("app/a", into(one)).value();
  auto second = reader.watch_prefix("app", into(all), existing).value();
  REQUIRE(wait_until([&] { return size(all) == 2; }, lenient(5s)));
  config.set("app/a", 3).value();
  config.remove("app/b").value();
  CHECK(wait_until([&] { return size(all) == 4 && size(one) == 1; }, lenient(5s)));
  CHECK(one == Keys{"PUT app/a=3"});
  CHECK(all == Keys{"PUT app/a=1", "PUT app/b=2", "PUT app/a=3", "DELETE app/b=null"});
  first.cancel();
  second.cancel();
  config.set("app/a", 4).value();
  CHECK(never([&] { return size(one) + size(all) > 5; }, 200ms));
}

TEST_CASE_FIXTURE(Fixture, "config: watching from everything that is there, pulled") {
  config.set("a", 1).value();
  WatchOptions existing;
  existing.include_existing = true;
  auto key = reader.watch("a", existing).value();
  auto none = reader.watch("b", existing).value();
  CHECK(take(key, 1) == Keys{"PUT a=1"});
  config.set("b", 2).value();
  CHECK(take(none, 1) == Keys{"PUT b=2"});
}

TEST_CASE_FIXTURE(Fixture, "config: a view answers without a request, and follows") {
  config.set("app/a", 1).value();
  config.set("app/b", "two").value();
  config.set("app2", "elsewhere").value();
  std::atomic<int> changes{0};  // outlives its handler
  auto view = reader.view("app").value();
  REQUIRE(wait_until([&] { return view.connected(); }, lenient(2s)));
  view.on_change([&] { ++changes; });
  counting->reset();
  CHECK(view.keys() == Keys{"app/a", "app/b"});
  CHECK(view.get("app/a").value() == 1);
  CHECK(view.get("app/b").value() == "two");
  CHECK(view.get("app/c").error().code == ErrorCode::NotFound);
  CHECK(view.get("app2").error().code == ErrorCode::NotFound);
  CHECK(counting->requests() == 0);

  const auto entry = view.get_entry("app/a").value();
  const auto revision = config.compare_and_set("app/a", entry.revision, 10).value();
  CHECK(wait_until([&] { return view.get("app/a").value() == 10; }, lenient(2s)));
  CHECK(view.get_entry("app/a").value().revision == revision);
  CHECK(view.revision() >= revision);
  config.remove("app/b").value();
  CHECK(wait_until([&] { return view.keys() == Keys{"app/a"}; }, lenient(2s)));
  CHECK(wait_until([&] { return changes >= 1; }, lenient(2s)));
}
