// Neither cpp-httplib nor OpenSSL: a transport must be given, and the default one says so.
#include "coordination.hpp"

int main() {
  coordination::HttpRequest request;
  request.endpoint = "http://127.0.0.1:2379";
  request.path = "/v3/kv/range";
  const auto answer = coordination::make_default_transport()->perform(request, {}, {});
  if (answer || answer.error().code != coordination::ErrorCode::Unavailable) return 1;

  auto c = coordination::Coordinator::in_memory();
  return c.config().list("") ? 0 : 2;
}
