// leader [ENDPOINT]: one of many does the work, until SIGTERM; then another one, at once. Without
// an endpoint on an etcd in memory, where it sends itself the signal.
#include <coordination.hpp>
#include <csignal>
#include <cstdio>

using namespace coordination;
using namespace std::chrono_literals;

int main(int argc, char** argv) try {
  bool demo = argc < 2;
  Context ctx = Context::on_signals({SIGINT, SIGTERM});
  Coordinator c = demo ? Coordinator::in_memory() : Coordinator::connect({{argv[1]}}).value();

  // `office` ends with the office, and with ctx. After a loss it is called again when we lead
  // again.
  auto work = [&](Leadership& me, const Context& office) {
    std::printf("in office\n");
    for (int round = 1; office.sleep_for(20ms); ++round) {
      // Refused by etcd if somebody else leads by now, even if this process was asleep for an hour.
      if (!me.put("/examples/leader/round", std::to_string(round))) continue;
      if (!demo) continue;
      std::printf("round %d\n", round);
      if (round == 3) std::raise(SIGTERM);
      if (round == 3) office.sleep_for(10s);  // no matter how long: the signal ends it
    }
    std::printf("leaving\n");
  };
  auto done = c.election().lead("examples/leader", "10.0.0.7:8080", 10s, work, ctx);
  if (!done && done.error().code != ErrorCode::Cancelled) done.value();  // Cancelled: never led
  if (!demo) return 0;

  bool free = !c.election().leader("examples/leader");
  std::printf("the office is %s\n", free ? "free" : "taken");
  return free ? 0 : 1;
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
