// Two files of one program, header-only: every definition must be inline.
#include "coordination.hpp"

std::string from_b();

int main() {
  const std::string a = coordination::to_string(coordination::ErrorCode::Timeout);
  return a == from_b() ? 0 : 1;
}
