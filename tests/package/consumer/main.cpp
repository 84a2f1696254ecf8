#include <coordination.hpp>

bool works(coordination::Coordinator& c);

int main() {
  auto c = coordination::Coordinator::in_memory();
  return works(c) ? 0 : 1;
}
