// Without MemoryEtcd: what is left is whole.
#include "coordination.hpp"

int main() {
  coordination::CoordinatorOptions options;
  options.endpoints = {"127.0.0.1:1"};
  options.timeout = coordination::milliseconds(200);
  const auto made = coordination::Coordinator::connect(options);
  return !made && made.error().outcome == coordination::Outcome::NotApplied ? 0 : 1;
}
