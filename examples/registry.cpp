// registry [ENDPOINT]: three instances register, a caller keeps a view of them and picks one for
// each request. Without an endpoint on an etcd in memory.
#include <coordination.hpp>
#include <cstdio>
#include <future>
#include <set>

using namespace coordination;
using namespace std::chrono_literals;

int main(int argc, char** argv) try {
  CoordinatorOptions options;
  options.endpoints = {argc > 1 ? argv[1] : "memory:2379"};
  if (argc < 2) options.transport = std::make_shared<MemoryEtcd>();
  auto server = Coordinator::connect(options).value();
  auto caller = Coordinator::connect(options).value();

  // A registration is an intent: it renews itself, and comes back if etcd has lost it.
  RegisterOptions tell;
  tell.on_event = [](RegistrationEvent event, const ServiceInfo& service) {
    std::printf("%s: %s\n", service.id.c_str(), to_string(event));
  };
  for (int i = 1; i <= 3; ++i) {
    ServiceInfo service;
    service.id = "pay-" + std::to_string(i);
    service.name = "payments";
    service.address = "10.0.0." + std::to_string(i);
    service.port = 8080;
    service.metadata["zone"] = i == 1 ? "north" : "south";
    service.ttl = 10s;  // how long the record outlives a process that dies
    server.registry().register_service(service, tell).value();
  }

  // The view is filled when view() returns, and follows every change from then on.
  std::promise<void> two_left;
  auto view = caller.registry().view("payments").value();
  view.on_change([&] {
    if (view.instances().size() == 2) two_left.set_value();
  });

  std::set<std::string> used;
  for (int request = 1; request <= 6; ++request) {
    ServiceInfo service = view.pick().value();  // round robin; no request is sent
    std::printf("request %d goes to %s:%d\n", request, service.address.c_str(), service.port);
    used.insert(service.id);
  }
  if (used.size() != 3) return 1;

  server.registry().unregister("pay-2").value();
  if (two_left.get_future().wait_for(10s) != std::future_status::ready) return 1;
  for (const ServiceInfo& service : view.instances()) {
    std::printf("left: %s in %s\n", service.id.c_str(), service.metadata.at("zone").c_str());
  }
  return view.connected() ? 0 : 1;
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
