// How fast a contended lock passes from hand to hand.
#include <doctest/doctest.h>

#include <thread>

#include "support/live.hpp"

using namespace coordination;
using namespace support;

namespace {

struct Count {
  std::atomic<int> handovers{0};
  std::atomic<int> failures{0};
  std::atomic<int> inside{0};
  std::atomic<int> last_owner{-1};
  std::atomic<std::int64_t> last_token{0};
};

/// Until it has passed so many times from one to the other.
void contend(DistributedLock& locks, int me, int enough, Count& count) {
  while (count.handovers < enough && count.failures == 0) {
    auto lock = locks.acquire("baton", 10s, Context::with_timeout(lenient(20s)));
    if (!lock) return static_cast<void>(++count.failures);
    if (++count.inside != 1) ++count.failures;
    if (lock->fencing_token() <= count.last_token) ++count.failures;
    count.last_token = lock->fencing_token();
    if (count.last_owner.exchange(me) != me) ++count.handovers;
    --count.inside;
    if (!lock->unlock()) ++count.failures;
  }
}

}  // namespace

TEST_CASE("handover: two contenders pass one lock at least 300 times a second") {
  auto options = options_for(shared_etcd());
  auto first = connect(options);
  auto second = connect(options);
  const int enough = scaled(600);
  bool in_time = false;
  for (int round = 0; round < 10 && !in_time; ++round) {  // the machine has other users
    Count count;
    const Stopwatch watch;
    std::thread a([&] { contend(first.lock(), 0, enough, count); });
    std::thread b([&] { contend(second.lock(), 1, enough, count); });
    a.join();
    b.join();
    in_time = watch.over(2s) == 0;
    const double rate = enough / watch.seconds();
    MESSAGE(rate, " hand-overs a second");
    CHECK(count.failures == 0);
  }
  CHECK(in_time);
}
