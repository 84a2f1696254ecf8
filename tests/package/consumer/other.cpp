#include <coordination.hpp>

bool works(coordination::Coordinator& c);
bool works(coordination::Coordinator& c) {
  auto lock = c.lock().try_acquire("jobs/nightly", std::chrono::seconds(10));
  return lock && lock->held() && lock->unlock();
}
