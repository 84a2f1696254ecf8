#include <coordination.hpp>

int main() {
  auto c = coordination::Coordinator::in_memory();
  auto lock = c.lock().try_acquire("jobs/nightly", std::chrono::seconds(10));
  return lock && lock->held() && lock->unlock() ? 0 : 1;
}
