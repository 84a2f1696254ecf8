// One cluster with etcdctl, with Go's concurrency package, and with the Go module's records.
#include <doctest/doctest.h>

#include <filesystem>
#include <thread>

#include "support/live.hpp"

using namespace coordination;
using namespace support;
using nlohmann::json;

namespace {

// Without a key prefix: the keys that Go programs use. Hence an etcd of its own.
struct Fixture {
  EtcdServer server;
  Etcdctl ctl{server};
  Coordinator coordinator{connect([this] {
    CoordinatorOptions options;
    options.endpoints = {server.endpoint()};
    return options;
  }())};
};

}  // namespace

TEST_CASE_FIXTURE(Fixture, "interop: etcdctl's lock shuts us out, and hands over in order") {
  auto theirs = ctl.start({"lock", "/locks/x"});
  const auto their_key = theirs.read_line(lenient(10s));
  REQUIRE(their_key.has_value());
  CHECK(coordinator.lock().try_acquire("x", 10s).error().code == ErrorCode::Conflict);

  Result<Lock> ours = Error{};
  std::atomic<bool> done{false};
  std::thread waiter([&] {
    ours = coordinator.lock().acquire("x", 10s, Context::with_timeout(lenient(20s)));
    done = true;
  });
  CHECK(wait_until([&] { return ctl.keys("/locks/x/").size() == 2; }, lenient(5s)));
  auto third = ctl.start({"lock", "/locks/x"});
  CHECK(wait_until([&] { return ctl.keys("/locks/x/").size() == 3; }, lenient(5s)));
  CHECK_FALSE(done);
  theirs.terminate();
  waiter.join();
  REQUIRE_MESSAGE(ours, why(ours));
  CHECK(ours->key() != *their_key);
  CHECK(ours->key().find("/locks/x/") == 0);
  CHECK_FALSE(third.read_line(300ms).has_value());
  CHECK(ours->unlock());
  CHECK(third.read_line(lenient(10s)).value_or("").find("/locks/x/") == 0);
}

TEST_CASE_FIXTURE(Fixture, "interop: our lock shuts etcdctl out, and hands over in order") {
  auto ours = coordinator.lock().acquire("jobs/x", 10s).value();
  auto theirs = ctl.start({"lock", "/locks/jobs/x"});
  CHECK(wait_until([&] { return ctl.keys("/locks/jobs/x/").size() == 2; }, lenient(5s)));
  Result<Lock> later = Error{};
  std::thread waiter([&] {
    later = coordinator.lock().acquire("jobs/x", 10s, Context::with_timeout(lenient(20s)));
  });
  CHECK(wait_until([&] { return ctl.keys("/locks/jobs/x/").size() == 3; }, lenient(5s)));
  CHECK_FALSE(theirs.read_line(300ms).has_value());
  CHECK(ours.unlock());
  const auto their_key = theirs.read_line(lenient(10s));
  CHECK(their_key.value_or("").find("/locks/jobs/x/") == 0);
  CHECK(ctl.keys("/locks/jobs/x/").size() == 2);
  theirs.terminate();
  waiter.join();
  CHECK_MESSAGE(later, why(later));
}

TEST_CASE_FIXTURE(Fixture, "interop: a record as the Go module writes it is read") {
  REQUIRE(ctl.put("/services/web/web-1",
                  R"({"id":"web-1","name":"web","address":"10.0.0.7","port":8080,)"
                  R"("metadata":{"zone":"b","größe":"x"},"ttl":30000000000})"));
  REQUIRE(ctl.put("/services/web/web-2",
                  R"({"id":"web-2","name":"web","address":"h","port":1,"metadata":null,"ttl":0})"));
  const auto found = coordinator.registry().discover("web").value();
  REQUIRE(found.size() == 2);
  CHECK(found[0].id == "web-1");
  CHECK(found[0].name == "web");
  CHECK(found[0].address == "10.0.0.7");
  CHECK(found[0].port == 8080);
  CHECK(found[0].metadata == std::map<std::string, std::string>{{"zone", "b"}, {"größe", "x"}});
  CHECK(found[0].ttl == 30s);
  CHECK(found[1].metadata.empty());

  auto watch = coordinator.registry().watch("web").value();
  REQUIRE(ctl.run({"del", "/services/web/web-1"}).ok());
  const auto event = watch.next(Context::with_timeout(lenient(20s))).value();
  CHECK(event.type == EventType::Delete);
  CHECK(event.service == found[0]);
}

