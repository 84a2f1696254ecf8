// A tiny HTTP server that is no etcd: it gives one answer to everything, or none.
#pragma once

#include <atomic>
#include <list>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "process.hpp"

namespace support {

/// Listens on 127.0.0.1. Every request gets `answer`, sent as it is; "" = no answer, ever. If
/// `drip`, it comes one byte every 20 ms.
/// It is a raw socket on purpose: cpp-httplib's server ignores SIGPIPE for the whole process.
class LocalServer {
 public:
  explicit LocalServer(std::string answer, bool drip = false)
      : answer_(std::move(answer)), drip_(drip) {
    thread_ = std::thread([this] { loop(); });
  }
  LocalServer(const LocalServer&) = delete;
  LocalServer& operator=(const LocalServer&) = delete;
  ~LocalServer() {
    stopping_ = true;
    thread_.join();
    for (auto& client : clients_) close(client.fd);
    close(listener_);
  }

  /// A whole answer with a body.
  static std::string http(const std::string& status, const std::string& type,
                          const std::string& body) {
    return "HTTP/1.1 " + status + "\r\nContent-Type: " + type +
           "\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
  }

  int port() const { return port_; }
  std::string endpoint() const { return "127.0.0.1:" + std::to_string(port_); }
  int connections() const { return connections_; }
  int requests() const { return requests_; }

 private:
  struct Client {
    int fd;
    std::string bytes{};
    std::string dripping{};
    bool gone{false};
  };

  void loop() {
    while (!stopping_) {
      std::vector<pollfd> fds{{listener_, POLLIN, 0}};
      for (auto& client : clients_) {
        drip_one(client);
        fds.push_back({client.fd, POLLIN, 0});
      }
      if (poll(fds.data(), fds.size(), 20) <= 0) continue;
      std::size_t i = 1;
      for (auto& client : clients_) {
        if (fds[i++].revents != 0) serve(client);
      }
      clients_.remove_if([](const Client& client) { return client.gone; });
      if (fds[0].revents != 0) accept_one();
    }
  }
  void accept_one() {
    const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0) return;
    ++connections_;
    clients_.push_back({fd});
  }
  static void drip_one(Client& client) {
    if (client.dripping.empty()) return;
    static_cast<void>(send(client.fd, client.dripping.data(), 1, MSG_NOSIGNAL) < 0);
    client.dripping.erase(0, 1);
  }
  void serve(Client& client) {
    char bytes[4096];
    const ssize_t n = recv(client.fd, bytes, sizeof(bytes), 0);
    if (n <= 0) {
      close(client.fd);
      client.gone = true;
      return;
    }
    client.bytes.append(bytes, static_cast<std::size_t>(n));
    while (take_request(client.bytes)) {
      ++requests_;
      if (drip_) {
        client.dripping += answer_;
        continue;
      }
      if (send(client.fd, answer_.data(), answer_.size(), MSG_NOSIGNAL) < 0) return;
    }
  }
  static bool take_request(std::string& bytes) {
    const auto head = bytes.find("\r\n\r\n");
    if (head == std::string::npos) return false;
    const std::string name = "Content-Length: ";
    const auto length = bytes.find(name);
    const auto body =
        length < head ? std::stoul(bytes.substr(length + name.size())) : std::size_t{0};
    if (bytes.size() < head + 4 + body) return false;
    bytes.erase(0, head + 4 + body);
    return true;
  }

  const std::string answer_;
  const bool drip_;
  int port_{0};
  const int listener_{listen_somewhere(&port_)};
  std::atomic<bool> stopping_{false};
  std::atomic<int> connections_{0};
  std::atomic<int> requests_{0};
  std::list<Client> clients_;  // of the thread alone
  std::thread thread_;
};

}  // namespace support
