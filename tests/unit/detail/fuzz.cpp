// The corpus of the fuzz targets, with any compiler: what was found once is not found again.
#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "fuzz/targets.hpp"

TEST_CASE("fuzz: the corpus of every target, and each of its files cut short") {
  for (const auto& target : fuzz::kTargets) {
    const auto folder = std::filesystem::path(COORDINATION_CORPUS) / target.name;
    REQUIRE_MESSAGE(std::filesystem::is_directory(folder), folder.string());
    int count = 0;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      std::ifstream stream(entry.path(), std::ios::binary);
      const std::string bytes(std::istreambuf_iterator<char>(stream), {});
      INFO(entry.path().string());
      for (auto size : {bytes.size(), bytes.size() / 2, bytes.size() - bytes.size() / 4}) {
        target.run(std::string_view(bytes).substr(0, size));
      }
      ++count;
    }
    CHECK_MESSAGE(count >= 3, target.name);
  }
}
