// testing_with_faults: how a program's own tests can take its lock away, cut it off from etcd and
// lose an answer, in no time and with no server. Exits 0 if the program does the right thing.
#include <coordination.hpp>
#include <cstdio>
#include <future>

using namespace coordination;
using namespace std::chrono_literals;

// The program under test: counts under a lock, and stops when it does not hold it any more.
struct Counter {
  explicit Counter(Lock held) : lock(std::move(held)) {
    lock.on_lost([this](const Error&) { stopped.set_value(); });
  }
  Result<PutResponse> count_to(int n) { return lock.put("/counter", std::to_string(n)); }

  std::promise<void> stopped;
  Lock lock;
};

int failures = 0;
void check(bool condition, const char* what) {
  std::printf("%s: %s\n", condition ? "ok" : "FAILED", what);
  if (!condition) ++failures;
}

int main() {
  // Time stands still until advance() is called. Two programs, known by their endpoints' names.
  auto etcd = MemoryEtcd::manual_clock();
  CoordinatorOptions options;
  options.transport = etcd;
  options.clock = etcd->clock();
  options.endpoints = {"first:2379"};
  auto first = Coordinator::connect(options).value();
  options.endpoints = {"second:2379"};
  auto second = Coordinator::connect(options).value();

  Counter counter(first.lock().acquire("counting", 10s).value());
  check(counter.count_to(1).has_value(), "the holder writes");

  // The answer to a write is lost: the program must know that etcd may have done it.
  etcd->drop_replies(1, "/v3/kv/txn");
  auto unknown = counter.count_to(2);
  check(!unknown && unknown.error().outcome == Outcome::MaybeApplied, "it may have been applied");

  // The network fails, and the lock's 10 s pass.
  etcd->partition("first:2379");
  check(!second.lock().try_acquire("counting", 10s), "nobody else has it yet");
  etcd->advance(11s);
  bool told = counter.stopped.get_future().wait_for(5s) == std::future_status::ready;
  check(told, "the holder hears that the lock is lost");
  check(second.lock().try_acquire("counting", 10s).has_value(), "another one can have it");

  // Back in the network it must not write any more.
  etcd->heal();
  auto late = counter.count_to(3);
  check(!late && late.error().code == ErrorCode::Lost, "a late write is refused");
  return failures == 0 ? 0 : 1;
}
