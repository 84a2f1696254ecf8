// Test programs that run parts of themselves as child processes.
//
//   static const bool registered = support::child_main("holder", [](const support::Args& args) {
//     std::puts("ready");
//     std::fflush(stdout);
//     return 0;                                          // the exit code of the child
//   });
//   ...
//   support::Process child = support::start_child("holder", {endpoint});
//   REQUIRE(child.read_line(5s) == "ready");
//   child.kill9();
#pragma once

#include <cstdio>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "process.hpp"

namespace support {

using Args = std::vector<std::string>;
using ChildFunction = std::function<int(const Args&)>;

namespace detail {
constexpr const char* kChildFlag = "--child";

inline std::map<std::string, ChildFunction>& children() {
  static std::map<std::string, ChildFunction> map;
  return map;
}
inline std::vector<std::pair<std::string, std::function<bool()>>>& requirements() {
  static std::vector<std::pair<std::string, std::function<bool()>>> list;
  return list;
}
}  // namespace detail

/// Registers what `start_child(name)` is to run.
inline bool child_main(const std::string& name, ChildFunction function) {
  return detail::children().emplace(name, std::move(function)).second;
}

/// Says what this test program cannot do without.
inline bool requires_program(const std::string& what, std::function<bool()> have) {
  detail::requirements().emplace_back(what, std::move(have));
  return true;
}

/// To be called first in main(): runs a child, or skips everything if something is missing. Its
/// value, if there is one, is what main() has to return.
inline std::optional<int> before_tests(int argc, char** argv) {
  constexpr int kSkipped = 77;
  if (argc >= 3 && std::string(argv[1]) == detail::kChildFlag) {
    const auto child = detail::children().find(argv[2]);
    if (child == detail::children().end()) return 125;
    return child->second(Args(argv + 3, argv + argc));
  }
  for (const auto& [what, have] : detail::requirements()) {
    if (have()) continue;
    std::printf("SKIPPED: needs %s\n", what.c_str());
    return kSkipped;
  }
  return std::nullopt;
}

/// This very program in a process of its own, running the named function.
inline Process start_child(const std::string& name, const Args& args = {},
                           const ProcessOptions& options = {}) {
  Args argv{"/proc/self/exe", detail::kChildFlag, name};
  argv.insert(argv.end(), args.begin(), args.end());
  return Process(argv, options);
}

/// For children: a line of output that the parent sees at once.
inline void say(const std::string& line) {
  std::fputs((line + "\n").c_str(), stdout);
  std::fflush(stdout);
}

}  // namespace support
