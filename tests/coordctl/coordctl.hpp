// coordctl as a process, on an etcd of its own.
#pragma once

#include <doctest/doctest.h>

#include <cerrno>
#include <fstream>
#include <initializer_list>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "support/live.hpp"

namespace support {

/// The exit statuses that the man page names.
enum CoordctlExit {
  kDifferent = 1,
  kUsage = 64,
  kBadData = 65,
  kNotFound = 66,
  kUnavailable = 69,
  kHeld = 75,
  kLost = 76,
  kDenied = 77,
  kNotExecutable = 126,
  kNoCommand = 127
};

inline ProcessOptions with_env(std::vector<std::string> env) {
  ProcessOptions options;
  options.env = std::move(env);
  options.merge_stderr = true;
  return options;
}

/// coordctl for one etcd, or whatever listens at a url.
class Coordctl {
 public:
  explicit Coordctl(std::string url) : url_(std::move(url)) {}
  explicit Coordctl(const EtcdServer& server) : Coordctl(server.url()) {}

  RunResult run(const std::vector<std::string>& args, std::vector<std::string> env = {},
                milliseconds limit = 30s) const {
    return support::run(command(args), with_env(std::move(env)), limit);
  }
  /// Standard output without the last '\n'.
  std::string out(const std::vector<std::string>& args) const {
    Process process(command(args));
    auto text = process.read_all(30s);
    if (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
  }
  /// In the background; stdout and stderr in one pipe.
  Process start(const std::vector<std::string>& args, std::vector<std::string> env = {}) const {
    return Process(command(args), with_env(std::move(env)));
  }

 private:
  std::vector<std::string> command(const std::vector<std::string>& args) const {
    std::vector<std::string> argv{COORDCTL, "--endpoints", url_};
    argv.insert(argv.end(), args.begin(), args.end());
    return argv;
  }
  std::string url_;
};

inline std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

inline bool is_alive(pid_t pid) {
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  std::string text;
  std::getline(stat, text);
  const auto name_end = text.rfind(')');
  return name_end != std::string::npos && text[name_end + 2] != 'Z';
}
inline bool ends(pid_t pid, milliseconds limit = 10s) {
  return wait_until([&] { return !is_alive(pid); }, lenient(limit));
}

}  // namespace support
