// The header came before, through another header; the implementation must come all the same.
#include "coordination.hpp"

#define COORDINATION_IMPLEMENTATION
#include "coordination.hpp"

int main() {
  const std::string name = coordination::to_string(coordination::ErrorCode::NotFound);
  return name == "NOT_FOUND" ? 0 : 1;
}
