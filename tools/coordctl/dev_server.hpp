// MemoryEtcd behind cpp-httplib's server: an etcd for development, and for curl.
#pragma once

#include <coordination.hpp>
#include <memory>
#include <string>

namespace coordctl {

class DevServer {
 public:
  /// Answers on this port from now on; 0 = any free one. Throws std::runtime_error.
  DevServer(std::shared_ptr<coordination::MemoryEtcd> etcd, const std::string& host, int port);
  /// Ends all streams, too.
  ~DevServer();

  int port() const { return port_; }

 private:
  struct State;
  std::unique_ptr<State> state_;
  int port_{0};
};

}  // namespace coordctl
