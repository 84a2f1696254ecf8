// Logged in to a cluster where tokens live for seconds, users come, and passwords change.
#include <deque>

#include "etcds.hpp"
#include "load.hpp"

using namespace cluster;

namespace {

constexpr const char* kRootPassword = "root-password";

/// A cluster with authentication, and a user "app" who may do everything below /app/.
class GuardedCluster {
 public:
  GuardedCluster(const std::string& binary, const std::vector<std::string>& flags)
      : etcd_(options_with(binary, flags)) {
    if (!enable_auth(etcd_.server(0), "app", "secret", "/app/")) {
      throw std::runtime_error("no authentication");
    }
  }
  EtcdCluster& etcd() { return etcd_; }
  /// What the test itself does next, it does as root.
  void log_in() {
    const auto reply = etcd_.ask(etcd_.well().at(0), "/v3/auth/authenticate",
                                 {{"name", "root"}, {"password", kRootPassword}}, 5s);
    etcd_.set_token(reply.json.value("token", ""));
  }
  bool as_root(const std::string& path, const gateway::Json& body) {
    log_in();
    return etcd_.ask(etcd_.well().at(0), path, body, 5s).status == 200;
  }
  bool add_user() {  // while the leader changes, it may take two
    const auto added = [this] {
      const std::string name = "user" + std::to_string(++users_);
      return as_root("/v3/auth/user/add", {{"name", name}, {"password", "p"}});
    };
    return wait_until(added, 30s);
  }
  bool change_password(const std::string& password) {
    return as_root("/v3/auth/user/changepw", {{"name", "app"}, {"password", password}});
  }
  CoordinatorOptions options() {
    CoordinatorOptions options;
    for (std::size_t i = 0; i < etcd_.size(); ++i) options.endpoints.push_back(etcd_.endpoint(i));
    options.endpoints.erase(options.endpoints.begin());  // the default one
    options.username = "app";
    options.password = "secret";
    options.key_prefix = "/app";
    return options;
  }

 private:
  static ClusterOptions options_with(const std::string& binary, std::vector<std::string> flags) {
    ClusterOptions options;
    options.binary = binary;
    options.flags = std::move(flags);
    options.flags.push_back("--bcrypt-cost=4");  // logging in costs etcd no time
    return options;
  }

  EtcdCluster etcd_;
  int users_{0};
};

/// Calls of all kinds in a row, and those that failed.
class Calls {
 public:
  explicit Calls(Coordinator& coordinator) : c_(coordinator) {
    c_.config().set("watched", "0").value();
    watch_ = std::make_unique<Watch<ConfigEvent>>(c_.config().watch("watched").value());
    lock_ = std::make_unique<Lock>(c_.lock().acquire("kept", 15s).value());
    c_.registry().register_service({"id", "svc", "127.0.0.1", 80, {}, 15s}).value();
    loops_.add(20ms, [this] { count("get", c_.config().get("watched")); });
    loops_.add(20ms, [this] { set_and_hear(); });
    loops_.add(50ms, [this] { take_and_give_back(); });
    loops_.add(50ms, [this] { count("discover", c_.registry().discover("svc")); });
    loops_.add(50ms, [this] { count("new watch", c_.config().watch("other")); });
  }
  /// A member dies: what becomes of a write that is in flight nobody can know.
  void expect_doubts(bool on) { doubts_ = on; }
  void stop() { loops_.stop(); }
  bool lock_held() const { return lock_->held(); }
  int done() const { return done_; }
  std::vector<std::string> failures() const { return failures_.all(); }

 private:
  template <class T>
  bool count(const char* what, const Result<T>& result) {
    ++done_;
    if (result) return true;
    const bool in_doubt = result.error().outcome == Outcome::MaybeApplied;
    if (!in_doubt || !doubts_) failures_.add(std::string(what) + ": " + why(result));
    return false;
  }
  /// Sets a value and waits until its own watch tells it.
  void set_and_hear() {
    const nlohmann::json value = std::to_string(++value_);
    if (!count("set", c_.config().set("watched", value))) return;
    const auto ctx = Context::with_timeout(10s);
    for (;;) {
      const auto event = watch_->next(ctx);
      if (!count("watch", event) || event->value == value) return;
    }
  }
  void take_and_give_back() {
    auto lock = c_.lock().acquire("taken", 5s, Context::with_timeout(10s));
    if (count("acquire", lock)) count("unlock", lock->unlock());
  }

