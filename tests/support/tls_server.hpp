// A TLS server in the test process, which answers every request with `{}`.
#pragma once

#include <openssl/ssl.h>

#include <atomic>
#include <list>
#include <string>
#include <thread>

#include "process.hpp"

namespace support {

struct TlsServerOptions {
  std::string cert, key;     // PEM files
  std::string client_ca{};   // asks for a client certificate of this CA
  int max_version{0};        // e.g. TLS1_2_VERSION; 0 = the newest
  bool low_security{false};  // also offers what OpenSSL thinks too old
};

class TlsServer {
 public:
  explicit TlsServer(const TlsServerOptions& options) : context_(SSL_CTX_new(TLS_server_method())) {
    if (options.low_security) {
      SSL_CTX_set_cipher_list(context_, "DEFAULT@SECLEVEL=0");
      SSL_CTX_set_min_proto_version(context_, TLS1_VERSION);
    }
    SSL_CTX_set_max_proto_version(context_, options.max_version);
    bool good = SSL_CTX_use_certificate_file(context_, options.cert.c_str(), SSL_FILETYPE_PEM) == 1;
    good =
        good && SSL_CTX_use_PrivateKey_file(context_, options.key.c_str(), SSL_FILETYPE_PEM) == 1;
    if (!options.client_ca.empty()) {
      good =
          good && SSL_CTX_load_verify_locations(context_, options.client_ca.c_str(), nullptr) == 1;
      SSL_CTX_set_verify(context_, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
    }
    if (!good) throw std::runtime_error("the TLS server cannot start");
    acceptor_ = std::thread([this] { accept_all(); });
  }
  TlsServer(const TlsServer&) = delete;
  TlsServer& operator=(const TlsServer&) = delete;
  ~TlsServer() {
    shutdown(listener_, SHUT_RDWR);
    acceptor_.join();
    for (const int fd : fds_) shutdown(fd, SHUT_RDWR);
    for (auto& thread : threads_) thread.join();
    for (const int fd : fds_) close(fd);
    close(listener_);
    SSL_CTX_free(context_);
  }

  std::string url(const std::string& host) const {
    return "https://" + host + ":" + std::to_string(port_);
  }
  int requests() const { return requests_; }

 private:
  void accept_all() {
    while (true) {
      const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd < 0) return;
      fds_.push_back(fd);
      threads_.emplace_back([this, fd] { serve(fd); });
    }
  }
  void serve(int fd) {
    sigset_t pipe;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, nullptr);
    SSL* ssl = SSL_new(context_);
    SSL_set_fd(ssl, fd);
    const std::string answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
    if (SSL_accept(ssl) == 1) {
      while (read_request(ssl)) {
        ++requests_;
        SSL_write(ssl, answer.data(), static_cast<int>(answer.size()));
      }
    }
    SSL_free(ssl);
    shutdown(fd, SHUT_RDWR);
  }
  /// Of the requests here the bodies are "{}".
  static bool read_request(SSL* ssl) {
    std::string bytes;
    while (bytes.find("\r\n\r\n{}") == std::string::npos) {
      char buffer[4096];
      const int n = SSL_read(ssl, buffer, sizeof(buffer));
      if (n <= 0) return false;
      bytes.append(buffer, static_cast<std::size_t>(n));
    }
    return true;
  }

  SSL_CTX* context_;
  int port_{0};
  const int listener_{listen_somewhere(&port_)};
  std::atomic<int> requests_{0};
  std::thread acceptor_;
  std::list<std::thread> threads_;  // of the acceptor alone until it is joined
  std::list<int> fds_;
};

}  // namespace support
