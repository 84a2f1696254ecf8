// error: ignoring return(ed)? value
// A failure that nobody looks at.
#include "coordination.hpp"

void drop(coordination::Lock& lock);
void drop(coordination::Lock& lock) {
#if MUST_FAIL
  lock.unlock();
#else
  static_cast<void>(lock.unlock());
#endif
}
