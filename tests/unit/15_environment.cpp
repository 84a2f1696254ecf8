// Section 15: options from etcdctl's environment variables.
#include <doctest/doctest.h>

#include <cstdlib>
#include <map>
#include <string>

#include "coordination.hpp"

using namespace coordination;
using namespace std::chrono_literals;

namespace {

const std::string kPrefix = "ETCDCTL_";
const char* const kNames[] = {
    "ENDPOINTS",      "USER", "PASSWORD", "CACERT", "CERT", "KEY", "INSECURE_SKIP_TLS_VERIFY",
    "COMMAND_TIMEOUT"};

// What stands in the environment while `values` are all of etcdctl's variables that do.
CoordinatorOptions read_with(const std::map<std::string, std::string>& values) {
  for (const char* name : kNames) {
    const auto it = values.find(name);
    if (it == values.end()) {
      unsetenv((kPrefix + name).c_str());
    } else {
      setenv((kPrefix + name).c_str(), it->second.c_str(), 1);
    }
  }
  auto options = options_from_env();
  for (const char* name : kNames) unsetenv((kPrefix + name).c_str());
  return options;
}

milliseconds timeout_of(const std::string& text) {
  return read_with({{"COMMAND_TIMEOUT", text}}).timeout;
}

}  // namespace

TEST_CASE("environment: without variables, and with empty ones, the defaults") {
  const auto defaults = default_coordinator_options();
  std::map<std::string, std::string> empty;
  for (const char* name : kNames) empty[name] = "";
  for (const auto& options : {read_with({}), read_with(empty)}) {
    CHECK(options.endpoints == defaults.endpoints);
    CHECK(options.username.empty());
    CHECK(options.password.empty());
    CHECK(options.timeout == defaults.timeout);
    CHECK(options.tls.ca_file.empty());
    CHECK(options.tls.verify_server);
  }
}

TEST_CASE("environment: all of them") {
  const auto options = read_with({{"ENDPOINTS", "https://a:1, b:2"},
                                  {"USER", "app"},
                                  {"PASSWORD", "with:colon"},
                                  {"CACERT", "ca.pem"},
                                  {"CERT", "cert.pem"},
                                  {"KEY", "key.pem"},
                                  {"INSECURE_SKIP_TLS_VERIFY", "true"},
                                  {"COMMAND_TIMEOUT", "1m30s"}});
  CHECK(options.endpoints == std::vector<std::string>{"https://a:1", "b:2"});
  CHECK(options.username == "app");
  CHECK(options.password == "with:colon");
  CHECK(options.tls.ca_file == "ca.pem");
  CHECK(options.tls.cert_file == "cert.pem");
  CHECK(options.tls.key_file == "key.pem");
  CHECK_FALSE(options.tls.verify_server);
  CHECK(options.timeout == 90s);
  CHECK(validate(options));
}

TEST_CASE("environment: the user with the password, and the user alone") {
  const auto both = read_with({{"USER", "app:pass:word"}});
  CHECK(both.username == "app");
  CHECK(both.password == "pass:word");
  const auto alone = read_with({{"USER", "app"}});
  CHECK(alone.username == "app");
  CHECK(alone.password.empty());
  const auto apart = read_with({{"USER", "a:b"}, {"PASSWORD", "c"}});
  CHECK(apart.username == "a:b");
  CHECK(apart.password == "c");
}

TEST_CASE("environment: durations as Go writes them; others are refused by validate()") {
  CHECK(timeout_of("5s") == 5s);
  CHECK(timeout_of("250ms") == 250ms);
  CHECK(timeout_of("1.5s") == 1500ms);
  CHECK(timeout_of("1h0.5m10s") == 3640s);
  for (const char* wrong : {"5", "s", "5 s", "-5s", "5d", "1..5s", ".s", "0s"}) {
    CAPTURE(wrong);
    CHECK(timeout_of(wrong) == 0ms);
    CHECK(validate(read_with({{"COMMAND_TIMEOUT", wrong}})).error().code == ErrorCode::Validation);
  }
}
