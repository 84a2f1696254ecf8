// prometheus [ENDPOINT]: counts every request to etcd, and prints what Prometheus scrapes. Without
// an endpoint on an etcd in memory.
#include <coordination.hpp>
#include <cstdio>
#include <map>
#include <mutex>

using namespace coordination;

class Metrics {
 public:
  void count(const RequestEvent& event) {
    auto outcome = event.error ? to_string(event.error->code) : std::to_string(event.status);
    auto labels = "{path=\"" + event.path + "\",outcome=\"" + outcome + "\"}";
    std::lock_guard<std::mutex> lock(mutex_);
    auto& sum = sums_[labels];
    ++sum.requests;
    sum.bytes += event.bytes_sent + event.bytes_received;
    sum.seconds += std::chrono::duration<double>(event.duration).count();
  }
  int requests(const std::string& labels) {
    std::lock_guard<std::mutex> lock(mutex_);
    return sums_[labels].requests;
  }
  void print() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [labels, sum] : sums_) {
      std::printf("etcd_requests_total%s %d\n", labels.c_str(), sum.requests);
      std::printf("etcd_request_bytes_total%s %zu\n", labels.c_str(), sum.bytes);
      std::printf("etcd_request_seconds_total%s %.6f\n", labels.c_str(), sum.seconds);
    }
  }

 private:
  struct Sum {
    int requests{0};
    std::size_t bytes{0};
    double seconds{0};
  };
  std::mutex mutex_;
  std::map<std::string, Sum> sums_;
};

int main(int argc, char** argv) try {
  Metrics metrics;  // declared first: it must live as long as the Coordinator
  CoordinatorOptions options;
  if (argc > 1) options.endpoints = {argv[1]};
  if (argc < 2) options.transport = std::make_shared<MemoryEtcd>();
  options.on_request = [&](const RequestEvent& event) { metrics.count(event); };

  auto c = Coordinator::connect(options).value();
  for (int i = 0; i < 3; ++i) c.client().put("/examples/metrics", "x").value();
  c.client().remove("/examples/metrics").value();
  c.close().value();  // what was told until then has been counted
  metrics.print();
  return metrics.requests("{path=\"/v3/kv/put\",outcome=\"200\"}") == 3 ? 0 : 1;
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
