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

TEST_CASE("tap: what is cut before it is connected cannot be connected") {
  const int server = ::socket(AF_INET, SOCK_STREAM, 0);
  auto address = loopback();
  socklen_t size = sizeof(address);
  auto* raw = reinterpret_cast<sockaddr*>(&address);
  REQUIRE(::bind(server, raw, size) == 0);
  REQUIRE(::listen(server, 1) == 0);
  REQUIRE(::getsockname(server, raw, &size) == 0);
  coordination::detail::SocketTap tap;
  tap.cut();
  const int client = ::socket(AF_INET, SOCK_STREAM, 0);
  tap.attach(client);
  CHECK(::connect(client, raw, size) == -1);
  CHECK(errno == ENOTSOCK);
  ::close(client);
  ::close(server);
}

TEST_CASE("tap: a connection is quiet until its server says something, or goes") {
  int pair[2] = {-1, -1};
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
  coordination::detail::SocketTap tap;
  CHECK_FALSE(tap.is_quiet());  // there is none
  tap.attach(pair[0]);
  CHECK(tap.is_quiet());
  SUBCASE("it says something") { REQUIRE(::send(pair[1], "x", 1, MSG_NOSIGNAL) == 1); }
  SUBCASE("it goes") { ::shutdown(pair[1], SHUT_RDWR); }
  CHECK_FALSE(tap.is_quiet());
  ::close(pair[0]);
  ::close(pair[1]);
}

#endif
