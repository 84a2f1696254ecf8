// worker_ids [ENDPOINT]: unique 64-bit ids without a request for each, as Snowflake makes them: the
// time, the number of the worker, a counter. Without an endpoint on an etcd in memory.
#include <chrono>
#include <coordination.hpp>
#include <cstdio>
#include <set>

using namespace coordination;
using namespace std::chrono_literals;

class Ids {
 public:
  explicit Ids(Slot slot) : slot_(std::move(slot)) {}

  Result<std::uint64_t> next() {
    if (!slot_.held())
      return Error::make(ErrorCode::Lost, "the worker's number is not ours any more");
    std::uint64_t now = milliseconds_since_2026();
    if (now <= time_ && ++count_ == 4096) ++time_, count_ = 0;  // the clock may stand, or go back
    if (now > time_) time_ = now, count_ = 0;
    return time_ << 22 | static_cast<std::uint64_t>(slot_.number()) << 12 | count_;
  }

 private:
  static std::uint64_t milliseconds_since_2026() {
    auto now = std::chrono::system_clock::now().time_since_epoch();
    return static_cast<std::uint64_t>(now / 1ms) - 1767225600000;
  }
  Slot slot_;
  std::uint64_t time_{0}, count_{0};
};

int main(int argc, char** argv) try {
  Coordinator c = argc > 1 ? Coordinator::connect({{argv[1]}}).value() : Coordinator::in_memory();
  // Each has a number from 0 to 1023 for itself, as long as it lives; a dead one's is free after 10
  // s.
  Ids one(c.lock().lease_slot("examples/ids", 1024, 10s).value());
  Ids two(c.lock().lease_slot("examples/ids", 1024, 10s).value());

  std::set<std::uint64_t> ids;
  for (int i = 0; i < 10000; ++i) {
    ids.insert(one.next().value());
    ids.insert(two.next().value());
  }
  std::printf("%zu ids, all different\n", ids.size());

  c.close().value();  // as after a loss: no id without a number
  std::printf("%s\n", to_string(one.next().error()).c_str());
  return ids.size() == 20000 ? 0 : 1;
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
