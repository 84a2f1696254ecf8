// counter [ENDPOINT]: many count at once, and nothing is lost. Without an endpoint on an etcd in
// memory.
#include <coordination.hpp>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <thread>
#include <vector>

using namespace coordination;
using namespace std::chrono_literals;

int main(int argc, char** argv) try {
  Coordinator c = argc > 1 ? Coordinator::connect({{argv[1]}}).value() : Coordinator::in_memory();
  auto add_one = [](nlohmann::json& n) { n = n.is_null() ? 1 : n.get<int>() + 1; };

  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 25; ++round) {
        // Reads, calls add_one and writes, and again if another one was faster.
        auto done = c.config().update("examples/counter", add_one, Context::with_timeout(1min));
        if (!done) std::printf("%s\n", to_string(done.error()).c_str());
      }
    });
  }
  for (auto& thread : threads) thread.join();

  int count = c.config().get_as<int>("examples/counter").value();
  c.config().remove("examples/counter").value();
  std::printf("counted to %d\n", count);
  return count == 100 ? 0 : 1;
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
