// Whom the conformance tests are run on, and in what these are known to differ.
//
// Always: MemoryEtcd, by itself and behind coordctl's dev-server, and the etcd that is installed,
// also by libcurl. And those that COORDINATION_ETCDS names (paths separated by ':'), see
// tools/fetch_etcd.sh.
#pragma once

#include <doctest/doctest.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "gateway.hpp"
#include "support/etcd_cluster.hpp"
#include "support/wait.hpp"
#include "tools/coordctl/dev_server.hpp"

#if COORDINATION_TEST_CURL
#include "examples/curl_transport.hpp"
#endif

namespace conformance {

using namespace std::chrono_literals;
using gateway::b64;
using gateway::create_request;
using gateway::Gateway;
using gateway::Json;
using gateway::Jsons;
using gateway::number;
using gateway::Reply;
using gateway::revision_of;
using gateway::unb64;
using gateway::WatchCall;
using std::chrono::milliseconds;

/// 3.4.23 = 30423.
constexpr int version(int major, int minor, int patch) {
  return major * 10000 + minor * 100 + patch;
}
/// What MemoryEtcd says it is.
constexpr int kMemoryVersion = version(3, 5, 30);

/// In what etcds differ from each other and MemoryEtcd from them.
enum class Quirk {
  V1Errors,
  PreconditionIs412,
  NotFoundIsText,
  UnknownEnumRefused,
  LeasesNeedNoToken,
  KeysNeedNoToken,
  NestedTxnUnchecked,
  TokenRefusedWhileOff,
  ProgressWithoutWatcher,
  NegativeStartCompacts,
  CompactionEatsDelete,
  StatusForAllUsers,
  TxnRefusedByFirst,
  LeaseBeforeKeyInTxn,
  KeysOnlyHasNoLease,
  TimeoutIsUnknown,
};

/// Which etcds are so. MemoryEtcd never is.
struct Which {
  int first, last;
  bool of_gateway_v1;  // whatever the version

  bool holds(int version, bool gateway_v1) const {
    return of_gateway_v1 ? gateway_v1 : version >= first && version <= last;
  }
};
constexpr Which until(int major, int minor, int patch) {
  return {0, version(major, minor, patch), false};
}
constexpr Which since(int major, int minor, int patch) {
  return {version(major, minor, patch), version(99, 0, 0), false};
}
/// It is in etcd 3.4 and in the project's own builds of 3.5; Debian links its 3.5 with v2, which
/// everybody's 3.6 has.
constexpr Which kGatewayV1{0, 0, true};

struct Difference {
  Quirk quirk;
  Which which;
  const char* reason;
};

// The one table of differences. It was measured with 3.4.23, 3.5.16, 3.5.30, 3.5.35, 3.6.16 and
// 3.7.3: where a limit is 3.5.29, the change came somewhere after 3.5.23, and in 3.6 after 3.6.8.
inline const Difference kDifferences[] = {
    {Quirk::V1Errors, kGatewayV1, "gateway v1 also puts the message into `error`"},
    {Quirk::PreconditionIs412, until(3, 4, 99),
     "the gateway of 3.4 maps FailedPrecondition to 412, later ones to 400"},
    {Quirk::NotFoundIsText, kGatewayV1,
     "gateway v1 answers an unknown path in plain text, v2 in JSON"},
    {Quirk::UnknownEnumRefused, kGatewayV1,
     "gateway v1 refuses an unknown enum name, v2 takes it for the first one"},
    {Quirk::LeasesNeedNoToken, until(3, 5, 29),
     "lease, maintenance and compaction calls did not ask for a token"},
    {Quirk::KeysNeedNoToken, until(3, 4, 99), "3.4 tells anybody the keys of a lease"},
    {Quirk::NestedTxnUnchecked, until(3, 5, 29),
     "permissions were not looked for inside a nested txn"},
    {Quirk::TokenRefusedWhileOff, until(3, 4, 99),
     "3.4 refuses a token while authentication is off, 3.5 ignores it"},
    {Quirk::ProgressWithoutWatcher, until(3, 4, 99),
     "3.5 answers a progress request only if there is a watcher, and none is catching up"},
    {Quirk::NegativeStartCompacts, until(3, 5, 29),
     "a negative start_revision was taken for a compacted one, and is refused now"},
    {Quirk::CompactionEatsDelete, until(3, 5, 15),
     "compaction at the very revision of a delete dropped its event (etcd issue 18089); 3.5.16 is "
     "the oldest without it that was tried"},
    {Quirk::StatusForAllUsers, since(3, 5, 31),
     "3.5.30 told its status to root only, the next ones to whoever has logged in"},
    {Quirk::TxnRefusedByFirst, since(3, 6, 0),
     "a txn with several faults was refused for its puts before its ranges; now for the first"},
    {Quirk::LeaseBeforeKeyInTxn, since(3, 7, 0),
     "a put in a txn was looked at for its key first, and is for its lease now, as by itself"},
    {Quirk::KeysOnlyHasNoLease, since(3, 7, 0),
     "keys_only is answered from the index, which knows nothing of leases"},
    {Quirk::TimeoutIsUnknown, until(3, 4, 99),
     "3.4 gives the end of some requests' time as code 2, later ones as DeadlineExceeded"},
};

/// A member without a leader, and what it lives on.
struct Leaderless {
  Gateway gateway;
  std::shared_ptr<void> owner;
};

/// One etcd under test.
class Subject {
 public:
  virtual ~Subject() = default;

