// Short or long, and on which etcds.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "support/etcd_server.hpp"

namespace cluster {

/// COORDINATION_CLUSTER_ROUNDS; 0 = the short form.
inline int rounds() {
  const char* value = std::getenv("COORDINATION_CLUSTER_ROUNDS");
  return value != nullptr ? std::max(1, std::atoi(value)) : 0;
}
inline bool is_long() { return rounds() > 0; }

/// In the short form one etcd: the last of COORDINATION_ETCDS, else the one that all tests use.
inline std::vector<std::string> binaries() {
  const char* named = std::getenv("COORDINATION_ETCDS");
  std::istringstream paths(named != nullptr ? named : "");
  std::vector<std::string> result;
  for (std::string path; std::getline(paths, path, ':');) {
    if (!support::find_program(path).empty()) result.push_back(path);
  }
  if (result.empty()) result.push_back(support::etcd_program());
  if (!is_long()) result.erase(result.begin(), result.end() - 1);
  return result;
}

/// "3.5.16".
inline std::string version_of(const std::string& binary) {
  const auto line = support::run({binary, "--version"}).out;
  const auto begin = line.find_first_of("0123456789");
  return begin == std::string::npos ? "?" : line.substr(begin, line.find('\n') - begin);
}

}  // namespace cluster