  Coordinator& c_;
  std::unique_ptr<Watch<ConfigEvent>> watch_;
  std::unique_ptr<Lock> lock_;
  std::atomic<bool> doubts_{false};
  std::atomic<int> done_{0};
  int value_{0};
  Journal<std::string> failures_;
  Loops loops_;  // the last: it ends before what it uses
};

/// Users are added all the time, and the leader changes, once in good order and once by its death.
class Trial {
 public:
  Trial(const std::string& binary, const std::string& flag)
      : flag_(flag), guarded_(binary, {flag}), coordinator_(connect(guarded_.options())),
        calls_(coordinator_) {}

  void at(int second, int of) {
    EtcdCluster& etcd = guarded_.etcd();
    CHECK(guarded_.add_user());
    if (second == of / 4) CHECK(etcd.hand_over((etcd.leader() + 1) % 3));
    if (second == of / 2) {
      const std::size_t leader = etcd.leader();
      REQUIRE(leader < etcd.size());
      calls_.expect_doubts(true);
      etcd.kill(leader);
      etcd.restart(leader);
    }
    if (second == of / 2 + 6) calls_.expect_doubts(false);  // the default timeout, and a bit
  }
  void judge(int seconds) {
    calls_.stop();
    CHECK(calls_.lock_held());
    const auto failures = calls_.failures();
    for (std::size_t i = 0; i < std::min<std::size_t>(3, failures.size()); ++i) {
      MESSAGE(flag_ << ": " << failures[i]);
    }
    CHECK(failures.empty());
    CHECK(calls_.done() > 5 * seconds);
  }

 private:
  const std::string flag_;
  GuardedCluster guarded_;
  Coordinator coordinator_;
  Calls calls_;
};

/// The flag for signed tokens of three seconds; "" if there is no openssl that makes keys.
std::string signed_tokens(const TempDir& folder) {
  const std::string key = folder.file("key.pem"), pub = folder.file("pub.pem");
  if (find_program("openssl").empty() || !run({"openssl", "genrsa", "-out", key, "2048"}).ok() ||
      !run({"openssl", "rsa", "-in", key, "-pubout", "-out", pub}).ok()) {
    return "";
  }
  return "--auth-token=jwt,pub-key=" + pub + ",priv-key=" + key + ",sign-method=RS256,ttl=3s";
}

}  // namespace

TEST_CASE("tokens of two and three seconds, users being added, the leader dies: no call fails") {
  const TempDir folder;
  std::vector<std::string> flags{"--auth-token-ttl=2", signed_tokens(folder)};
  if (flags.back().empty()) {
    MESSAGE("SKIPPED: signed tokens: no openssl that makes keys");
    flags.pop_back();
  }
  const int seconds = is_long() ? 60 : 14;
  for (const auto& binary : binaries()) {
    std::deque<Trial> trials;  // at the same time
    for (const auto& flag : flags) trials.emplace_back(binary, flag);
    for (int second = 0; second < seconds; ++second) {
      const Stopwatch begun;
      for (auto& trial : trials) trial.at(second, seconds);
      std::this_thread::sleep_for(std::max(0ms, 1000ms - begun.elapsed()));
    }
    for (auto& trial : trials) trial.judge(seconds);
  }
}

TEST_CASE("a password is changed: locks that are held stay held") {
  for (const auto& binary : binaries()) {
    GuardedCluster guarded(binary, {});
    auto coordinator = connect(guarded.options());
    auto lock = coordinator.lock().acquire("held", 5s).value();
    auto office = coordinator.election().campaign("office", "us", 5s).value();
    // Newer releases of etcd want a live token of who renews: there nothing can be kept.
    guarded.etcd().set_token("");
    const auto renewal = guarded.etcd().ask(0, "/v3/lease/keepalive", {{"ID", "1"}});
    const bool renews_for_all = renewal.status == 200;
    REQUIRE(guarded.change_password("new"));
    const auto read = coordinator.config().get("any");
    REQUIRE_FALSE(read);
    CHECK(read.error().code == ErrorCode::PermissionDenied);
    std::this_thread::sleep_for(is_long() ? 20s : 11s);  // more than two TTLs
    guarded.log_in();
    const auto key_is_there = [&](const std::string& key) {
      return guarded.etcd().gateway(0).get(key).json.contains("kvs");
    };
    CHECK(lock.held() == renews_for_all);
    CHECK(office.held() == renews_for_all);
    CHECK(key_is_there(lock.key()) == renews_for_all);
    CHECK(key_is_there(office.key()) == renews_for_all);
    REQUIRE(guarded.change_password("secret"));
    const auto works_again = [&] { return bool(coordinator.config().set("any", 1)); };
    CHECK(wait_until(works_again, 30s));
    CHECK(lock.held() == renews_for_all);
  }
}
