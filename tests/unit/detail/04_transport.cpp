// Section 4, what stands behind the interface.
#include <doctest/doctest.h>

#include "coordination.hpp"

#if COORDINATION_USE_HTTPLIB && !defined(_WIN32)

using namespace coordination;

namespace {

sockaddr_in loopback() {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

}  // namespace

TEST_CASE("connection: what is cut before it is connected is not connected") {
  const int server = ::socket(AF_INET, SOCK_STREAM, 0);
  auto address = loopback();
  socklen_t size = sizeof(address);
  auto* raw = reinterpret_cast<sockaddr*>(&address);
  REQUIRE(::bind(server, raw, size) == 0);
  REQUIRE(::listen(server, 1) == 0);
  REQUIRE(::getsockname(server, raw, &size) == 0);
  const coordination::detail::HostPort to{false, "127.0.0.1", ntohs(address.sin_port)};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  std::optional<coordination::detail::Address> known;
  {
    coordination::detail::Connection early;
    early.cut();
    CHECK_FALSE(early.connect(to, known, deadline));
    CHECK_FALSE(known);
  }
  coordination::detail::Connection connection;
  CHECK(connection.connect(to, known, deadline));
  CHECK(known);
  CHECK(connection.is_quiet());
  const int peer = ::accept(server, nullptr, nullptr);
  SUBCASE("it says something") { REQUIRE(::send(peer, "x", 1, MSG_NOSIGNAL) == 1); }
  SUBCASE("it goes") { ::shutdown(peer, SHUT_RDWR); }
  pollfd readable{connection.socket(), POLLIN, 0};
  CHECK(::poll(&readable, 1, 5000) == 1);
  CHECK_FALSE(connection.is_quiet());
  ::close(peer);
  ::close(server);
}

#endif