  Subject(std::string name, int number, bool is_memory)
      : name_(std::move(name)), version_(number), is_memory_(is_memory) {}
  const std::string& name() const { return name_; }
  int version() const { return version_; }
  bool is_memory() const { return is_memory_; }

  bool has(Quirk quirk) const {
    for (const Difference& row : kDifferences) {
      if (row.quirk != quirk) continue;
      return !is_memory_ && row.which.holds(version_, gateway_v1_);
    }
    FAIL("a quirk that is not in the table");
    return false;
  }

  virtual Gateway gateway() = 0;
  /// Another of the same kind, with nothing in it; `flags` are for real ones.
  virtual std::unique_ptr<Subject> fresh(const std::vector<std::string>& flags = {}) = 0;
  /// Another, which has been given the lease 50, and has lost its leader.
  virtual Leaderless leaderless() = 0;
  /// Switches authentication on: root with the password "root-password", and a user who may do
  /// anything under `prefix`.
  virtual void enable_auth(const std::string& user, const std::string& password,
                           const std::string& prefix) = 0;
  /// Lets time pass for what counts it by itself. With a real etcd, wait for what shall happen.
  virtual void let_pass(milliseconds time) = 0;

  /// A key prefix and a lease id that no other test uses.
  std::string prefix() { return "t" + std::to_string(++count_) + "/"; }
  std::int64_t lease_id() { return 1000 + ++count_; }

 protected:
  void set_gateway_v1(bool is_v1) { gateway_v1_ = is_v1; }

 private:
  std::string name_;
  int version_;
  bool is_memory_;
  bool gateway_v1_{false};
  std::int64_t count_{0};
};

class MemorySubject : public Subject {
 public:
  explicit MemorySubject(const std::string& name = "MemoryEtcd")
      : Subject(name, kMemoryVersion, true) {}
  Gateway gateway() override { return {etcd_, "http://memory:2379"}; }
  std::unique_ptr<Subject> fresh(const std::vector<std::string>&) override {
    return std::make_unique<MemorySubject>();
  }
  Leaderless leaderless() override {
    const auto other = std::make_shared<coordination::MemoryEtcd>();
    const Gateway g(other, "http://memory:2379");
    g.grant(50, 600);
    other->no_leader(1000);
    return {g, other};
  }
  void enable_auth(const std::string& user, const std::string& password,
                   const std::string& prefix) override {
    etcd_->enable_auth("root-password");
    etcd_->add_user(user, password, prefix);
  }
  void let_pass(milliseconds time) override { etcd_->advance(time); }

