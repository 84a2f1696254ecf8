// worker_pool [ENDPOINT]: however many workers there are on however many machines, two at most
// download at once. Without an endpoint on an etcd in memory.
#include <atomic>
#include <coordination.hpp>
#include <cstdio>
#include <thread>
#include <vector>

using namespace coordination;
using namespace std::chrono_literals;

int main(int argc, char** argv) try {
  Coordinator c = argc > 1 ? Coordinator::connect({{argv[1]}}).value() : Coordinator::in_memory();
  Semaphore downloads = c.lock().semaphore("examples/downloads", 2);
  std::atomic<int> running{0}, most{0}, done{0};

  std::vector<std::thread> workers;
  for (int worker = 0; worker < 6; ++worker) {
    workers.emplace_back([&] {
      // First come, first served; a worker that dies gives its permit back after 10 s.
      auto permit = downloads.acquire(10s, Context::with_timeout(1min));
      if (!permit) return;
      int now = ++running;
      for (int seen = most; now > seen && !most.compare_exchange_weak(seen, now);) {
      }
      std::this_thread::sleep_for(50ms);  // the download
      --running;
      if (permit->unlock()) ++done;  // Lost: somebody else may have been downloading, too
    });
  }
  for (auto& worker : workers) worker.join();
  std::printf("%d downloads, %s\n", done.load(), most <= 2 ? "two at once at most" : "too many");
  return done == 6 && most <= 2 ? 0 : 1;
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
