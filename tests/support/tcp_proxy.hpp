// A TCP proxy in the test process that can break connections in every way a network can.
#pragma once

#include <fcntl.h>
#include <netinet/tcp.h>
#include <sys/eventfd.h>

#include <functional>
#include <list>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "process.hpp"

namespace support {

/// Forwards 127.0.0.1:port() to another port of 127.0.0.1. One thread.
class TcpProxy {
 public:
  explicit TcpProxy(int target) : target_(target), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    for (int i = 0; i < 10 && listener_ < 0; ++i) {
      port_ = free_port();
      listen_now();
    }
    if (listener_ < 0) throw std::runtime_error("the proxy cannot listen");
    thread_ = std::thread([this] { loop(); });
  }
  TcpProxy(const TcpProxy&) = delete;
  TcpProxy& operator=(const TcpProxy&) = delete;
  ~TcpProxy() {
    command([this] { stopping_ = true; });
    thread_.join();
    close_all(true);
    if (listener_ >= 0) close(listener_);
    close(wake_);
  }

  int port() const { return port_; }
  std::string endpoint() const { return "127.0.0.1:" + std::to_string(port_); }

  /// Resets every connection, on both sides.
  void cut() {
    command([this] { close_all(true); });
  }
  /// Lets every connection that is open now pass `bytes` more to the client, and then closes it in
  /// an orderly way: in the middle of a chunk, if the number is chosen for it.
  void cut_after(std::size_t bytes) {
    command([this, bytes] {
      for (auto& link : links_) link.budget = static_cast<long>(bytes);
    });
  }
  /// Passes nothing on; connections stay open, and new ones can be made.
  void pause() {
    command([this] { paused_ = true; });
  }
  void resume() {
    command([this] { paused_ = false; });
  }
  /// Resets what is open, and refuses new connections, until refuse(false).
  void refuse(bool on = true) {
    command([this, on] {
      if (on) {
        close_all(true);
        if (listener_ >= 0) shutdown(listener_, SHUT_RDWR);  // at once, though it is being polled
        if (listener_ >= 0) close(listener_);
        listener_ = -1;
      } else if (listener_ < 0) {
        listen_now();
      }
    });
  }
  /// For connections to come.
  void set_target(int port) {
    command([this, port] { target_ = port; });
  }

  int accepted() {
    return ask([this] { return accepted_; });
  }
  int open_connections() {
    return ask([this] { return static_cast<int>(links_.size()); });
  }

 private:
  struct Direction {
    int from{-1}, to{-1};
    std::string waiting;  // read and not yet written
    bool ended{false};    // `from` has said that it is done
  };
  struct Link {
    Direction up, down;  // client to server, server to client
    long budget{-1};     // bytes that may still pass down; -1 = any number
    bool broken{false}, orderly{false};
  };

  /// Runs `action` while the loop stands still.
  void command(const std::function<void()>& action) {
    std::lock_guard<std::mutex> hold(mutex_);
    action();
    const std::uint64_t one = 1;
    if (write(wake_, &one, sizeof(one)) < 0) return;  // it is awake already
  }
  int ask(const std::function<int()>& question) {
    std::lock_guard<std::mutex> hold(mutex_);
    return question();
  }

  static sockaddr_in local_address(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
  }
  static int new_socket() {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    const int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    return fd;
  }
  void listen_now() {
    listener_ = new_socket();
    const auto address = local_address(port_);
    if (bind(listener_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0 &&
        listen(listener_, 512) == 0) {
      return;
    }
    close(listener_);
    listener_ = -1;
  }

  void loop() {
    for (;;) {
      std::vector<pollfd> fds;
      {
        std::lock_guard<std::mutex> hold(mutex_);
        if (stopping_) return;
        move_bytes();
        fds = interests();
      }
      poll(fds.data(), fds.size(), -1);
      std::uint64_t count = 0;
      if (read(wake_, &count, sizeof(count)) < 0) continue;  // it was not a command
    }
  }
  void move_bytes() {
    while (listener_ >= 0 && accept_one()) {
    }
    if (!paused_) {
      for (auto& link : links_) pump_link(link);
    }
    for (auto& link : links_) {
      if (link.broken) close_link(link, !link.orderly);
    }
    links_.remove_if([](const Link& link) { return link.broken; });
  }
  bool accept_one() {
    const int client = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (client < 0) return false;
    const int on = 1;
    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    ++accepted_;
    const int server = new_socket();
    const auto address = local_address(target_);
    const int rc = connect(server, reinterpret_cast<const sockaddr*>(&address), sizeof(address));
    Link link;
    link.up.from = link.down.to = client;
    link.up.to = link.down.from = server;
    link.broken = rc != 0 && errno != EINPROGRESS;
    links_.push_back(std::move(link));
    return true;
  }
  void pump_link(Link& link) {
    pump(link, link.up, nullptr);
    pump(link, link.down, &link.budget);
    if (link.up.ended && link.down.ended && link.up.waiting.empty() && link.down.waiting.empty()) {
      link.broken = link.orderly = true;
    }
  }
  static bool would_block() {
    return errno == EAGAIN || errno == EINPROGRESS || errno == ENOTCONN || errno == EINTR;
  }
  void pump(Link& link, Direction& way, long* budget) {
    char bytes[16384];
    while (!link.broken && !way.ended && way.waiting.empty()) {
      const ssize_t n = recv(way.from, bytes, sizeof(bytes), 0);
      if (n > 0) {
        way.waiting.assign(bytes, static_cast<std::size_t>(n));
        write_out(link, way, budget);
      } else if (n == 0) {
        way.ended = true;
        shutdown(way.to, SHUT_WR);
      } else {
        if (!would_block()) link.broken = true;
        return;
      }
    }
    if (!way.waiting.empty()) write_out(link, way, budget);
  }
  void write_out(Link& link, Direction& way, long* budget) {
    std::size_t allowed = way.waiting.size();
    if (budget != nullptr && *budget >= 0) {
      allowed = std::min(allowed, static_cast<std::size_t>(*budget));
    }
    const ssize_t n = allowed == 0 ? 0 : send(way.to, way.waiting.data(), allowed, MSG_NOSIGNAL);
    if (n < 0) {
      if (!would_block()) link.broken = true;
      return;
    }
    way.waiting.erase(0, static_cast<std::size_t>(n));
    if (budget == nullptr || *budget < 0) return;
    *budget -= n;
    if (*budget <= 0) link.broken = link.orderly = true;
  }

  std::vector<pollfd> interests() const {
    std::vector<pollfd> fds{{wake_, POLLIN, 0}};
    if (listener_ >= 0) fds.push_back({listener_, POLLIN, 0});
    if (paused_) return fds;
    for (const auto& link : links_) {
      for (const Direction* way : {&link.up, &link.down}) {
        if (!way->waiting.empty()) {
          fds.push_back({way->to, POLLOUT, 0});
        } else if (!way->ended) {
          fds.push_back({way->from, POLLIN, 0});
        }
      }
    }
    return fds;
  }

  static void close_link(Link& link, bool reset) {
    const linger at_once{1, 0};
    for (const int fd : {link.up.from, link.up.to}) {
      if (reset) setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
      close(fd);
    }
  }
  void close_all(bool reset) {
    for (auto& link : links_) close_link(link, reset);
    links_.clear();
  }

  std::mutex mutex_;
  int target_;
  int wake_;
  int port_{0};
  int listener_{-1};
  int accepted_{0};
  bool paused_{false};
  bool stopping_{false};
  std::list<Link> links_;
  std::thread thread_;
};

}  // namespace support