TEST_CASE_FIXTURE(Fixture, "interop: a record as we write it can be read by the Go module") {
  ServiceInfo service{"web-1", "web", "10.0.0.7", 8080};
  service.metadata = {{"zone", "b"}};
  service.ttl = 2500ms;
  coordinator.registry().register_service(service).value();
  const auto record = json::parse(ctl.get("/services/web/web-1"));
  const json expected{{"id", "web-1"},
                      {"name", "web"},
                      {"address", "10.0.0.7"},
                      {"port", 8080},
                      {"metadata", {{"zone", "b"}}},
                      {"ttl", 2'500'000'000}};
  CHECK(record == expected);
  CHECK(record["ttl"].is_number_integer());
  service.metadata.clear();
  coordinator.registry().register_service(service).value();
  const auto bare = json::parse(ctl.get("/services/web/web-1"));
  CHECK((!bare.contains("metadata") || bare["metadata"] == json::object()));
}

TEST_CASE_FIXTURE(Fixture, "interop: configuration values, both ways") {
  // What Go writes: strings as they are, everything else as JSON.
  REQUIRE(ctl.put("/config/app/name", "db1"));
  REQUIRE(ctl.put("/config/app/port", "5432"));
  REQUIRE(ctl.put("/config/app/db", R"({"host":"h","tags":["a","b"],"ratio":0.5})"));
  auto& config = coordinator.config();
  CHECK(config.get("app/name").value() == "db1");
  CHECK(config.get_as<int>("app/port").value() == 5432);
  CHECK(config.get("app/db").value() == json{{"host", "h"}, {"tags", {"a", "b"}}, {"ratio", 0.5}});
  CHECK(config.list("app").value() == std::vector<std::string>{"app/db", "app/name", "app/port"});

  config.set("app/name", "db2").value();
  CHECK(ctl.get("/config/app/name") == "db2");
  config.set("app/port", 5433).value();
  CHECK(ctl.get("/config/app/port") == "5433");
  config.set("app/version", "17").value();
  CHECK_MESSAGE(ctl.get("/config/app/version") == "\"17\"", "it stays a string on both sides");
  config.set("app/db", {{"host", "h2"}}).value();
  CHECK(json::parse(ctl.get("/config/app/db")) == json{{"host", "h2"}});

  auto watch = config.watch_prefix("app").value();
  REQUIRE(ctl.put("/config/app/name", "from outside"));
  const auto event = watch.next(Context::with_timeout(lenient(20s))).value();
  CHECK(event.key == "app/name");
  CHECK(event.value == "from outside");
}

TEST_CASE_FIXTURE(Fixture, "examples: the same program on a real etcd [slow]") {
  const auto folder = std::filesystem::read_symlink("/proc/self/exe").parent_path().parent_path();
  int ran = 0;
  for (const char* name :
       {"quickstart", "lock", "registry", "config_live", "election", "custom_transport"}) {
    const auto program = folder / "examples" / name;
    CAPTURE(program.string());
    REQUIRE(std::filesystem::exists(program));
    const auto result = run({program.string(), server.endpoint()});
    CHECK_MESSAGE(result.ok(), result.out);
    CHECK(result.out.size() > 20);
    ++ran;
  }
  CHECK(ran == 6);
  CHECK(Etcdctl(server).keys("/locks/").empty());  // they give back what they have taken
  CHECK(Etcdctl(server).keys("/services/").empty());
}
