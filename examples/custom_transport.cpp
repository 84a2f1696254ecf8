// custom_transport [ENDPOINT]: a Transport that counts the requests and logs those that fail, in
// front of another one. Without an endpoint that is an etcd in memory.
#include <atomic>
#include <coordination.hpp>
#include <cstdio>

using namespace coordination;
using namespace std::chrono_literals;

class CountingTransport : public Transport {
 public:
  explicit CountingTransport(std::shared_ptr<Transport> next) : next_(std::move(next)) {}

  // Called from several threads at once. A sink gets the bytes of an answer as they come.
  Result<HttpResponse> perform(const HttpRequest& request, const ChunkSink& sink,
                               const Context& ctx) override {
    ++requests_;
    ChunkSink counting = [&](std::string_view bytes) {
      received_ += bytes.size();
      return sink(bytes);
    };
    auto response = next_->perform(request, sink ? counting : ChunkSink(), ctx);
    if (response) {
      received_ += response->body.size();
    } else {
      std::printf("%s: %s\n", request.path.c_str(), to_string(response.error()).c_str());
    }
    return response;
  }

  std::size_t requests() const { return requests_; }
  std::size_t received() const { return received_; }

 private:
  std::shared_ptr<Transport> next_;
  std::atomic<std::size_t> requests_{0};
  std::atomic<std::size_t> received_{0};
};

int main(int argc, char** argv) try {
  std::shared_ptr<Transport> real = std::make_shared<MemoryEtcd>();
  if (argc > 1) real = make_default_transport();
  auto counting = std::make_shared<CountingTransport>(real);

  CoordinatorOptions options;
  options.endpoints = {argc > 1 ? argv[1] : "memory:2379"};
  options.transport = counting;
  auto coordinator = Coordinator::connect(options).value();

  auto before = counting->requests();
  coordinator.lock().acquire("examples/counted", 10s).value().unlock().value();
  std::printf("a lock and its unlock: %zu requests\n", counting->requests() - before);
  std::printf("in all: %zu requests, %zu bytes\n", counting->requests(), counting->received());
  return counting->requests() > before ? 0 : 1;
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
