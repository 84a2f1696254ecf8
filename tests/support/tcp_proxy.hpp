// A TCP proxy in the test process that can break connections in every way a network can.
#pragma once

#include <fcntl.h>
#include <netinet/tcp.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <list>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "process.hpp"

namespace support {

/// Forwards 127.0.0.1:port() to another port of 127.0.0.1. One thread.
class TcpProxy {
 public:
  enum class Way { Both, Up, Down };  // up: from the client to the server
  /// What to call a connection by, if these bytes of its client tell; else "".
  using Label = std::function<std::string(std::string_view bytes)>;

  explicit TcpProxy(int target, Label label = nullptr)
      : target_(target), label_(std::move(label)), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
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
  /// Passes nothing on; connections stay open, and new ones can be made. With a label: on those
  /// connections only.
  void pause(Way way = Way::Both, const std::string& label = "") {
    command([&] { pauses_.push_back({way, label}); });
  }
  /// Takes back every pause.
  void resume() {
    command([this] { pauses_.clear(); });
  }
  /// Everything that comes from now on, from either side or from one, is passed on so much later.
  void delay(milliseconds by, Way way = Way::Both) {
    command([this, by, way] {
      if (way != Way::Down) delay_up_ = by;
      if (way != Way::Up) delay_down_ = by;
    });
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

  /// What the client says goes through `rewrite`, piece by piece.
  void rewrite(std::function<void(std::string&)> rewrite) {
    command([this, &rewrite] { rewrite_ = std::move(rewrite); });
  }

  int accepted() {
    return ask([this] { return accepted_; });
  }
  int open_connections() {
    return ask([this] { return static_cast<int>(links_.size()); });
  }

 private:
  using Time = std::chrono::steady_clock::time_point;
  struct Pause {
    Way way;
    std::string label;  // "" = all
  };
  struct Piece {
    Time due;
    std::string bytes;  // none: the end
  };
  struct Direction {
    Way way;
    int from{-1}, to{-1};
    std::deque<Piece> waiting{};  // read and not yet written
    bool ended{false};            // `from` has said that it is done
  };
  struct Link {
    Direction up{Way::Up}, down{Way::Down};
    std::string label{};
    long budget{-1};  // bytes that may still pass down; -1 = any number
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
      int limit = -1;
      {
        std::lock_guard<std::mutex> hold(mutex_);
        if (stopping_) return;
        move_bytes();
        fds = interests(&limit);
      }
      poll(fds.data(), fds.size(), limit);
      std::uint64_t count = 0;
      if (read(wake_, &count, sizeof(count)) < 0) continue;  // it was not a command
    }
  }
  void move_bytes() {
    while (listener_ >= 0 && accept_one()) {
    }
    for (auto& link : links_) pump_link(link);
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
  bool paused(const Link& link, const Direction& way) const {
    return std::any_of(pauses_.begin(), pauses_.end(), [&](const Pause& pause) {
      const bool this_way = pause.way == Way::Both || pause.way == way.way;
      return this_way && (pause.label.empty() || pause.label == link.label);
    });
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
    while (!link.broken && !paused(link, way)) {
      write_out(link, way, budget);
      if (link.broken || !takes_more(way) || !read_in(link, way)) return;
    }
  }
  milliseconds delay_of(const Direction& way) const {
    return way.way == Way::Up ? delay_up_ : delay_down_;
  }
  bool takes_more(const Direction& way) const {
    constexpr std::size_t kMost = 1024;  // pieces
    return !way.ended && way.waiting.size() < (delay_of(way).count() > 0 ? kMost : 1);
  }
  /// False if there was nothing to read.
  bool read_in(Link& link, Direction& way) {
    char bytes[16384];
    const ssize_t n = recv(way.from, bytes, sizeof(bytes), 0);
    if (n < 0) {
      if (!would_block()) link.broken = true;
      return false;
    }
    std::string piece(bytes, static_cast<std::size_t>(n));
    if (way.way == Way::Up && label_ && link.label.empty()) link.label = label_(piece);
    if (way.way == Way::Up && rewrite_) rewrite_(piece);
    way.ended = piece.empty();
    way.waiting.push_back({std::chrono::steady_clock::now() + delay_of(way), std::move(piece)});
    return true;
  }
  void write_out(Link& link, Direction& way, long* budget) {
    const auto now = std::chrono::steady_clock::now();
    while (!link.broken && !way.waiting.empty() && way.waiting.front().due <= now) {
      std::string& bytes = way.waiting.front().bytes;
      if (bytes.empty()) {
        shutdown(way.to, SHUT_WR);
      } else if (!write_some(link, way.to, bytes, budget)) {
        return;
      }
      way.waiting.pop_front();
    }
  }
  /// True if it has written all.
  static bool write_some(Link& link, int to, std::string& bytes, long* budget) {
    std::size_t allowed = bytes.size();
    if (budget != nullptr && *budget >= 0) {
      allowed = std::min(allowed, static_cast<std::size_t>(*budget));
    }
    const ssize_t n = allowed == 0 ? 0 : send(to, bytes.data(), allowed, MSG_NOSIGNAL);
    if (n < 0) {
      if (!would_block()) link.broken = true;
      return false;
    }
    bytes.erase(0, static_cast<std::size_t>(n));
    if (budget != nullptr && *budget >= 0) {
      *budget -= n;
      if (*budget <= 0) link.broken = link.orderly = true;
    }
    return bytes.empty();
  }

  /// What to wait for, and for how many milliseconds at most.
  std::vector<pollfd> interests(int* limit) const {
    const auto now = std::chrono::steady_clock::now();
    Time next = Time::max();
    std::vector<pollfd> fds{{wake_, POLLIN, 0}};
    if (listener_ >= 0) fds.push_back({listener_, POLLIN, 0});
    for (const auto& link : links_) {
      for (const Direction* way : {&link.up, &link.down}) {
        if (paused(link, *way)) continue;
        if (takes_more(*way)) fds.push_back({way->from, POLLIN, 0});
        if (way->waiting.empty()) continue;
        const Time due = way->waiting.front().due;
        if (due <= now) fds.push_back({way->to, POLLOUT, 0});
        if (due > now) next = std::min(next, due);
      }
    }
    if (next != Time::max()) {
      *limit = static_cast<int>(std::chrono::ceil<milliseconds>(next - now).count());
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
  const Label label_;
  std::function<void(std::string&)> rewrite_;
  int wake_;
  int port_{0};
  int listener_{-1};
  int accepted_{0};
  std::vector<Pause> pauses_;
  milliseconds delay_up_{0}, delay_down_{0};
  bool stopping_{false};
  std::list<Link> links_;
  std::thread thread_;
};

}  // namespace support
