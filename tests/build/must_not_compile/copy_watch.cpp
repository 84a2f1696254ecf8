// error: deleted
// Two readers would share the events of one watch.
#include "coordination.hpp"

void copy(coordination::Watch<coordination::WatchEvent> watch);
void copy(coordination::Watch<coordination::WatchEvent> watch) {
#if MUST_FAIL
  coordination::Watch<coordination::WatchEvent> other = watch;
#else
  coordination::Watch<coordination::WatchEvent> other = std::move(watch);
#endif
  other.cancel();
}
