// Which etcds the tests of this folder were run on.
#include <cstdio>

#include "subject.hpp"

using namespace conformance;

namespace {

const char* const kNotNamed = "COORDINATION_ETCDS does not name one, see tools/fetch_etcd.sh";

void check_tested(const char* name, int first, int last, const char* missing) {
  for (const Binary& binary : binaries()) {
    CHECK_MESSAGE(binary.version != 0, "does not run: " << binary.path);
    if (binary.version < first || binary.version > last) continue;
    std::printf("conformance: %s is %s\n", name, binary.path.c_str());
    return;
  }
  std::printf("SKIPPED: conformance on %s: %s\n", name, missing);
}

}  // namespace

CONFORMANCE("which gateway it has") {
  const bool v1 = etcd.has(Quirk::V1Errors);
  if (etcd.version() < version(3, 5, 0)) CHECK(v1);
  if (etcd.is_memory() || etcd.version() >= version(3, 6, 0)) CHECK_FALSE(v1);
}

TEST_CASE("MemoryEtcd is among those tested") {
  REQUIRE_FALSE(subjects().empty());
  CHECK(subjects()[0]->is_memory());
}

TEST_CASE("etcd 3.4 is among those tested") {
  check_tested("etcd 3.4", version(3, 4, 0), version(3, 4, 99), "it is not installed");
}

TEST_CASE("etcd 3.5 is among those tested") {
  check_tested("etcd 3.5", version(3, 5, 0), version(3, 5, 99), kNotNamed);
}

TEST_CASE("etcd 3.6 is among those tested") {
  check_tested("etcd 3.6", version(3, 6, 0), version(3, 6, 99), kNotNamed);
}

TEST_CASE("etcd 3.7 is among those tested") {
  check_tested("etcd 3.7", version(3, 7, 0), version(3, 7, 99), kNotNamed);
}
