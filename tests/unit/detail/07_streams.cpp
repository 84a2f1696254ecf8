// Section 7: when a stream is opened and what it swallows, without a stream.
#include <doctest/doctest.h>

#include <cmath>

#include "coordination.hpp"

using namespace coordination;
using namespace coordination::detail;
using namespace std::chrono_literals;

namespace {

using Kind = StreamPolicy::Kind;
using Streams = std::vector<StreamPolicy::Stream>;
using Victims = StreamPolicy::Victims;

/// The victims of the next stream, in the order of their places.
std::optional<Victims> next(const Streams& streams, std::size_t waiting, std::size_t ending = 0) {
  auto victims = StreamPolicy::next(streams, waiting, ending);
  if (victims) std::sort(victims->begin(), victims->end());
  return victims;
}

}  // namespace

TEST_CASE("streams: one is opened for what waits, and for nothing else") {
  CHECK_FALSE(next({}, 0));
  CHECK(next({}, 1) == Victims{});
  CHECK_FALSE(next({{5, 0, Kind::Movable}}, 0));
}

TEST_CASE("streams: the smaller ones are swallowed, the larger ones stay") {
  CHECK(next({{100, 0, Kind::Movable}, {2, 0, Kind::Movable}}, 3) == Victims{1});
  CHECK(next({{2, 0, Kind::Movable}, {4, 0, Kind::Movable}}, 3) == Victims{0, 1});
  CHECK(next({{2, 0, Kind::Busy}, {4, 0, Kind::Movable}}, 4) == Victims{1});
}

TEST_CASE("streams: one whose dead are as many as its living is swallowed") {
  CHECK(next({{5, 5, Kind::Movable}, {9, 8, Kind::Movable}}, 0) == Victims{0});
  CHECK(next({{100, 100, Kind::Movable}}, 1) == Victims{0});
  CHECK_FALSE(next({{5, 50, Kind::Stuck}}, 0));
  CHECK_FALSE(next({{5, 50, Kind::Busy}}, 0));
}

TEST_CASE("streams: never more than five, but for those that must stay") {
  const StreamPolicy::Stream large{1000, 0, Kind::Movable}, busy{9, 0, Kind::Busy},
      stuck{9, 0, Kind::Stuck};
  CHECK(next({large, large, large}, 1) == Victims{});
  CHECK_FALSE(next({large, large, large, large}, 1)->empty());
  CHECK_FALSE(next({large, large, large, large, busy}, 1));
  // Where nothing is under way that would make room, one more makes it.
  CHECK(next({large, large, large, large, large}, 1)->size() >= 2);
  CHECK_FALSE(next({large, large, large, large}, 1, 1));  // until one has ended
  CHECK_FALSE(next({busy, busy, busy, busy}, 1));
  CHECK(next({stuck, stuck, stuck, stuck}, 1) == Victims{});
  CHECK(next({stuck, stuck, stuck, stuck, large}, 1) == Victims{4});
  CHECK(next({stuck, stuck, stuck, stuck, stuck, stuck}, 1) == Victims{});
  CHECK_FALSE(next(Streams(kUtmostStreams, stuck), 1));
}

TEST_CASE("streams: one watch after the other is created again but a few times") {
  for (const std::size_t count : {80U, 2000U}) {
    Streams streams;
    std::size_t created = 0, most = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const auto victims = next(streams, 1);
      REQUIRE(victims);
      std::size_t size = 1;
      for (auto it = victims->rbegin(); it != victims->rend(); ++it) {
        size += streams[*it].living;
        streams.erase(streams.begin() + static_cast<std::ptrdiff_t>(*it));
      }
      streams.push_back({size, 0, Kind::Movable});
      created += size;
      most = std::max(most, streams.size());
    }
    const auto n = static_cast<double>(count);
    MESSAGE(count, " watches: ", created, " creations on ", most, " streams");
    CHECK(most <= kMaxStreams - 1);
    CHECK(static_cast<double>(created) <= 2 * n * (std::log2(n) + 2));
  }
}

TEST_CASE("streams: some at once, then gathered, unless many have come") {
  StreamPolicy policy;
  const auto now = steady_clock::now();
  for (int i = 0; i < 4; ++i) {
    CHECK(policy.next_opening(now, 1000, 1) == now);
    policy.opened(now);
  }
  policy.asked(now + 2s);  // they come all the time
  CHECK(policy.next_opening(now, 1000, 1) == now + 200ms + 250ms);
  CHECK(policy.next_opening(now, 100000, 1) == now + 200ms + 1000ms);
  CHECK(policy.next_opening(now, 1000, 400) == now + 200ms + 250ms);
  CHECK(policy.next_opening(now + 1s, 1000, 1) == now + 1s);
  policy.asked(now);  // and then no more
  CHECK(policy.next_opening(now, 1000, 1) == now + 200ms);
  policy.asked(now + 180ms);
  CHECK(policy.next_opening(now, 1000, 1) == now + 280ms);
  CHECK(policy.next_opening(now, 1000, 500) == now + 50ms);
  CHECK(policy.next_opening(now + 1s, 1000, 1) == now + 1s);
}
