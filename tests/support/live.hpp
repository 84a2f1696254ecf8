// What most live tests begin with: options for an etcd, a log that can be read, handler counts.
#pragma once

#include <atomic>
#include <mutex>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "../../coordination.hpp"
#include "etcd_server.hpp"
#include "wait.hpp"

namespace support {

inline const bool needs_etcd = requires_program("etcd", [] { return !etcd_program().empty(); });
inline const bool needs_etcdctl =
    requires_program("etcdctl", [] { return !find_program("etcdctl").empty(); });

/// For doctest's messages: what went wrong, or "ok".
template <class T>
std::string why(const coordination::Result<T>& result) {
  return result ? "ok" : to_string(result.error());
}

/// Options for this etcd, with a key prefix of their own. COORDINATION_TEST_LOG=1 prints the log.
inline coordination::CoordinatorOptions options_for(const EtcdServer& server) {
  coordination::CoordinatorOptions options;
  options.endpoints = {server.url()};
  options.key_prefix = unique_prefix();
  options.timeout = lenient(options.timeout);
  if (std::getenv("COORDINATION_TEST_LOG") != nullptr) {
    options.logger = coordination::stderr_logger(coordination::LogLevel::Debug);
  }
  return options;
}

/// Throws, so that the test case ends.
inline coordination::Coordinator connect(coordination::CoordinatorOptions options) {
  return coordination::Coordinator::connect(std::move(options)).value();
}
inline coordination::Coordinator connect(const EtcdServer& server) {
  return connect(options_for(server));
}

/// Keeps what is logged.
class LogKeeper {
 public:
  coordination::Logger logger() {
    auto state = state_;
    return [state](coordination::LogLevel level, std::string_view message,
                   const coordination::LogFields& fields) {
      std::ostringstream line;
      line << to_string(level) << ' ' << message;
      for (const auto& [name, value] : fields) line << ' ' << name << '=' << value;
      std::lock_guard<std::mutex> hold(state->mutex);
      state->lines.push_back(line.str());
    };
  }
  std::vector<std::string> lines() const {
    std::lock_guard<std::mutex> hold(state_->mutex);
    return state_->lines;
  }
  bool contains(const std::string& text) const {
    for (const auto& line : lines()) {
      if (line.find(text) != std::string::npos) return true;
    }
    return false;
  }

 private:
  struct State {
    std::mutex mutex;
    std::vector<std::string> lines;
  };
  std::shared_ptr<State> state_{std::make_shared<State>()};
};

}  // namespace support
