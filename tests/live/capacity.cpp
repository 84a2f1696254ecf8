// Five hundred locks and five hundred registrations in one Coordinator.
#include <doctest/doctest.h>

#include "support/live.hpp"
#include "support/transports.hpp"

using namespace coordination;
using namespace support;

TEST_CASE(
    "capacity: 500 locks and 500 registrations on at most 12 threads, past their TTL [slow]") {
  constexpr auto kTtl = 20s;
  const int many = scaled(500);
  auto options = options_for(shared_etcd());
  const auto counting = std::make_shared<CountingTransport>();
  options.transport = counting;
  auto coordinator = connect(options);
  std::atomic<int> lost{0};
  std::vector<Lock> locks;
  for (int i = 0; i < many; ++i) {
    locks.push_back(coordinator.lock().acquire("lock-" + std::to_string(i), kTtl).value());
    locks.back().on_lost([&](const Error&) { ++lost; });
    ServiceInfo service{"id-" + std::to_string(i), "web", "10.0.0.1", 1 + i};
    service.ttl = kTtl;
    coordinator.registry().register_service(service).value();
  }

  int most_threads = 0, most_connections = 0;
  const Stopwatch watch;
  wait_until(
      [&] {
        most_threads = std::max(most_threads, thread_count());
        most_connections = std::max(most_connections, connection_count(shared_etcd().port()));
        return watch.elapsed() > kTtl + 5s;
      },
      30s);
  MESSAGE(most_threads, " threads, ", most_connections, " connections, ",
          counting->requests("/v3/lease/keepalive"), " renewals sent");
  CHECK(most_threads <= 20 + (sanitized() ? 1 : 0));
  CHECK(most_connections <= 32);
  CHECK(lost == 0);
  for (auto& lock : locks) CHECK(lock.held());
  CHECK(coordinator.registry().discover("web").value().size() == static_cast<std::size_t>(many));
  RangeRequest all{options.key_prefix + "/locks/"};
  all.range_end = prefix_range_end(all.key);
  all.count_only = true;
  CHECK(coordinator.client().range(all).value().count == many);
  for (auto& lock : locks) CHECK(lock.unlock());
  const Stopwatch closing;
  CHECK(coordinator.close());
  CHECK(closing.over(lenient(1s)) == 0);
  const Etcdctl ctl(shared_etcd());
  CHECK(wait_until([&] { return ctl.keys(options.key_prefix).empty(); }, lenient(500ms)));
}
