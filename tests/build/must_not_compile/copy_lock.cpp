// error: deleted
// Two handles would release one lock twice.
#include "coordination.hpp"

void copy(coordination::Lock lock);
void copy(coordination::Lock lock) {
#if MUST_FAIL
  const coordination::Lock other = lock;
#else
  const coordination::Lock other = std::move(lock);
#endif
  static_cast<void>(other.held());
}
