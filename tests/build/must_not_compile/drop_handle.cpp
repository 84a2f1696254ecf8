// error: ignoring return(ed)? value
// times: 10
// What a handle holds is given back at once if nobody keeps the handle.
#include "coordination.hpp"

template <class T>
T make();

void drop();
void drop() {
#if MUST_FAIL
  make<coordination::Coordinator>();
  make<coordination::ConfigView>();
  make<coordination::Leadership>();
  make<coordination::Lease>();
  make<coordination::Lock>();
  make<coordination::Registration>();
  make<coordination::Semaphore>();
  make<coordination::ServiceView>();
  make<coordination::Subscription>();
  make<coordination::Watch<coordination::WatchEvent>>();
#else
  static_cast<void>(make<coordination::Lock>());
#endif
}
