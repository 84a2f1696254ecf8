// error: ignoring return value
// A handler that is unregistered at once.
#include "coordination.hpp"

void drop(const coordination::Context& context);
void drop(const coordination::Context& context) {
#if MUST_FAIL
  context.on_cancel([] {});
#else
  const auto hook = context.on_cancel([] {});
#endif
}
