// A bit of everything that a program does.
#include "coordination.hpp"

using namespace std::chrono_literals;

namespace {

bool locks(coordination::Coordinator& c) {
  auto lock = c.lock().try_acquire("jobs/nightly", 10s);
  return lock && lock->held() && lock->fencing_token() > 0 && lock->unlock();
}

bool services(coordination::Coordinator& c) {
  coordination::ServiceInfo service{"1", "web", "10.0.0.1", 80};
  if (!c.registry().register_service(service)) return false;
  const auto found = c.registry().discover("web");
  return found && found->size() == 1 && found->front() == service;
}

}  // namespace

int main() {
  auto c = coordination::Coordinator::in_memory();
  return locks(c) && services(c) && c.close() ? 0 : 1;
}
