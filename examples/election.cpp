// election [ENDPOINT]: of two candidates one leads, then the other; a third party follows who it
// is. Without an endpoint on an etcd in memory.
#include <coordination.hpp>
#include <cstdio>
#include <future>

using namespace coordination;
using namespace std::chrono_literals;

// Waits until the observer is told of this leader; it is told of nobody, too, where nobody leads.
void expect_leader(Watch<LeaderInfo>& observed, const std::string& value) {
  while (observed.next(Context::with_timeout(10s)).value().value != value) {
  }
  std::printf("the leader is now: %s\n", value.c_str());
}

int main(int argc, char** argv) try {
  CoordinatorOptions options;
  options.endpoints = {argc > 1 ? argv[1] : "memory:2379"};
  if (argc < 2) options.transport = std::make_shared<MemoryEtcd>();
  auto node_a = Coordinator::connect(options).value();
  auto node_b = Coordinator::connect(options).value();

  auto observed = node_b.election().observe("examples/scheduler").value();

  // Blocks until we lead. The value is what others need to know of the leader: its address, say.
  auto a_leads = node_a.election().campaign("examples/scheduler", "10.0.0.1:8080", 5s).value();
  expect_leader(observed, "10.0.0.1:8080");

  // The second candidate stands in the queue, in a thread of its own.
  auto b_campaigns = std::async(std::launch::async, [&node_b] {
    return node_b.election().campaign("examples/scheduler", "10.0.0.2:8080", 5s,
                                      Context::with_timeout(10s));
  });

  a_leads.proclaim("10.0.0.1:9090").value();
  expect_leader(observed, "10.0.0.1:9090");

  // As for a Lock: held() before each step of the work, and guard() in each write.
  if (a_leads.held()) {
    Txn txn;
    txn.when(a_leads.guard()).then(Op::put("/examples/election/done-by", "node a"));
    if (!node_a.client().commit(txn).value().succeeded) return 1;
  }

  a_leads.resign().value();  // a node that dies resigns as well, when its 5 s have passed
  auto b_leads = b_campaigns.get().value();
  expect_leader(observed, "10.0.0.2:8080");
  if (b_leads.fencing_token() <= a_leads.fencing_token()) return 1;
  node_b.client().remove("/examples/election/done-by").value();
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
