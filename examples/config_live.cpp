// config_live [ENDPOINT]: typed reads, changes as they happen, and a local copy that is always up
// to date. Without an endpoint on an etcd in memory.
#include <coordination.hpp>
#include <cstdio>
#include <future>
#include <nlohmann/json.hpp>

using namespace coordination;
using namespace std::chrono_literals;

struct Limits {
  int rate{0};
  bool strict{false};
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Limits, rate, strict)

int main(int argc, char** argv) try {
  CoordinatorOptions options;
  options.endpoints = {argc > 1 ? argv[1] : "memory:2379"};
  if (argc < 2) options.transport = std::make_shared<MemoryEtcd>();
  auto coordinator = Coordinator::connect(options).value();
  ConfigCenter& config = coordinator.config();

  config.set("examples/name", "shop").value();  // any JSON, and what can be made into it
  config.set("examples/limits", Limits{100, true}).value();
  Limits limits = config.get_as<Limits>("examples/limits").value();
  int workers = config.get_as<int>("examples/workers").value_or(4);  // not there: a default
  auto wrong = config.get_as<int>("examples/name");
  std::printf("rate %d, %d workers; %s\n", limits.rate, workers, to_string(wrong.error()).c_str());

  // A handler that is called with every change, in order, until the Subscription is destroyed.
  std::promise<void> told;
  auto handler = [&told](const ConfigEvent& event) {
    std::printf("%s %s\n", to_string(event.type), event.value.dump().c_str());
    told.set_value();
  };
  Subscription subscription = config.watch("examples/limits", handler).value();

  // A local copy of all that stands under a prefix: for what is read on every request.
  ConfigView view = config.view("examples").value();

  // A change that overwrites nobody else's. The view follows; wait_for waits until it shows it.
  ConfigEntry seen = config.get_entry("examples/limits").value();
  auto revision = config.compare_and_set("examples/limits", seen.revision, Limits{200, false});
  view.wait_for(revision.value(), Context::with_timeout(10s)).value();
  limits = view.get_as<Limits>("examples/limits").value();
  if (limits.rate != 200 || limits.strict) return 1;
  if (told.get_future().wait_for(10s) != std::future_status::ready) return 1;
  subscription.cancel();

  for (const auto& key : view.keys()) {
    std::printf("%s = %s\n", key.c_str(), view.get(key).value().dump().c_str());
    config.remove(key).value();
  }
  return workers == 4 && wrong.error().code == ErrorCode::Validation ? 0 : 1;
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
