// Waiting for conditions, and what a test may ask about its own process.
#pragma once

#include <dirent.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <thread>

namespace support {

using std::chrono::milliseconds;
using namespace std::chrono_literals;

/// True in a sanitizer build, or when COORDINATION_SANITIZED=1 says so.
inline bool sanitized() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
  return true;
#endif
#endif
  const char* value = std::getenv("COORDINATION_SANITIZED");
  return value != nullptr && std::string(value) == "1";
}

/// True in a build with ThreadSanitizer.
inline bool thread_sanitized() {
#if defined(__SANITIZE_THREAD__)
  return true;
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
  return true;
#endif
#endif
  return false;
}

/// `full` of something, or a tenth of it (one at least) under a sanitizer.
inline int scaled(int full) { return sanitized() ? (full + 9) / 10 : full; }

/// A limit of time, ten times as long under a sanitizer.
inline milliseconds lenient(milliseconds limit) { return sanitized() ? limit * 10 : limit; }

namespace detail {

/// How long, since the system began, somebody here has had to wait for a processor. 0 where the
/// system does not say.
inline milliseconds pressure() {
  std::ifstream file("/proc/pressure/cpu");
  std::string some, total;
  while (file >> some && some.compare(0, 6, "total=") != 0) {
  }
  const long microseconds = file ? std::stol(some.substr(6)) : 0;
  return milliseconds(microseconds / 1000);
}

}  // namespace detail

class Stopwatch {
 public:
  milliseconds elapsed() const {
    return std::chrono::duration_cast<milliseconds>(std::chrono::steady_clock::now() - start_);
  }
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  /// By how many milliseconds it is over `limit`; 0 if it is not. While the machine had more to do
  /// than processors, time does not count, but for a tenth: so limits can be narrow, and hold on a
  /// busy machine.
  long over(milliseconds limit) const {
    const auto late = elapsed() - limit;
    if (late <= 0ms) return 0;
    const auto busy = std::clamp(detail::pressure() - pressure_, 0ms, 9 * limit);
    return std::max<long>(0, (late - busy).count());
  }
  void reset() { *this = Stopwatch(); }

 private:
  // First: a thread may lose its processor between the two, and that time must not count alone.
  milliseconds pressure_{detail::pressure()};
  std::chrono::steady_clock::time_point start_{std::chrono::steady_clock::now()};
};

/// Asks every few milliseconds; false if the condition did not come true within `limit`, see
/// Stopwatch::over().
template <class Condition>
bool wait_until(Condition condition, milliseconds limit) {
  const Stopwatch watch;
  while (!condition()) {
    if (watch.over(limit) > 0) return false;
    std::this_thread::sleep_for(2ms);
  }
  return true;
}

/// Asks for so long; false if the condition came true.
template <class Condition>
bool never(Condition condition, milliseconds time) {
  const Stopwatch watch;
  while (!condition()) {
    if (watch.elapsed() > time) return true;
    std::this_thread::sleep_for(2ms);
  }
  return false;
}

namespace detail {

/// The first number after `name` in /proc/self/status.
inline long status_number(const std::string& name) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.compare(0, name.size() + 1, name + ":") == 0) {
      return std::stol(line.substr(name.size() + 1));
    }
  }
  return -1;
}

/// The inodes of the sockets that this process has open.
inline std::set<std::string> socket_inodes() {
  std::set<std::string> inodes;
  DIR* folder = opendir("/proc/self/fd");
  if (folder == nullptr) return inodes;
  while (const dirent* entry = readdir(folder)) {
    char target[64] = {};
    const std::string path = std::string("/proc/self/fd/") + entry->d_name;
    if (readlink(path.c_str(), target, sizeof(target) - 1) <= 0) continue;
    const std::string text = target;
    if (text.compare(0, 8, "socket:[") == 0) inodes.insert(text.substr(8, text.size() - 9));
  }
  closedir(folder);
  return inodes;
}

inline int connections_in(const char* table, int port, const std::set<std::string>& inodes) {
  constexpr const char* kEstablished = "01";
  std::ifstream file(table);
  std::string line;
  std::getline(file, line);     // the heading
  std::set<std::string> found;  // while others come and go, one may be listed twice
  while (std::getline(file, line)) {
    std::istringstream fields(line);
    std::string slot, local, remote, state, queues, timer, retransmits, uid, timeout, inode;
    fields >> slot >> local >> remote >> state >> queues >> timer >> retransmits >> uid >>
        timeout >> inode;
    if (state != kEstablished || inodes.count(inode) == 0) continue;
    if (std::stoi(remote.substr(remote.find(':') + 1), nullptr, 16) == port) found.insert(inode);
  }
  return static_cast<int>(found.size());
}

}  // namespace detail

/// Threads of this process. ThreadSanitizer has one of its own among them.
inline int thread_count() { return static_cast<int>(detail::status_number("Threads")); }

/// Resident memory of this process in KiB.
inline long rss_kb() { return detail::status_number("VmRSS"); }

/// Open connections of this process to a TCP port of this machine.
inline int connection_count(int port) {
  const auto inodes = detail::socket_inodes();
  return detail::connections_in("/proc/self/net/tcp", port, inodes) +
         detail::connections_in("/proc/self/net/tcp6", port, inodes);
}

}  // namespace support
