// A server that sends what it is told, byte by byte.
#pragma once

#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <functional>
#include <iterator>
#include <list>
#include <string>
#include <thread>
#include <utility>

#include "coordination.hpp"
#include "process.hpp"
#include "wait.hpp"

namespace support {

/// One connection, as the server sees it.
class Wire {
 public:
  Wire(int fd, const std::atomic<bool>& stop) : fd_(fd), stop_(stop) {}

  /// The next request, head and body; "" when the client is gone.
  std::string read_request() {
    std::string bytes = std::exchange(rest_, {});
    while (!complete(bytes)) {
      char buffer[4096];
      const ssize_t n = recv(fd_, buffer, sizeof(buffer), 0);
      if (n <= 0) return "";
      bytes.append(buffer, static_cast<std::size_t>(n));
    }
    return bytes;
  }
  /// Something of a request.
  void read_some() const {
    char byte = 0;
    static_cast<void>(recv(fd_, &byte, 1, 0));
  }
  bool send(const std::string& bytes) const {
    return ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL) ==
           static_cast<ssize_t>(bytes.size());
  }
  /// One byte every few milliseconds, until the client has had enough (or seconds later).
  void dribble(const std::string& bytes) const {
    const Stopwatch watch;
    for (std::size_t i = 0; !stop_ && watch.elapsed() < 3s; i = (i + 1) % bytes.size()) {
      if (!send(bytes.substr(i, 1))) return;
      std::this_thread::sleep_for(5ms);
    }
  }
  /// Until the client has closed the connection (or seconds later).
  void wait_for_end() const {
    pollfd readable{fd_, POLLIN, 0};
    poll(&readable, 1, 3000);
  }
  /// Closes the socket, whatever is still to be read; its number stays taken.
  void hang_up() const {
    const int nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
    dup2(nothing, fd_);
    close(nothing);
  }
  /// Ends the connection with an RST.
  void reset() const {
    const linger hard{1, 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
  }

 private:
  static bool complete(const std::string& bytes) {
    const auto head = bytes.find("\r\n\r\n");
    if (head == std::string::npos) return false;
    const auto length = bytes.find("Content-Length: ");
    const auto body = length < head ? std::stoul(bytes.substr(length + 16)) : std::size_t{0};
    return bytes.size() >= head + 4 + body;
  }

  const int fd_;
  const std::atomic<bool>& stop_;
  std::string rest_;
};

/// Gives each connection to `serve`, in a thread of its own, and closes it then.
class RawServer {
 public:
  using Serve = std::function<void(Wire&)>;

  explicit RawServer(Serve serve) : serve_(std::move(serve)) {
    acceptor_ = std::thread([this] { accept_all(); });
  }
  RawServer(const RawServer&) = delete;
  RawServer& operator=(const RawServer&) = delete;
  ~RawServer() {
    stop_ = true;
    shutdown(listener_, SHUT_RDWR);
    acceptor_.join();
    for (const int fd : fds_) shutdown(fd, SHUT_RDWR);
    for (auto& thread : threads_) thread.join();
    for (const int fd : fds_) close(fd);
    close(listener_);
  }

  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_); }
  int port() const { return port_; }
  int connections() const { return connections_; }

 private:
  void accept_all() {
    while (!stop_) {
      const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd < 0) return;
      ++connections_;
      fds_.push_back(fd);
      threads_.emplace_back([this, fd] {
        Wire wire(fd, stop_);
        serve_(wire);
        shutdown(fd, SHUT_RDWR);
        if (!stop_) wire.reset();
      });
    }
  }

  const Serve serve_;
  int port_{0};
  const int listener_{listen_somewhere(&port_)};
  std::atomic<bool> stop_{false};
  std::atomic<int> connections_{0};
  std::thread acceptor_;
  std::list<std::thread> threads_;  // these two are its own until it is joined
  std::list<int> fds_;
};

inline coordination::HttpRequest post_to(const std::string& endpoint,
                                         const std::string& body = "{}") {
  coordination::HttpRequest request;
  request.endpoint = endpoint;
  request.path = "/v3/kv/range";
  request.body = body;
  return request;
}
inline coordination::HttpRequest post(const RawServer& server, const std::string& body = "{}") {
  return post_to(server.url(), body);
}

inline std::string http(const std::string& status, const std::string& body) {
  return "HTTP/1.1 " + status + "\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" +
         body;
}
constexpr const char* kChunkedHead = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
inline std::string chunk(const std::string& bytes) {
  char size[20];
  std::snprintf(size, sizeof(size), "%zx\r\n", bytes.size());
  return size + bytes + "\r\n";
}

/// A server that does this to the first request of each connection.
inline RawServer::Serve after_request(std::function<void(Wire&)> then) {
  return [then = std::move(then)](Wire& wire) {
    if (!wire.read_request().empty()) then(wire);
  };
}

}  // namespace support
