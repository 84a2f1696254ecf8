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

/// A server that has its answer ready, and notes what each call of send() brings.
class ReadyConnection : public coordination::detail::Connection {
 public:
  explicit ReadyConnection(std::string answer) : answer_(std::move(answer)) {}

  std::vector<std::string> sent;

 private:
  int receive(char* to, std::size_t size) override {
    const auto n = answer_.copy(to, size);
    answer_.erase(0, n);
    return static_cast<int>(n);
  }
  int send(const char* from, std::size_t size) override {
    sent.emplace_back(from, size);
    return static_cast<int>(size);
  }

  std::string answer_;
};

httplib::Response exchange(ReadyConnection& connection, const std::string& body) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  coordination::detail::HttpStream stream(connection, deadline, {}, 65536);
  coordination::detail::HttpEngine engine;
  httplib::Request request;
  request.method = "POST", request.path = "/", request.body = body;
  httplib::Response response;
  auto error = httplib::Error::Success;
  CHECK(engine.process_request(stream, request, response, false, error));
  CHECK(stream.drained());
  CHECK(stream.sent());
  return response;
}

}  // namespace

TEST_CASE("connection: a small request goes as one, a large one is not copied") {
  for (const std::size_t size : {5U, 1000U, 1000000U}) {
    CAPTURE(size);
    ReadyConnection connection("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
    const std::string body(size, 'x');
    CHECK(exchange(connection, body).body == "hi");
    std::string all;
    for (const auto& piece : connection.sent) all += piece;
    CHECK(connection.sent.size() == (size > 16384 ? 2 : 1));
    REQUIRE(all.size() > body.size());
    CHECK(all.substr(all.size() - body.size() - 4) == "\r\n\r\n" + body);
  }
}

TEST_CASE("connection: of a head only what is needed to read the body is handed on") {
  ReadyConnection connection(
      "HTTP/1.1 200 Fine\r\nDate: today\r\ntransfer-ENCODING: chunked\r\nX: 1\r\n"
      "Content-Lengthy: 3\r\nConnection: close\r\n\r\n2\r\nhi\r\n0\r\n\r\n");
  const auto response = exchange(connection, "?");
  CHECK(response.status == 200);
  CHECK(response.body == "hi");
  std::set<std::string> names;
  for (const auto& header : response.headers) names.insert(header.first);
  CHECK(names == std::set<std::string>{"Connection", "transfer-ENCODING"});
}

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