 protected:
  std::shared_ptr<coordination::MemoryEtcd> etcd_ = coordination::MemoryEtcd::manual_clock();
};

#if COORDINATION_USE_HTTPLIB
/// A MemoryEtcd over HTTP.
class ServedSubject : public MemorySubject {
 public:
  ServedSubject() : MemorySubject("dev-server") {}
  Gateway gateway() override { return served_->gateway(transport_); }
  std::unique_ptr<Subject> fresh(const std::vector<std::string>&) override {
    return std::make_unique<ServedSubject>();
  }
  Leaderless leaderless() override {
    const auto other = std::make_shared<coordination::MemoryEtcd>();
    const auto served = std::make_shared<Served>(other);
    const Gateway g = served->gateway(transport_);
    g.grant(50, 600);
    other->no_leader(1000);
    return {g, served};
  }

 private:
  struct Served {
    explicit Served(const std::shared_ptr<coordination::MemoryEtcd>& etcd)
        : server(etcd, "127.0.0.1", 0) {}
    Gateway gateway(const std::shared_ptr<coordination::Transport>& transport) const {
      return {transport, "http://127.0.0.1:" + std::to_string(server.port())};
    }
    coordctl::DevServer server;
  };

  std::shared_ptr<coordination::Transport> transport_ = coordination::make_default_transport();
  std::shared_ptr<Served> served_ = std::make_shared<Served>(etcd_);
};
#endif

class RealSubject : public Subject {
 public:
  using Transport = std::shared_ptr<coordination::Transport>;

  RealSubject(std::string binary, int number, const std::vector<std::string>& flags = {},
              Transport transport = coordination::make_default_transport(),
              const std::string& by = "")
      : Subject("etcd " + text(number) + by, number, false), binary_(std::move(binary)),
        server_(options(binary_, flags)), transport_(std::move(transport)) {
    set_gateway_v1(RealSubject::gateway().range(Json::object()).json.contains("error"));
  }
  Gateway gateway() override { return {transport_, server_.url()}; }
  std::unique_ptr<Subject> fresh(const std::vector<std::string>& flags) override {
    return std::make_unique<RealSubject>(binary_, version(), flags, transport_);
  }
  Leaderless leaderless() override {
    support::ClusterOptions options;
    options.binary = binary_;
    const auto cluster = std::make_shared<support::EtcdCluster>(options);
    const Gateway g = cluster->gateway(2);
    REQUIRE(g.grant(50, 600).status == 200);
    cluster->kill(0);
    cluster->kill(1);
    const Gateway asking = g.with_header("Grpc-Metadata-hasleader", "true");
    // Not by what needs a quorum: that would wait with those who still believe in the leader.
    const Json local = {{"key", b64("a")}, {"serializable", true}};
    REQUIRE(support::wait_until([&] { return asking.range(local).status == 503; }, 30s));
    return {g, cluster};
  }
  void enable_auth(const std::string& user, const std::string& password,
                   const std::string& prefix) override {
    const Gateway g = gateway();
    const auto must = [&](const char* path, const Json& body) {
      const Reply reply = g.call(path, body);
      const bool exists = reply.message().find("already exists") != std::string::npos;
      REQUIRE_MESSAGE((reply.status == 200 || exists), path << ": " << reply.body);
    };
    for (const auto& [name, secret] :
         {std::pair<std::string, std::string>{"root", "root-password"}, {user, password}}) {
      must("/v3/auth/user/add", {{"name", name}, {"password", secret}});
      must("/v3/auth/role/add", {{"name", name}});
      must("/v3/auth/user/grant", {{"user", name}, {"role", name}});
    }
    const Json range = {{"permType", "READWRITE"},
                        {"key", b64(prefix)},
                        {"range_end", b64(coordination::prefix_range_end(prefix))}};
    must("/v3/auth/role/grant", {{"name", user}, {"perm", range}});
    must("/v3/auth/enable", Json::object());
  }
  void let_pass(milliseconds) override {}

 private:
  static support::EtcdOptions options(const std::string& binary,
                                      const std::vector<std::string>& flags) {
    support::EtcdOptions options;
    options.binary = binary;
    options.flags = flags;
    return options;
  }
  static std::string text(int number) {
    return std::to_string(number / 10000) + "." + std::to_string(number / 100 % 100) + "." +
           std::to_string(number % 100);
  }

