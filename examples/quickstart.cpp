// quickstart [ENDPOINT]: a lock, a service registry and a configuration, step by step, on the etcd
// at ENDPOINT ("localhost:2379") or, without one, on an etcd in memory. Exits 0 if all went well.
#include <coordination.hpp>
#include <cstdio>
#include <future>
#include <nlohmann/json.hpp>

using namespace coordination;
using namespace std::chrono_literals;

// Prints a line, with the seconds since the first one.
void say(const std::string& line) {
  static const auto start = std::chrono::steady_clock::now();
  std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
  std::printf("%7.3f s  %s\n", passed.count(), line.c_str());
}

void title(const char* text) { std::printf("\n%s\n", text); }

void expect(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("expected: ") + what);
}

std::string number(std::int64_t n) { return std::to_string(n); }

// Two programs want to do one job: one of them works, the other waits its turn.
void locks(Coordinator& alice, Coordinator& bob) {
  title("Lock: \"jobs/nightly\"");
  Lock hers = alice.lock().acquire("jobs/nightly", 10s).value();
  say("alice has it: token " + number(hers.fencing_token()) + ", " +
      number(hers.ttl().value().count()) + " ms left, renewed by itself");

  auto refused = bob.lock().try_acquire("jobs/nightly", 10s);
  expect(!refused && refused.error().code == ErrorCode::Conflict, "try_acquire is a conflict");
  say("bob tries: " + to_string(refused.error()));

  say("bob waits");
  auto bob_waits = std::async(std::launch::async, [&bob] {
    return bob.lock().acquire("jobs/nightly", 10s, Context::with_timeout(10s));
  });
  expect(bob_waits.wait_for(300ms) == std::future_status::timeout, "bob waits for alice");
  hers.unlock().value();
  say("alice unlocks");
  Lock his = bob_waits.get().value();
  say("bob has it: token " + number(his.fencing_token()) + ", greater than alice's");
  expect(his.fencing_token() > hers.fencing_token(), "a later holder has a greater token");
  expect(his.held() && !hers.held(), "one holder");
  his.unlock().value();
}

std::string describe(const ServiceInfo& service) {
  return service.id + " at " + service.address + ":" + number(service.port) + ", version " +
         service.metadata.at("version");
}

void expect_event(Watch<ServiceEvent>& events, EventType type, const ServiceInfo& service) {
  ServiceEvent event = events.next(Context::with_timeout(5s)).value();
  say("bob is told: " + std::string(to_string(event.type)) + " " + describe(event.service));
  expect(event.type == type && event.service == service, "every change, in order");
}

// One program offers services, the other finds them and hears of every change.
void services(Coordinator& alice, Coordinator& bob) {
  title("Services: \"payments\"");
  auto events = bob.registry().watch("payments").value();

  ServiceInfo one{"pay-1", "payments", "10.0.0.1", 8080, {{"version", "1"}}, 10s};
  ServiceInfo two{"pay-2", "payments", "10.0.0.2", 8080, {{"version", "1"}}, 10s};
  alice.registry().register_service(one).value();
  alice.registry().register_service(two).value();
  say("alice has registered two instances; they stay until she is gone");
  expect_event(events, EventType::Put, one);
  expect_event(events, EventType::Put, two);

  auto found = bob.registry().discover("payments").value();
  for (const ServiceInfo& service : found) say("bob discovers " + describe(service));
  expect(found == std::vector<ServiceInfo>{one, two}, "the instances as they were registered");

  one.metadata["version"] = "2";
  alice.registry().register_service(one).value();
  say("alice updates pay-1");
  expect_event(events, EventType::Put, one);

  alice.registry().unregister("pay-2").value();
  say("alice unregisters pay-2");
  expect_event(events, EventType::Delete, two);
}

void expect_event(Watch<ConfigEvent>& events, const std::string& expected) {
  ConfigEvent event = events.next(Context::with_timeout(5s)).value();
  std::string told = std::string(to_string(event.type)) + " " + event.value.dump();
  say("bob is told: " + told);
  expect(told == expected, "every change, in order");
}

// Both read and change one value, and neither overwrites what it has not seen.
void configuration(Coordinator& alice, Coordinator& bob) {
  title("Configuration: \"app/limits\"");
  auto events = bob.config().watch("app/limits").value();
  alice.config().set("app/limits", {{"rate", 100}, {"burst", 20}}).value();
  say("alice sets it");
  expect_event(events, R"(PUT {"burst":20,"rate":100})");

  ConfigEntry seen = bob.config().get_entry("app/limits").value();
  say("bob reads it at revision " + number(seen.revision));

  alice.config().compare_and_set("app/limits", seen.revision, {{"rate", 200}}).value();
  say("alice changes it");
  expect_event(events, R"(PUT {"rate":200})");

  auto late = bob.config().compare_and_set("app/limits", seen.revision, {{"rate", 50}});
  expect(!late && late.error().code == ErrorCode::Conflict, "bob's revision is out of date");
  say("bob is too late: " + to_string(late.error()));
  expect(bob.config().get("app/limits").value()["rate"] == 200, "alice's value stands");

  alice.config().remove("app/limits").value();
  say("alice removes it");
  expect_event(events, "DELETE null");
}

void demo(const CoordinatorOptions& options) {
  // As two programs would, each with a Coordinator of its own.
  Coordinator alice = Coordinator::connect(options).value();
  Coordinator bob = Coordinator::connect(options).value();
  Status status = alice.client().status().value();
  say("connected: etcd " + status.version + " at " + status.endpoint);

  locks(alice, bob);
  services(alice, bob);
  configuration(alice, bob);

  title("The end");
  alice.close().value();
  expect(bob.registry().discover("payments").value().empty(), "nothing of alice's is left");
  say("alice closes, and pay-1 is gone with her");
}

int main(int argc, char** argv) try {
  CoordinatorOptions options;
  options.endpoints = {argc > 1 ? argv[1] : "memory:2379"};
  if (argc < 2) options.transport = std::make_shared<MemoryEtcd>();
  // A place of its own for every run: /quickstart/<now>/locks/...
  auto now = std::chrono::system_clock::now().time_since_epoch();
  options.key_prefix = "/quickstart/" + number(now.count());
  demo(options);
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
