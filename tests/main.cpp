// The main() of every test program.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "support/child.hpp"

/// Of ThreadSanitizer: it does not see how libcrypto, which is not compiled with it, orders what
/// its threads share.
extern "C" const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() { return "called_from_lib:libcrypto.so\n"; }

int main(int argc, char** argv) {
  if (const auto done = support::before_tests(argc, argv)) return *done;
  return doctest::Context(argc, argv).run();
}