  std::string binary_;
  support::EtcdServer server_;
  Transport transport_;
};

/// A binary and its version; 0 if it does not run.
struct Binary {
  std::string path;
  int version{0};
};

inline Binary look_at(const std::string& path) {
  const auto run = support::run({path, "--version"});
  int major = 0, minor = 0, patch = 0;
  if (std::sscanf(run.out.c_str(), "etcd Version: %d.%d.%d", &major, &minor, &patch) != 3) {
    return {path, 0};
  }
  return {path, version(major, minor, patch)};
}

/// The real etcds that are to be had.
inline std::vector<Binary> binaries() {
  std::vector<Binary> found;
#if COORDINATION_USE_HTTPLIB
  const std::string installed = support::etcd_program();
  if (!installed.empty()) found.push_back(look_at(installed));
  const char* more = std::getenv("COORDINATION_ETCDS");
  std::istringstream paths(more ? more : "");
  for (std::string path; std::getline(paths, path, ':');) {
    if (!path.empty()) found.push_back(look_at(path));
  }
#endif
  return found;
}

/// The first real one once more, by another Transport.
inline void add_by_libcurl([[maybe_unused]] std::vector<std::unique_ptr<Subject>>& list) {
#if COORDINATION_TEST_CURL
  for (const Binary& binary : binaries()) {
    list.push_back(std::make_unique<RealSubject>(binary.path, binary.version,
                                                 std::vector<std::string>(),
                                                 std::make_shared<CurlTransport>(), " by libcurl"));
    return;
  }
#endif
}

/// All of them; each is started once, at its first use.
inline const std::vector<std::unique_ptr<Subject>>& subjects() {
  static const std::vector<std::unique_ptr<Subject>> all = [] {
    std::vector<std::unique_ptr<Subject>> list;
    list.push_back(std::make_unique<MemorySubject>());
#if COORDINATION_USE_HTTPLIB
    list.push_back(std::make_unique<ServedSubject>());
#endif
    for (const Binary& binary : binaries()) {
      if (binary.version == 0) throw std::runtime_error("does not run: " + binary.path);
      list.push_back(std::make_unique<RealSubject>(binary.path, binary.version));
    }
    add_by_libcurl(list);
    return list;
  }();
  return all;
}

// CONFORMANCE("what etcd does") { ... etcd.gateway() ... } is run on every one of them.
#define CONFORMANCE_AS(function, title)                        \
  static void function(conformance::Subject&);                 \
  TEST_CASE(title) {                                           \
    for (const auto& subject : conformance::subjects()) {      \
      SUBCASE(subject->name().c_str()) { function(*subject); } \
    }                                                          \
  }                                                            \
  static void function([[maybe_unused]] conformance::Subject& etcd)
#define CONFORMANCE(title) CONFORMANCE_AS(DOCTEST_ANONYMOUS(conformance_case_), title)

/// An error of etcd's, in the shape of this version and no other.
inline void check_error(Subject& etcd, const Reply& reply, int status, int code,
                        const std::string& message) {
  CAPTURE(reply.body);
  CHECK(reply.status == (code == 9 && etcd.has(Quirk::PreconditionIs412) ? 412 : status));
  CHECK(reply.code() == code);
  CHECK(reply.message() == message);
  CHECK(reply.json.contains("error") == etcd.has(Quirk::V1Errors));
}

/// The same, as a line of a stream.
inline void check_error_line(Subject& etcd, const Json& line, int code,
                             const std::string& message) {
  CAPTURE(line);
  const Json& error = line["error"];
  CHECK(error[etcd.has(Quirk::V1Errors) ? "grpc_code" : "code"] == code);
  CHECK(error["message"] == message);
}

/// Keys of a range's answer.
inline std::vector<std::string> keys_of(const Reply& reply) {
  std::vector<std::string> keys;
  if (!reply.json.contains("kvs")) return keys;
  for (const Json& kv : reply.json["kvs"]) keys.push_back(unb64(kv["key"]));
  return keys;
}

inline Json prefix_range(const std::string& prefix, Json fields = Json::object()) {
  fields["key"] = b64(prefix);
  fields["range_end"] = b64(coordination::prefix_range_end(prefix));
  return fields;
}

inline bool is(const Json& object, const char* name) { return object.value(name, false); }

}  // namespace conformance
