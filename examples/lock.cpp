// lock [ENDPOINT]: works under a lock, lets nobody but its holder write, and hears of its loss.
// Without an endpoint on an etcd in memory.
#include <coordination.hpp>
#include <cstdio>
#include <future>

using namespace coordination;
using namespace std::chrono_literals;

const char* const kProgress = "/examples/lock/progress";

// Work in steps that are written down. The writes go through the lock: etcd refuses them unless
// the lock is ours at that moment, even if this program was asleep for an hour before the last.
Result<void> work(Lock& lock) {
  for (int step = 1; step <= 3; ++step) {
    if (!lock.held()) return Error{ErrorCode::Lost, "the report", "the lock is lost", {}};
    if (auto put = lock.put(kProgress, std::to_string(step)); !put) return put.error();
    std::printf("step %d is done\n", step);
  }
  return {};
}

int main(int argc, char** argv) try {
  CoordinatorOptions options;
  options.endpoints = {argc > 1 ? argv[1] : "memory:2379"};
  if (argc < 2) options.transport = std::make_shared<MemoryEtcd>();
  auto coordinator = Coordinator::connect(options).value();

  // Waits its turn, for a minute at most; then renews itself until it is unlocked or destroyed.
  std::promise<Error> loss;
  auto lock =
      coordinator.lock().acquire("examples/report", 10s, Context::with_timeout(1min)).value();
  lock.on_lost([&loss](const Error& error) { loss.set_value(error); });
  // For a resource outside etcd: send the token along, and let it refuse a lower one than before.
  std::printf("locked, fencing token %lld\n", static_cast<long long>(lock.fencing_token()));
  work(lock).value();

  // An operator deletes our key by hand: the lock is gone, and whoever waits has it now.
  coordinator.client().remove(lock.key()).value();
  auto late = lock.put(kProgress, "4");
  if (late || late.error().code != ErrorCode::Lost) return 1;
  std::printf("a late write: %s\n", to_string(late.error()).c_str());

  auto told = loss.get_future();
  if (told.wait_for(10s) != std::future_status::ready || lock.held()) return 1;
  std::printf("on_lost: %s\n", to_string(told.get()).c_str());
  if (coordinator.client().get(kProgress).value().value != "3") return 1;
  coordinator.client().remove(kProgress).value();
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
