// curl_transport [ENDPOINT]: the library on libcurl. Without an endpoint, what it says of a port
// where nobody listens.
#include "curl_transport.hpp"

#include <cstdio>

using namespace coordination;
using namespace std::chrono_literals;

int main(int argc, char** argv) try {
  CoordinatorOptions options;
  options.endpoints = {argc > 1 ? argv[1] : "127.0.0.1:1"};
  options.transport = std::make_shared<CurlTransport>();
  auto coordinator = Coordinator::connect(options, Context::with_timeout(1s));
  if (!coordinator) {
    std::printf("%s\n", to_string(coordinator.error()).c_str());
    return argc > 1 || coordinator.error().outcome != Outcome::NotApplied ? 1 : 0;
  }

  Lock lock = coordinator->lock().acquire("examples/curl", 10s).value();
  std::printf("ours, token %lld\n", static_cast<long long>(lock.fencing_token()));
  lock.unlock().value();
  return 0;
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
