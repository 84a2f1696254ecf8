// libFuzzer's program. Which target it is for is the name of a folder:
// fuzz [OPTION...] FOLDER/TARGET [FOLDER...] fuzzes, and puts there what it has found;
// fuzz CORPUS/TARGET/FILE... runs these files.
#include <algorithm>
#include <string>

#include "targets.hpp"

namespace {

const fuzz::Target* chosen = nullptr;

void choose(std::string path) {
  path = "/" + path + "/";
  for (const auto& target : fuzz::kTargets) {
    if (path.rfind("/" + std::string(target.name) + "/") != path.npos) chosen = &target;
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  std::for_each(*argv + 1, *argv + *argc, choose);
  fuzz::must(chosen, "a path is named like a target");
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  chosen->run({reinterpret_cast<const char*>(data), size});
  return 0;
}
