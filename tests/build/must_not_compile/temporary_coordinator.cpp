// error: deleted
// times: 5
// A service of a Coordinator that is closed at the end of the line.
#include "coordination.hpp"

using coordination::Coordinator;

void use(Coordinator make());
void use(Coordinator make()) {
#if MUST_FAIL
  static_cast<void>(make().lock());
  static_cast<void>(make().registry());
  static_cast<void>(make().config());
  static_cast<void>(make().election());
  static_cast<void>(make().client());
#else
  auto coordinator = make();
  static_cast<void>(coordinator.lock());
#endif
}
