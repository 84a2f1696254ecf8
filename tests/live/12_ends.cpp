// The ends of things on a real etcd: exit(), fork() and close(), plain and with TLS, and sockets
// after close.
#include <doctest/doctest.h>

#include "support/ends.hpp"
#include "support/live.hpp"
#include "support/tls_files.hpp"

using namespace coordination;
using namespace support;

namespace {

/// An etcd, and how a child is told of it.
struct Place {
  explicit Place(const TlsFiles* tls) : server(of(tls)) {
    where = {server.url()};
    options.endpoints = where;
    if (tls == nullptr) return;
    options.tls.ca_file = tls->ca();
    where.push_back(tls->ca());
  }
  static EtcdOptions of(const TlsFiles* tls) {
    EtcdOptions options;
    if (tls != nullptr) options.flags = tls->etcd_flags(false);
    if (tls != nullptr) options.scheme = "https";
    return options;
  }
  RunResult run(const std::string& child, Args args) const {
    args.insert(args.end(), where.begin(), where.end());
    return ends::run_child(child, args);
  }
  std::size_t take_keys() const {
    auto c = connect(options);
    RemoveRequest all;
    all.key = all.range_end = std::string(1, '\0');
    return static_cast<std::size_t>(c.client().remove(all).value().deleted);
  }
  /// Ends as it should, and leaves no key; but for what close() cannot do in a second.
  void check(const std::string& child, const Args& args) const {
    CAPTURE(child);
    CAPTURE(args.front());
    std::size_t left = 1;
    for (int i = 0; i < 3 && left > 0; ++i) {
      const auto done = run(child, args);
      CHECK(done.exit_code == 7);
      CHECK(done.out.empty());
      left = take_keys();
    }
    CHECK(left == 0);
  }

  EtcdServer server;
  Args where;
  CoordinatorOptions options;
};

void check_ends(const TlsFiles* tls) {
  const Place place(tls);
  for (const char* child : {"exit", "exit with the default"}) {
    for (const char* how : {"return", "exit in a handler"}) place.check(child, {how});
  }
  place.check("fork", {std::to_string(scaled(10))});
  place.check("close", {std::to_string(scaled(20))});
}

}  // namespace

TEST_CASE("ends: exit(), fork() and close()") { check_ends(nullptr); }

TEST_CASE("ends: exit(), fork() and close() with TLS") {
  const TlsFiles tls;
  check_ends(&tls);
}

TEST_CASE("ends: after close() no socket is open, whoever still has a handle") {
  const EtcdServer server;
  auto c = connect(server);
  auto watch = c.client().watch("k").value();
  auto client = c.client();
  std::vector<std::thread> threads;
  for (int t = 0; t < 10; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 10; ++i) client.put("x", "1").value();
    });
  }
  for (auto& thread : threads) thread.join();
  const int port = std::stoi(server.url().substr(server.url().rfind(':') + 1));
  CHECK(connection_count(port) > 1);
  c.close().value();
  CHECK(wait_until([&] { return connection_count(port) == 0; }, lenient(1s)));
}
