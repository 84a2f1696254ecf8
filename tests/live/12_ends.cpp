// The ends of things on a real etcd: exit() and fork(), plain and with TLS, and sockets after
// close.
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
  std::size_t keys_left() const {
    auto c = connect(options);
    RangeRequest all;
    all.key = all.range_end = std::string(1, '\0');
    return c.client().range(all).value().kvs.size();
  }

  EtcdServer server;
  Args where;
  CoordinatorOptions options;
};

void check_ends(const TlsFiles* tls) {
  const Place place(tls);
  for (const char* name : {"exit", "exit with the default"}) {
    for (const char* how : {"return", "exit in a handler"}) {
      CAPTURE(name);
      CAPTURE(how);
      const auto done = place.run(name, {how});
      CHECK(done.exit_code == 7);
      CHECK(done.out.empty());
      CHECK(place.keys_left() == 0);
    }
  }
  const auto done = place.run("fork", {std::to_string(scaled(10))});
  CHECK(done.exit_code == 7);
  CHECK(done.out.empty());
  CHECK(place.keys_left() == 0);
}

}  // namespace

TEST_CASE("ends: exit() and fork()") { check_ends(nullptr); }

TEST_CASE("ends: exit() and fork() with TLS") {
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
  CHECK(wait_until([&] { return connection_count(port) == 0; }, 1s));
}
