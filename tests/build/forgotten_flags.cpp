// Without the flags of a cpp-httplib that was compiled with OpenSSL: an error, and no crash.
#include <cstring>

#include "coordination.hpp"

int main() {
  coordination::CoordinatorOptions options;
  options.endpoints = {"127.0.0.1:1"};
  options.timeout = coordination::milliseconds(300);
  const auto made = coordination::Coordinator::connect(options);
  if (made) return 1;
  const auto& error = made.error();
  std::fprintf(stderr, "%s\n", to_string(error).c_str());
  const bool said = error.cause.find("CPPHTTPLIB_OPENSSL_SUPPORT") != std::string::npos;
  return said && error.code == coordination::ErrorCode::Validation ? 0 : 2;
}
