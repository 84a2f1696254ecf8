// Section 6: a machine that was asleep. The clock that counts such time is this program's own.
#include <doctest/doctest.h>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"

#if defined(__linux__) && defined(__LP64__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace {
std::atomic<int> asleep{0};  // s
}

extern "C" int clock_gettime(clockid_t id, timespec* time) noexcept {
  const auto result = static_cast<int>(syscall(SYS_clock_gettime, id, time));
  if (result == 0 && id == CLOCK_BOOTTIME) time->tv_sec += asleep;
  return result;
}

TEST_CASE("lease: the time in which the machine sleeps counts" *
          doctest::skip(support::sanitized())) {
  auto c = coordination::Coordinator::in_memory();
  auto lease = c.client().grant(std::chrono::seconds(60)).value();
  CHECK(lease.held());
  asleep = 30;
  CHECK(lease.held());
  asleep = 61;
  CHECK_FALSE(lease.held());
  asleep = 0;
}
#endif
