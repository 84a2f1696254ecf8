// Two files that use the library, compiled once in a third.
#include "coordination.hpp"

std::string from_b();

int main() {
  auto c = coordination::Coordinator::in_memory();
  const bool valid = c.lock().try_acquire("", std::chrono::seconds(1)).has_value();
  return !valid && from_b() == "CONFLICT" ? 0 : 1;
}
