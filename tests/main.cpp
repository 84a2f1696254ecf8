// The main() of every test program.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "support/child.hpp"

int main(int argc, char** argv) {
  if (const auto done = support::before_tests(argc, argv)) return *done;
  return doctest::Context(argc, argv).run();
}
